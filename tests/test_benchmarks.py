# SPDX-License-Identifier: Apache-2.0

"""The benchmarks measure what they say; how long it takes is not looked at, as it depends on the machine."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import conversational_rows, few_prompts, make_llama, make_tokenizer, save_model, write_rows
from processes import end_of, in_child
from scripts import BENCHMARKS, load
from transformers import LlamaConfig, LlamaForCausalLM

from trl_tfpo import DoctorGuidedLogitsProcessor
from trl_tfpo.functional import guided_logps
from trl_tfpo.training.objective import tfpo_objective


SCRIPTS = BENCHMARKS
TINY = dict(
    repetitions=1,
    vocab_sizes={97: 1.08},
    random_patient=(64, 2),
    random_doctor=(32, 1),
    random_lengths=(5, 4),
    num_pairs=16,
    max_steps=2,
    grown_patient=(192, 5),
    grown_doctor=(96, 4),
    num_prompts=2,
    trained_cases=[("bfloat16", 0.5), ("float32", 1.0)],
    random_cases=[("float32", 0.5)],
)


@pytest.fixture(autouse=True, scope="module")
def short():
    """Policies are measured on few prompts."""
    with few_prompts():
        yield


@pytest.fixture(scope="module")
def decoding():
    return load(BENCHMARKS, "decoding")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_key_value_heads", [4, 2, 1])
def test_growing_keeps_what_a_model_says(decoding, num_key_value_heads, tied):
    """Were a grown model to speak otherwise, the speed would be that of a pair that nobody trained."""
    torch.manual_seed(0)
    shape = dict(vocab_size=23, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(**shape, num_key_value_heads=num_key_value_heads, tie_word_embeddings=tied, rms_norm_eps=1e-2)
    config.attention_bias = config.mlp_bias = True
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)  # biases and norms too
    grown = decoding.grow(model, 72, 5)
    ids = torch.randint(23, (2, 11))
    assert grown.config.num_hidden_layers == 5 and grown.config.hidden_size == 72
    assert grown.num_parameters() > 10 * model.num_parameters()
    torch.testing.assert_close(grown(ids).logits, model(ids).logits, atol=1e-4, rtol=0)  # norms are in float32
    with pytest.raises(AssertionError):  # and the weights matter
        torch.testing.assert_close(grown(ids.flip(1)).logits, model(ids).logits, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def decoding_run(decoding, tmp_path_factory):
    """The report of a run on tiny models, and what was printed."""
    output = tmp_path_factory.mktemp("decoding") / "decoding.json"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(decoding, "QUICK", TINY)
        decoding.main(["--quick", "--peers", "--device", "cpu", "--output", str(output)])
    return json.loads(output.read_text(encoding="utf-8")), printed.getvalue()


@pytest.fixture(scope="module")
def decoding_report(decoding_run):
    return decoding_run[0]


@pytest.mark.slow
def test_decoding_reports_every_part(decoding_run):
    """Each part that is measured has a table, and the report says on which machine."""
    report, printed = decoding_run
    parts = {"overhead", "speculative", "verification", "adapters", "peers"}
    assert report.keys() == parts | {"machine", "arguments", "sizes"}
    machine = {"date", "machine", "cpu", "device", "threads", "clock", "torch", "transformers"}
    assert report["machine"].keys() == machine
    assert printed.count("\n|---|") == len(parts)


@pytest.mark.slow
def test_the_overhead_of_a_guide_is_that_of_its_tokens(decoding_report):
    """A cached guide reads each token once; a naive guide reads the whole text at each step."""
    prompt_length, num_new_tokens = TINY["random_lengths"]
    assert [row["batch_size"] for row in decoding_report["overhead"]] == [1, 8]
    for row in decoding_report["overhead"]:
        first_quartile, median, third_quartile = row["cached"]
        assert 0 < first_quartile <= median <= third_quartile
        read_once = prompt_length + num_new_tokens - 1
        read_again = sum(range(prompt_length, prompt_length + num_new_tokens))
        assert row["cached_guide_tokens"] == row["batch_size"] * read_once
        assert row["naive_guide_tokens"] == row["batch_size"] * read_again
        assert row["cached_target"] == 1.08


@pytest.mark.slow
def test_speculation_is_compared_with_plain_guidance(decoding_report):
    """Every way to decode is timed against the patient alone and the plain guide, for trained and random models."""
    rows = decoding_report["speculative"]
    plain, speculative = ["patient", "doctor", "guided"], ["speculative 2", "speculative 4", "speculative auto"]
    others = ["lookup auto", "assistant auto"]
    trained, default, random = (
        [row for row in rows if row["pair"] == pair] for pair in ("trained", "default", "random")
    )
    assert [row["method"] for row in default] == 4 * (plain + others)
    assert [row["method"] for row in trained] == 4 * (plain + speculative)  # two cases, twice
    assert [row["method"] for row in random] == 2 * (plain + speculative[-1:])
    for row in rows:
        assert all(ratio > 0 for ratio in row["over_patient"] + row["over_guided"])
        assert (row["tokens_per_forward"] is not None) == (row["method"] in speculative + others)
    for row in trained:
        if row["method"] in speculative[:2]:  # "auto" need not draft
            assert row["tokens_per_forward"] > 1 and 0 < row["acceptance"] <= 1


@pytest.mark.slow
def test_verification_is_timed_for_each_type_and_batch(decoding_report):
    """The time to verify a draft is that of each number of tokens, type and batch size."""
    rows = decoding_report["verification"]
    cases = [(dtype, batch_size) for dtype in ("bfloat16", "float32") for batch_size in (1, 8)]
    assert [(row["dtype"], row["batch_size"]) for row in rows] == cases
    assert all({"k=1", "k=2", "k=4", "k=8"} < row.keys() for row in rows)


@pytest.mark.slow
def test_peers_read_as_many_tokens_as_a_cached_guide(decoding_report):
    """The guide of transformers has a cache, too: its tokens are ours, and not those of a naive guide."""
    cached, naive, of_transformers, *_ = decoding_report["peers"]
    assert "transformers" in of_transformers["guide"]
    assert cached["guide_tokens"] == of_transformers["guide_tokens"] < naive["guide_tokens"]


def test_peers_compute_the_same_mixture(decoding):
    """Guides that say something else are no yardstick."""
    from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

    torch.manual_seed(0)
    patient, doctor = (decoding.random_llama(31, 64, 2, scale=0.3) for _ in range(2))
    prompt = torch.randint(31, (1, 5))
    mask = torch.ones_like(prompt)
    guides = [
        decoding.cached_guide(doctor, 0.5, 0.5)(prompt, mask),
        decoding.naive_guide(doctor, 0.5, 0.5)(prompt, mask),
        UnbatchedClassifierFreeGuidanceLogitsProcessor(0.5, doctor, unconditional_ids=prompt),
    ]
    cached, *others = (
        patient.generate(
            prompt,
            attention_mask=mask,
            logits_processor=[guide],
            do_sample=False,
            max_new_tokens=12,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for guide in guides
    )
    for other in others:
        assert torch.equal(other.sequences, cached.sequences)
        scores = [torch.stack(output.scores).log_softmax(dim=-1) for output in (other, cached)]
        torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_annotation_is_compared_with_the_same_numbers(tmp_path, monkeypatch, capsys):
    """Were the two sides to compute different things, the ratio of their times would mean nothing."""
    annotation = load(BENCHMARKS, "annotation")
    sizes = dict(num_pairs=3, repetitions=2, hidden_size=64, num_layers=1, vocab_sizes=[97])
    monkeypatch.setattr(annotation, "QUICK", sizes)
    annotation.main(["--quick", "--device", "cpu", "--output", str(tmp_path / "annotation.json")])
    (row,) = json.loads((tmp_path / "annotation.json").read_text(encoding="utf-8"))["rows"]
    assert row["largest_difference"] < 1e-4
    assert row["pairs_per_second"] > 0 and len(row["four_forwards_over_annotated"]) == 3
    assert capsys.readouterr().out.count("\n| 97 |") == 1


@pytest.mark.slow
def test_annotation_of_real_pairs_reads_fewer_tokens(tmp_path, capsys):
    """Both sides must give the same gaps, or the ratio of their times would mean nothing."""
    annotation, output = load(BENCHMARKS, "annotation"), tmp_path / "annotation.json"
    patient = save_model(tmp_path / "patient", make_llama(0, hidden_size=32), make_tokenizer())
    pairs = write_rows(tmp_path / "pairs.jsonl", conversational_rows(20))
    arguments = ["--pairs", str(pairs), "--patient", patient, "--num_pairs", "20"]
    annotation.main([*arguments, "--device", "cpu", "--output", str(output)])
    for row in json.loads(output.read_text(encoding="utf-8"))["rows"]:
        assert row["largest_difference"] < 1e-4
        assert len(row["rows_of_pairs_over_annotated"]) == 3
        assert row["tokens_per_pair"]["annotated"] < row["tokens_per_pair"]["rows of pairs"]
    printed = capsys.readouterr().out
    assert printed.count("\n| system |") == printed.count("\n| user |") == 1


@pytest.mark.slow
def test_training_is_compared_on_the_same_shapes(tmp_path, monkeypatch):
    """Were DPO's batches longer than ours, the ratio would flatter us."""
    training = load(BENCHMARKS, "training")
    sizes = dict(repetitions=2, hidden_size=64, num_layers=1, vocab_size=512, lengths=[5, 17])
    monkeypatch.setattr(training, "QUICK", sizes | dict(num_tokens=1024, large_vocab=32_768))
    training.main(["--quick", "--device", "cpu", "--output", str(tmp_path / "training.json")])
    report = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert report["step"]["shapes"]["TFPO"] == report["step"]["shapes"]["DPO"] == [8, 240]
    assert [row["length"] for row in report["subtb"]] == [5, 17]
    assert 0 < report["memory"]["chunked"] < report["memory"]["naive"] / 3
    assert all(peak >= 0 for peak in report["step"]["peak_mebibytes"].values())


