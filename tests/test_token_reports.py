# SPDX-License-Identifier: Apache-2.0

"""Reports of rewards and traces show the right number at each token, and escape all text."""

import re

import pytest
import torch
from datasets import Dataset

from trl_tfpo import (
    DoctorGuidedLogitsProcessor,
    annotate_token_rewards,
    guided_generate,
    reward_report,
    show_token_rewards,
    show_trace,
)
from trl_tfpo.common.heat_map import TokenMap
from trl_tfpo.decoding.trace import GuidanceTrace
from trl_tfpo.testbed import load_world


@pytest.fixture(scope="module")
def world():
    return load_world()


@pytest.fixture(scope="module")
def annotated(world):
    pairs = world.preference_dataset("praise", num_pairs=24, seed=0)
    return annotate_token_rewards(pairs, world.patient, world.tokenizer, faces=world.attributes["praise"].faces)


EVIL = ["<script>alert(1)</script>", "\x1b[31mred", "a\nb", "\u202ereversed", '"quoted"']


def test_what_a_map_shows():
    """A color alone says nothing on a black and white screen, or to one reader in twelve."""
    shown = TokenMap([("text", ["good", " bad", " so"], [2.0, -1.0, 0.0], ["a", "b", "c"])], "legend")
    assert str(shown).splitlines() == ["text: good⁺ bad⁻ so", "legend"]
    assert [line.split() for line in shown.table().splitlines()] == [
        ["text"],
        ["good", "a"],
        ["bad", "b"],
        ["so", "c"],
    ]
    page = shown._repr_html_()
    assert re.findall(r"rgba\((\d+),\d+,\d+,([\d.]+)\)", page) == [("0", "1.00"), ("204", "0.50"), ("204", "0.00")]
    assert re.findall(r'title="(\w)"', page) == ["a", "b", "c"]


def test_nothing_shown_is_obeyed():
    """A model's text that moves the cursor or runs a script attacks whoever looks at it."""
    shown = TokenMap([(EVIL[0], EVIL, [1.0, -1.0, float("nan"), 0.0, 1.0], EVIL)], EVIL[0])
    plain, page = str(shown) + shown.table(), shown._repr_html_()
    assert "\x1b" not in plain and "\u202e" not in plain and "\x1b" not in page
    assert "<script>" not in page and "&lt;script&gt;" in page and '"quoted"' not in page.replace('title="', "")
    assert "a⏎b" in plain


def test_a_pair_shows_its_rewards(world, annotated):
    """A heat map that is off by a token shows the reason for a reward next to it."""
    row = annotated[0]
    shown = show_token_rewards(row, world.tokenizer)
    for (title, tokens, values, notes), name in zip(shown.rows, ("chosen", "rejected"), strict=True):
        assert title == name and values == row[f"{name}_token_rewards"]
        assert len(tokens) == len(values) == len(notes) == len(row[f"{name}_ids"])
        assert tokens[-1].strip() == world.tokenizer.eos_token
        assert "".join(tokens[:-1]) == world.tokenizer.decode(row[f"{name}_ids"], skip_special_tokens=True)
        for note, gap, reward in zip(notes, row[f"{name}_gaps"], values, strict=True):
            assert note.startswith(f"gap {gap:+.2f} nats, importance ") and note.endswith(f"reward {reward:+.2f}")
            if reward:
                is_contradicted = (gap > 0) != (name == "chosen")  # by the label, which leaves half of the reward
                assert f"importance {abs(reward) * (1 + is_contradicted):.2f}" in note
    with pytest.raises(ValueError, match="annotate_token_rewards"):
        show_token_rewards({"chosen": "a", "rejected": "b"}, world.tokenizer)


def test_the_report(world, annotated, tmp_path, recwarn):
    """Rewards that sit on the wrong words, or nowhere, must be seen before a training is paid for."""
    report = reward_report(annotated, world.tokenizer, tmp_path)
    words = world.attributes["praise"].words
    assert all(words[token] == 1 for token, _ in report["most_rewarded"][:3])
    assert all(words[token] == -1 for token, _ in report["most_punished"][:3])
    rewards = [x for row in annotated for x in row["chosen_token_rewards"] + row["rejected_token_rewards"]]
    assert report["sparsity"] == pytest.approx(sum(x == 0 for x in rewards) / len(rewards))
    assert report["agreement"] > 0.7 and len(report["by_position"]) == 10
    assert (tmp_path / "rewards.png").stat().st_size > 5000
    assert "24 pairs" in (tmp_path / "rewards.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rewards.html", "rewards.png"]
    assert not [warning for warning in recwarn if "do not separate" in str(warning.message)]


def test_faces_that_say_nothing_are_noticed(world, annotated, tmp_path):
    """Faces about something else give rewards all the same, and a doctor that learns noise."""
    swapped = [
        {
            name.replace("chosen", "x").replace("rejected", "chosen").replace("x", "rejected"): v
            for name, v in row.items()
        }
        if index % 2
        else row
        for index, row in enumerate(annotated)
    ]
    with pytest.warns(UserWarning, match="do not separate these data"):
        reward_report(Dataset.from_list(swapped), world.tokenizer, tmp_path)
    with pytest.raises(ValueError, match="must have pairs with the columns"):
        reward_report(Dataset.from_list([{"prompt": "a"}]), world.tokenizer, tmp_path)


