# SPDX-License-Identifier: Apache-2.0

"""Default precision of loaded models, and float32 computation with weights in half precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # documented under this private name only
from torch.utils._pytree import tree_map  # documented under this private name only
from transformers import PreTrainedModel


HALF_PRECISION = (torch.bfloat16, torch.float16)


def default_dtype() -> str:
    """
    Default dtype of loaded models: `"auto"` (the dtype of the checkpoint), or `"float32"` on a CPU without bfloat16
    instructions, where half precision is several times slower.
    """
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    capabilities = {} if get_capabilities is None else get_capabilities()
    has_bfloat16 = any(value for name, value in capabilities.items() if "bf16" in name)
    return "auto" if torch.accelerator.is_available() or has_bfloat16 else "float32"


@contextmanager
def float32_residuals(model: PreTrainedModel) -> Iterator[None]:
    """
    Within the context a model in half precision computes its residual stream and its norms in float32, and matrix
    products in half precision. Autocast has this effect if the embeddings are float32.
    """
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.float())
    try:
        with torch.autocast(model.device.type, dtype=model.dtype):
            yield
    finally:
        hook.remove()


@contextmanager
def in_float32() -> Iterator[None]:
    """
    Within the context models in bfloat16 or float16 compute in float32. Their stored weights do not change.

    Each weight is converted when it is used, which is slow and needs memory for one more weight. Kernels that support
    only half precision raise an error.
    """
    with _Float32(), _Float32Convolutions():
        yield


def _to_float32(x: Any) -> Any:
    if isinstance(x, torch.dtype):
        return torch.float32 if x in HALF_PRECISION else x
    return x.float() if isinstance(x, torch.Tensor) and x.dtype in HALF_PRECISION else x


class _Float32(TorchDispatchMode):
    """Converts the arguments of operations to float32. Tensors that are changed in place keep their dtype."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.embedding.default:  # convert the rows that are read, not the table
            return _to_float32(func(*args, **kwargs))
        written = {id(args[0])} if func._schema.is_mutable and args else set()
        args, kwargs = tree_map(lambda x: x if id(x) in written else _to_float32(x), (args, kwargs))
        return func(*args, **kwargs)


class _Float32Convolutions(TorchFunctionMode):
    """Converts the arguments of convolutions, which compare dtypes before dispatch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.conv1d, torch.conv2d):
            args, kwargs = tree_map(_to_float32, (args, kwargs))
        return func(*args, **kwargs)