@pytest.fixture(scope="module")
def frontier():
    """The script, whose quick runs are as short as they can be."""
    module = load(BENCHMARKS, "frontier")
    module.QUICK = dict(num_pairs=16, max_steps=5, num_samples_per_prompt=4)
    module.QUICK_KLS = [0.01, 0.02]
    return module


@pytest.fixture(scope="module")
def run_all_methods(frontier):
    """Measures every method at one strength: guided flow with two settings, the others with one. What is printed."""
    methods = {
        name: replace(
            method,
            grid=method.grid[: 2 if name == "guided flow" else 1],
            strengths=method.strengths and method.strengths[:1],
        )
        for name, method in frontier.METHODS.items()
    }

    def run(output):
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
            patch.setattr(frontier, "METHODS", methods)
            frontier.main(["--quick", "--output", str(output)])
        return printed.getvalue()

    return run


@pytest.fixture(scope="module")
def all_methods(run_all_methods, tmp_path_factory):
    """The output of such a run, and what it printed."""
    output = tmp_path_factory.mktemp("frontier") / "frontier.jsonl"
    return output, run_all_methods(output)


def rows_of(output):
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_every_method_of_the_frontier_is_measured(all_methods, frontier):
    """Each method is measured on test prompts, away from the patient, and is in the table and the picture."""
    output, printed = all_methods
    rows = rows_of(output)
    assert {row["method"] for row in rows if row["split"] == "test"} == set(frontier.METHODS)
    assert all(row["kl"] > 0 for row in rows)
    assert all(f"| {name} |" in printed for name in frontier.METHODS)
    assert output.with_suffix(".png").stat().st_size > 1000


