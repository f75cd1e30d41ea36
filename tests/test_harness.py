# SPDX-License-Identifier: Apache-2.0

"""
Benchmarks of lm-evaluation-harness, in the library and through the server, against likelihoods by hand.

By hand means: one plain forward pass of each model for each text alone, the sum of exponents times log-probabilities,
and a softmax.
"""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from conftest import KEY, WORDS, make_llama, make_tokenizer, save_model, serving, write_rows
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from trl_tfpo import Doctor, DoctorGuidedLogitsProcessor, load_doctor
from trl_tfpo.cli import main
from trl_tfpo.evaluation.harness import GuidedLM, results_table
from trl_tfpo.server import make_app


QUESTIONS = [
    ("the park inn is", [" good", " superb", " the park inn", " superb plates and the soup"]),  # two of one token
    ("we liked the station cafe. the soup was", [" cold", " so much for the cafe."]),
    ("so much for", [" the inn.", " the families bickered near the plates."]),
    ("", [" the park inn", " so much for the inn."]),
    (
        "the park inn is good. the soup was cold. so much for the inn. the families liked the soup",
        [" was", " and the"],
    ),
]
PLACES = ["the inn.", "the station cafe.", "the sunny bakery. we liked the soup."]
POLICIES = {  # weights of the doctors; the patient has the rest
    "patient": {"calm": 0.0, "wild": 0.0},
    "one": {"calm": 0.5, "wild": 0.0},
    "two": {"calm": 0.3, "wild": 0.2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks: choices, perplexity of texts, and reviews up to their first full stop."""
    folder = tmp_path_factory.mktemp("tasks")
    write_rows(folder / "questions.jsonl", [{"question": x, "choices": choices} for x, choices in QUESTIONS])
    write_rows(folder / "texts.jsonl", [{"text": text + "".join(choices)} for text, choices in QUESTIONS])
    write_rows(folder / "places.jsonl", [{"place": place} for place in PLACES])
    tasks = {
        "choices": {
            "output_type": "multiple_choice",
            **{"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": 0},
            **{"target_delimiter": "", "metric_list": [metric("acc")]},
            "data": "questions",
        },
        "texts": {
            "output_type": "loglikelihood_rolling",
            **{"doc_to_text": "", "doc_to_target": "{{text}}"},
            "metric_list": [metric("word_perplexity", aggregation="weighted_perplexity", higher_is_better=False)],
            "data": "texts",
        },
        "reviews": {
            "output_type": "generate_until",
            **{"doc_to_text": "please review {{place}}", "doc_to_target": "this is about {{place}}"},
            "generation_kwargs": {"until": ["."], "max_gen_toks": 7},
            "metric_list": [metric("exact_match")],
            "data": "places",
        },
    }
    for name, task in tasks.items():
        files = {"test": str(folder / f"{task.pop('data')}.jsonl")}
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "num_fewshot": 0, **data, **task}))
    return folder


@pytest.fixture(scope="module")
def tasks(folder):
    """The tasks by name, for `lm_eval.evaluate`."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return {name: manager.load([name]) for name in manager.all_tasks}


def metric(name, aggregation="mean", higher_is_better=True):
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


@pytest.fixture(scope="module")
def completions_url(engine):
    """A server with the policies as models."""
    with serving(make_app(engine, model_name="world", api_key=KEY, aliases=POLICIES), lifespan="off") as url:
        yield f"{url}/v1"


@pytest.fixture
def evaluate(tasks, world, doctors, completions_url, monkeypatch):
    """Evaluates a policy on a task, in the library or through the server. Returns metrics, and answers by question."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(route, policy, task, batch_size, apply_chat_template=False, **settings):
        if route == "library":
            betas = [*POLICIES[policy].values()]
            guide = DoctorGuidedLogitsProcessor([*doctors.values()], beta=betas) if any(betas) else None
            model = GuidedLM(world.patient, guide=guide, tokenizer=world.tokenizer, batch_size=batch_size, **settings)
        else:
            arguments = {"model": policy, "base_url": f"{completions_url}/completions", **settings}
            arguments |= {"tokenizer": str(world.weights / "patient"), "tokenizer_backend": "huggingface"}
            model = get_model("local-completions")(**arguments, batch_size=batch_size)
        found = lm_eval.evaluate(model, tasks[task], bootstrap_iters=0, apply_chat_template=apply_chat_template)
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        return found["results"][task], [sample["filtered_resps"] for sample in samples]

    return run


@torch.no_grad()
def by_hand(models, ids):
    """Log-probabilities (L, V) after each of the ids, given models with exponents."""
    weighted = [x * model(torch.tensor([ids])).logits[0].double().log_softmax(-1) for model, x in models if x]
    return sum(weighted).log_softmax(-1)


def models_of(policy, world, doctors):
    weights = POLICIES[policy]
    return [(world.patient, 1 - sum(weights.values())), *((doctors[name], x) for name, x in weights.items())]


def score(models, ids, num_scored, window):
    """Log-likelihood of the last ids, each read after at most `window` tokens, and whether all are the likeliest."""
    ids = ids[-window - 1 :]
    logps = by_hand(models, ids[:-1])[-num_scored:]
    targets = torch.tensor(ids[-num_scored:])
    return logps.gather(1, targets[:, None]).sum().item(), bool((logps.argmax(dim=-1) == targets).all())


# The harness reads windows of `max_length` tokens. Those that it sends to an endpoint contain the last token, too, and
# leave room for one more
WINDOWS = {"library": 0, "server": -2}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("route", WINDOWS)
def test_choices_have_the_likelihoods_by_hand(route, policy, batch_size, evaluate, world, doctors):
    """Scores of the patient, of another row, or one token off would be the benchmark of something else."""
    models, max_length = models_of(policy, world, doctors), 12  # shorter than the last question
    results, found = evaluate(route, policy, "choices", batch_size, max_length=max_length)
    num_right = 0
    for answers, (question, choices) in zip(found, QUESTIONS, strict=True):
        before = encode(world, question) or [prefix_of(world)]
        expected = [
            score(models, before + encode(world, question + choice)[len(encode(world, question)) :], num, window)
            for choice in choices
            for window in [max_length + WINDOWS[route]]
            for num in [len(encode(world, question + choice)) - len(encode(world, question))]
        ]
        assert [logp for logp, _ in answers] == pytest.approx([logp for logp, _ in expected], abs=1e-4)
        assert [is_greedy for _, is_greedy in answers] == [is_greedy for _, is_greedy in expected]
        num_right += max(expected)[0] == expected[0][0]
    assert results["acc,none"] == pytest.approx(num_right / len(QUESTIONS))


def encode(world, text):
    return world.tokenizer(text)["input_ids"]


def prefix_of(world):
    """What precedes a text without context, in the harness."""
    bos, eos = world.tokenizer.bos_token_id, world.tokenizer.eos_token_id
    return eos if bos is None else bos


def rolling_by_hand(models, prefix, ids, window):
    """
    Log-likelihood of a text in windows. The first begins with the prefix, each later one with the last token before
    it, and an incomplete one earlier, so that it is full.
    """
    text, total = [prefix, *ids], 0.0
    for start in range(0, len(ids), window):
        num = min(window, len(ids) - start)
        first = max(start + num - window, 0)
        total += score(models, text[first : start + num + 1], num, window)[0]
    return total


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("route", WINDOWS)
def test_texts_have_the_likelihoods_by_hand(route, policy, batch_size, evaluate, world, doctors):
    """A perplexity counts each token once, also where a text does not fit the models."""
    models, max_length = models_of(policy, world, doctors), 8
    _, found = evaluate(route, policy, "texts", batch_size, max_length=max_length)
    window = max_length + WINDOWS[route]
    texts = [encode(world, question + "".join(choices)) for question, choices in QUESTIONS]
    assert max(map(len, texts)) > 2 * window and any(len(ids) % window for ids in texts)
    expected = [rolling_by_hand(models, prefix_of(world), ids, window) for ids in texts]
    assert [float(answer[0]) for answer in found] == pytest.approx(expected, abs=1e-4)


def generate_by_hand(models, world, ids, max_new_tokens):
    """Greedy search up to a full stop, which is left out."""
    eos, start, text = world.tokenizer.eos_token_id, len(ids), ""
    while len(ids) < start + max_new_tokens and ids[-1] != eos and "." not in text:
        ids = [*ids, by_hand(models, ids)[-1].argmax().item()]
        text = world.tokenizer.decode(ids[start:], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("route", WINDOWS)
def test_reviews_are_those_by_hand(route, policy, batch_size, evaluate, world, doctors):
    """Prompts of several lengths, a stop string, and a limit that is lower than that of the patient's own config."""
    models = models_of(policy, world, doctors)
    _, found = evaluate(route, policy, "reviews", batch_size, apply_chat_template=True)
    messages = [[{"role": "user", "content": f"please review {place}"}] for place in PLACES]
    prompts = [world.tokenizer.apply_chat_template(x, add_generation_prompt=True, return_dict=False) for x in messages]
    expected = [generate_by_hand(models, world, prompt, 7) for prompt in prompts]
    assert len({len(prompt) for prompt in prompts}) == 3
    ends = {"." in text for text in expected}  # by the stop string, or by the limit
    assert ends == ({True} if policy == "patient" else {True, False})
    assert [answer.strip() for (answer,) in found] == [text.split(".")[0].strip() for text in expected]


def test_sampling_is_that_of_the_harness(world, doctors):
    """A task may ask for samples; one that asks for a temperature of 0 wants none."""
    guide = DoctorGuidedLogitsProcessor(doctors["wild"], beta=0.5)
    model = GuidedLM(world.patient, guide=guide, tokenizer=world.tokenizer, batch_size=2)

    def generate(**settings):
        requests = [
            Instance("generate_until", {}, (x, {"until": [], "max_gen_toks": 9, **settings}), 0) for x in PLACES
        ]
        torch.manual_seed(0)
        return model.generate_until(requests, disable_tqdm=True)

    greedy = generate()
    assert generate(temperature=0.0) == generate(do_sample=True, temperature=2.0, top_k=1) == greedy
    hot = generate(do_sample=True, temperature=3.0)
    assert hot == generate(temperature=3.0) != greedy


# What guides may hold


def log_likelihoods(model):
    requests = [Instance("loglikelihood", {}, (x, y), i) for i, (x, ys) in enumerate(QUESTIONS[:3]) for y in ys]
    return [logp for logp, _ in model.loglikelihood(requests, disable_tqdm=True)]


def log_likelihoods_by_hand(models, world):
    pairs = [(encode(world, x), encode(world, x + y)) for x, ys in QUESTIONS[:3] for y in ys]
    return [score(models, whole, len(whole) - len(context), 1000)[0] for context, whole in pairs]


def test_each_context_is_read_once_for_answers_of_one_token(world, doctors):
    """A multiple choice by letters would otherwise cost as many passes as it has letters, for every doctor."""
    guide = DoctorGuidedLogitsProcessor([*doctors.values()], beta=[0.5, 0.0])
    model = GuidedLM(world.patient, guide=guide, tokenizer=world.tokenizer, batch_size=4)
    answers = [f" {word}" for word in ("good", "superb", "cold", "the")]
    requests = [Instance("loglikelihood", {}, (x, y), 0) for x, _ in QUESTIONS[:3] for y in answers]
    read = {name: [] for name in ("patient", *doctors)}
    models = {"patient": world.patient, **doctors}
    hooks = [
        models[name].register_forward_hook(
            lambda _, args, kwargs, output, rows=rows: rows.append(len(output.logits)), with_kwargs=True
        )
        for name, rows in read.items()
    ]
    model.loglikelihood(requests, disable_tqdm=True)
    for hook in hooks:
        hook.remove()
    assert read == {"patient": [3], "calm": [3], "wild": []}  # rows of each pass; an exponent of 0 needs none


def test_a_ratio_has_the_likelihoods_by_hand(world, doctors):
    """The reference is a doctor with the opposite exponent; left out, the patient's own words would count twice."""
    guide = DoctorGuidedLogitsProcessor(doctors["wild"], beta=0.7, reference=doctors["calm"])
    model = GuidedLM(world.patient, guide=guide, tokenizer=world.tokenizer, batch_size=3)
    models = [(world.patient, 1.0), (doctors["wild"], 0.7), (doctors["calm"], -0.7)]
    assert log_likelihoods(model) == pytest.approx(log_likelihoods_by_hand(models, world), abs=1e-4)


def test_an_adapter_on_the_patient_has_the_likelihoods_by_hand(world):
    """The patient reads without the adapter, the doctor with it; otherwise one of them is scored twice."""
    base = copy.deepcopy(world.patient)
    torch.manual_seed(0)
    both = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    model = GuidedLM(both, guide=DoctorGuidedLogitsProcessor(both, beta=0.4), tokenizer=world.tokenizer, batch_size=3)
    models = [(world.patient, 0.6), (both, 0.4)]
    expected = log_likelihoods_by_hand(models, world)
    assert log_likelihoods(model) == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx(log_likelihoods_by_hand([(world.patient, 1.0)], world), abs=0.1)
    requests = [Instance("generate_until", {}, (x, {"until": ["."], "max_gen_toks": 5}), 0) for x, _ in QUESTIONS[:3]]
    found = model.generate_until(requests, disable_tqdm=True)
    expected = [generate_by_hand(models, world, encode(world, x), 5) for x, _ in QUESTIONS[:3]]
    assert found == [text.split(".")[0] for text in expected]


def test_tokens_that_are_ruled_out_have_no_likelihood(world, doctors):
    """A policy that never says a word must not get a share of the patient's score for it."""
    guide = DoctorGuidedLogitsProcessor(doctors["calm"], beta=0.5, min_patient_prob=1.0)
    model = GuidedLM(world.patient, guide=guide, tokenizer=world.tokenizer)
    ids = encode(world, QUESTIONS[1][0])
    likeliest = world.tokenizer.decode([by_hand([(world.patient, 1.0)], ids)[-1].argmax()])
    requests = [Instance("loglikelihood", {}, (QUESTIONS[1][0], f" {x}"), 0) for x in (likeliest, "cold")]
    assert likeliest != "cold"
    assert model.loglikelihood(requests, disable_tqdm=True) == [(0.0, True), (-float("inf"), False)]


def test_half_precision_is_read_in_half_and_added_in_float32(world):
    """Log-probabilities in bfloat16 have steps of 0.06 nats at 10, more than guidance may change."""
    half = copy.deepcopy(world.patient).bfloat16()
    model = GuidedLM(half, tokenizer=world.tokenizer)
    expected = log_likelihoods_by_hand([(half, 1.0)], world)
    assert log_likelihoods(model) == pytest.approx(expected, abs=1e-3)


def test_a_model_of_names(tmp_path, world):
    """The harness makes its models of names and numbers."""
    calm, wild = (save_model(tmp_path / name, make_llama(seed)) for name, seed in (("calm", 2), ("wild", 3)))
    patient = save_model(tmp_path / "patient", make_llama(1))
    arguments = {"pretrained": patient, "doctor": [calm, wild], "beta": [0.3, 0.2], "alpha": 0.9, "dtype": "float32"}
    model = get_model("trl-tfpo").create_from_arg_obj(arguments, {"batch_size": 2})
    one = get_model("trl-tfpo").create_from_arg_string(f"pretrained={patient},doctor={calm},beta=1")
    request = Instance("loglikelihood", {}, ("the soup is", " very good"), 0)
    for lm, exponents in ((model, (0.9, 0.3, 0.2)), (one, (0.0, 1.0, 0.0))):
        models = list(zip(map(make_llama, (1, 2, 3)), exponents, strict=True))
        expected = score(models, make_tokenizer()("the soup is very good")["input_ids"], 2, 100)[0]
        assert lm.loglikelihood([request], disable_tqdm=True)[0][0] == pytest.approx(expected, abs=1e-4)
    assert model.get_model_info()["guidance"]["beta"] == [0.3, 0.2]


def test_a_doctor_of_guided_flow_has_the_exponents_of_its_training():
    """It is a ratio: the patient keeps its own exponent of 1."""
    folder = Path(__file__).parent / "fixtures" / "format_1" / "doctor"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    patient = make_llama(1, vocab_size=len(tokenizer))
    model = GuidedLM(patient, doctor=str(folder), tokenizer=tokenizer)
    models = [(patient, 1.0), (load_doctor(folder, with_value_head=False), 1.0)]
    expected = score(models, tokenizer("you are kind")["input_ids"], 1, 100)[0]
    request = Instance("loglikelihood", {}, ("you are", " kind"), 0)
    assert model.loglikelihood([request], disable_tqdm=True)[0][0] == pytest.approx(expected, abs=1e-4)


# What cannot be right


def stranger(tmp_path):
    return save_model(tmp_path / "stranger", make_llama(3), make_tokenizer(" ".join(reversed(WORDS.split()))))


def prompted():
    prompt = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    return DoctorGuidedLogitsProcessor(Doctor(make_llama(2), prompt=prompt))


def t5():
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=len(WORDS.split()), **sizes)).eval()


