# SPDX-License-Identifier: Apache-2.0

"""Inspect evals of guided models: by our provider, and by its provider for OpenAI's interface."""

import asyncio
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from conftest import KEY, serving
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.log import list_eval_logs, read_eval_log
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
    ResponseSchema,
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.tool import tool
from inspect_ai.util import JSONSchema

from trl_tfpo import DoctorGuidedLogitsProcessor, guided_generate
from trl_tfpo.cli import inspect_entry, inspect_provider  # the first registers the provider
from trl_tfpo.server import make_app


PLACES = ["park inn", "river cafe", "station cafe", "garden bistro"]
SETTINGS = dict(temperature=0, max_tokens=12, logprobs=True, top_logprobs=2)
pytestmark = pytest.mark.slow
ONE, BOTH = {"calm": 0.4, "wild": 0.0}, {"calm": 0.3, "wild": 0.2}


@pytest.fixture(scope="module")
def folders(doctors, world, tmp_path_factory):
    """The doctors as saved folders, in the form of an argument."""
    names = []
    for name, doctor in doctors.items():
        folder = tmp_path_factory.mktemp("doctors") / name
        doctor.save_pretrained(folder)
        world.tokenizer.save_pretrained(folder)
        names.append(f"{name}={folder}")
    return names


@pytest.fixture(scope="module")
def guided(folders, tmp_path_factory):
    """Run the task on the world's patient with both doctors. All settings but model arguments are Inspect's."""

    def run(model="trl-tfpo/world", model_args=None, **settings):
        samples = [Sample(input=f"please review the {place}.", target=place.split()[0]) for place in PLACES]
        task = Task(dataset=samples, scorer=includes())
        arguments = {"doctor": folders} if model == "trl-tfpo/world" else {}
        logs = eval(
            task,
            model=model,
            model_args=arguments | (model_args or {}),
            log_dir=str(tmp_path_factory.mktemp("logs")),
            display="none",
            **SETTINGS | settings,
        )
        return logs[0]

    return run


def outputs(log):
    assert log.status == "success", log.error
    return [sample.output.choices[0] for sample in sorted(log.samples, key=lambda sample: sample.id)]


def prompt_of(world, place):
    messages = [{"role": "user", "content": f"please review the {place}."}]
    return world.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )["input_ids"]


@torch.no_grad()
def logps_by_hand(world, doctors, weights, place, num_tokens):
    """Greedy tokens of the guided policy, and their log-probabilities, from whole forward passes."""
    ids, logps = prompt_of(world, place), []
    for _ in range(num_tokens):
        parts = [(1 - sum(weights.values())) * world.patient(ids).logits[0, -1].log_softmax(-1)]
        parts += [weights[name] * doctor(ids).logits[0, -1].log_softmax(-1) for name, doctor in doctors.items()]
        policy = sum(parts).log_softmax(-1)
        logps.append(policy.max().item())
        ids = torch.cat([ids, policy.argmax()[None, None]], dim=1)
    return ids[0, -num_tokens:], logps


@pytest.mark.parametrize("weights", [{"calm": 0.0, "wild": 0.0}, ONE, BOTH], ids=["patient", "one doctor", "two"])
def test_log_probabilities_are_those_of_the_guided_policy(weights, guided, world, doctors):
    """An eval of the patient alone, or with the weights of another eval, would look the same."""
    log = guided(model_args={"weights": weights})
    for choice, place in zip(outputs(log), PLACES, strict=True):
        ids, expected = logps_by_hand(world, doctors, weights, place, 12)
        found = choice.logprobs.content
        assert [x.logprob for x in found] == pytest.approx(expected, abs=1e-4)
        assert [x.top_logprobs[0].logprob for x in found] == pytest.approx(expected, abs=1e-4)
        assert choice.message.text == world.tokenizer.decode(ids)
        assert choice.stop_reason == "max_tokens"
    assert log.eval.model_args["weights"] == weights
    assert log.samples[0].output.metadata == {"alpha": pytest.approx(1 - sum(weights.values())), "weights": weights}
    usage = log.samples[0].output.usage
    assert (usage.input_tokens, usage.output_tokens) == (prompt_of(world, PLACES[0]).size(1), 12)


def test_a_request_may_have_weights_of_its_own(guided):
    """`extra_body` wins by name, as in a request to the server."""
    expected = outputs(guided(model_args={"weights": BOTH}))
    arguments = {"weights": {"calm": 0.3, "wild": 0.0}, "alpha": 0.7}
    found = outputs(guided(model_args=arguments, extra_body={"weights": {"wild": 0.2}, "alpha": 0.5}))
    for one, other in zip(found, expected, strict=True):
        assert one.message.text == other.message.text
        assert [x.logprob for x in one.logprobs.content] == pytest.approx(
            [x.logprob for x in other.logprobs.content], abs=1e-4
        )


