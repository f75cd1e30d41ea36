# SPDX-License-Identifier: Apache-2.0

"""
Inputs of a model that reads a text with padding or a cache, and a test of its logits.

Some models return wrong logits when a text is padded on the left, or when several tokens follow a filled cache:
padding enters their recurrent state, or their positions restart at zero. No list of names can cover these models.
The test therefore compares the logits of a short text with those of one forward pass without padding or a cache.

Shapes: B rows, L tokens (padding included), V vocabulary. Units: nats.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ..common.language_model import LanguageModel, is_sharded, unwrap_peft
from ..common.precision import in_float32
from .padding import special_ids


NUM_PROBE_TOKENS = 16
TOLERANCE = 0.005  # error, relative to the spread of logits between positions; TF32 convolutions have 0.001
HALF_TOLERANCE = 0.25  # error of the median position, for quantized models and models that need half precision
LEAST_SPREAD = 0.001  # relative to the logits; with a smaller spread rounding errors alone exceed the tolerance
ZERO_LOGITS = 1e-5  # nats; smaller logits come from an untrained head of zeros
_FAULTS: WeakKeyDictionary[PreTrainedModel, dict[tuple, str]] = WeakKeyDictionary()

# Reads ids (16,). Yields logits (n, V), and the indices of the n tokens that precede the predicted ones
Reader = Callable[[torch.Tensor], Iterable[tuple[torch.Tensor, list[int]]]]


def accepted_inputs(model: LanguageModel) -> set[str]:
    """Return the names of the arguments of `forward`, including those of the model inside a `PeftModel`."""
    return {
        *inspect.signature(model.forward).parameters,
        *inspect.signature(type(unwrap_peft(model)).forward).parameters,
    }


def next_inputs(
    ids: torch.Tensor, accepted: set[str], *, num_read: int = 0, mask: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """
    Return the inputs with which a model reads the rest of a text.

    Positions are included, because some models count from zero in every forward pass.

    Args:
        ids (`torch.Tensor` of shape `(B, L)`):
            The whole text.
        accepted (`set[str]`):
            Result of [`accepted_inputs`].
        num_read (`int`, *optional*, defaults to `0`):
            Number of leading columns in the cache.
        mask (`torch.Tensor` of shape `(B, L)`, *optional*):
            Mask of a padded text.

    Returns:
        `dict`: `input_ids` of the columns not in the cache, their `position_ids` if the model accepts them, and the
        `attention_mask` of all columns if there is a mask.
    """
    inputs = {"input_ids": ids[:, num_read:]}
    if mask is not None:
        inputs["attention_mask"] = mask.long()
    if "position_ids" in accepted:
        is_token = torch.ones_like(ids) if mask is None else mask.long()
        inputs["position_ids"] = (is_token.cumsum(dim=1) - 1).clamp(min=0)[:, num_read:]
    return inputs


def reading_fault(
    model: LanguageModel, mode: str, read: Reader, forward: Callable | None = None, errors_count: bool = True
) -> str:
    """
    Test one reading mode of a model.

    The model reads a text of 16 tokens in one forward pass, without a cache or padding, and then with `read`. The
    logits may differ by 0.5% of their spread between positions. Models in half precision are tested in float32. For
    quantized models and models that need half precision, the logits may differ by 25% at the median position. Sharded
    models, and models whose logits are all zero, are not tested.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, in eval mode.
        mode (`str`):
            Name of the reading mode. The result is stored under this name, for each model.
        read (`Reader`):
            Function from ids of shape `(16,)` to an iterator over logits of shape `(n, V)` and the indices of the n
            tokens that precede the predicted ones.
        forward (`Callable`, *optional*):
            Forward pass of the text. The default is that of the model.
        errors_count (`bool`, *optional*, defaults to `True`):
            Whether an error that `read` raises is a fault.

    Returns:
        `str`: the fault, as a clause for a message. Empty if there is none.
    """
    base = unwrap_peft(model)
    faults = _FAULTS.setdefault(base, {})
    key = (mode, getattr(base.config, "_attn_implementation", None), base.dtype)
    if key in faults:
        return faults[key]
    if is_sharded(base):  # the test would have to run in all processes at once
        return ""
    text, is_quantized = _probe_ids(base), bool(getattr(base, "is_quantized", False))
    is_half = is_quantized or base.dtype.itemsize < 4
    contexts: list[Callable[[], AbstractContextManager]] = [in_float32, nullcontext] if is_half else [nullcontext]
    fault = ""
    for context in contexts:
        is_last, errors = context is nullcontext, None
        try:
            with torch.no_grad(), context():
                whole = (forward or model)(input_ids=text[None], use_cache=False).logits[0].float().log_softmax(dim=-1)
                scale = _rms(_centred(whole)).item()
                if scale < ZERO_LOGITS:
                    return ""
                spread = max(_rms(_centred(whole) - _centred(whole).mean(dim=0)).item(), LEAST_SPREAD * scale)
                errors = []
                for logits, places in read(text):
                    errors += [_error(x, whole[place]) / spread for x, place in zip(logits, places, strict=True)]
        except Exception as error:  # models and kernels raise various errors on unsupported inputs
            if isinstance(error, torch.OutOfMemoryError) and is_last:
                raise
            if errors is None and is_last:  # the text itself cannot be read, e.g. with fewer than 16 positions
                return faults.setdefault(key, "")
            fault = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}" if errors_count else ""
            continue
        is_exact = not is_quantized and not (is_half and is_last)
        worst = max(errors) if is_exact else median(errors)
        is_right = worst <= (TOLERANCE if is_exact else HALF_TOLERANCE)
        fault = "" if is_right else f"its logits differ from those of one forward pass by {worst:.0%} of their spread"
        break
    faults[key] = fault
    return fault


def _probe_ids(base: PreTrainedModel) -> torch.Tensor:
    """Return ids (16,) from the middle of the vocabulary, without BOS, EOS and padding."""
    size = base.config.get_text_config().vocab_size
    special = {i for name in ("bos", "eos", "pad") for i in special_ids(base, name)}
    ids = [i for i in (*range(size // 4, size), *range(size // 4)) if i not in special] or [0]
    step = max(1, len(ids) // 2 // NUM_PROBE_TOKENS)
    text = [ids[(index * step + index // 3) % len(ids)] for index in range(NUM_PROBE_TOKENS)]  # aperiodic
    return torch.tensor(text, device=base.device)


def _error(found: torch.Tensor, whole: torch.Tensor) -> float:
    """Return the root mean square difference of centred logits (V',) and log-probabilities (V,), V' <= V."""
    found, whole = found.to(whole).float(), whole[: found.size(-1)]
    if not torch.equal(found.isfinite(), whole.isfinite()):
        return math.inf
    return _rms(_centred(found) - _centred(whole)).item()


def _centred(logits: torch.Tensor) -> torch.Tensor:
    """Subtract the mean from logits (..., V). Infinite entries become 0."""
    is_finite = logits.isfinite()
    logits = logits.masked_fill(~is_finite, 0)
    return (logits - logits.sum(dim=-1, keepdim=True) / is_finite.sum(dim=-1, keepdim=True)).masked_fill(~is_finite, 0)


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt()
