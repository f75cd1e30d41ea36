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
    "PYTHONPATH": os.pathsep.join(map(str, (STAND_IN, STAND_IN.parents[1]))),  # for other processes
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
from tiny_models import save_all  # noqa: E402


runpy.run_path(str(STAND_IN / "sitecustomize.py"))
HAS_VLLM = importlib.util.find_spec("vllm") is not None
NEED_VLLM = ("benchmark", "doctors", "engine", "http", "readme", "refusals")
collect_ignore = [] if HAS_VLLM else [f"test_{name}.py" for name in NEED_VLLM]
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


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A patient, doctors of other sizes, and adapters: see `tiny_models.py`."""
    root = tmp_path_factory.mktemp("models")
    folders = SimpleNamespace(root=root, **save_all(root))
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
