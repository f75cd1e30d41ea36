# SPDX-License-Identifier: Apache-2.0

"""Scores survive the death of the process that computes them."""

import os
import random
import signal
import time

import datasets
import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from conftest import conversational_rows, make_llama, make_tokenizer
from datasets import Dataset, load_from_disk
from injection import NUM_FAULTS, without_room
from processes import end_of, finish, free_port, in_child, kill, start_ranks, wait_for

from trl_tfpo import annotate_token_rewards
from trl_tfpo.annotation import score_cache as shards
from trl_tfpo.annotation.scoring import score_completions
from trl_tfpo.faces import Faces


COLUMNS = ["scores"]
NUM_ROWS, SHARD_SIZE = 101, 8


def tokenized() -> Dataset:
    draw = random.Random(0)
    ids = [[draw.randrange(100) for _ in range(draw.randint(1, 9))] for _ in range(NUM_ROWS)]
    return Dataset.from_dict({"chosen_ids": ids, "text": ["x"] * NUM_ROWS})


def score(batch, log, seconds):
    """Scores that can be told apart, slowly; a line in the log for each shard that is computed."""
    time.sleep(seconds * len(batch["chosen_ids"]))
    with open(log, "a") as file:
        file.write("shard\n")
    return {"scores": [[sum(ids) / (position + 1) for position in range(len(ids))] for ids in batch["chosen_ids"]]}


def add_scores(folder, seconds: float, rank: int, num_processes: int, port: str) -> None:
    """What each process does."""
    datasets.config.HF_DATASETS_CACHE = folder
    shards.SHARD_SIZE = SHARD_SIZE
    if num_processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    PartialState._reset_state()
    PartialState(cpu=True)
    (folder / f"met-{rank}").touch()
    dataset = tokenized()
    scored = shards.add_scores(
        dataset,
        lambda batch, **_: score(batch, folder / "log", seconds),
        lengths=np.array([len(ids) for ids in dataset["chosen_ids"]]),
        key="test",
        columns=COLUMNS,
        desc="Scoring",
    )
    if rank == 0:
        torch.save(scored["scores"][:], folder / "result.tmp")
        os.replace(folder / "result.tmp", folder / "result.pt")