@pytest.mark.slow
def test_settings_are_chosen_on_validation_prompts(all_methods, frontier):
    """Where a method has several settings, only the best on validation prompts is measured on test prompts."""
    rows = rows_of(all_methods[0])
    validation = [row for row in rows if row["split"] == "validation"]
    assert {row["method"] for row in validation} == {"guided flow"}
    best = frontier.best(frontier.METHODS["guided flow"].grid[:2], validation)
    tested = [row["settings"] for row in rows if row["method"] == "guided flow" and row["split"] == "test"]
    assert tested and all(settings == best for settings in tested)


@pytest.mark.slow
def test_the_frontier_is_measured_once(all_methods, run_all_methods, tmp_path):
    """A run that was cut short measures what is missing, and nothing else."""
    output = tmp_path / "frontier.jsonl"
    lines = all_methods[0].read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["method"] != "TFPO"]
    output.write_text("".join(kept), encoding="utf-8")
    run_all_methods(output)
    resumed = output.read_text(encoding="utf-8").splitlines(keepends=True)
    assert resumed[: len(kept)] == kept
    assert {json.loads(line)["method"] for line in resumed[len(kept) :]} == {"TFPO"}
    run_all_methods(output)  # now nothing is missing
    assert output.read_text(encoding="utf-8") == "".join(resumed)


