# SPDX-License-Identifier: Apache-2.0

"""Two texts in one row give the states, losses and gradients of two texts apart, with less arithmetic."""

import pytest
import torch
from plain_guidance import gpt2, llama, mistral
from transformers import MambaConfig, MambaForCausalLM

from trl_tfpo.models.doctor import add_value_head
from trl_tfpo.models.pair_rows import pair_rows, reads_pairs, worthwhile_pair_rows


NUM_PAIRS, LENGTH = 5, 20


def eager(seed):
    model = llama(seed)
    model.set_attn_implementation("eager")
    return model


def bfloat16(seed):
    return llama(seed).to(torch.bfloat16)


def mamba(seed):
    torch.manual_seed(seed)
    return MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)).eval()


@pytest.fixture(scope="module")
def texts():
    """Pairs with a common beginning of 7 tokens, of all tokens, of none, and one text that is a part of the other."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 32, (2 * NUM_PAIRS, LENGTH), generator=generator)
    first, second = ids.chunk(2)  # views
    second[:, :7] = first[:, :7]
    second[1:3] = first[1:3]
    second[3, 0] = first[3, 0] % 29 + 3
    lengths = torch.tensor([20, 12, 9, 15, 8, 13, 12, 20, 9, 20])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("make", [llama, eager, gpt2])
def test_states_are_those_of_texts_apart(make, texts):
    """Else the rejected completion would be read with words of the chosen one."""
    model, (ids, mask) = make(0), texts
    assert reads_pairs(model)
    rows = pair_rows(ids, mask, model)
    with torch.no_grad():
        apart = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        together = rows.unpack(model.base_model(**rows.inputs).last_hidden_state)
    torch.testing.assert_close(together[mask.bool()], apart[mask.bool()])
    assert rows.inputs["input_ids"].shape == (NUM_PAIRS, 20 + 13 - 7)  # the first pair is the longest


@pytest.mark.parametrize("has_base", [False, True])
def test_log_probabilities_values_and_gradients_are_those_of_texts_apart(texts, monkeypatch, has_base):
    """Training must learn the same, whichever way it reads."""
    ids, mask = texts
    completion_mask = (torch.arange(LENGTH) >= 6) & mask.bool()
    found, num_read = [], {False: [], True: []}
    for is_paired in (False, True):
        doctor = llama(0).train()
        add_value_head(doctor)
        torch.nn.init.normal_(doctor.value_head.weight, generator=torch.Generator().manual_seed(1))
        doctor.get_input_embeddings().register_forward_hook(
            lambda _, args, __, counts=num_read[is_paired]: counts.append(args[0].numel())
        )
        if not is_paired:
            monkeypatch.setattr("trl_tfpo.models.logits.worthwhile_pair_rows", no_rows)
        num_labels = int(completion_mask.sum())
        base = torch.randn(num_labels, 32, generator=torch.Generator().manual_seed(2)) if has_base else None
        output = doctor(
            input_ids=ids,
            attention_mask=mask,
            completion_mask=completion_mask,
            base_logits=None if base is None else [base],
        )
        is_state = torch.cat([torch.ones(len(ids), 1, dtype=torch.bool), output.completion_mask], dim=1)
        loss = output.doctor_logps.square().sum() + output.log_values[is_state].square().sum()
        loss.backward()
        monkeypatch.undo()
        found.append([loss.detach(), *(parameter.grad for parameter in doctor.parameters())])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    assert max(num_read[True]) < 0.9 * max(num_read[False])


def no_rows(*_, **__):
    """Read every text apart."""


@pytest.mark.parametrize("make", [mistral, mamba])
def test_models_with_a_window_or_a_state_read_texts_apart(make):
    """Their states depend on where a token is in the row."""
    assert not reads_pairs(make(0))


def test_half_precision_reads_pairs():
    """Rounding is not a reason to read the prompt twice."""
    assert reads_pairs(bfloat16(0))


@pytest.mark.parametrize("num_texts, num_common", [(3, 7), (4, 0)])
def test_texts_that_share_too_little_are_read_apart(num_texts, num_common):
    """A longer row costs more attention, and an odd number of texts has no pairs."""
    ids = torch.randint(3, 32, (num_texts, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, :num_common] = ids[:1, :num_common]
    assert worthwhile_pair_rows(ids, torch.ones_like(ids), llama(0)) is None
