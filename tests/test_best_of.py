# SPDX-License-Identifier: Apache-2.0

"""The best of several guided completions is the one that the doctors' own credits value most."""

import pytest
import torch
from plain_guidance import BOS, ONE, PAD, PADDED, batch, llama

from trl_tfpo import Doctor, DoctorGuidedLogitsProcessor, guided_generate
from trl_tfpo.cli import main
from trl_tfpo.decoding.best_of import completion_rewards, keep_best
from trl_tfpo.models.token_credits import credited_rewards, load_credits, save_credits


SETTINGS = dict(max_new_tokens=6, do_sample=True, eos_token_id=None, pad_token_id=PAD)


@pytest.fixture(scope="module")
def patient():
    return llama(0)


def credits_of(model, seed: int = 0) -> torch.Tensor:
    credits = torch.randn(model.config.vocab_size, generator=torch.Generator().manual_seed(seed))
    credits[PAD] = 0  # at the end of a completion it is not told from padding
    return credits


def generated(patient, guide, seed=0, **settings):
    torch.manual_seed(seed)
    return guided_generate(patient, guide, **(PADDED | SETTINGS | settings))


@pytest.mark.parametrize("beta, pick", [(0.7, torch.argmax), (-0.7, torch.argmin)])
def test_it_keeps_the_sample_with_the_largest_reward(patient, beta, pick):
    """With a negative exponent what the doctor values least: the sign of the guidance is that of the ranking."""
    doctor = llama(1)
    guide = DoctorGuidedLogitsProcessor(Doctor(doctor, credits=credits_of(doctor)), alpha=1.0, beta=beta)
    samples = generated(patient, guide, num_return_sequences=5)
    kept = generated(patient, guide, best_of=5)
    length = PADDED["input_ids"].size(1)
    for row, of_prompt in zip(kept, samples.chunk(len(kept)), strict=True):
        rewards = credits_of(doctor)[of_prompt[:, length:]].sum(dim=1)
        assert rewards.unique().numel() > 1
        assert torch.equal(row, of_prompt[pick(rewards)])
    assert torch.equal(generated(patient, guide, best_of=1), generated(patient, guide))


def test_tokens_after_the_end_do_not_count(patient):
    """Padding behind a short completion has a credit as well."""
    doctor = llama(1)
    credits = credits_of(doctor)
    credits[PAD] = 100.0
    guide = DoctorGuidedLogitsProcessor(Doctor(doctor, credits=credits), beta=0.5)
    vocabulary = list(range(doctor.config.vocab_size))
    eos = vocabulary[4::2]  # most completions end early
    samples = generated(patient, guide, num_return_sequences=8, eos_token_id=eos)[:, PADDED["input_ids"].size(1) :]
    rewards = []
    for row in samples.tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        rewards.append(sum(credits[token].item() for token in row[:end]))
    best = torch.tensor(rewards).view(-1, 8).argmax(dim=1)
    expected = samples.view(-1, 8, samples.size(1))[torch.arange(len(best)), best]
    assert (samples == PAD).any()
    found = generated(patient, guide, best_of=8, eos_token_id=eos)[:, PADDED["input_ids"].size(1) :]
    width = min(found.size(1), expected.size(1))
    assert torch.equal(found[:, :width], expected[:, :width])


def test_padding_after_a_stop_does_not_count(patient):
    """What stops a row may be no token: `generate` then fills it up."""
    doctor = llama(1)
    credits = credits_of(doctor)
    credits[PAD] = 100.0
    guide = DoctorGuidedLogitsProcessor(Doctor(doctor, credits=credits))
    prompt = [BOS, 5]
    short, long = [*prompt, 7, PAD, PAD], [*prompt, 7, PAD, 8]
    credits[7], credits[8] = 1.0, -500.0
    for rows, best in (([short, long], short), ([long, short], short)):
        kept = keep_best(guide, torch.tensor(rows), 2, prompt_length=2, eos_token_id=None, pad_token_id=PAD)
        assert kept.tolist() == [best]
    assert completion_rewards(guide, torch.tensor([[7, PAD]]), torch.tensor([[True, False]])).item() == 0.5


def test_several_doctors_rank_together():
    """Weights that steer are weights that rank, by prompt; a doctor that is switched off needs no credits."""
    one, two = llama(1), llama(2)
    a, b = credits_of(one, 1), credits_of(two, 2)
    ids, mask = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([[True, True, False], [True, True, True]])
    doctors = [Doctor(one, credits=a), Doctor(two, credits=b), llama(3)]
    guide = DoctorGuidedLogitsProcessor(
        doctors, 1.0, beta=[torch.tensor([0.5, 1.0]), -2.0, 0.0], reference=[llama(4), None, None]
    )
    expected = torch.tensor([0.5, 1.0]) * credited_rewards(a, ids, mask) - 2 * credited_rewards(b, ids, mask)
    assert torch.allclose(completion_rewards(guide, ids, mask), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(best_of=0), "at least 1. Got 0"),
        (dict(do_sample=False), "Got `do_sample=False`"),
        (dict(num_beams=2), "Got `num_beams`"),
        (dict(num_return_sequences=2), "Got `num_return_sequences`"),
        (dict(speculative=True), "Got `speculative`"),
        (dict(return_dict_in_generate=True), "Got `return_dict_in_generate`"),
    ],
)
def test_what_cannot_be_ranked_is_refused(patient, change, message):
    """A mode that returns something else would be ranked by chance."""
    doctor = llama(1)
    guide = DoctorGuidedLogitsProcessor(Doctor(doctor, credits=credits_of(doctor)))
    with pytest.raises(ValueError, match=message):
        guided_generate(patient, guide, **(ONE | SETTINGS | dict(best_of=2) | change))


def test_doctors_without_credits_are_refused_before_anything_is_generated(patient):
    """Else the first sample would be returned as the best."""
    guide = DoctorGuidedLogitsProcessor(llama(1))
    with pytest.raises(ValueError, match="Got a doctor without credits"):
        guided_generate(patient, guide, **ONE, **SETTINGS, best_of=2)
    assert guide.num_calls == 0
    later = DoctorGuidedLogitsProcessor(Doctor(llama(1), credits=torch.zeros(40)), beta=lambda step: step / 5)
    with pytest.raises(ValueError, match="Got 0 for all"):
        guided_generate(patient, later, **ONE, **SETTINGS, best_of=2)
    short = DoctorGuidedLogitsProcessor(Doctor(llama(1), credits=torch.zeros(3)))
    with pytest.raises(ValueError, match="from 0 to 2, the ids with credits. Got"):
        guided_generate(patient, short, input_ids=batch([BOS, 5])["input_ids"], **SETTINGS, best_of=2)


def test_credits_come_back_from_the_folder(tmp_path):
    """The ranking of a saved doctor is that of its training."""
    credits = torch.tensor([0.5, -0.25, 0.0])
    (tmp_path / "sub").mkdir()
    assert load_credits(tmp_path) is None
    save_credits(credits, tmp_path)
    assert torch.equal(load_credits(tmp_path), credits)
    save_credits(-credits, tmp_path / "sub")
    assert torch.equal(load_credits(tmp_path, subfolder="sub", dtype=torch.float32), -credits)
    save_credits(None, tmp_path)  # another doctor in the same folder, without credits
    assert load_credits(tmp_path) is None


def test_the_command_line_ranks(tmp_path, capsys):
    """`--best_of` without a doctor, or with one that has no credits, would be silently nothing."""
    assert main(["generate", "--world", "--prompt", "please review the park inn.", "--best_of", "2"]) != 0
    assert "without `--doctor`" in capsys.readouterr().err