def run_in_a_fork(command, *, stdout, stderr, env):
    """In place of `subprocess.run`: run a script on a few pairs, in a fork, so that nothing is imported again."""
    _, script, *arguments = map(str, command)

    def run():
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        module = load(BENCHMARKS, Path(script).stem)
        if hasattr(module, "QUICK"):
            module.QUICK = dict(num_pairs=16, max_steps=2, num_samples_per_prompt=8)
        module.main(arguments)
        sys.stdout.flush()

    return SimpleNamespace(returncode=end_of(in_child(run)))


@pytest.mark.slow
def test_one_command_measures_everything(frontier, tmp_path, monkeypatch, capsys):
    """One command writes the results of each part into a folder, and prints its tables."""
    monkeypatch.setattr(frontier.subprocess, "run", run_in_a_fork)
    frontier.main(["--quick", "--methods", "TFPO", "--everything", str(tmp_path)])
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jsonl")}
    parts = {f"{name}.jsonl" for name in ("methods-praise", "objectives", "sweep-praise", "worlds/1")}
    assert written == parts | {f"sizes/{patient}-24.jsonl" for patient in (64, 96)}
    assert (tmp_path / "worlds/1/language.json").is_file() and (tmp_path / "methods.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert printed.count("| TFPO |") >= 1
    assert printed.count("| nothing |") == 4  # among changes, in the drawn world, and of two sizes
    assert len((tmp_path / "minutes.txt").read_text().splitlines()) == 5  # as many parts
    assert "loss" not in printed  # what trainers log is no part of a table


def test_a_part_that_fails_is_not_passed_over(frontier, tmp_path):
    """A page with a table missing would look like one that was never asked for."""
    with pytest.raises(RuntimeError, match="seeds failed, see .*seeds.log"):  # a script that imports nothing large
        frontier.run_parts({"seeds": ["seeds.py", "--seeds", "zero"]}, tmp_path, [])
    assert "invalid int value: 'zero'" in (tmp_path / "seeds.log").read_text(encoding="utf-8")


def test_the_best_settings_are_those_of_the_highest_mean(frontier):
    """A method must be shown at its best, not at the first or the last of its settings."""
    grid = [{"rate": 1}, {"rate": 2}, {"rate": 3}]
    rows = [
        {"settings": {"rate": rate}, "efficiency": efficiency, "kl": kl}
        for rate, efficiency, kl in [(1, 0.5, 0.6), (2, 0.9, 0.6), (2, 0.7, 1.2), (3, 0.7, 0.6), (1, 5.0, 0.01)]
    ]
    assert frontier.best(grid, rows) == {"rate": 2}


def test_interpolation(frontier):
    """Methods must be compared at the same KL, not at the nearest one that happens to be measured."""
    points = [(1.0, 10.0), (2.0, 20.0), (4.0, 0.0)]
    assert frontier.interpolate(points, 1.5) == 15.0
    assert frontier.interpolate(points, 3.0) == 10.0
    assert frontier.interpolate(points, 4.3) is None
    assert frontier.interpolate(points, 4.3, slack=0.5) == 0.0
    assert frontier.interpolate([], 1.0) is None


@pytest.mark.slow
def test_the_kl_of_a_reward_guided_search(frontier):
    """The KL of a search is near 0 without reward, and grows with the weight of the reward."""
    from methods import Task, args_decoding

    task = Task("praise", 0, num_pairs=16, max_steps=2, num_samples_per_prompt=8)
    comparison, policy = task.comparison("validation"), args_decoding(task, learning_rate=1e-3, top_k=160)
    alone, guided = (policy(comparison, weight) for weight in (0.0, 4.0))
    assert alone["kl"] == pytest.approx(0, abs=1e-2)
    assert alone["reward"] == pytest.approx(
        comparison.rows[0]["reward"], abs=4 * comparison.rows[0]["reward_se"] + 0.2
    )
    assert guided["kl"] > 0.1


def test_what_is_left_of_an_objective(frontier):
    """An ablation must leave out the part it is named after, and nothing else."""
    from methods import fine_tuning, full_trajectory, no_boundary

    tensors = dict(
        doctor_logps=torch.tensor([[-1.0, -2.0], [-3.0, -1.0]]),
        log_values=torch.tensor([[0.0, 5.0, 9.0], [2.0, 5.0, 9.0]]),
        token_rewards=torch.tensor([[0.5, 0.0], [0.0, -0.25]]),
        completion_mask=torch.tensor([[True, True], [True, False]]),
        completion_ids=torch.tensor([[4, 5], [6, 0]]),
        is_complete=torch.tensor([True, True]),
        reference_logps=torch.tensor([[-2.0, -2.0], [-2.0, -7.0]]),
    )
    # log V(s_0) - (r / 0.25 + log reference - log doctor), over real tokens: 0 - (2 - 1) and 2 - (0 + 1)
    assert full_trajectory(**tensors)[0].item() == pytest.approx((1 + 1) / 2)
    assert fine_tuning(**tensors)[0].item() == pytest.approx(3)  # of the chosen completion alone
    moved = tensors | dict(log_values=tensors["log_values"] + torch.tensor([0.0, 0.0, 3.0]))  # the last state of row 0
    assert no_boundary(**tensors)[0] != no_boundary(**moved)[0]
    assert tfpo_objective(**tensors)[0] == tfpo_objective(**moved)[0]  # is held at zero there


@pytest.mark.slow
def test_serving(capsys):
    """Throughput is counted in tokens of answers that came to their end."""
    ratios = load(BENCHMARKS, "serving").main(["--quick"])
    assert list(ratios) == [4] and all(ratio > 0 for ratio in ratios[4])
    assert "| 4 |" in capsys.readouterr().out


@pytest.mark.slow
def test_measurements_on_a_gpu_run_on_tiny_models(tmp_path):
    """The script for a GPU, where an error would cost the time of the card. It compiles patient and doctor."""
    environment = os.environ | {"MODELS": "tiny", "PARTS": "decoding", "PYTHON": sys.executable}
    script = [shutil.which("bash"), str(BENCHMARKS / "gpu.sh"), str(tmp_path)]
    subprocess.run(script, env=environment, check=True, capture_output=True, timeout=300)
    rows = json.loads((tmp_path / "decoding.json").read_text())["rows"]
    assert [(row["batch_size"], row["way"]) for row in rows] == [(1, "eager"), (1, "compiled")]
    assert all(min(row["over_both"]) > 0 and row["limit"] > 0 for row in rows)
    tables = (tmp_path / "tables.md").read_text()
    assert "| 1 | compiled |" in tables and "different tokens" not in tables


@pytest.mark.slow
@pytest.mark.parametrize("name", ["server", "decoding", "training"])
def test_soaks_are_sound(name, tmp_path, capsys):
    """Each runs for seconds here, and must have seen what it is for: clients that leave, kept memory, kills."""
    soak = load(BENCHMARKS, "soak")
    figures = soak.main(["--quick", "--output", str(tmp_path / "figures.json"), name])
    growth = {"growth": 0.0} if "growth" in figures else {}  # seconds are all warm-up
    assert soak.is_sound(figures | growth), figures
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    seen = {
        "server": "cancelled answers, correct so far",
        "decoding": "guided_generate, memory kept",
        "training": "kills",
    }
    assert figures[seen[name]] > 0 and f"| {seen[name]} |" in capsys.readouterr().out


def test_a_soak_sees_what_is_wrong(capsys):
    """A soak that always ends well would be believed."""
    soak = load(BENCHMARKS, "soak")
    sound = {"wrong answers": 0, "lost answers": 0, "growth": 0.049}
    assert soak.is_sound(sound)
    for wrong in ({"lost answers": 1}, {"wrong answers": 1}, {"tensors that differ": 2}, {"growth": 0.051}):
        assert not soak.is_sound(sound | wrong)
    assert soak.growth([1.0, *[100.0] * 18, 200.0])["growth"] == 0.5  # the median of the last two is between them


@pytest.mark.slow
def test_two_objectives(tmp_path, capsys):
    """Every way to weigh two objectives is measured at every weighting."""
    objectives, output = load(BENCHMARKS, "objectives"), tmp_path / "objectives.jsonl"
    arguments = ["--quick", "--kl", "0.05", "--output", str(output)]
    found = objectives.main(arguments)
    assert set(found) == {"two doctors", "two doctors, guided flow", "MOD", "soup", "DPO for each weighting"}
    written = output.read_bytes()
    assert len(written.splitlines()) == 2 * len(found)
    assert capsys.readouterr().out.count("(") >= 2 * len(found)
    assert objectives.main(arguments) == found and output.read_bytes() == written  # a run that ended trains nothing


def test_hypervolume_by_hand():
    """A front that counts a dominated point, or an area twice, favors whoever has more points."""
    objectives = load(BENCHMARKS, "objectives")
    assert objectives.hypervolume([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)], (0.0, 0.0)) == 3 * 1 + 2 * 1 + 1 * 1
    assert objectives.hypervolume([(2.0, 2.0), (1.0, 1.0), (-1.0, 5.0)], (0.0, 0.0)) == 4
    assert objectives.hypervolume([(2.0, 2.0)], (1.0, 1.0)) == 1


