# SPDX-License-Identifier: Apache-2.0

"""
Tiny models with the same weights in any environment: these tests have one, and `make_fixture.py` another.

It needs torch, transformers and tokenizers only.
"""

import json
import shutil
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


NUM_TOKENS = 61
ADAPTERS = Path(__file__).parent / "adapters"  # that the main package saved, see `make_fixture.py`
MODELS = {  # seed and sizes; the patient ties its embeddings, as small models do
    "patient": dict(seed=1, tied=True),
    "helpful": dict(seed=2, head_dim=64, num_layers=1),
    "harmless": dict(seed=3, num_layers=3, vocab_size=62),  # with other padding of the vocabulary
}


def make_model(seed, head_dim=32, num_layers=2, vocab_size=64, positions=128, tied=False):
    """A random Llama. CPU attention of vLLM takes heads of 32, 64 and more."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        head_dim=head_dim,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=64 // head_dim,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    fill(model, seed)
    return model


@torch.no_grad()
def fill(model, seed, scale=0.3):
    """Give trainable matrices random values that depend on seed, name and shape alone."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and parameter.requires_grad:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}.{name}".encode()))
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def save_model(folder, words=(), **settings):
    """Save a random Llama with a tokenizer, and return its folder."""
    make_model(**settings).save_pretrained(folder)
    make_tokenizer(words).save_pretrained(folder)
    return str(folder)


def save_config(folder, config):
    """Save the config of a model with a tokenizer, without weights, and return the folder."""
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def change_config(folder, **changes):
    """Change fields in the config of a model, and return its folder."""
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def save_adapter(folder, name, base, **changes):
    """Put a stored adapter with a tokenizer in a folder, on another base. `changes` are to its config."""
    shutil.copytree(ADAPTERS / name, folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": str(base)} | changes
    path.write_text(json.dumps(config))
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def save_all(root):
    """Save all models and adapters, and return their folders by name."""
    folders = {name: save_model(root / name, **settings) for name, settings in MODELS.items()}
    adapters = sorted(path.name for path in ADAPTERS.iterdir())
    return folders | {name: save_adapter(root / name, name, base=folders["patient"]) for name in adapters}


def make_tokenizer(words=()):
    """A tokenizer of `NUM_TOKENS` words: `<pad>`, `<s>`, `</s>`, then `t3`, `t4` and so on, or the words given."""
    tokens = ["<pad>", "<s>", "</s>", *words]
    tokens += [f"t{index}" for index in range(len(tokens), NUM_TOKENS)]
    model = WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<pad>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
