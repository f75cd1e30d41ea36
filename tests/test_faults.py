# SPDX-License-Identifier: Apache-2.0

"""
Death, damage and a full disk, at random moments: the same command again ends as if nothing had happened.

`TRL_TFPO_FAULTS` is the number of random faults that each test injects; `make test-reliability` raises it.
"""

import math
import os
import random
import shutil
import signal
import time

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import FACES, conversational_rows, make_llama, make_tokenizer, save_model
from datasets import Dataset, load_from_disk
from injection import NUM_FAULTS, on_read_only, strike, without_room
from processes import PATIENCE, end_of, fails, finish, in_child, kill, start_ranks, wait_for
from safetensors.torch import load_file

from trl_tfpo import TFPOConfig, TFPOTrainer, TokenRewardCollator, annotate_token_rewards
from trl_tfpo.annotation.score_cache import SHARD_SIZE
from trl_tfpo.cli import main
from trl_tfpo.training.checkpoints import CONTENTS_FILE, check_checkpoint, mark_complete, resolve_checkpoint


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def annotated():
    rows = Dataset.from_list(conversational_rows(16))
    return annotate_token_rewards(rows, make_llama(1, 32), make_tokenizer(), faces=FACES)


def make_trainer(annotated, output_dir, data_collator=None, **settings):
    settings = dict(max_steps=12, save_strategy="steps", save_steps=2, save_total_limit=2) | settings
    return TFPOTrainer(
        model=make_llama(2),
        data_collator=data_collator,
        args=TFPOConfig(
            str(output_dir),
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **settings,
        ),
        train_dataset=annotated,
        processing_class=make_tokenizer(),
    )


def train(annotated, output_dir, **settings):
    """What a command for a machine that may be taken away does: the same whether it begins or goes on."""
    trainer = make_trainer(annotated, output_dir, **settings)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()


def outcome(output_dir) -> dict[str, torch.Tensor]:
    """Weights, and the state of the optimizer."""
    optimizer = torch.load(output_dir / "checkpoint-12" / "optimizer.pt", weights_only=True)
    moments = {f"{index} {name}": x for index, state in optimizer["state"].items() for name, x in state.items()}
    return load_file(output_dir / "model.safetensors") | moments


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.equal(found[name]), name


