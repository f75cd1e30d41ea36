# SPDX-License-Identifier: Apache-2.0

"""A doctor whose embeddings do not know what the faces reward gets a row of its own for each token."""

import copy

import pytest
import torch
from conftest import make_llama
from test_calibration import EOS, SIZE, annotated_pairs, made_up_pairs
from trainers import make_trainer
from transformers import AutoModelForCausalLM

from trl_tfpo.models.guidance_head import GuidanceHead
from trl_tfpo.training.head_choice import explained_variance


def test_what_tokens_and_embeddings_explain():
    """Values with variance 1 under noise with variance 1 explain half of the variance of the gaps."""
    dataset, embeddings, values = made_up_pairs(num_pairs=600)
    expected = values[3:].var() / (values[3:].var() + 1)
    by_token, by_embedding = explained_variance(dataset, embeddings, [EOS])
    assert by_token == pytest.approx(expected.item(), abs=0.06)
    assert by_embedding == pytest.approx(expected.item(), abs=0.06)
    others = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1))
    by_token, by_embedding = explained_variance(dataset, others, [EOS])
    assert by_token == pytest.approx(expected.item(), abs=0.06) and by_embedding < 0.3 * by_token
    by_token, by_embedding = explained_variance(made_up_pairs(num_pairs=600, signal=0.0)[0], embeddings, [EOS])
    assert abs(by_token) < 0.01 and abs(by_embedding) < 0.01


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_head_outside_the_span(is_tied, tmp_path):
    """Else a small doctor learns half of what it could, as its words are alike where the faces differ."""
    dataset, embeddings = annotated_pairs(100, noise=1.0)
    doctor = make_llama(2, hidden_size=8)
    doctor.config.tie_word_embeddings = is_tied
    doctor.tie_weights()
    knowing = copy.deepcopy(doctor)
    with torch.no_grad():
        knowing.get_output_embeddings().weight.zero_()[: len(embeddings), :SIZE] = embeddings
        doctor.get_output_embeddings().weight[:, 1:] = 0  # one random number for each token
    settings = dict(calibrate_rewards=False)
    assert isinstance(make_trainer(dataset, tmp_path, knowing, **settings).model.lm_head, GuidanceHead)
    few = make_trainer(dataset.select(range(63)), tmp_path, copy.deepcopy(doctor), **settings)
    assert isinstance(few.model.lm_head, GuidanceHead)

    trainer = make_trainer(dataset, tmp_path, doctor, **settings)
    head = trainer.model.lm_head
    assert type(head) is torch.nn.Linear and not head.weight.any()  # it starts at what is guided
    embeddings = trainer.model.get_input_embeddings().weight
    assert embeddings.requires_grad and embeddings is not head.weight
    before = embeddings.detach().clone()
    trainer.train()
    assert head.weight.any() and not embeddings.equal(before)
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.lm_head.weight.allclose(head.weight - head.weight.mean(dim=0), atol=1e-5)