@pytest.mark.slow
def test_a_mixed_annotator_cares_for_both():
    """A baseline that is trained on other labels than it is measured by is no baseline."""
    objectives = load(BENCHMARKS, "objectives")
    from methods import Task

    task = Task("praise", 0, num_pairs=2, max_steps=1, num_samples_per_prompt=8)
    world = objectives.mixed_task(task, 0.75).world
    assert world.attributes["mixed"].oracle("splendid and splendid, gently, wildly, wildly") == 2 * 0.75 - 0.25
    front = objectives.tilted_front(task.samples("test"), [0.3] * 3)
    assert front[0][1] > front[1][1] > front[2][1] and front[0][0] < front[1][0] < front[2][0]


@pytest.mark.slow
def test_settings_are_swept_once(tmp_path, capsys):
    """A sweep of an hour that is cut short must go on; a table must say which setting each row is of."""
    sweep, output = load(BENCHMARKS, "sweep"), tmp_path / "sweep.jsonl"
    names = ["nothing", "no boundary", "value_margin=1.0"]
    arguments = ["--quick", "--attributes", "praise", "--output", str(output), "--changes", *names]
    rows = sweep.main(arguments)
    assert [row["change"] for row in rows] == names
    written = output.read_bytes()
    assert sweep.main(arguments) == rows and output.read_bytes() == written
    printed = capsys.readouterr().out
    assert all(printed.count(f"| {name} |") == 2 for name in names)


