# SPDX-License-Identifier: Apache-2.0

"""`/v1/completions`: prompts in all their forms, and log-likelihoods of given texts under the guided policy."""

import threading
import time

import pytest
import torch
import yaml
from conftest import KEY, make_llama, make_tokenizer, write_rows

from trl_tfpo.server import Engine, Generation
from trl_tfpo.server import engine as engine_module


WEIGHTS = {"calm": 0.3, "wild": 0.2}
TEXTS = ["the park inn is", "we liked the station cafe. the soup was", "the families"]


def complete(client, prompt, **settings):
    settings = dict(model="world", temperature=0, extra_body={"weights": WEIGHTS}) | settings
    return client.completions.create(prompt=prompt, **settings)


@torch.no_grad()
def guided_by_hand(world, doctors, ids, alpha=0.5, weights=WEIGHTS):
    """Log-probabilities (L, V) of the guided policy after each of the ids, read at once."""
    logps = [model(torch.tensor([ids])).logits[0].log_softmax(-1) for model in (world.patient, *doctors.values())]
    exponents = [alpha, *weights.values()]
    return sum(x * logp for x, logp in zip(exponents, logps, strict=True)).log_softmax(-1)


def score_by_hand(logps, ids):
    """Log-probability of each of the ids but the first."""
    return logps[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


# Prompts


def test_a_prompt_may_be_text_or_ids(client, world):
    """Half of the clients send ids, as only so they know where the prompt ends."""
    ids = [world.tokenizer(text)["input_ids"] for text in TEXTS]
    alone = [complete(client, text, max_tokens=6).choices[0].text for text in TEXTS]
    assert len(set(alone)) == 3
    for forms in (TEXTS, ids):
        assert [complete(client, one, max_tokens=6).choices[0].text for one in forms] == alone
        answer = complete(client, forms, max_tokens=6)
        assert [(x.index, x.text) for x in answer.choices] == list(enumerate(alone))
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert [x.text for x in complete(client, forms[:1], max_tokens=6).choices] == alone[:1]
    chunks = list(complete(client, ids, max_tokens=6, stream=True))
    streamed = ["".join(x.choices[0].text for x in chunks if x.choices[0].index == index) for index in range(3)]
    assert streamed == alone


def test_choices_of_several_prompts_are_in_order(client):
    """Clients find the answers to a prompt by their place: `n` for the first, then `n` for the second."""
    both = complete(client, TEXTS[:2], n=2, seed=5, temperature=1, max_tokens=8).choices
    assert [choice.index for choice in both] == [0, 1, 2, 3]
    alone = [complete(client, text, n=2, seed=5, temperature=1, max_tokens=8).choices for text in TEXTS[:2]]
    assert [x.text for x in both] == [x.text for choices in alone for x in choices]


def test_a_text_goes_on_where_the_prompt_ends(client, world):
    """Put together, prompt and completion would lack the space between two words."""
    text = complete(client, TEXTS[2], max_tokens=3).choices[0].text
    ids = world.tokenizer(TEXTS[2] + text)["input_ids"]
    assert text[0] == " " and len(ids) == len(world.tokenizer(TEXTS[2])["input_ids"]) + 3
    echoed = [complete(client, prompt, max_tokens=3, echo=True) for prompt in (TEXTS[2], ids[:-3])]
    assert [x.choices[0].text for x in echoed] == [TEXTS[2] + text] * 2
    chunks = complete(client, TEXTS[2], max_tokens=3, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXTS[2] + text


# Log-likelihoods


def test_an_echo_of_nothing_else_comes_once(client):
    """A client would take the second prompt for the answer."""
    asked = dict(echo=True, max_tokens=0)
    assert complete(client, TEXTS[0], **asked).choices[0].text == TEXTS[0]
    chunks = list(complete(client, TEXTS[0], stream=True, **asked))
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXTS[0]


@pytest.mark.parametrize("num_scored", [1024, 4])
def test_echo_scores_the_prompt_under_the_guided_policy(num_scored, client, world, doctors, monkeypatch):
    """Scores of the patient alone, or one token off, would make every benchmark of a doctor one of something else."""
    monkeypatch.setattr(engine_module, "NUM_SCORED", num_scored)  # 4: in parts of one token each
    ids = [world.tokenizer(text)["input_ids"] for text in TEXTS]
    for max_tokens in (0, 1, 3):
        answer = complete(client, ids, echo=True, logprobs=2, max_tokens=max_tokens)
        assert answer.usage.completion_tokens == 3 * max_tokens
        for prompt, choice in zip(ids, answer.choices, strict=True):
            found = choice.logprobs
            said = world.tokenizer.convert_tokens_to_ids([x.strip() for x in found.tokens])
            assert said[: len(prompt)] == prompt and len(said) == len(prompt) + max_tokens
            logps = guided_by_hand(world, doctors, said)
            assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
            assert found.token_logprobs[1:] == pytest.approx(score_by_hand(logps, said), abs=1e-4)
            for top, row, token in zip(found.top_logprobs[1:], logps, said[1:], strict=False):
                best = set(row.topk(2).values.tolist()) | {row[token].item()}
                assert sorted(top.values()) == pytest.approx(sorted(best), abs=1e-4)
            assert choice.finish_reason == "length"


def test_scores_are_the_same_in_any_company(client, world, doctors):
    """A row that is scored next to others must not get the padding, the weights or the tokens of those."""
    ids = world.tokenizer(TEXTS[1])["input_ids"]
    busy = [
        threading.Thread(target=complete, args=(client, TEXTS[0]), kwargs=dict(n=4, max_tokens=64, temperature=1))
        for _ in range(3)
    ]
    for thread in busy:
        thread.start()
    for calm in (0.0, 0.25, 0.5):
        weights = {"calm": calm, "wild": 0.1}
        answer = complete(client, ids, echo=True, logprobs=1, max_tokens=1, extra_body={"weights": weights})
        logps = guided_by_hand(world, doctors, ids, 0.9 - calm, weights)
        scores = answer.choices[0].logprobs.token_logprobs
        assert scores[1:-1] == pytest.approx(score_by_hand(logps, ids), abs=1e-4)
    for thread in busy:
        thread.join()


def test_scores_of_a_stream(client):
    """A stream that leaves out the prompt's scores would be taken for one of a prompt without any."""
    asked = dict(echo=True, logprobs=1, max_tokens=3)
    whole = complete(client, TEXTS[0], **asked).choices[0]
    chunks = [chunk.choices[0] for chunk in complete(client, TEXTS[0], **asked, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    parts = [chunk.logprobs for chunk in chunks if chunk.logprobs]
    assert [x for part in parts for x in part.tokens] == whole.logprobs.tokens
    assert [x for part in parts for x in part.token_logprobs] == pytest.approx(whole.logprobs.token_logprobs, abs=1e-5)


def test_the_end_of_a_text_has_a_score(client, world):
    """Benchmarks take the last score off as that of the token they had to ask for, also where it is EOS."""
    prompt = world.tokenizer.apply_chat_template(
        world.prompts("test")[0], add_generation_prompt=True, return_dict=False
    )
    whole = complete(client, prompt, max_tokens=64, logprobs=1).choices[0]
    assert whole.finish_reason == "stop" and whole.logprobs.tokens[-1] == world.tokenizer.eos_token
    said = world.tokenizer.convert_tokens_to_ids([token.strip() for token in whole.logprobs.tokens])
    last = complete(client, prompt + said[:-1], max_tokens=1, logprobs=1, echo=True).choices[0]
    assert len(last.logprobs.tokens) == len(prompt) + len(said)
    assert last.logprobs.token_logprobs[-1] == pytest.approx(whole.logprobs.token_logprobs[-1], abs=1e-4)


def test_a_prompt_that_overflows_is_no_score():
    """NaN is no JSON: the client would get half an answer, and those who are scored with it none."""
    patient = make_llama(1)
    with torch.no_grad():
        patient.model.embed_tokens.weight[7] = float("inf")
    events = {}
    engine = Engine(patient, make_tokenizer(), {})
    done = threading.Semaphore(0)

    def listen(name):
        def on_event(event):
            events.setdefault(name, []).append(event)
            done.release() if "finish_reason" in event else None

        return on_event

    for name, ids in {"good": [5, 6, 8], "bad": [5, 7, 8]}.items():
        engine.submit(Generation(ids, listen(name), max_new_tokens=0, with_prompt=True))
    assert done.acquire(timeout=20) and done.acquire(timeout=20)
    engine.close()
    assert [event.get("finish_reason") for event in events["bad"]] == ["error"]
    assert [len(event.get("prompt", [])) for event in events["good"]] == [3, 0]


def test_a_completion_that_arrives_during_the_last_step_ends():
    """Its client would wait forever."""
    engine = Engine(make_llama(1), make_tokenizer(), {})
    closing, reasons = threading.Thread(target=engine.close), []

    def submit_and_close(event):
        if not closing.ident:  # during a step
            engine.submit(Generation([5, 6], lambda event: reasons.append(event.get("finish_reason"))))
            closing.start()
            while not engine._is_closed:
                time.sleep(0.001)

    engine.submit(Generation([5, 6, 8], submit_and_close, max_new_tokens=4))
    engine._thread.join(timeout=20)
    closing.join(timeout=20)
    assert reasons == ["cancelled"]


# lm-evaluation-harness

QUESTIONS = [
    ("the park inn is", [" good", " the park inn", " superb plates and the soup"]),
    ("we liked the station cafe. the soup was", [" cold", " so much for the cafe."]),
    ("so much for", [" the inn.", " the families bickered near the plates."]),
]


@pytest.fixture
def task(tmp_path):
    """A folder with a multiple-choice task of the harness, and its questions."""
    rows = [{"question": question, "choices": choices, "gold": 0} for question, choices in QUESTIONS]
    write_rows(tmp_path / "questions.jsonl", rows)
    config = {
        "task": "reviews",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "reviews.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"batch_size": 4}, {"num_concurrent": 3}, {"tokenized_requests": False}])
def test_lm_eval_gets_the_guided_log_likelihoods(settings, task, url, world, doctors, monkeypatch):
    """The benchmark of a doctor would be one of the patient alone, or of texts that are one token off."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    tokenizer = str(world.weights / "patient")
    arguments = dict(
        model="mild", base_url=f"{url}/v1/completions", tokenizer=tokenizer, tokenizer_backend="huggingface"
    )
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=arguments | {name: value for name, value in settings.items() if name != "batch_size"},
        tasks=["reviews"],
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
        bootstrap_iters=0,
        batch_size=settings.get("batch_size", 1),
    )
    num_right = 0
    for sample, (question, choices) in zip(results["samples"]["reviews"], QUESTIONS, strict=True):
        expected = []
        for choice in choices:
            ids = world.tokenizer(question + choice)["input_ids"]
            logps = guided_by_hand(world, doctors, ids, 0.9, {"calm": 0.1, "wild": 0.0})
            num_before = len(world.tokenizer(question)["input_ids"])
            scores = score_by_hand(logps, ids)[num_before - 1 :]
            is_greedy = logps[num_before - 1 : -1].argmax(dim=-1).tolist() == ids[num_before:]
            expected.append((sum(scores), is_greedy))
        found = [response[0] for response in sample["filtered_resps"]], [x[1] for x in sample["filtered_resps"]]
        assert found[0] == pytest.approx([score for score, _ in expected], abs=1e-3)
        assert found[1] == [is_greedy for _, is_greedy in expected]
        num_right += max(range(len(choices)), key=lambda index: expected[index][0]) == 0
    assert results["results"]["reviews"]["acc,none"] == pytest.approx(num_right / len(QUESTIONS))
