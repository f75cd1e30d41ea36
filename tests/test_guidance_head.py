# SPDX-License-Identifier: Apache-2.0

"""A head in the span of the vocabulary embeddings is the same doctor in training, saved, and loaded as any model."""

import pytest
import torch
from conftest import make_llama
from test_base_policy import BATCH, plain_logits, tokens_of
from transformers import AutoModelForCausalLM

from trl_tfpo.models.doctor import add_value_head, make_doctor
from trl_tfpo.models.guidance_head import GuidanceHead
from trl_tfpo.models.initial_head import start_at_credits, start_at_zero
from trl_tfpo.training.base_policy import read_base_policy


def trained_doctor(tied: bool = True):
    """A doctor whose head is as if it had been trained."""
    model = make_llama(3)
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    start_at_zero(model, in_span=True)
    torch.nn.init.normal_(model.lm_head.map)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_the_doctor_starts_nowhere_and_its_vocabulary_is_frozen(tied):
    """A head that moves with the input embeddings would guide by what the doctor reads."""
    model = make_llama(3)
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    vocabulary = model.lm_head.weight.detach().clone()
    start_at_zero(model, in_span=True)
    assert isinstance(model.lm_head, GuidanceHead) and not plain_logits(model).any()
    assert model.lm_head.weight.equal(vocabulary) and not model.lm_head.weight.requires_grad
    assert model.get_input_embeddings().weight.requires_grad is not tied and model.lm_head.map.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_doctor_is_an_ordinary_model(tied, tmp_path):
    """Whoever loads the folder with transformers must get the same guidance, without this class."""
    model = trained_doctor(tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.lm_head) is torch.nn.Linear and loaded.config.guidance == {"alpha": 1.0, "beta": 1.0}
    torch.testing.assert_close(plain_logits(loaded).log_softmax(-1), plain_logits(model).log_softmax(-1))
    assert loaded.lm_head.weight.sum(dim=0).abs().max() < 1e-4  # by which a ratio is told from a language model
    assert loaded.get_input_embeddings().weight.equal(model.get_input_embeddings().weight)

    again = make_llama(3)
    again.config.tie_word_embeddings = tied
    again.tie_weights()
    start_at_zero(again, in_span=True)
    again.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(again.lm_head.map, model.lm_head.map, atol=1e-4, rtol=1e-4)
    assert again.lm_head.weight.equal(model.lm_head.weight)


@pytest.mark.parametrize("same_vocabulary", [True, False], ids=["hidden states added", "side by side"])
def test_one_product_stands_for_two(same_vocabulary):
    """With equal embeddings the sum of two products is one product: a shortcut must not change what is learned."""
    doctor = trained_doctor()
    patient = make_llama(3 if same_vocabulary else 4)
    patient.config.tie_word_embeddings = True
    patient.tie_weights()
    with torch.no_grad():  # the vocabulary stays
        for layer in patient.model.layers:
            layer.mlp.up_proj.weight.mul_(2)
    add_value_head(doctor)
    found = tokens_of(doctor(**BATCH, base_logits=read_base_policy(patient, **BATCH)[0]))
    found.square().sum().backward()
    gradient = doctor.lm_head.map.grad.clone()
    doctor.lm_head.map.grad = None
    guided = (plain_logits(patient).detach() + plain_logits(doctor)).log_softmax(-1)
    is_token, ids = BATCH["completion_mask"][:, 1:], BATCH["input_ids"][:, 1:, None]
    expected = guided.gather(2, ids)[..., 0][is_token]
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, doctor.lm_head.map.grad, atol=1e-4, rtol=1e-4)


def test_the_head_starts_at_given_logits():
    """A doctor that starts at the credits of tokens needs not learn them; at others it starts with a fault."""
    torch.manual_seed(0)
    head = GuidanceHead(torch.nn.Parameter(torch.randn(40, 6)))
    wanted = head.weight.detach() @ torch.randn(6) + 3.0  # in the span, up to a constant
    states = torch.randn(50, 6) + torch.tensor([20.0, 0, 0, 0, 0, 0])  # as of language models, far from zero
    head.start_at(wanted, states)
    difference = head(states).detach() - wanted
    spread = difference - difference.mean(dim=1, keepdim=True)
    assert spread.square().mean().sqrt() < 0.1 * wanted.std()


def test_a_doctor_starts_at_credits():
    """The rewards of tokens are known before training; what has no room for them starts at zero."""
    doctor = make_doctor(make_llama(3, hidden_size=8), guides=True)
    credits = doctor.lm_head.weight.detach() @ torch.randn(8)
    start_at_credits(doctor, credits, [BATCH], lambda rows: rows[0])
    logits = plain_logits(doctor)[BATCH["completion_mask"][:, 1:]]
    centered = logits - logits.mean(dim=1, keepdim=True)
    assert torch.corrcoef(torch.stack([centered.mean(dim=0), credits]))[0, 1] > 0.9
    free = make_llama(3)
    start_at_zero(free)
    start_at_credits(free, credits, [BATCH], lambda rows: rows[0])
    assert not plain_logits(free).any()