@pytest.fixture
def two_tokens():
    """Samples of a patient that draws two of five tokens independently; the reward of a text is a sum over them."""
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(5, generator=generator).log_softmax(dim=-1)
    first, second = torch.multinomial(logps.exp(), 8000, True, generator=generator).view(2, 2, 2000)  # (P, N) each
    worth = torch.tensor([1.0, 0.0, -1.0, 0.5, 0.0])
    ids = torch.stack([torch.zeros_like(first), first, second], dim=-1).view(4000, 3)
    mask = torch.tensor([[False, True, True]]).expand(4000, 3)
    rewards = {"worth": (worth[first] + worth[second]).double()}
    drawn = load(BENCHMARKS, "patient_samples").PatientSamples(ids, mask, rewards, logps.expand(8000, 5))
    return SimpleNamespace(logps=logps, worth=worth, drawn=drawn)


def test_a_policy_is_weighed_on_samples_of_the_patient(two_tokens, frontier):
    """The best policy must be found efficient, the patient nowhere, and one that is led astray must lose."""

    def found(shift):
        def doctor(input_ids):
            return SimpleNamespace(logits=(two_tokens.logps + shift).expand(*input_ids.shape, 5))

        def guide(beta):
            def mixture(patient_logits, doctor_logits):
                return guided_logps(
                    patient_logits=patient_logits, doctor_logits=doctor_logits, alpha=1 - beta, beta=[beta]
                )

            return SimpleNamespace(doctors=[doctor], combine=mixture)

        drawn = two_tokens.drawn
        return drawn.follow(guide, drawn.doctor_logits(guide(1.0)), frontier.SHARES, attribute="worth")

    good = [row for row in found(4 * two_tokens.worth) if row["efficiency"] is not None]
    assert len(good) > 3 and [row["efficiency"] for row in good] == [pytest.approx(1.0, abs=0.02)] * len(good)
    for row in good:
        assert row["efficiency"] == pytest.approx(sum(row["by_prompt"]) / 2, abs=1e-4)  # of two prompts
    assert [row["efficiency"] for row in found(0.0)] == [None] * len(frontier.SHARES)
    bad = found(-4 * two_tokens.worth)
    assert all(row["efficiency"] is None or row["efficiency"] < 0 for row in bad) and bad[0]["efficiency"] < -0.9
    assert [row["kl"] for row in good] == sorted(row["kl"] for row in good)


