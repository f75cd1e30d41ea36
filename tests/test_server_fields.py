# SPDX-License-Identifier: Apache-2.0

"""Fields of OpenAI's interface: a field that would change nothing is accepted, and no other is ignored."""

import httpx
import openai
import pytest
import torch
from conftest import CHAT_TEMPLATE, KEY, WORDS, make_llama, make_tokenizer, serving
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from trl_tfpo import DoctorGuidedLogitsProcessor, guided_generate
from trl_tfpo.server import Engine, Generation, make_app
from trl_tfpo.server.generation import Row
from trl_tfpo.server.protocol import ChatRequest, TextRequest
from trl_tfpo.server.token_texts import TokenTexts


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PARK = [{"role": "user", "content": "please review the park inn."}]


def post(url, path, body, key=KEY):
    """The answer to a body as it is, of which a client's library would leave out a part."""
    return httpx.post(url + path, json=body, headers={"authorization": f"Bearer {key}"}, timeout=60)


def say(url, **changes):
    """What a greedy chat completion says."""
    answer = post(url, CHAT, {"model": "world", "messages": PARK, "temperature": 0, "max_tokens": 8} | changes)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


# Fields that change nothing

NEUTRAL = {
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "auto",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "verbosity": "medium",
    "store": False,
    "metadata": {},
    "service_tier": "auto",
    "logit_bias": {},
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "top_k": -1,
    "min_p": 0,
    "n": 1,
    "stop": [],
    "logprobs": False,
    "top_logprobs": 0,
    "user": "somebody",
    "safety_identifier": "somebody",
    "prompt_cache_key": "a",
    "chat_template_kwargs": {"enable_thinking": False},
    "stream": False,
    "skip_special_tokens": True,
    "ignore_eos": False,
    "length_penalty": 1.0,
    "min_tokens": 0,
    "weights": {},
}