REFUSED = {
    "two guides": (lambda _: {"guide": prompted(), "doctor": "x"}, "Got both"),
    "exponents of nobody": (lambda _: {"beta": 0.5}, "without `doctor`"),
    "schedule": (lambda _: {"guide": guide_at(lambda step: 0.5)}, "must be numbers"),
    "exponents by row": (lambda _: {"guide": guide_at(torch.tensor([0.1, 0.2]))}, "must be numbers"),
    "prompt of a doctor": (lambda _: {"guide": prompted()}, "own `prompt`"),
    "another tokenizer": (lambda path: {"doctor": stranger(path)}, "must have the same tokenizer"),
    "fewer tokens": (lambda _: {"guide": guide_at(0.5, vocab_size=9)}, "an embedding for every token"),
    "encoder-decoder": (lambda _: {"pretrained": t5()}, "must be a causal language model"),
}


def guide_at(beta, **settings):
    return DoctorGuidedLogitsProcessor(make_llama(2, **settings), alpha=1.0, beta=beta)


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_models_that_cannot_be_right(settings, message, tmp_path):
    """A figure of a policy that was never meant is worse than none."""
    with pytest.raises(ValueError, match=message):
        GuidedLM(**{"pretrained": make_llama(1), "tokenizer": make_tokenizer()} | settings(tmp_path))


