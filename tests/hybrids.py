# SPDX-License-Identifier: Apache-2.0

"""Tiny models, most of them with states other than keys and values, or with heads that do more than multiply."""

import torch
import transformers
from transformers import PreTrainedModel


SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
STATES = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=4)
WINDOW = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])
ARCHITECTURES = {
    "Llama": {},
    "Bamba": STATES | dict(attn_layer_indices=[1]),
    "GraniteMoeHybrid": STATES
    | dict(
        layer_types=["mamba", "attention"], num_local_experts=2, num_experts_per_tok=1, shared_intermediate_size=16
    ),
    "Jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1)
    | dict(num_experts=2, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False),
    "Lfm2": dict(layer_types=["conv", "full_attention"], block_multiple_of=8),
    "Mamba2": dict(num_heads=8, head_dim=8, state_size=8, n_groups=1, expand=2, chunk_size=4),
    "RecurrentGemma": dict(attention_window_size=5, lru_width=32, num_hidden_layers=3),
    "Rwkv": dict(attention_hidden_size=32),
    "Gemma2": dict(sliding_window=5),
    "Cohere2": WINDOW,
    "Roberta": dict(is_decoder=True, max_position_embeddings=64),
    "Mistral": dict(sliding_window=5),
    "OPT": dict(ffn_dim=48, word_embed_proj_dim=32),
}


def make(name: str, seed: int = 0, **settings) -> PreTrainedModel:
    """A model with large random weights, in eval mode, in float32."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**(SIZES | ARCHITECTURES[name] | settings))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if weight.dim() >= 2 and "conv" not in weight_name:
                weight.normal_(0, 0.25)
    return model.eval().float()