def test_evals_share_a_model_that_is_given_loaded(guided, folders):
    """Without this, each strength of a comparison would load the patient again."""
    model = get_model("trl-tfpo/world", doctor=folders)
    logs = [guided(model=model, extra_body={"weights": weights}) for weights in (ONE, BOTH)]
    num_decoded = sum(sample.output.usage.output_tokens for log in logs for sample in log.samples)
    assert model.api.engine.num_tokens == num_decoded
    assert [log.samples[0].output.metadata["weights"] for log in logs] == [ONE, BOTH]


def test_cached_answers_are_of_the_same_policy(guided, folders, tmp_path, monkeypatch):
    """Inspect's cache ignores model arguments. Without care, all weights would have the answers of the first."""
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path))
    logs = [
        guided(model_args=arguments, cache=True)
        for arguments in ({"weights": ONE}, {"weights": BOTH}, {"doctor": folders[:1], "weights": {"calm": 0.4}})
    ]
    first, second, third = ([x.logprob for x in outputs(log)[0].logprobs.content] for log in logs)
    assert first != pytest.approx(second, abs=1e-3)
    assert first == pytest.approx(third, abs=1e-4)
    again = guided(model_args={"weights": BOTH}, cache=True)
    calls = [[x.cache for x in log.samples[0].events if x.event == "model"] for log in (logs[2], again)]
    assert calls == [["write"], ["read"]]
    assert [x.logprob for x in outputs(again)[0].logprobs.content] == pytest.approx(second, abs=1e-6)


def test_a_running_server_is_evaluated_by_its_aliases(guided, url, folders, monkeypatch):
    """Inspect's own provider, for servers on other machines; `mild` is an alias of the fixture's server."""
    monkeypatch.setenv("TFPO_API_KEY", KEY)
    found = outputs(guided(model="openai-api/tfpo/mild", model_base_url=f"{url}/v1"))
    expected = outputs(guided(model_args={"weights": {"calm": 0.1, "wild": 0.0}}))
    for one, other in zip(found, expected, strict=True):
        assert one.message.text == other.message.text
        assert [x.logprob for x in one.logprobs.content] == pytest.approx(
            [x.logprob for x in other.logprobs.content], abs=1e-4
        )


def test_sampling_settings_are_those_of_inspect(guided, world, doctors):
    """A setting that is dropped changes what an eval measures."""
    one, same = (outputs(guided(model_args={"weights": ONE}, temperature=1, seed=3)) for _ in range(2))
    assert [x.message.text for x in one] == [x.message.text for x in same]
    greedy = outputs(guided(model_args={"weights": ONE}))
    by_top_k = outputs(guided(model_args={"weights": ONE}, temperature=1, top_k=1))
    assert [x.message.text for x in by_top_k] == [x.message.text for x in greedy] != [x.message.text for x in one]
    stopped = outputs(guided(model_args={"weights": ONE}, stop_seqs=["."]))
    assert all("." not in x.message.text and x.stop_reason == "stop" for x in stopped)
    several = guided(model_args={"weights": ONE}, temperature=1, seed=3, num_choices=3)
    assert all(len({x.message.text for x in sample.output.choices}) == 3 for sample in several.samples)
    guide = DoctorGuidedLogitsProcessor(list(doctors.values()), beta=[0.4, 0.0])
    plain = guided_generate(
        world.patient, guide, input_ids=prompt_of(world, PLACES[0]), max_new_tokens=12, do_sample=False
    )
    assert greedy[0].message.text == world.tokenizer.decode(plain[0, -12:])


def ask(folders, messages, tools=(), **settings):
    """Ask one model, the same for all tests and event loops."""
    model = get_model("trl-tfpo/world", doctor=folders, weights=ONE)
    return asyncio.run(model.generate(messages, tools=tools, config=GenerateConfig(**settings)))


@tool
def clock():
    async def execute():
        """Tell the time."""
        return "noon"

    return execute