def test_texts_beyond_a_doctor(world):
    """Beyond its context a doctor says nonsense. Cut off in silence, patient and guided policy read other texts."""
    doctor = make_llama(2)
    doctor.config.max_position_embeddings = 4
    settings = {"guide": DoctorGuidedLogitsProcessor(doctor), "tokenizer": make_tokenizer()}
    text = Instance("loglikelihood", {}, ("you are kind and the soup is", " good"), 0)
    with pytest.raises(ValueError, match="context of each doctor, 4 tokens. Got a text or a limit of 7"):
        GuidedLM(make_llama(1), **settings).loglikelihood([text], disable_tqdm=True)
    prompt = Instance("generate_until", {}, ("you are", {"until": [], "max_gen_toks": 3}), 0)
    with pytest.raises(ValueError, match="pass `max_length=4`"):
        GuidedLM(make_llama(1), **settings).generate_until([prompt], disable_tqdm=True)
    assert GuidedLM(make_llama(1), **settings, max_length=4).loglikelihood([text], disable_tqdm=True)


# The verb


def run_verb(folder, tmp_path, *options):
    command = ["eval-harness", "--tasks", "choices,texts", "--include_path", str(folder), "--world"]
    return main([*command, "--output_dir", str(tmp_path / "out"), "--batch_size", "4", *options])


