# SPDX-License-Identifier: Apache-2.0

"""Weights & Biases, Trackio and TensorBoard in their local modes: one training reports to all three."""

import html
import json
import socket
import sys

import pytest
from conftest import FACES, conversational_rows, make_llama, make_tokenizer
from datasets import Dataset
from transformers import GenerationConfig

from trl_tfpo import LogGuidedCompletionsCallback, TFPOConfig, TFPOTrainer, annotate_token_rewards


pytestmark = pytest.mark.slow
METRICS = ("loss", "loss/subtb", "flow/potential_std", "rewards/margins", "values/start", "token_rewards/sparsity")
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the trackers write. A connection to another machine fails."""
    folder, connect = tmp_path_factory.mktemp("trackers"), socket.socket.connect

    def connect_here(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a connection to {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(socket.socket, "connect", connect_here)
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
            patch.delitem(sys.modules, name)  # it reads the variable when it is imported
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        for name in ("", "CACHE_", "CONFIG_", "DATA_"):
            patch.setenv(f"WANDB_{name}DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def run(folder):
    """The training: its log, the table of its callback, and what Weights & Biases keeps of it."""
    wandb = pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    pytest.importorskip("tensorboard")
    patient, tokenizer = make_llama(1, 32), make_tokenizer()
    trainer = TFPOTrainer(
        model=make_llama(2),
        args=TFPOConfig(
            str(folder / "doctor"),
            max_steps=2,
            learning_rate=0.1,
            logging_steps=1,
            save_strategy="no",
            report_to=["wandb", "trackio", "tensorboard"],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=annotate_token_rewards(
            Dataset.from_list(conversational_rows(8)), patient, tokenizer, faces=FACES
        ),
        processing_class=tokenizer,
    )
    callback = LogGuidedCompletionsCallback(trainer, patient, GREEDY, num_prompts=2, freq=1)
    trainer.add_callback(callback)
    trainer.train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    return trainer.state.log_history[:2], callback.table, summary


def read_trackio() -> list[dict]:
    """What Trackio has logged, in this order."""
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("huggingface")
    return SQLiteStorage.get_logs("huggingface", run)


def read_tensorboard(folder):
    """The events of TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.glob("doctor/runs/*/events.*")
    return EventAccumulator(str(file)).Reload()


def test_metrics_in_weights_and_biases(run):
    """A metric that a tracker drops is missed when the training is over."""
    history, _, summary = run
    assert {name: summary[f"train/{name}"] for name in METRICS} == {name: history[-1][name] for name in METRICS}


def test_metrics_in_trackio(run):
    """Each value, at its step."""
    logged = [row for row in read_trackio() if "train/loss" in row]
    for row, expected in zip(logged, run[0], strict=True):
        assert row["train/global_step"] == expected["step"]
        assert {name: row[f"train/{name}"] for name in METRICS} == {name: expected[name] for name in METRICS}


def test_metrics_in_tensorboard(run, folder):
    """Each value, at its step, in float32."""
    events = read_tensorboard(folder)
    for name in METRICS:
        values = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert values == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in run[0]]


def test_completions_in_weights_and_biases(run, folder):
    """Whoever looks at a run in the browser does not read the console. The last table has the rows of all steps."""
    _, rows, summary = run
    (file,) = folder.rglob(summary["completions"]["path"])
    table = json.loads(file.read_text())
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == rows
    assert len(rows) == 4 and any(row["completion"] != row["patient"] for row in rows)


def test_completions_in_trackio(run):
    """Both tables, at the steps of training."""
    logged = [row for row in read_trackio() if "completions" in row]
    assert [row["train/global_step"] for row in logged] == [1, 2]
    assert [row["completions"]["_value"] for row in logged] == [run[1][:2], run[1]]


def test_completions_in_tensorboard(run, folder):
    """A Markdown table for each step. Markup of a model is shown, not rendered."""
    events = read_tensorboard(folder).Tensors("completions/text_summary")
    for event, rows in zip(events, (run[1][:2], run[1][2:]), strict=True):
        (text,) = event.tensor_proto.string_val
        lines = [line[2:-2].split(" | ") for line in html.unescape(text.decode()).splitlines()]
        assert event.step == rows[0]["step"] and "&lt;user&gt;" in text.decode()
        assert lines[0] == ["prompt", "patient", "guided"]
        assert lines[2:] == [[row[name] for name in ("prompt", "patient", "completion")] for row in rows]