def test_the_best_policy_of_a_reward(two_tokens):
    """What no policy can have, distance and diversity at once, is no fault of a method that has not both."""
    row = two_tokens.drawn.best("worth", reward=1.7)
    best = (two_tokens.logps + row["beta"] * two_tokens.worth).log_softmax(dim=-1)  # each token is tilted alike
    assert 2 * (best.exp() * two_tokens.worth).sum().item() == pytest.approx(1.7, abs=0.02)
    assert row["kl"] == pytest.approx(2 * (best.exp() * (best - two_tokens.logps)).sum().item(), rel=0.1)
    assert row["entropy"] == pytest.approx(-(best.exp() * best).sum().item(), rel=0.02)


def test_intervals_draw_seeds_and_prompts_but_no_attributes(frontier):
    """That one attribute is harder than another says nothing of what another seed, or another prompt, would bring."""
    sure = {(attribute, seed): np.full(12, gain) for attribute, gain in (("a", 0.0), ("b", 1.0)) for seed in (0, 1, 2)}
    both = {"a", "b"}
    assert frontier.interval(sure, both, ".2f") == "0.50 (0.50 to 0.50)"
    in_one_attribute = sure | {("a", 3): np.zeros(12)}
    assert frontier.interval(in_one_attribute, both, ".2f") == "0.50 (0.50 to 0.50)"
    prompts, seeds = np.arange(12) / 6, [0.9, 1.0, 1.1]
    for found in ({("a", 0): prompts}, {("a", seed): np.full(12, gain) for seed, gain in enumerate(seeds)}):
        mean, low, high = map(float, re.findall(r"[\d.]+", frontier.interval(found, {"a"}, ".3f")))
        assert low < mean < high
    assert frontier.interval({}, both, ".2f") == frontier.interval({("a", 0): prompts}, both, ".2f") == ""
    numbers = {("a", seed): gain for seed, gain in enumerate(seeds)}  # of a seed, with nothing of its prompts
    assert frontier.interval(numbers, {"a"}, ".1f") == "1.0 (0.9 to 1.1)"