def start(folder, seconds: float, num_processes: int = 1) -> list[int]:
    """Processes that add scores."""
    port = free_port()
    return [in_child(add_scores, folder, seconds, rank, num_processes, port) for rank in range(num_processes)]


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.arrow"))}


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(tmp_path, num_processes, record_property):
    """Else a night of annotation would be lost to a preempted machine, or end in a file that is half written."""
    num_shards = -(-NUM_ROWS // SHARD_SIZE)
    calm, seconds = tmp_path / "calm", 0.002
    calm.mkdir()
    begin = time.monotonic()
    finish(start(calm, seconds, num_processes))
    duration = time.monotonic() - begin
    expected, result = files(calm), torch.load(calm / "result.pt")
    assert len(expected) == num_shards
    draw, num_unfinished = random.Random(num_processes), 0
    num_faults = max(NUM_FAULTS, 10)
    for attempt in range(num_faults):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        children = start(folder, seconds, num_processes)
        time.sleep(draw.uniform(0, duration))
        for child in children:
            kill(child)
        done = len(files(folder))
        num_unfinished += 0 < done < num_shards
        finish(start(folder, seconds, num_processes))
        assert files(folder) == expected
        assert torch.load(folder / "result.pt") == result
        computed = len((folder / "log").read_text().split())
        assert computed <= num_shards + num_processes  # of each process, the shard it was at
    assert num_unfinished >= 1  # or the test shows nothing
    record_property(f"annotation is killed, processes: {num_processes}", num_faults)


@pytest.mark.slow
def test_death_in_the_middle_of_a_shard(tmp_path, record_property):
    """Half a shard that is taken for a whole one would be rewards of other pairs."""
    (tmp_path / "calm").mkdir()
    finish(start(tmp_path / "calm", 0.0))
    expected, draw = files(tmp_path / "calm"), random.Random(0)
    for fault in range(NUM_FAULTS):
        folder = tmp_path / str(fault)
        folder.mkdir()
        num_bytes = draw.randrange(1, max(map(len, expected.values())))  # the largest does not fit
        child = in_child(without_room, signal.SIG_DFL, num_bytes, add_scores, folder, 0.0, 0, 1, "", said=os.devnull)
        assert os.WTERMSIG(end_of(child)) == signal.SIGXFSZ
        assert files(folder).items() <= expected.items()
        finish(start(folder, 0.0))
        assert files(folder) == expected
        assert len((folder / "log").read_text().split()) <= len(expected) + 1
    record_property("death while a shard is written", NUM_FAULTS)


@pytest.mark.slow
def test_a_process_that_dies_does_not_leave_the_other_waiting(tmp_path, record_property):
    """A rank that waits for one that is dead holds eight GPUs until somebody looks."""
    (tmp_path / "calm").mkdir()
    finish(start(tmp_path / "calm", 0.0, num_processes=2))
    draw = random.Random(0)
    for fault in range(NUM_FAULTS):
        folder = tmp_path / str(fault)
        folder.mkdir()
        children = start(folder, 0.02, num_processes=2)  # a second at least
        victim = children.pop(draw.randrange(2))
        wait_for([folder / "met-0", folder / "met-1"])  # until then it is for the launcher to end the others
        time.sleep(draw.uniform(0.0, 0.8))
        kill(victim)
        assert end_of(children[0]) != 0  # and it does end
        finish(start(folder, 0.0, num_processes=2))
        assert files(folder) == files(tmp_path / "calm")
    record_property("one of two processes of an annotation is killed", NUM_FAULTS)


def test_one_process_goes_on_where_two_were(tmp_path):
    """Else a run could only go on with as many processes as it began with."""
    children = start(tmp_path, 0.01, num_processes=2)
    while len(files(tmp_path)) < 4:
        time.sleep(0.01)
    for child in children:
        kill(child)
    finish(start(tmp_path, 0.0))
    assert len((tmp_path / "log").read_text().split()) <= -(-NUM_ROWS // SHARD_SIZE) + 2


def annotate_in(folder, num_rows):
    """Annotate in one process, or as one of several; the scores go to a file for each process."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    AcceleratorState._reset_state(reset_partial_state=True)
    state = PartialState(cpu=True)
    rows, faces = Dataset.from_list(conversational_rows(num_rows)), Faces(positive="you are kind", negative="rude")
    annotated = annotate_token_rewards(rows, make_llama(1, 32), make_tokenizer(), faces=faces)
    annotated.save_to_disk(folder / f"of-{state.process_index}")


@pytest.mark.parametrize("num_rows", [23, 1])  # of a single row, one process has none to score
def test_processes_share_the_scoring(tmp_path, num_rows):
    """Each process scores its share of the rows, and gets the scores of all, in order."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    finish([in_child(annotate_in, one, num_rows), *start_ranks(two, annotate_in, two, num_rows)])
    expected = load_from_disk(one / "of-0")
    assert len(expected) == num_rows
    for rank in range(2):
        found = load_from_disk(two / f"of-{rank}")
        assert found.column_names == expected.column_names
        assert found["chosen_ids"][:] == expected["chosen_ids"][:]
        for gaps, others in zip(found["chosen_gaps"], expected["chosen_gaps"], strict=True):
            assert gaps == pytest.approx(others, abs=1e-5)


def test_what_is_done_is_not_done_again(patient, tokenizer, tmp_path, monkeypatch):
    """Else every start of a training run would read the whole dataset with the patient."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    forwards, faces = [], Faces(positive="you are kind", negative="you are rude")
    patient.register_forward_hook(lambda *_: forwards.append(1))

    def annotate(rows, **settings):
        forwards.clear()
        return annotate_token_rewards(Dataset.from_list(rows), patient, tokenizer, faces=faces, **settings)

    rows = conversational_rows(20)
    first, again = annotate(rows), None
    assert forwards
    again = annotate([row | {"id": index} for index, row in enumerate(rows)])  # the same texts in another dataset
    assert not forwards and again["chosen_gaps"][:] == first["chosen_gaps"][:]
    for change in (dict(max_length=12), dict(reward_direction="label")):
        annotate(rows, **change)
        assert forwards, change
    annotate(rows[1:])
    assert forwards
    with torch.no_grad():
        patient.lm_head.weight[3] += 1
    annotate(rows)
    assert forwards


def test_a_killed_run_of_a_small_dataset_is_not_lost(patient, tokenizer, tmp_path, monkeypatch):
    """A first try on a hundred pairs takes minutes on a laptop; whoever stops it should not wait for them again."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    faces, num_pairs, forwards = Faces(positive="you are kind", negative="you are rude"), 60, []
    dataset = Dataset.from_list(conversational_rows(num_pairs))

    def die(*_):
        forwards.append(1)
        if len(forwards) == 15:
            raise KeyboardInterrupt

    hook = patient.register_forward_hook(die)
    with pytest.raises(KeyboardInterrupt):
        annotate_token_rewards(dataset, patient, tokenizer, faces=faces, batch_size=8)
    kept = len(files(tmp_path))
    assert 1 <= kept < num_pairs / shards.SHARD_SIZE
    hook.remove()
    num_scored = []

    def score(model, prompt_ids, completion_ids, **settings):
        num_scored.append(len(completion_ids))
        return score_completions(model, prompt_ids, completion_ids, **settings)

    monkeypatch.setattr("trl_tfpo.annotation.token_rewards.score_completions", score)
    annotate_token_rewards(dataset, patient, tokenizer, faces=faces, batch_size=8)
    assert sum(num_scored) == 4 * (num_pairs - kept * shards.SHARD_SIZE)  # two completions under two faces


def test_scores_are_those_of_their_pairs_whatever_the_order(tmp_path, monkeypatch):
    """Shards are sorted by length; one permutation that is not taken back gives every pair the rewards of another."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(shards, "SHARD_SIZE", 3)
    monkeypatch.setattr(shards, "SHARDS_IN_WINDOW", 4)
    dataset, told = tokenized(), []

    def function(batch, on_progress):
        told.append(max(map(len, batch["chosen_ids"])) - min(map(len, batch["chosen_ids"])))
        return {"scores": [[float(token) for token in ids] for ids in batch["chosen_ids"]]}

    lengths = np.array([len(ids) for ids in dataset["chosen_ids"]])
    scored = shards.add_scores(
        dataset.with_format("torch"), function, lengths=lengths, key="test", columns=COLUMNS, desc="Scoring"
    )
    assert scored.with_format(None)["scores"][:] == scored.with_format(None)["chosen_ids"][:]
    assert np.mean(told) < np.mean([np.ptp(lengths[i : i + 3]) for i in range(0, NUM_ROWS, 3)]) / 2  # alike in a shard


def test_progress_moves_with_each_forward_pass(patient, tokenizer, monkeypatch):
    """A bar that stands still for minutes looks like a hang."""
    moves = []
    monkeypatch.setattr(shards.Progress, "update", lambda self, amount, **_: moves.append(amount))
    faces = Faces(positive="you are kind", negative="you are rude")
    datasets.disable_caching()
    try:
        dataset = Dataset.from_list(conversational_rows(16))
        annotate_token_rewards(dataset, patient, tokenizer, faces=faces, batch_size=8)
    finally:
        datasets.enable_caching()
    assert sum(moves) == pytest.approx(16) and len([x for x in moves if x > 1e-6]) == 4  # passes