SCHEMA = ResponseSchema(name="answer", json_schema=JSONSchema(type="object"))
IMAGE = ContentImage(image="data:image/png;base64,iVBORw0KGgo=")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(best_of=4), "do not support `best_of`"),
        (dict(verbosity="low"), "do not support `verbosity`"),
        (dict(prompt_logprobs=1), "prompt_logprobs"),
        (dict(response_schema=SCHEMA), "response_format"),
        (dict(extra_body={"weights": {"kind": 1.0}}), "must name doctors"),
        (dict(tools=[clock()]), "tools"),
        (dict(messages=[ChatMessageUser(content=[IMAGE])]), "Input should be 'text'"),
        (dict(frequency_penalty=3.0), "frequency_penalty"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_would_be_ignored_is_refused(folders, change, message):
    with pytest.raises(Exception, match=message):
        ask(folders, **{"messages": "please review the park inn."} | change)


def test_an_error_fails_the_eval(guided):
    log = guided(model_args={"weights": ONE}, extra_body={"weights": "kind:1"})
    assert log.status == "error" and "must name doctors" in log.error.message


def test_a_full_context_is_told_from_max_tokens(folders, world):
    """Agents shorten their conversation by this reason, and ask for more after `max_tokens`."""
    model = get_model("trl-tfpo/world", doctor=folders, memoize=False)
    no_end = dict.fromkeys(model.api.engine.eos, -100)
    found = [
        ask(folders, "park " * num, max_tokens=max_tokens, logit_bias=no_end)
        for num, max_tokens in ((300, 4), (240, 4096), (240, None), (240, 4))
    ]
    reasons = [output.stop_reason for output in found]
    assert reasons == ["model_length", "model_length", "model_length", "max_tokens"]
    assert found[1].usage.total_tokens == found[2].usage.total_tokens == model.api.engine.max_positions
    with serving(make_app(model.api.engine, model_name="world")) as url:  # closes the engine
        server = get_model("openai-api/tfpo/world", base_url=f"{url}/v1", api_key="none", memoize=False)
        assert asyncio.run(server.generate("park " * 300)).stop_reason == "model_length"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(device="cpu"), "Got device; leave it out"),
        (dict(base_url="http://localhost:8000/v1"), "For a running server use `openai-api`"),
        (dict(weights="calm"), "DOCTOR:WEIGHT"),
        (dict(weights={"kind": 0.5}), "must name doctors"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_model_arguments_are_checked(folders, arguments, message):
    with pytest.raises(ValueError, match=message):
        inspect_provider.GuidedModelAPI("world", doctor=folders, **arguments)


def test_a_conversation_has_several_turns(folders, world):
    """Inspect sends the whole conversation for each turn."""
    turns = [
        ChatMessageSystem(content="be kind."),
        ChatMessageUser(content="please review the park inn."),
        ChatMessageAssistant(content="the park inn is good."),
        ChatMessageUser(content="please review the river cafe."),
    ]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    prompt = world.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert ask(folders, turns).usage.input_tokens == len(prompt["input_ids"])


def test_samples_share_the_batch_and_leave_it(folders):
    """Rows of cancelled samples would slow down the others until they end."""

    async def run():
        async with get_model("trl-tfpo/world", doctor=folders, weights=ONE, memoize=False) as model:
            engine = model.api.engine
            config = GenerateConfig(logit_bias=dict.fromkeys(engine.eos, -100), max_connections=8)
            tasks = [asyncio.create_task(model.generate("the park", config=config)) for _ in range(8)]
            while engine.num_rows < 8:
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            while engine.num_rows:
                await asyncio.sleep(0.01)
            engine.close()
            with pytest.raises(Exception, match="closed engine"):  # and is not tried again and again
                await model.generate("the park")
        return engine

    engine = asyncio.run(asyncio.wait_for(run(), timeout=60))
    assert not engine._thread.is_alive()


def test_the_command_finds_the_provider(folders, tmp_path, monkeypatch):
    """With the arguments of the command line."""
    (tmp_path / "reviews.py").write_text(
        "from inspect_ai import Task, task\n"
        "from inspect_ai.dataset import Sample\n"
        "from inspect_ai.scorer import includes\n\n\n"
        "@task\n"
        "def reviews():\n"
        "    return Task(dataset=[Sample(input='please review the park inn.', target='park')], scorer=includes())\n"
    )
    command = [
        *("inspect", "eval", "reviews.py", "--model", "trl-tfpo/world"),
        *("-M", f"doctor={','.join(folders)}", "-M", "weights=calm:0.4,wild:0.1"),
        *("--max-tokens", "8", "--temperature", "0", "--display", "none", "--log-dir", "logs"),
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command)
    (script,) = entry_points(group="console_scripts", name="inspect")
    with pytest.raises(SystemExit) as stop:
        script.load()()
    assert not stop.value.code
    log = read_eval_log(list_eval_logs(str(tmp_path / "logs"))[0])
    assert log.status == "success" and log.eval.model == "trl-tfpo/world"
    assert log.samples[0].output.metadata["weights"] == {"calm": 0.4, "wild": 0.1}


def test_the_entry_point_imports_little():
    """Inspect loads it in every eval, also of other models."""
    (entry,) = entry_points(group="inspect_ai", name="trl_tfpo")
    assert entry.load() is inspect_entry
    script = "import sys, trl_tfpo.cli.inspect_entry; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