@pytest.fixture(scope="module")
def undisturbed(annotated, tmp_path_factory):
    """A folder that nothing happened to, and how long that takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    begin = time.monotonic()
    finish([in_child(train, annotated, folder)])
    return folder, time.monotonic() - begin


def test_a_training_that_is_killed_ends_with_the_same_weights(annotated, undisturbed, tmp_path, record_property):
    """Machines are taken away: at any moment, also while a checkpoint is written, and more than once."""
    expected, duration = outcome(undisturbed[0]), undisturbed[1]
    largest = max(path.stat().st_size for path in undisturbed[0].rglob("*"))
    draw, num_resumed, num_killed = random.Random(0), 0, 0
    for fault in range(NUM_FAULTS):
        folder = tmp_path / str(fault)
        for _ in range(1 + fault % 2):
            if fault % 2:
                num_killed += kill_in_a_checkpoint(draw, annotated, folder)
            else:
                num_killed += strike(draw, duration, largest, train, annotated, folder)
        num_resumed += resolve_checkpoint(True, folder) is not None
        finish([in_child(train, annotated, folder)])
        assert_equal(outcome(folder), expected)
    assert num_resumed >= 1 and num_killed >= NUM_FAULTS / 2  # or the test shows nothing
    record_property("training is killed, half the time while a checkpoint is written", num_killed)


def kill_in_a_checkpoint(draw, annotated, folder) -> bool:
    """Whether it died: at a random moment after a checkpoint has been begun."""
    child, number = in_child(train, annotated, folder), 2 * draw.randint(1, 6)
    deadline = time.monotonic() + PATIENCE
    while not (folder / f"checkpoint-{number}").exists() and time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False  # ended before
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_damaged_checkpoint_is_not_read(undisturbed, tmp_path, record_property):
    """Half an optimizer trains on without a word, and so does one of another step."""
    num_damaged = 0
    for name in [path.name for path in (undisturbed[0] / "checkpoint-12").iterdir()]:
        for damage in ("cut", "emptied", "gone"):
            folder = tmp_path / f"{num_damaged}"
            shutil.copytree(undisturbed[0], folder)
            victim = folder / "checkpoint-12" / name
            if victim.is_dir():
                victim = next(victim.iterdir())
            if damage == "gone":
                victim.unlink()
            else:
                with open(victim, "r+b") as file:
                    file.truncate(victim.stat().st_size // 2 if damage == "cut" else 0)
            assert resolve_checkpoint(True, folder) == str(folder / "checkpoint-10"), (name, damage)
            with pytest.raises(ValueError, match="checkpoint must"):
                check_checkpoint(folder / "checkpoint-12")
            num_damaged += 1
            shutil.rmtree(folder)
    assert num_damaged >= 30
    record_property("a file of a checkpoint is cut, emptied or gone", num_damaged)


def test_checkpoints_of_later_versions_are_refused(undisturbed, tmp_path):
    """What a later version means by its files this one cannot know."""
    shutil.copytree(undisturbed[0] / "checkpoint-12", tmp_path / "checkpoint-12")
    contents = tmp_path / "checkpoint-12" / CONTENTS_FILE
    contents.write_text(contents.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="must have format 1. Got format 2; use the version"):
        check_checkpoint(tmp_path / "checkpoint-12")


def test_nothing_older_is_deleted_before_a_checkpoint_is_whole(annotated, tmp_path, monkeypatch):
    """With room for one checkpoint, a death between the deletion and the end of the write would leave none."""
    seen = []

    def marked(folder):
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        mark_complete(folder)

    monkeypatch.setattr("trl_tfpo.training.checkpoints.mark_complete", marked)
    make_trainer(annotated, tmp_path, save_total_limit=1, max_steps=4).train()
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def annotate(cache):
    datasets.config.HF_DATASETS_CACHE = cache
    rows = Dataset.from_list(conversational_rows(300))
    return annotate_token_rewards(rows, make_llama(1), make_tokenizer(), faces=FACES)


def test_damaged_shards_are_scored_again(tmp_path, monkeypatch, record_property):
    """Half a shard would be rewards of other pairs, or the end of every later run."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    expected = annotate(tmp_path)["chosen_token_rewards"][:]
    shards = sorted(tmp_path.rglob("0*.arrow"))
    before, draw = [shard.read_bytes() for shard in shards], random.Random(0)
    assert len(shards) == math.ceil(300 / SHARD_SIZE)
    for _ in range(NUM_FAULTS):
        victim = draw.choice(shards)
        with open(victim, "r+b") as file:
            file.truncate(draw.randrange(victim.stat().st_size))
        assert annotate(tmp_path)["chosen_token_rewards"][:] == expected
        assert [shard.read_bytes() for shard in shards] == before
    record_property("a shard is cut at a random byte", NUM_FAULTS)


@pytest.mark.parametrize("num_bytes", [10, 3_000])
def test_a_full_disk_loses_nothing(annotated, undisturbed, tmp_path, num_bytes, record_property):
    """It fails, says so, and goes on where it was once there is room."""
    full = (without_room, signal.SIG_IGN, num_bytes)  # to a program a full disk: no file grows beyond so many bytes
    assert "File too large" in fails(*full, train, annotated, tmp_path / "run")
    assert resolve_checkpoint(True, tmp_path / "run") is None
    finish([in_child(train, annotated, tmp_path / "run")])
    assert_equal(outcome(tmp_path / "run"), outcome(undisturbed[0]))

    (tmp_path / "cache").mkdir()
    assert "File too large" in fails(*full, annotate, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("0*.arrow"))
    assert len(annotate(tmp_path / "cache")) == 300
    record_property("the disk is full", 2)