@pytest.mark.slow
def test_fields_that_change_nothing_are_accepted(url):
    """Clients send them whether they are asked to or not; a server that refuses them has no clients."""
    plain = say(url)
    for name, value in NEUTRAL.items():
        assert say(url, **{name: value}) == plain, name
    assert say(url, **NEUTRAL) == plain
    of_texts = [name for name in NEUTRAL if name in TextRequest.model_fields and name not in ("logprobs", "n")]
    text = {"model": "world", "prompt": "the park", "temperature": 0}
    changed = text | {name: NEUTRAL[name] for name in of_texts} | {"echo": False, "best_of": 1, "suffix": ""}
    answers = [post(url, TEXT, body).json()["choices"][0]["text"] for body in (text, changed)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("path, request_class", [(CHAT, ChatRequest), (TEXT, TextRequest)], ids=["chat", "text"])
def test_null_is_nothing(path, request_class, url):
    """Libraries of typed languages write every field of a request, as null where it is not set."""
    needed = {"model": "world", "messages": PARK} if path == CHAT else {"model": "world", "prompt": "the park"}
    nulls = dict.fromkeys(request_class.model_fields) | {"temperature": 0, "max_tokens": 4} | needed
    more = dict.fromkeys(["reasoning_effort", "audio", "prediction", "web_search_options", "guided_json"])
    answers = [post(url, path, body) for body in (nulls | more, needed | {"temperature": 0, "max_tokens": 4})]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    assert answers[0].json()["choices"] == answers[1].json()["choices"]


def test_fields_with_an_effect_that_is_not_there_are_refused_by_name(url):
    """An answer without the JSON, the tool or the length that was asked for looks like one with them."""
    effects = {
        **{"tools": [{"type": "function"}], "tool_choice": "required", "functions": [{"name": "f"}]},
        **{"response_format": {"type": "json_object"}, "modalities": ["audio"], "verbosity": "low", "store": True},
        **{"metadata": {"a": "b"}, "service_tier": "flex", "reasoning_effort": "low", "min_tokens": 3},
        **{"ignore_eos": True, "stop_token_ids": [3], "use_beam_search": True, "guided_json": {}, "best_of": 3},
    }
    for name, value in effects.items():
        answer = post(url, CHAT, {"model": "world", "messages": PARK, name: value})
        assert answer.status_code == 400 and name in answer.json()["error"]["message"], name


def test_an_answer_can_be_sent_back(client, url):
    """In the second turn of every chat the client echoes the first answer, with all fields that the library has."""
    answer = client.chat.completions.create(model="world", messages=PARK, temperature=0, max_tokens=8)
    message = answer.choices[0].message
    turn = [{"role": "user", "content": "please review the station cafe."}]
    plain = [*PARK, {"role": "assistant", "content": message.content}, *turn]
    empty = {"refusal": None, "annotations": [], "tool_calls": [], "function_call": None, "audio": None}
    echoes = [message.model_dump(), message.model_dump() | empty | {"tool_calls": None}, plain[1] | empty]
    assert len({say(url, messages=[*PARK, echo, *turn]) for echo in [plain[1], *echoes]}) == 1


def test_parts_and_developers(url, world):
    """Newer clients send the content as parts, and the instruction under another name."""
    parts = [{"type": "text", "text": "please review "}, {"type": "text", "text": "the park inn."}]
    assert say(url, messages=[{"role": "user", "content": parts}]) == say(url)
    instruction = world.attributes["praise"].faces.negative
    instructions = [{"role": role, "content": instruction} for role in ("system", "developer")]
    answers = [say(url, messages=[instruction, *PARK], max_tokens=64) for instruction in instructions]
    assert answers[0] == answers[1] != say(url, max_tokens=64)


def test_max_completion_tokens(client):
    """The newer name of a limit that, ignored, would be paid for."""
    for settings in ({"max_completion_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 5}):
        answer = client.chat.completions.create(model="world", messages=PARK, **settings, temperature=0)
        assert answer.usage.completion_tokens == 3


def test_models_are_listed_and_found(client):
    """Clients offer what `/v1/models` lists, and look up what they were told."""
    listed = {model.id: model.doctors for model in client.models.list()}
    assert listed["world"] == {"calm": 0.25, "wild": 0.25} and listed["mild"] == {"calm": 0.1, "wild": 0.0}
    for name, doctors in listed.items():
        assert client.models.retrieve(name).doctors == doctors
    with pytest.raises(openai.NotFoundError, match="'world' or 'mild' or 'wild'"):
        client.models.retrieve("other")


def test_an_alias_carries_weights(client, url):
    """Tools that know nothing but the name of a model, such as benchmarks, choose the weights by it."""
    assert say(url, model="mild") == say(url, weights={"calm": 0.1, "wild": 0.0})
    assert say(url, model="wild") == say(url, weights={"calm": 0.0, "wild": 0.9}) != say(url, model="mild")
    assert say(url, model="wild", weights={"wild": 0.2}) == say(url, weights={"calm": 0.0, "wild": 0.2})
    assert client.chat.completions.create(model="mild", messages=PARK, max_tokens=1).model == "mild"


def test_template_variables_reach_the_template():
    """A model that thinks unless it is told not to would think, and the client wait for it and pay."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "' <assistant>' }}", "' <assistant>' }}{% if enable_thinking %}{{ ' you are' * depth }}{% endif %}"
    )
    body = {"model": "tiny", "messages": [{"role": "user", "content": "say good"}], "max_tokens": 1}
    engine = Engine(make_llama(1), tokenizer, {})
    with serving(make_app(engine, model_name="tiny")) as url:

        def num_prompt_tokens(**given):
            answer = post(url, CHAT, body | {"chat_template_kwargs": given}).json()
            return answer["usage"]["prompt_tokens"] if "usage" in answer else answer["error"]["message"]

        assert num_prompt_tokens() == num_prompt_tokens(enable_thinking=False, documents_are_known=None) == 5
        assert num_prompt_tokens(enable_thinking=True, depth=2) == 9
        assert "Got 'thinking'" in num_prompt_tokens(thinking=True)
        assert "must fit the chat template" in num_prompt_tokens(enable_thinking=True, depth="a")
        for name in ("tools", "chat_template", "tokenize", "messages", "conversation", "add_generation_prompt"):
            assert f"Got {name!r}" in num_prompt_tokens(**{name: None})


# Streams


def test_a_stream_begins_with_who_speaks(client):
    """Libraries put a message together from its deltas; one without a role cannot be sent back."""
    chunks = list(client.chat.completions.create(model="world", messages=PARK, n=2, seed=3, stream=True))
    roles = [(chunk.choices[0].index, chunk.choices[0].delta.role) for chunk in chunks]
    assert roles[:2] == [(0, "assistant"), (1, "assistant")] and {role for _, role in roles[2:]} == {None}
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].id.startswith("chatcmpl-")
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    whole = client.chat.completions.create(model="world", messages=PARK, n=2, seed=3)
    for index, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(x.delta.content or "" for x in own) == choice.message.content
        assert [x.finish_reason for x in own if x.finish_reason] == [choice.finish_reason]
    completions = (
        client.chat.completions if hasattr(client.chat.completions, "stream") else client.beta.chat.completions
    )
    with completions.stream(model="world", messages=PARK, temperature=0) as stream:
        message = stream.get_final_completion().choices[0].message
    assert (message.role, message.content) == ("assistant", say_whole(client))


def say_whole(client):
    return client.chat.completions.create(model="world", messages=PARK, temperature=0).choices[0].message.content


def test_a_stream_ends_with_its_usage(client):
    """Whoever pays by the token asks for the usage of a stream, in a last chunk without choices."""
    for create, prompt in (
        (client.chat.completions.create, {"messages": PARK}),
        (client.completions.create, {"prompt": ["the park", "the inn is"]}),
    ):
        asked = prompt | {"model": "world", "temperature": 0, "max_tokens": 4}
        with_usage = list(create(**asked, stream=True, stream_options={"include_usage": True}))
        assert with_usage[-1].choices == [] and with_usage[-1].usage == create(**asked).usage
        assert all(chunk.usage is None and chunk.choices for chunk in with_usage[:-1])
        assert all(chunk.choices for chunk in create(**asked, stream=True))


def test_more_than_four_stops(client):
    """Benchmarks pass a list of all that ends an answer; OpenAI's limit of four is not ours."""
    whole = say_whole(client)
    stops = [f"never {number}" for number in range(20)] + [whole[12:22]]
    for stream in (False, True):
        answer = client.chat.completions.create(model="world", messages=PARK, temperature=0, stop=stops, stream=stream)
        pieces = [x.choices[0].delta.content or "" for x in answer] if stream else [answer.choices[0].message.content]
        assert "".join(pieces) == whole[: whole.index(stops[-1])]


# Penalties


class Counted(LogitsProcessor):
    """Presence and frequency penalty, as a processor of `generate`: on tokens after the prompt."""

    def __init__(self, num_prompt, presence, frequency):
        self.num_prompt, self.presence, self.frequency = num_prompt, presence, frequency

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for token in input_ids[0, self.num_prompt :].tolist():
            scores[0, token] -= self.frequency
        for token in set(input_ids[0, self.num_prompt :].tolist()):
            scores[0, token] -= self.presence
        return scores


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [None, 1.0, 0.25])
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.4},
        {"logit_bias": {98: 6.0, 71: -100}},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 1.2, "presence_penalty": -1.0, "frequency_penalty": 2.0, "logit_bias": {98: 5.0}},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_penalties_act_where_they_do_in_generate(settings, alpha, client, world, doctors):
    """Penalties are applied before guidance, as by the library."""
    inputs = world.tokenizer.apply_chat_template(
        PARK, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    num_prompt = inputs["input_ids"].size(1)
    guide = DoctorGuidedLogitsProcessor(
        list(doctors.values()), alpha=alpha, beta=[0.3, 0.2], attention_mask=inputs["attention_mask"]
    )
    bias = {
        (token,): -torch.inf if value == -100 else value for token, value in settings.get("logit_bias", {}).items()
    }
    counted = Counted(num_prompt, settings.get("presence_penalty", 0.0), settings.get("frequency_penalty", 0.0))
    output = world.patient.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=64,
        sequence_bias={token: max(value, -1e4) for token, value in bias.items()} or None,
        repetition_penalty=settings.get("repetition_penalty", 1.0),
        logits_processor=[counted, guide],
    )
    expected = world.tokenizer.decode(output[0, num_prompt:], skip_special_tokens=True)
    known = {name: settings[name] for name in settings if name != "repetition_penalty"}
    extra = {"weights": {"calm": 0.3, "wild": 0.2}, "repetition_penalty": settings.get("repetition_penalty")}
    answer = client.chat.completions.create(
        model="world", messages=PARK, temperature=0, **known, extra_body=extra | {"alpha": alpha}
    )
    assert answer.choices[0].message.content == expected
    assert expected != guided_answer(world, guide, inputs)


