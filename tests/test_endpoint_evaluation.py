# SPDX-License-Identifier: Apache-2.0

"""Evaluation by an endpoint: the policy that is reported is the one that the exponents ask for."""

import json

import pytest
import torch
from conftest import KEY, write_rows

from trl_tfpo import DoctorGuidedLogitsProcessor
from trl_tfpo.cli import main
from trl_tfpo.cli.endpoint_methods import read_exponents
from trl_tfpo.common.endpoint import Endpoint
from trl_tfpo.evaluation import Report, endpoint_completions, generate_completions


WEIGHTS = {"calm": 0.3, "wild": 0.2}


@pytest.fixture(scope="module")
def endpoint(url):
    return Endpoint(f"{url}/v1", "wild", api_key=KEY, backoff=0.0)  # an alias, whose own weights do not count


def logps(world, doctors, completion, weights, alpha):
    """Log-probabilities of a completion by hand."""
    ids = completion.prompt_ids + completion.completion_ids
    models = [(world.patient, alpha), *((doctors[name], weight) for name, weight in weights.items())]
    with torch.no_grad():
        mixed = sum(x * model(torch.tensor([ids])).logits[0].double().log_softmax(-1) for model, x in models)
    rows = mixed.log_softmax(-1)[len(completion.prompt_ids) - 1 : -1]
    return rows.gather(1, torch.tensor(completion.completion_ids)[:, None])[:, 0]


def test_measures_are_those_of_the_policy(endpoint, world, doctors):
    """A likelihood under other exponents than those of the samples would be the KL of another policy."""
    settings = dict(num_samples_per_prompt=3, max_new_tokens=20, seed=7)
    prompts = world.prompts("test")[:3]
    completions, found = endpoint_completions(endpoint, world.tokenizer, prompts, weights=WEIGHTS, **settings)
    assert [x.prompt for x in completions] == [prompt for prompt in prompts for _ in range(3)]
    assert len({x.text for x in completions}) > 3
    for index, completion in enumerate(completions):
        guided = logps(world, doctors, completion, WEIGHTS, 0.5).sum()
        patient = logps(world, doctors, completion, {}, 1.0).sum()
        assert found["log_likelihood"][index] == pytest.approx(guided.item(), abs=1e-3)
        assert found["kl"][index] == pytest.approx((guided - patient).item(), abs=1e-3)
        assert completion.is_complete == (completion.completion_ids[-1] == world.tokenizer.eos_token_id)
    again, _ = endpoint_completions(endpoint, world.tokenizer, prompts, weights=WEIGHTS, **settings)
    assert again == completions
    alone, found = endpoint_completions(endpoint, world.tokenizer, prompts, **settings)
    assert found["kl"] == pytest.approx(0, abs=1e-4) and alone != completions


def test_greedy_completions_are_those_of_the_library(endpoint, world, doctors):
    """The same report must come from a server as from the library."""
    settings = dict(max_new_tokens=30, temperature=0.0)
    guide = DoctorGuidedLogitsProcessor([*doctors.values()], alpha=0.7, beta=[*WEIGHTS.values()])
    prompts = world.prompts("test")[:4]
    expected = generate_completions(world.patient, world.tokenizer, prompts, guide=guide, **settings)
    found, measures = endpoint_completions(endpoint, world.tokenizer, prompts, weights=WEIGHTS, alpha=0.7, **settings)
    assert found == expected and measures.keys() == {"log_likelihood"}  # greedy search has no KL
    assert all(completion.altered_by == {"temperature": 0.0} for completion in found)


def test_evaluate_by_an_endpoint(endpoint, world, tmp_path, capsys, monkeypatch):
    """From a running server to a report, in one command; completions from files beside."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompts = world.prompts("test")[:2]
    write_rows(tmp_path / "file.jsonl", [{"prompt": x, "completion": "a fine soup."} for x in prompts])
    command = ["evaluate", "--world", "praise", "--base_url", endpoint.base_url, "--output_dir", str(tmp_path / "out")]
    command += ["--method", "patient", "guided=calm:0.5,alpha:0.5", "--max_new_tokens", "12", "--baseline", "patient"]
    command += ["--completions", f"file={tmp_path / 'file.jsonl'}", "--output", str(tmp_path / "rewards.jsonl")]
    assert main(command) == 0
    methods = Report.load(tmp_path / "out" / "report.json").methods
    assert methods.keys() == {"file", "patient", "guided"}
    assert {"kl", "log_likelihood", "reward", "num_tokens"} <= methods["guided"]["measures"].keys()
    assert methods["patient"]["measures"]["kl"]["mean"] == pytest.approx(0, abs=1e-4)
    assert methods["guided"]["head_to_head"]["win_half_tie"] >= 0
    rows = [json.loads(line) for line in (tmp_path / "rewards.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["file"] * 2 + ["patient"] * 2 + ["guided"] * 2
    assert KEY not in "".join(capsys.readouterr())


def test_exponents_of_methods():
    """A name alone is the patient, and `alpha` is no doctor."""
    found = read_exponents(["patient", "mild=helpful:0.2,alpha:1", "both=a:0.5,b:-1"])
    assert found == {
        "patient": ({}, None),
        "mild": ({"helpful": 0.2}, 1.0),
        "both": ({"a": 0.5, "b": -1.0}, None),
    }
    for given in (["=a:1"], ["x=a"], ["x=a:1", "x=a:2"], ["x=a:b"], ["x", "x"]):
        with pytest.raises(ValueError, match="`--method` must be NAME"):
            read_exponents(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "`evaluate` needs completions"),
        (["--method", "patient"], "without `--base_url`"),
        (["--base_url", "http://x/v1"], "needs methods to sample"),
        (["--base_url", "http://x/v1", "--method", "a"], "Pass the patient's tokenizer with `--patient`"),
    ],
)
def test_incomplete_options(options, message, tmp_path, capsys):
    """What is missing is said before anything is sent."""
    assert main(["evaluate", "--output_dir", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
