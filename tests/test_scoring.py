# SPDX-License-Identifier: Apache-2.0

"""A prompt is read once for all its completions, and no completion is the wiser for its neighbours."""

import pytest
import torch
from conftest import make_llama
from plain_guidance import gpt2, llama, mistral
from transformers import MambaConfig, MambaForCausalLM

from trl_tfpo.annotation.scoring import score_completions
from trl_tfpo.models.logits import PLAIN, head_form
from trl_tfpo.models.pair_rows import reads_pairs
from trl_tfpo.models.token_trees import reads_trees


def draw(generator, size: int) -> list[int]:
    return torch.randint(4, 20, (size,), generator=generator).tolist()


@torch.no_grad()
def plain_logps(model, prompt, completion):
    """Each sequence alone, without padding."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def mamba(seed):
    torch.manual_seed(seed)
    return MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)).eval()


def eager(seed):
    model = llama(seed)
    model.set_attn_implementation("eager")
    return model


def grouped(seed):
    """Two heads of queries for each head of keys."""
    return llama(seed, hidden_size=32, num_attention_heads=4)


SHARING = {"sdpa": llama, "grouped": grouped, "eager": eager, "learned positions": gpt2}
MODELS = {**SHARING, "window": mistral, "state space": mamba}


@pytest.mark.parametrize("in_trees", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
@pytest.mark.parametrize("name", MODELS)
def test_each_completion_is_scored_as_if_alone(name, batch_size, in_trees, monkeypatch):
    """Else what is rejected would depend on what was chosen."""
    model, generator = MODELS[name](1), torch.Generator().manual_seed(0)
    monkeypatch.setattr("trl_tfpo.models.token_trees.BLOCK", 4)
    if not in_trees:  # as on a GPU
        monkeypatch.setattr("trl_tfpo.annotation.scoring.reads_trees", lambda _: False)
    prompts = [draw(generator, n) for n in (3, 9, 1, 12)]
    prompts = [*prompts, prompts[1], prompts[3], prompts[1], prompts[0]]  # 9 tokens: three completions
    completions = [draw(generator, n) for n in (7, 1, 4, 2, 10, 3, 5, 1)]
    prompts += [prompts[1] + completions[1], prompts[1][:5], prompts[1]]  # one continues another; the last is repeated
    completions += [completions[0], completions[2], completions[1]]
    scored = score_completions(model, prompts, completions, batch_size=batch_size)
    for prompt, completion, found in zip(prompts, completions, scored, strict=True):
        torch.testing.assert_close(
            found.double(), plain_logps(model, prompt, completion).double(), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name, shares", [(name, name in SHARING) for name in MODELS])
def test_a_prompt_is_read_once_where_attention_allows_it(name, shares):
    """Else most of the time on long prompts would be spent on reading them again."""
    model, generator, num_tokens = MODELS[name](1), torch.Generator().manual_seed(0), []
    prompt, completions = draw(generator, 30), [draw(generator, 5), draw(generator, 5)]
    assert head_form(model) == PLAIN  # asked once, and not counted
    backbone = model.base_model
    backbone.register_forward_pre_hook(
        lambda _, args, kwargs: num_tokens.append((args or (kwargs["input_ids"],))[0].numel()), with_kwargs=True
    )
    score_completions(model, [prompt] * 2, completions, batch_size=2)
    assert num_tokens[-1] == (30 + 4 + 4 if shares else 2 * 34)  # the last token of a completion predicts nothing


@pytest.mark.parametrize("in_trees", [True, False])
def test_faces_share_what_comes_before_the_instruction(in_trees, monkeypatch):
    """Else a conversation would be read once for each face."""
    model, generator, shapes = MODELS["sdpa"](1), torch.Generator().manual_seed(0), []
    monkeypatch.setattr("trl_tfpo.annotation.scoring.reads_trees", lambda _: in_trees)
    assert head_form(model) == PLAIN and reads_trees(model) and reads_pairs(model)  # asked once, and not counted
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    conversation = draw(generator, 20)
    faces = [conversation + [token] + draw(generator, 4) for token in (20, 21)]
    completions = [[token] + draw(generator, 4) for token in (20, 21)]
    score_completions(model, [face for face in faces for _ in completions], completions * 2, batch_size=16)
    assert shapes == [(1, 20 + 2 * 5 + 4 * 4)]


def test_pairs_share_the_instruction_of_a_face():
    """Else the same system message would be read for each pair."""
    model, generator, num_tokens = MODELS["sdpa"](1), torch.Generator().manual_seed(0), []
    assert head_form(model) == PLAIN and reads_trees(model)
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: num_tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    instruction = draw(generator, 9)
    prompts = [instruction + [token] + draw(generator, 11) for token in (20, 21, 22)]
    score_completions(model, prompts, [draw(generator, 5) for _ in prompts], batch_size=16)
    assert num_tokens == [9 + 3 * (12 + 4)]


def test_attention_is_as_before_after_an_error():
    """Else the patient would be broken for whatever comes next."""
    model = MODELS["sdpa"](1)

    def fail(*_):
        raise RuntimeError("out of memory")

    assert head_form(model) == PLAIN and reads_trees(model)
    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        score_completions(model, [[4, 5]], [[6, 7]], batch_size=2)
    hook.remove()
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(
        score_completions(model, [[4, 5]], [[6, 7]], batch_size=2)[0].double(), plain_logps(model, [4, 5], [6, 7])
    )


def test_short_completions_share_a_pass_in_greater_numbers():
    """Else a device that holds 2 long texts at once would be left idle by short ones."""
    model, generator, shapes = MODELS["window"](1), torch.Generator().manual_seed(0), []
    assert head_form(model) == PLAIN  # asked once, and not counted
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prompts = [draw(generator, n) for n in (40, 40, 10, 10, 10, 10, 10, 10)]
    score_completions(model, prompts, [draw(generator, 10)] * 8, batch_size=2)
    assert shapes == [(2, 49), (5, 19), (1, 19)]


def test_a_model_whose_mask_leaks_is_read_apart():
    """Else a model that ignores masks of this form would be scored wrongly without a word."""
    model = make_llama(1)

    def leak(_, args, kwargs):
        mask = kwargs["attention_mask"]
        return args, kwargs | {"attention_mask": None if mask is None or mask.dim() == 4 else mask}

    hook = model.model.register_forward_pre_hook(leak, with_kwargs=True)
    prompt, completions = [4, 5, 6], [[7, 8], [9, 10, 11]]
    scored = score_completions(model, [prompt] * 2, completions, batch_size=2)
    hook.remove()
    for completion, found in zip(completions, scored, strict=True):
        torch.testing.assert_close(found, plain_logps(model, prompt, completion), atol=1e-5, rtol=1e-5)


def test_each_module_keeps_its_mode(patient):
    """Users freeze parts of a model in eval mode; a call between steps must not enable their dropout."""
    patient.train()
    patient.model.layers[0].eval()
    modes = {name: module.training for name, module in patient.named_modules()}
    score_completions(patient, [[5, 6]], [[7, 8]], batch_size=1)
    assert {name: module.training for name, module in patient.named_modules()} == modes