def guided_answer(world, guide, inputs):
    output = guided_generate(world.patient, guide, **inputs, do_sample=False, max_new_tokens=64)
    return world.tokenizer.decode(output[0, inputs["input_ids"].size(1) :], skip_special_tokens=True)


@pytest.mark.slow
def test_truncation_is_that_of_generate():
    """A cut before temperature keeps other tokens than after it, and one of another order keeps more or fewer."""
    logps = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()

    def drawn(**settings):
        row = Row(Generation([1], print, seed=0, **settings), 1.0, [])
        return torch.bincount(torch.tensor([row.sample(logps) for _ in range(3000)]), minlength=5) / 3000

    def close(found, expected):
        return torch.allclose(found, torch.tensor(expected) / sum(expected), atol=0.03)

    assert close(drawn(top_k=2), [0.4, 0.3, 0.0, 0.0, 0.0])
    assert close(drawn(min_p=0.3), [0.4, 0.3, 0.15, 0.0, 0.0])  # at least 0.12
    # At temperature 0.5 the probabilities are 16 : 9 : 2.25 : 1 : 0.25, and only the first two have 0.3 of the largest
    assert close(drawn(min_p=0.3, temperature=0.5), [16.0, 9.0, 0.0, 0.0, 0.0])
    # Of the three that top_k keeps, 0.47, 0.35 and 0.18, the first two have 0.8; of all five they have 0.7
    assert close(drawn(top_k=3, top_p=0.8), [0.4, 0.3, 0.0, 0.0, 0.0])
    assert close(drawn(top_p=0.8), [0.4, 0.3, 0.15, 0.0, 0.0])


