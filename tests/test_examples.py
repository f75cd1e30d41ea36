# SPDX-License-Identifier: Apache-2.0

"""Every example, run as a user would: a process of its own, real files, two processes where it says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import conversational_rows, few_prompts, make_llama, make_tokenizer
from processes import finish, in_child, run_script, start_ranks, succeeds
from transformers import AutoModelForCausalLM

from trl_tfpo import DoctorGuidedLogitsProcessor


ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "examples" / "train.py"
HH_RLHF = ROOT.parent / "shared" / "data" / "hh-rlhf"
TWO_PROCESSES = [
    *[sys.executable, "-m", "accelerate.commands.launch"],
    *["--config_file", ROOT / "examples" / "accelerate_configs" / "cpu.yaml", "--num_processes", "2"],
]

pytestmark = pytest.mark.slow


def run(*command, cwd, **environment):
    """Output of a command that has to succeed."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(cwd / "cache"),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout


def logged_losses(output_dir):
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_controlled_world_end_to_end(tmp_path, monkeypatch):
    """Without arguments: table, picture and completions, here with less training and fewer samples."""

    def in_forks(command, *, check):
        """In place of `subprocess.run`: nothing is imported again."""
        _, script, *options = command
        finish([in_child(run_script, script, tmp_path, *options)])

    monkeypatch.setattr(subprocess, "run", in_forks)
    options = ["--seeds", "0", "1", "--output_dir", "runs"]
    options += ["--num_pairs", "128", "--max_steps", "30", "--num_samples_per_prompt", "16"]
    with few_prompts():
        output = succeeds(run_script, ROOT / "benchmarks" / "seeds.py", tmp_path, *options)
    for seed in (0, 1):
        report = json.loads((tmp_path / f"runs/seed-{seed}/report.json").read_text())
        patient, guided, stronger, published, best = report
        assert [row["method"] for row in report[::3]] == ["patient", "published setting"]
        assert patient["kl"] == 0 and patient["efficiency"] is None
        assert guided["kl"] == pytest.approx(0.5, abs=0.15) and published["kl"] == pytest.approx(0.5, abs=0.15)
        assert patient["reward"] + 0.5 < guided["reward"] < stronger["reward"]
        assert patient["reward"] + 1 < best["reward"]
        assert (tmp_path / f"runs/seed-{seed}/reward_kl.png").stat().st_size > 10_000
    assert "unguided" in output and "guided" in output
    assert "Mean ± standard deviation over seeds [0, 1]" in output


@pytest.fixture
def small(tmp_path):
    """A dataset file, a patient and a doctor, as folders."""
    with open(tmp_path / "preferences.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in conversational_rows(24))
    for name, model in (("patient", make_llama(1, 32)), ("doctor", make_llama(2))):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def arguments(folder, **others):
    settings = {
        "patient": folder / "patient",
        "doctor": folder / "doctor",
        "dataset_name": folder / "preferences.jsonl",
        "positive_face": "you are kind",
        "negative_face": "you are rude",
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 4,
        "report_to": "none",
        "output_dir": folder / "run",
        **others,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


def test_own_models_from_a_yaml_config(small):
    """Everything can be said in a file, and the command line has the last word."""
    names = arguments(small, max_steps=1, save_steps=1)
    config = {
        name.removeprefix("--"): value if isinstance(value, (int, float)) else str(value)
        for name, value in zip(names[::2], names[1::2], strict=True)
    }
    (small / "config.yaml").write_text(yaml.safe_dump(config))
    options = ["--config", "config.yaml", "--max_steps", "2", "--save_steps", "2", "--num_guided_examples", "1"]
    options += ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    succeeds(run_script, TRAIN, small, *options)
    assert len(logged_losses(small / "run" / "checkpoint-2")) == 2
    assert (small / "run" / "adapter_model.safetensors").exists()


def test_two_processes_equal_one_with_twice_the_batch(small):
    """Processes that do not average their gradients, or score only their share, still finish without a word."""
    one, two = small / "one", small / "two"
    finish([in_child(run_script, TRAIN, small, *arguments(small, output_dir=one, per_device_train_batch_size=8))])
    options = arguments(small, output_dir=two, per_device_train_batch_size=4)
    finish(start_ranks(small / "ranks", run_script, TRAIN, small, *options))
    assert logged_losses(two / "checkpoint-4") == pytest.approx(logged_losses(one / "checkpoint-4"), rel=1e-4)
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not HH_RLHF.exists(), reason="real preference data is not on this machine")
def test_real_preferences_with_two_processes(tmp_path):
    """Real transcripts, a tokenizer and models made for them, two processes: the loss falls and the doctor guides."""
    options = ["--dataset_name", HH_RLHF, "--split", "test", "--output_dir", "small", "--vocab_size", 1024]
    succeeds(run_script, ROOT / "examples" / "make_small_models.py", tmp_path, *options)
    import gzip

    with gzip.open(HH_RLHF / "harmless-base-test.jsonl.gz", "rt", encoding="utf-8") as file:
        (tmp_path / "head.jsonl").write_text("".join(next(file) for _ in range(120)), encoding="utf-8")
    output = run(
        *[*TWO_PROCESSES, TRAIN, "--patient", "small/patient"],
        *["--doctor", "small/doctor", "--dataset_name", "head.jsonl", "--faces", "harmlessness"],
        *["--max_length", 2048, "--learning_rate", 1e-3, "--num_train_epochs", 3, "--per_device_train_batch_size", 4],
        *["--logging_steps", 5, "--report_to", "none", "--output_dir", "run", "--num_guided_examples", 1],
        *["--save_strategy", "epoch", "--save_total_limit", 1, "--drop_unusable", True],  # some answers are blank
        cwd=tmp_path,
    )
    assert "unguided" in output and "guided" in output
    losses = logged_losses(next((tmp_path / "run").glob("checkpoint-*")))
    assert losses[-1] < 0.8 * losses[0]
    doctor = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    DoctorGuidedLogitsProcessor(doctor, beta=0.5)