@torch.no_grad()
def test_a_trace_is_what_was_said(world):
    """A trace that lags by a step blames the token after the one that was changed."""
    conversations = [world.prompts("test")[0], world.prompts("test")[1] * 2]
    inputs = world.tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True,
        tokenizer_kwargs={"padding_side": "left"},
    )  # fmt: skip
    guide = DoctorGuidedLogitsProcessor([world.doctor, load_world().doctor], beta=[0.3, 0.2], return_trace=True)
    for seed in (0, 1):  # the second generation has a trace of its own
        torch.manual_seed(seed)
        output = guided_generate(world.patient, guide, **inputs, max_new_tokens=12, do_sample=True, top_k=0)
        trace = guide.trace(output)
        num_prompt = inputs["input_ids"].size(1)
        assert torch.equal(trace.token_ids, output[:, num_prompt:])
        assert trace.doctor_logps.shape == (2, *trace.patient_logps.shape) == (2, *trace.shift.shape)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(output[:, num_prompt:])], dim=1)
        position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logps = [
            model(output, attention_mask=mask, position_ids=position_ids)
            .logits[:, num_prompt - 1 : -1]
            .log_softmax(-1)
            for model in (world.patient, world.doctor)
        ]
        guided = (0.5 * logps[0] + 0.5 * logps[1]).log_softmax(-1)
        is_before_end = (trace.token_ids == world.tokenizer.eos_token_id).cumsum(dim=1) <= 1
        index = trace.token_ids[:, :, None]
        for mine, theirs in (
            (trace.patient_logps, logps[0]),
            (trace.doctor_logps[0], logps[1]),
            (trace.doctor_logps[1], logps[1]),
            (trace.guided_logps, guided),
        ):
            theirs = theirs.gather(2, index).squeeze(2)
            assert torch.allclose(mine[is_before_end], theirs[is_before_end], atol=1e-4)
    shown = show_trace(trace, world.tokenizer)
    assert len(shown.rows) == 2 and all(len(row[1]) == len(row[2]) for row in shown.rows)
    assert shown.rows[0][2] == trace.shift[0, : len(shown.rows[0][1])].tolist()


def test_what_cannot_be_traced_is_refused(world):
    """A trace of beams would mix texts; the trace of another generation would be believed."""
    ids = torch.tensor([[world.tokenizer.bos_token_id, 9, 10]])
    guide = DoctorGuidedLogitsProcessor(world.doctor, return_trace=True)
    with pytest.raises(ValueError, match="Got none; call `generate` first"):
        guide.trace(ids)
    with pytest.raises(ValueError, match="keep their rows"):
        guided_generate(world.patient, guide, input_ids=ids, num_beams=4, max_new_tokens=12, do_sample=False)
    output = guided_generate(world.patient, guide, input_ids=ids, max_new_tokens=4, do_sample=False)
    assert guide.trace(output).token_ids.shape == (1, output.size(1) - 3)
    with pytest.raises(ValueError, match="pass the output of `generate`"):
        guide.trace(output.flip(1))
    with pytest.raises(ValueError, match="return_trace=True"):
        DoctorGuidedLogitsProcessor(world.doctor).trace(output)


def test_only_what_the_assistant_says_is_reported(tokenizer, tmp_path):
    """The words of a user between two turns have no reward by rule, and would look as if the faces agreed on them."""
    row = {"prompt_ids": [4], "chosen_ids": [5, 2, 6, 7, 8, 2], "chosen_mask": [1, 1, 0, 0, 1, 1]}
    row |= {"chosen_token_rewards": [0.5, 0.0, 0.0, 0.0, 0.5, 0.0], "chosen_gaps": [2.0, 0.0, 0.0, 0.0, 2.0, 0.0]}
    row |= {
        "rejected_ids": [9, 2],
        "rejected_mask": [1, 1],
        "rejected_token_rewards": [-0.5, 0.0],
        "rejected_gaps": [-1.0, 0.0],
    }
    report = reward_report(Dataset.from_list([row] * 20), tokenizer, tmp_path)
    assert report["sparsity"] == pytest.approx(3 / 6)
    notes = show_token_rewards(row, tokenizer).rows[0][3]
    without = {name: value for name, value in row.items() if not name.endswith("mask")}
    deleted = without | {
        "chosen_ids": [5, 2, 8, 2],
        "chosen_token_rewards": [0.5, 0.0, 0.5, 0.0],
        "chosen_gaps": [2.0, 0.0, 2.0, 0.0],
    }
    spoken = [note for note, mask in zip(notes, row["chosen_mask"], strict=True) if mask]
    assert spoken == show_token_rewards(deleted, tokenizer).rows[0][3]


def test_a_trace_ends_at_any_end_of_a_text(world):
    """Padding behind an EOS of the generation config would be shown as if it had been said."""
    eos, other = world.tokenizer.eos_token_id, world.tokenizer.convert_tokens_to_ids("soup")
    shape = torch.zeros(1, 3)
    trace = GuidanceTrace(torch.tensor([[5, other, eos]]), shape, shape[None], shape)
    assert len(show_trace(trace, world.tokenizer).rows[0][1]) == 3
    assert len(show_trace(trace, world.tokenizer, eos_token_ids=[other]).rows[0][1]) == 2