def test_logprobs_are_of_the_guided_policy_alone(client, world):
    """Log-probabilities of an answer are those before penalties and temperature."""
    prompt = world.tokenizer.apply_chat_template(PARK, add_generation_prompt=True, return_dict=False)
    settings = dict(temperature=1.7, top_p=0.9, seed=4, presence_penalty=1.0, frequency_penalty=1.0, max_tokens=12)
    said = client.completions.create(model="world", prompt=prompt, logprobs=2, **settings).choices[0].logprobs
    ids = world.tokenizer.convert_tokens_to_ids([token.strip() for token in said.tokens])
    asked = dict(model="world", prompt=[*prompt, *ids], logprobs=2, echo=True, max_tokens=0)
    again = client.completions.create(**asked).choices[0].logprobs
    assert len(ids) == 12 and again.tokens[len(prompt) :] == said.tokens
    assert again.token_logprobs[len(prompt) :] == pytest.approx(said.token_logprobs, abs=1e-4)


# Bytes


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Byte-level BPE with few merges, so that characters beyond ASCII are several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([f"{WORDS} {WORDS}"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def fallback_tokenizer():
    """As in Llama 2: spaces are a part of the word, and what is no word is spelled by bytes."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    words |= {word: len(words) + n for n, word in enumerate(["\u2581", "\u2581good", "\u2581so", "up"])}
    backend = Tokenizer(models.BPE(words, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "words"])
def test_bytes_of_tokens_are_those_of_their_text(kind, byte_tokenizer):
    """Clients put characters together from the bytes of their parts; a replacement character is another text."""
    text = "good soup ñandú 日本 🏳️\u200d🌈 é"
    if kind == "byte-level":
        tokenizer = byte_tokenizer
        ids = tokenizer(text)["input_ids"]
    elif kind == "byte fallback":
        tokenizer = fallback_tokenizer()
        ids = tokenizer.convert_tokens_to_ids(["<s>", "\u2581good", "\u2581so", "up", "\u2581"])
        ids += [3 + byte for byte in text.removeprefix("good soup ").encode()]
    else:
        tokenizer, text = make_tokenizer(), "good soup and bread"
        ids = tokenizer(text)["input_ids"]
    texts = TokenTexts(tokenizer)
    spelled = [texts.spell(token, before) for token, before in zip(ids, [None, *ids[:-1]], strict=True)]
    assert b"".join(token for _, token in spelled).decode() == text == texts.decode(ids)
    assert not any("\ufffd" in token for token, _ in spelled)
    for cut in range(1, len(ids)):
        begun = texts.decode(ids[:cut]).rstrip("\ufffd")
        assert begun + texts.continuation(ids[:cut], ids[cut:]) == text


def test_a_stream_has_whole_characters(byte_tokenizer, monkeypatch):
    """Half a character in a chunk is shown as a question mark that no later chunk takes back."""
    said = " ñandú 日本 🏳️\u200d🌈"
    ids = byte_tokenizer(said)["input_ids"] + [byte_tokenizer.eos_token_id]
    monkeypatch.setattr(Row, "sample", lambda row, logps: ids[len(row.ids)])
    engine = Engine(make_llama(1, vocab_size=len(byte_tokenizer)), byte_tokenizer, {})
    with (
        serving(make_app(engine, model_name="tiny")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client,
    ):
        asked = dict(model="tiny", prompt="é", max_tokens=len(ids), logprobs=3)
        whole = client.completions.create(**asked).choices[0]
        pieces = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
        chat = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a"}], logprobs=True, top_logprobs=3
        )
    assert whole.text == said == "".join(piece.text for piece in pieces) and len(pieces) > 5
    assert not any("\ufffd" in piece.text for piece in pieces)
    assert sum(len(piece.logprobs.tokens) for piece in pieces if piece.logprobs) == len(whole.logprobs.tokens)
    assert len(whole.logprobs.tokens) == len(ids) == chat.usage.completion_tokens  # with EOS
    assert whole.logprobs.tokens[-1] == "</s>" and any(x.startswith("bytes:") for x in whole.logprobs.tokens)
    assert all(len(top) in (3, 4) for top in whole.logprobs.top_logprobs)  # none hides another
    choice = chat.choices[0]
    assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode() == choice.message.content == said
