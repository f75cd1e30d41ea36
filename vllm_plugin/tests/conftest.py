# SPDX-License-Identifier: Apache-2.0

"""Tiny models, and an environment in which Model Runner V2 runs on a CPU: see `stand_in`."""

import gc
import importlib.util
import os
import runpy
from pathlib import Path
from types import SimpleNamespace


STAND_IN = Path(__file__).parent / "stand_in"
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(STAND_IN),  # for other processes of vLLM
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",  # compilation would use the stand-in
    "TRITON_INTERPRET": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.pre_tokenizers import WhitespaceSplit  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402


runpy.run_path(str(STAND_IN / "sitecustomize.py"))
HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore = [] if HAS_VLLM else ["test_engine.py", "test_refusals.py", "test_http.py", "test_benchmark.py"]
NUM_TOKENS = 61
ENGINE = dict(  # of the smallest engine; prompts are longer than a step, so they are read in chunks
    block_size=32,
    dtype="float32",
    enforce_eager=True,
    kv_cache_memory_bytes=2**25,
    max_model_len=96,
    max_num_batched_tokens=32,
    max_num_seqs=8,
    seed=0,
)


def pytest_report_header():
    """Say why half of the tests are missing."""
    return None if HAS_VLLM else "vLLM is not installed here: the tests of the engine are left out"


def save_model(folder, seed, head_dim=32, num_layers=2, vocab_size=64, **settings):
    """Save a random Llama with a tokenizer, and return its folder. CPU attention takes heads of 32, 64 and more."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        head_dim=head_dim,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=64 // head_dim,
        num_key_value_heads=1,
        max_position_embeddings=settings.pop("positions", 128),
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(**settings).save_pretrained(folder)
    return str(folder)


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


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A patient, and doctors of other sizes: `helpful`, and `harmless` whose vocabulary has other padding."""
    root = tmp_path_factory.mktemp("models")
    folders = SimpleNamespace(
        root=root,
        patient=save_model(root / "patient", 1),
        helpful=save_model(root / "helpful", 2, head_dim=64, num_layers=1),
        harmless=save_model(root / "harmless", 3, num_layers=3, vocab_size=62),
    )
    for name in ("value_head", "token_credits"):  # which training leaves in the folder of a doctor
        save_file({"weight": torch.zeros(1)}, root / "helpful" / f"{name}.safetensors")
    return folders


def start(**arguments):
    """Start an engine."""
    from vllm import LLM

    return LLM(**ENGINE | arguments)


def stop(engine):
    """End an engine, so that another can start in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