def test_a_folder_that_cannot_be_written_is_noticed_before_the_work(annotated, undisturbed, tmp_path, record_property):
    """A training that finds out at its first checkpoint has lost what led to it."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(undisturbed[0] / "checkpoint-10", run / "checkpoint-10")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert "must be writable. Got" in fails(on_read_only, run, train, annotated, run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    run.chmod(0o755)  # a user other than root, who has no other means, has changed it
    finish([in_child(train, annotated, run)])
    assert_equal(outcome(run), outcome(undisturbed[0]))

    cache.mkdir()
    said = fails(on_read_only, cache, annotate, cache)
    assert str(cache) in said and ("Read-only file system" in said or "Permission denied" in said)
    record_property("the output folder is read-only", 2)


def test_a_dataset_that_vanishes(annotated, undisturbed, tmp_path, record_property):
    """A cleaned scratch disk must cost neither the run that goes on nor the checkpoints of the one that cannot."""
    data, run = tmp_path / "data", tmp_path / "run"
    annotated.save_to_disk(data)
    child = in_child(lambda: train(load_from_disk(data), run))
    wait_for([run / "checkpoint-4"])
    shutil.rmtree(data)
    finish([child])  # it had been opened
    assert_equal(outcome(run), outcome(undisturbed[0]))

    doctor, data, run = tmp_path / "doctor", tmp_path / "data.parquet", tmp_path / "again"
    save_model(doctor, make_llama(2))
    annotated.to_parquet(data)
    command = ["train", "--dataset_name", data, "--doctor", doctor, "--output_dir", run]
    command += ["--max_steps", "4", "--save_steps", "2", "--report_to", "none", "--resume_from_checkpoint", "True"]
    child = in_child(main, [str(argument) for argument in command], said=os.devnull)
    while resolve_checkpoint(True, run) is None:
        time.sleep(0.01)
    kill(child)
    data.rename(tmp_path / "elsewhere")
    before = sorted(run.rglob("*"))
    said = fails(main, [str(argument) for argument in command])
    assert f"Got '{data}', which does not exist; check the path." in said and "Traceback" not in said
    assert sorted(run.rglob("*")) == before
    (tmp_path / "elsewhere").rename(data)
    finish([in_child(main, [str(argument) for argument in command], said=os.devnull)])
    assert (run / "checkpoint-4").is_dir()
    record_property("the dataset vanishes", 2)


def test_a_worker_that_dies_ends_the_training(annotated, undisturbed, tmp_path, record_property):
    """A training that waits for batches that nobody makes looks like one that is slow."""
    collator, num_batches = TokenRewardCollator(make_tokenizer()), 0

    def dies(rows):
        nonlocal num_batches
        num_batches += 1
        if num_batches == 3:  # in the worker; the trainer's process has a counter of its own
            os.kill(os.getpid(), signal.SIGKILL)
        return collator(rows)

    # With which error depends on what was being read from the worker
    fails(lambda: train(annotated, tmp_path, data_collator=dies, dataloader_num_workers=1))
    finish([in_child(train, annotated, tmp_path)])
    assert_equal(outcome(tmp_path), outcome(undisturbed[0]))
    record_property("a worker of the data loader is killed", 1)


def train_as_rank(annotated, output_dir):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    (output_dir / f"met-{os.environ['RANK']}").touch()
    train(annotated, output_dir, use_cpu=True)
    PartialState().destroy_process_group()


def start_two(annotated, output_dir) -> list[int]:
    """Begin or resume a training in two processes."""
    return start_ranks(output_dir, train_as_rank, annotated, output_dir)


def test_a_rank_that_dies_ends_the_training_of_all(annotated, tmp_path, record_property):
    """A rank that waits for one that is dead holds eight GPUs until somebody looks."""
    begin = time.monotonic()
    finish(start_two(annotated, tmp_path / "calm"))
    duration, draw, num_killed = time.monotonic() - begin, random.Random(0), 0
    for fault in range(NUM_FAULTS):
        folder = tmp_path / str(fault)
        children = start_two(annotated, folder)
        victim = children.pop(draw.randrange(2))
        wait_for([folder / "met-0", folder / "met-1"])  # until then it is for the launcher to end the others
        time.sleep(draw.uniform(0, duration))
        os.kill(victim, signal.SIGKILL)
        num_killed += (was_killed := os.WIFSIGNALED(os.waitpid(victim, 0)[1]))
        assert (end_of(children[0]) != 0) or not was_killed or (folder / "checkpoint-12").is_dir()
        finish(start_two(annotated, folder))
        assert_equal(outcome(folder), outcome(tmp_path / "calm"))
    assert num_killed >= 1
    record_property("one of two processes of a training is killed", num_killed)
