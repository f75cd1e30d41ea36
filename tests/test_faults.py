# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Death, damage and a full disk, at random moments: the same command again ends as if nothing had happened.

`TRL_TFPO_FAULTS` says how many random faults each test injects; `make test-reliability` asks for more than `make test`.
"""

import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback

import datasets
import pytest
import torch
from conftest import conversational_rows, make_llama, make_tokenizer
from datasets import Dataset
from safetensors.torch import load_file
from test_shards import finish, start

from trl_tfpo import Faces, TFPOConfig, TFPOTrainer, annotate_token_rewards
from trl_tfpo.checkpoints import CONTENTS_FILE, check_checkpoint, mark_whole, resolve_checkpoint


NUM_FAULTS = int(os.environ.get("TRL_TFPO_FAULTS", 4))
FACES = Faces(positive="you are kind", negative="you are rude")
PATIENCE = 60  # seconds after which something counts as hung


@pytest.fixture(scope="module")
def annotated():
    rows = Dataset.from_list(conversational_rows(16))
    return annotate_token_rewards(rows, make_llama(1, 32), make_tokenizer(), faces=FACES)


def make_trainer(annotated, output_dir, **settings):
    settings = dict(max_steps=12, save_strategy="steps", save_steps=2, save_total_limit=2) | settings
    return TFPOTrainer(
        model=make_llama(2),
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


def in_child(function, *args) -> int:
    """Run in a process of its own, forked so that nothing has to be imported again. Returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        function(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def train(annotated, output_dir):
    """What a command for a machine that may be taken away does: the same whether it begins or goes on."""
    trainer = make_trainer(annotated, output_dir)
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


def test_a_training_that_is_killed_ends_with_the_same_weights(annotated, undisturbed, tmp_path):
    """Machines are taken away: at any moment, also while a checkpoint is written, and more than once."""
    expected, duration = outcome(undisturbed[0]), undisturbed[1]
    draw, num_resumed = random.Random(0), 0
    for fault in range(NUM_FAULTS):
        folder = tmp_path / str(fault)
        for _ in range(1 + fault % 2):
            child = in_child(train, annotated, folder)
            if fault % 2:  # in the middle of a checkpoint
                number = 2 * draw.randint(1, 6)
                deadline = time.monotonic() + PATIENCE
                while not (folder / f"checkpoint-{number}").exists() and time.monotonic() < deadline:
                    if os.waitpid(child, os.WNOHANG)[0]:
                        child = None  # ended before
                        break
                    time.sleep(0.001)
                time.sleep(draw.uniform(0, 0.02))
            else:
                time.sleep(draw.uniform(0, duration))
            if child is not None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        num_resumed += resolve_checkpoint(True, folder) is not None
        finish([in_child(train, annotated, folder)])
        assert_equal(outcome(folder), expected)
    assert num_resumed >= 1  # or the test shows nothing


def test_a_damaged_checkpoint_is_not_read(undisturbed, tmp_path):
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
            with pytest.raises(ValueError, match="checkpoint must|written to its end"):
                check_checkpoint(folder / "checkpoint-12")
            num_damaged += 1
            shutil.rmtree(folder)
    assert num_damaged >= 30


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
        mark_whole(folder)

    monkeypatch.setattr("trl_tfpo.checkpoints.mark_whole", marked)
    make_trainer(annotated, tmp_path, save_total_limit=1, max_steps=4).train()
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def annotate(cache):
    datasets.config.HF_DATASETS_CACHE = cache
    rows = Dataset.from_list(conversational_rows(300))
    return annotate_token_rewards(rows, make_llama(1), make_tokenizer(), faces=FACES)


def test_damaged_shards_are_scored_again(tmp_path, monkeypatch):
    """Half a shard would be rewards of other pairs, or the end of every later run."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    expected = annotate(tmp_path)["chosen_token_rewards"][:]
    shards = sorted(tmp_path.rglob("0*.arrow"))
    before, draw = [shard.read_bytes() for shard in shards], random.Random(0)
    assert len(shards) == 3
    for _ in range(NUM_FAULTS):
        victim = draw.choice(shards)
        with open(victim, "r+b") as file:
            file.truncate(draw.randrange(victim.stat().st_size))
        assert annotate(tmp_path)["chosen_token_rewards"][:] == expected
        assert [shard.read_bytes() for shard in shards] == before


def fill_the_disk(num_bytes, function, *args):
    """Files cannot grow beyond so many bytes: to a program it is a full disk."""
    reader, writer = os.pipe()
    child = in_child(_without_room, writer, num_bytes, function, *args)
    os.close(writer)
    with open(reader) as said:
        text = said.read()
    assert os.waitpid(child, 0)[1] != 0
    assert "File too large" in text, text[-2000:]


def _without_room(writer, num_bytes, function, *args):
    os.dup2(writer, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    function(*args)


@pytest.mark.parametrize("num_bytes", [10, 3_000])
def test_a_full_disk_loses_nothing(annotated, undisturbed, tmp_path, num_bytes):
    """It fails, says so, and goes on where it was once there is room."""
    fill_the_disk(num_bytes, train, annotated, tmp_path / "run")
    assert resolve_checkpoint(True, tmp_path / "run") is None
    finish([in_child(train, annotated, tmp_path / "run")])
    assert_equal(outcome(tmp_path / "run"), outcome(undisturbed[0]))

    (tmp_path / "cache").mkdir()
    fill_the_disk(num_bytes, annotate, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("0*.arrow"))
    assert len(annotate(tmp_path / "cache")) == 300


def test_a_process_that_dies_does_not_leave_the_other_waiting(tmp_path):
    """A rank that waits for one that is dead holds eight GPUs until somebody looks."""
    survivor, victim = start(tmp_path, 0.03, num_processes=2)
    time.sleep(0.5)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    deadline = time.monotonic() + PATIENCE
    while not (ended := os.waitpid(survivor, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(survivor, signal.SIGKILL)
            os.waitpid(survivor, 0)
            pytest.fail("the other process hangs")
        time.sleep(0.1)
    assert ended[1] != 0
    finish(start(tmp_path, 0.0, num_processes=2))