def test_a_method_that_was_measured_in_two_ways_is_not_reported(frontier):
    """Efficiency interpolated between rows of two settings would be that of neither."""
    row = {"method": "a", "attribute": "b", "seed": 0, "split": "test", "settings": {"rate": 1}, "max_steps": 500}
    frontier.check_is_one_run([row, row | {"split": "validation", "settings": {"rate": 2}}, row | {"seed": 1}])
    for other in ({"settings": {"rate": 2}}, {"max_steps": 10}):
        with pytest.raises(ValueError, match="one setting and one size"):
            frontier.check_is_one_run([row, row | other])


@pytest.mark.slow
def test_faces_that_nobody_trained(frontier):
    """The rival that costs no training must be what it says: the patient, between what it says under either face."""
    from methods import Task, faces_alone

    task = Task("praise", 0, num_pairs=2, max_steps=1, num_samples_per_prompt=8)
    samples, comparison = task.samples("test"), task.comparison("test")
    prompts = [completion.prompt_ids for completion in comparison.patient_completions[:: 4 * 8]]
    as_it_was = samples.logits_after(prompts, task.world.patient).log_softmax(dim=-1)
    torch.testing.assert_close(as_it_was, samples.patient_logps, atol=1e-4, rtol=1e-4)
    weak, strong = (faces_alone(task)(comparison, strength) for strength in (0.1, 0.3))
    assert 0 < weak["kl"] < strong["kl"] and comparison.rows[0]["reward"] < weak["reward"] < strong["reward"]


@pytest.mark.slow
def test_what_is_weighed_is_what_is_sampled(frontier):
    """Were the two ways to measure a policy to differ, the settings would be chosen by the wrong one."""
    from methods import Task

    task = Task("praise", 0, num_pairs=2, max_steps=1, num_samples_per_prompt=25)
    world = task.world

    def guide(beta):
        return DoctorGuidedLogitsProcessor(world.doctor, beta=beta)

    with few_prompts(6):  # the standard error is over prompts
        samples = task.samples("validation")
        (row,) = samples.follow(guide, samples.doctor_logits(guide(0.4)), [0.4], attribute="praise")
        sampled = task.comparison("validation").add("doctor", guide(0.4), beta=0.4)
    assert row["kl"] == pytest.approx(sampled["kl"], rel=0.1, abs=4 * sampled["kl_se"])
    near = frontier.follow(task, guide, [row["kl"]], 1.0)
    assert [x["beta"] for x in near] == [pytest.approx(0.4, abs=0.02)]


@pytest.mark.slow
def test_a_grid_of_sizes(tmp_path, capsys):
    """Each doctor must be aligned for each patient, and models that exist must not be trained again."""
    sizes = load(BENCHMARKS, "weak_to_strong")
    arguments = ["--quick", "--patients", "16", "24", "--doctors", "8", "--steps", "2", "--output_dir", str(tmp_path)]
    found = sizes.main(arguments)
    assert [row["change"] for row in found] == ["nothing", "nothing"]
    assert (tmp_path / "16-8/doctor/model.safetensors").read_bytes() == (
        tmp_path / "24-8/doctor/model.safetensors"
    ).read_bytes()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert sizes.main(arguments) == found
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == times
    assert capsys.readouterr().out.count("| nothing |") == 4
