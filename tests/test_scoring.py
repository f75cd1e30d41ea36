# SPDX-License-Identifier: Apache-2.0

"""A prompt is read once for all its completions, and no completion is the wiser for its neighbours."""

import pytest
import torch
from conftest import make_llama
from plain_guidance import gpt2, llama, mistral
from transformers import MambaConfig, MambaForCausalLM

from trl_tfpo.annotation.scoring import score_completions
from trl_tfpo.models.logits import PLAIN, head_form


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


MODELS = {"sdpa": llama, "eager": eager, "learned positions": gpt2, "window": mistral, "state space": mamba}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
@pytest.mark.parametrize("name", MODELS)
def test_each_completion_is_scored_as_if_alone(name, batch_size):
    """Else what is rejected would depend on what was chosen."""
    model, generator = MODELS[name](1), torch.Generator().manual_seed(0)
    prompts = [draw(generator, n) for n in (3, 9, 1, 12)]
    prompts = [*prompts, prompts[1], prompts[3], prompts[1], prompts[0]]  # 9 tokens: three completions
    completions = [draw(generator, n) for n in (7, 1, 4, 2, 10, 3, 5, 1)]
    scored = score_completions(model, prompts, completions, batch_size=batch_size)
    for prompt, completion, found in zip(prompts, completions, scored, strict=True):
        torch.testing.assert_close(
            found.double(), plain_logps(model, prompt, completion).double(), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name, shares", [(name, name in ("sdpa", "eager", "learned positions")) for name in MODELS])
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
    assert num_tokens[-1] == (29 + 6 + 6 if shares else 2 * 35)


def test_short_completions_share_a_pass_in_greater_numbers():
    """Else a device that holds 2 long texts at once would be left idle by short ones."""
    model, generator, shapes = MODELS["window"](1), torch.Generator().manual_seed(0), []
    assert head_form(model) == PLAIN  # asked once, and not counted
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prompts = [draw(generator, n) for n in (40, 40, 10, 10, 10, 10, 10, 10)]
    score_completions(model, prompts, [draw(generator, 10)] * 8, batch_size=2)
    assert shapes == [(2, 50), (5, 20), (1, 20)]


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