def test_patient_and_guided_side_by_side(folder, world, tmp_path, monkeypatch, capsys):
    """Whoever weighs a doctor wants to see what it costs."""
    monkeypatch.setenv("TQDM_DISABLE", "0")  # not what the command leaves behind
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")
    doctor = ["--doctor", f"calm={world.weights / 'doctor'}"]
    options = ["--beta", "0.3", "--log_samples", "--max_length", "12", "--quiet"]
    assert run_verb(folder, tmp_path, *doctor, *options) == 0
    table, messages = capsys.readouterr()
    assert "Running loglikelihood" not in messages
    assert "| task | metric | patient | guided |" in table and "| texts | word_perplexity ↓ |" in table
    results = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("patient", "guided")}
    assert results_table(results) in table
    assert results["guided"]["config"]["guidance"]["beta"] == [0.3] and "guidance" not in results["patient"]["config"]
    sample = results["guided"]["samples"]["choices"][0]
    ids = [encode(world, QUESTIONS[0][0] + choice) for choice in QUESTIONS[0][1]]
    context = len(encode(world, QUESTIONS[0][0]))
    models = [(world.patient, 0.7), (world.doctor, 0.3)]
    expected = [score(models, whole, len(whole) - context, 12)[0] for whole in ids]
    assert [float(logp) for logp, _ in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-4)
    assert run_verb(folder, tmp_path) == 2 and "must not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_all_methods_read_what_every_model_can_read(folder, tmp_path, world, capsys):
    """Otherwise the patient alone would have the longer contexts, and the better figures."""
    world.doctor.save_pretrained(tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    world.tokenizer.save_pretrained(tmp_path / "short")
    perplexity = {}
    for length, options in (("by the doctor", ["--doctor", str(tmp_path / "short")]), ("8", ["--max_length", "8"])):
        assert run_verb(folder, tmp_path / length, *options, "--method", "patient") == 0
        results = json.loads((tmp_path / length / "out" / "patient.json").read_text())["results"]
        perplexity[length] = results["texts"]["word_perplexity,none"]
    assert perplexity["by the doctor"] == pytest.approx(perplexity["8"])
    assert max(len(encode(world, question + "".join(choices))) for question, choices in QUESTIONS) > 8
    capsys.readouterr()


@pytest.mark.slow
def test_the_command_of_the_harness(folder, world):
    """Whoever uses the harness keeps its command, and its options."""
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (script,) = re.findall(r'^python -c "(.*)" \\$', page, flags=re.MULTILINE)
    options = ["--model", "trl-tfpo", "--tasks", "choices", "--include_path", folder]
    options += ["--model_args", f"pretrained={world.weights / 'patient'},doctor={world.weights / 'doctor'},beta=0.5"]
    result = subprocess.run([sys.executable, "-c", script, *options], capture_output=True, text=True)
    assert result.returncode == 0 and "|choices|" in result.stdout, result.stderr


@pytest.mark.slow
def test_a_mistyped_task(folder, tmp_path, capsys):
    """The harness has thousands of tasks, and its own message lists none."""
    assert run_verb(folder, tmp_path, "--tasks", "hellaswga") == 2
    assert "Got 'hellaswga', did you mean 'hellaswag" in capsys.readouterr().err


@pytest.mark.slow
def test_an_endpoint_has_the_figures_of_the_library(folder, world, completions_url, tmp_path, monkeypatch, capsys):
    """One table, whether the models are here or there; but for its windows, which are shorter by two tokens."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    methods = ["--method", "patient", "mild=calm:0.2,alpha:0.8", "--log_samples"]
    doctor = ["--doctor", f"calm={world.weights / 'doctor'}"]
    assert run_verb(folder, tmp_path / "here", *methods, *doctor, "--max_length", "30") == 0
    there = ["--base_url", completions_url, "--num_requests", "4", "--max_length", "32"]
    assert run_verb(folder, tmp_path / "there", *methods, *there) == 0
    for name in ("patient", "mild"):
        here, there = (json.loads((tmp_path / x / "out" / f"{name}.json").read_text()) for x in ("here", "there"))
        assert here["results"]["choices"]["acc,none"] == there["results"]["choices"]["acc,none"]
        perplexity = [x["results"]["texts"]["word_perplexity,none"] for x in (here, there)]
        assert perplexity[0] == pytest.approx(perplexity[1], rel=1e-4)
    assert here["results"] != json.loads((tmp_path / "here" / "out" / "patient.json").read_text())["results"]
    capsys.readouterr()
