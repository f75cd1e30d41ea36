# SPDX-License-Identifier: Apache-2.0

"""
`PlainGuidance`, a reference implementation of guided decoding, and models for it.

It reads every row alone, from the start and without padding, and multiplies probabilities. All models are tiny and
random, with peaked distributions, so that rounding does not change the likeliest token.
"""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MistralConfig,
    MistralForCausalLM,
)


VOCABULARY = 32
PAD, BOS, EOS = 0, 1, 2
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
SPECIAL = dict(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, tie_word_embeddings=False)


def llama(seed: int, vocab_size: int = VOCABULARY, peak: float = 25.0, **kwargs) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return sharpen(LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(SIZES | SPECIAL | kwargs))), peak)


def gpt2(seed: int, **kwargs) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
    return sharpen(GPT2LMHeadModel(GPT2Config(**(config | SPECIAL | kwargs))), 2.0)


def mistral(seed: int) -> MistralForCausalLM:
    torch.manual_seed(seed)
    return sharpen(
        MistralForCausalLM(MistralConfig(vocab_size=VOCABULARY, sliding_window=8, **SIZES, **SPECIAL)), 25.0
    )


def sharpen(model, peak: float):
    with torch.no_grad():
        model.lm_head.weight.mul_(peak)
    model.config.use_cache = False  # as in a config that a trainer saved
    return model.double().eval()


DOCTORS = {"llama": llama, "gpt2": gpt2, "mistral": mistral}


def batch(*prompts: list[int], pad: int = PAD) -> dict[str, torch.Tensor]:
    """Left-padded prompts, as a tokenizer gives them."""
    length = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad] * (length - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts]),
    }


ONE = batch([BOS, 5, 9, 5, 9, 5])
PADDED = batch([BOS, 7, 3, 20, 21], [BOS, 11], [BOS, 4, 30, 8, 6, 12, 13, 14])


class PlainGuidance(LogitsProcessor):
    """Guidance from scratch: each row alone, unpadded, uncached, as a product of probabilities."""

    def __init__(self, doctors, exponents, alpha, attention_mask):
        self.doctors, self.exponents, self.alpha = doctors, exponents, alpha
        self.num_padding = (1 - attention_mask).sum(dim=1).tolist()

    @torch.no_grad()
    def __call__(self, input_ids, scores):
        copies = len(input_ids) // len(self.num_padding)
        rows = []
        for row, (ids, patient) in enumerate(zip(input_ids, scores, strict=True)):
            weight = patient.double().softmax(-1) ** self.alpha
            for doctor, exponent in zip(self.doctors, self.exponents, strict=True):
                text = ids[self.num_padding[row // copies] :][None]
                weight = weight * doctor(text, use_cache=False).logits[0, -1].softmax(-1) ** exponent
            rows.append((weight / weight.sum()).log().to(scores.dtype))
        return torch.stack(rows)


def generate(patient, processor, inputs, **kwargs):
    torch.manual_seed(0)
    settings = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    return patient.generate(**inputs, logits_processor=[processor], **(settings | kwargs))


def run_out_of_memory(*_):
    """A forward hook that stands for a failure in the middle of a call."""
    raise MemoryError
