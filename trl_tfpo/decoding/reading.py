# SPDX-License-Identifier: Apache-2.0

"""
How a model is read from a cache, and a check that it can be read so.

Some models give other logits when a text is padded on the left, or when several tokens follow a filled cache: recurrent
states take in the padding, positions start again at zero. No list of names can say which. So a short text is read once
whole, and once in the way that is asked about, and the two must agree.

Shapes: B rows, L tokens (padding included), V vocabulary. Units: nats.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from statistics import median
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ..common._upstream import in_float32, is_sharded, unwrap_peft


NUM_PROBE_TOKENS = 16
TOLERANCE = 0.005  # of the spread of the logits between positions, in float32; TF32 convolutions round by 0.001
HALF_TOLERANCE = 0.25  # of the median position, in quantized models and where half precision cannot be avoided
LEAST_SPREAD = 0.001  # of the logits; a model that hardly looks at its text differs by rounding alone
_FAULTS: WeakKeyDictionary[PreTrainedModel, dict[tuple, str]] = WeakKeyDictionary()


def accepted_inputs(model: PreTrainedModel) -> set[str]:
    """Names of the arguments that the forward of a model, or of the one inside a `PeftModel`, takes."""
    return {
        *inspect.signature(model.forward).parameters,
        *inspect.signature(type(unwrap_peft(model)).forward).parameters,
    }


def next_inputs(
    ids: torch.LongTensor, accepted: set[str], *, num_read: int = 0, mask: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """
    What a model is given to read on.

    The positions are always said: some models count from zero in every forward pass.

    Args:
        ids (`torch.LongTensor` of shape `(B, L)`):
            The whole text.
        accepted (`set[str]`):
            From [`accepted_inputs`].
        num_read (`int`, *optional*, defaults to `0`):
            How many leading columns the cache holds.
        mask (`torch.Tensor` of shape `(B, L)`, *optional*):
            Which ids are real, where some are not.

    Returns:
        `dict`: `input_ids` of the columns that are not read yet, and their `position_ids` and the `attention_mask` of all
        columns where they are needed.
    """
    inputs = {"input_ids": ids[:, num_read:]}
    if mask is not None:
        inputs["attention_mask"] = mask.long()
    if "position_ids" in accepted:
        is_token = torch.ones_like(ids) if mask is None else mask.long()
        inputs["position_ids"] = (is_token.cumsum(dim=1) - 1).clamp(min=0)[:, num_read:]
    return inputs


def reading_fault(
    model: PreTrainedModel,
    how: str,
    read: Callable[[torch.LongTensor], Iterable[tuple[torch.Tensor, list[int]]]],
    forward: Callable | None = None,
    errors_count: bool = True,
) -> str:
    """
    What is wrong with reading a model in some way, empty if nothing is.

    A text of 16 tokens is read whole, without a cache or padding, and by `read`. The logits may differ by rounding, by
    0.5% of how much logits differ from position to position. Models in half precision compute in float32 for this. Where they
    cannot, and for quantized models, the median position may differ by 25%. The answer is kept for the model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            In eval mode.
        how (`str`):
            Name of the way of reading.
        read (`Callable`):
            Given the ids of shape `(16,)`, yields logits of shape `(n, V)` with the indices of the n tokens that they
            come after.
        forward (`Callable`, *optional*):
            What reads the whole text. By default the model.
        errors_count (`bool`, *optional*, defaults to `True`):
            Whether an error that `read` raises is a fault.

    Returns:
        `str`: the fault, to be put into a message.
    """
    base = unwrap_peft(model)
    faults = _FAULTS.setdefault(base, {})
    key = (how, getattr(base.config, "_attn_implementation", None), base.dtype)
    if key in faults:
        return faults[key]
    if is_sharded(base):  # all processes would have to read at the same time
        return ""
    text, is_quantized = _probe_ids(base), getattr(base, "is_quantized", False)
    is_half = is_quantized or base.dtype.itemsize < 4
    for context in (in_float32, nullcontext) if is_half else (nullcontext,):
        errors = None
        try:
            with torch.no_grad(), context():
                whole = (forward or model)(input_ids=text[None], use_cache=False).logits[0].float().log_softmax(dim=-1)
                scale = _rms(_centred(whole)).item()
                if scale < 1e-5:  # nats: a head of zeros, before training, which will say something later
                    return ""
                spread = max(_rms(_centred(whole) - _centred(whole).mean(dim=0)).item(), LEAST_SPREAD * scale)
                errors = []
                for logits, places in read(text):
                    errors += [_error(x, whole[place]) / spread for x, place in zip(logits, places, strict=True)]
        except Exception as error:  # whatever a model, or a kernel, raises on inputs that it does not take
            if isinstance(error, torch.OutOfMemoryError) and context is nullcontext:
                raise
            if errors is None and context is nullcontext:  # fewer positions than the text has tokens, say
                return faults.setdefault(key, "")
            fault = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}" if errors_count else ""
            continue
        is_exact = not is_quantized and (context is in_float32 or not is_half)
        worst = max(errors) if is_exact else median(errors)
        is_right = worst <= (TOLERANCE if is_exact else HALF_TOLERANCE)
        fault = (
            "" if is_right else f"its logits differ from those of the text read whole by {worst:.0%} of their spread"
        )
        break
    faults[key] = fault
    return fault


def _probe_ids(base: PreTrainedModel) -> torch.LongTensor:
    """Ids from the middle of the vocabulary, none of which begins, ends or pads texts."""
    size = base.config.get_text_config().vocab_size
    configs = (getattr(base, "generation_config", None), base.config.get_text_config())
    named = [getattr(config, f"{name}_token_id", None) for config in configs for name in ("bos", "eos", "pad")]
    special = {i for value in named if value is not None for i in (value if isinstance(value, list) else [value])}
    ids = [i for i in (*range(size // 4, size), *range(size // 4)) if i not in special] or [0]
    step = max(1, len(ids) // 2 // NUM_PROBE_TOKENS)
    text = [ids[(index * step + index // 3) % len(ids)] for index in range(NUM_PROBE_TOKENS)]  # no rhythm
    return torch.tensor(text, device=base.device)


def _error(found: torch.Tensor, whole: torch.Tensor) -> float:
    """How far logits (V',) are from log-probabilities (V,), up to a constant; V' <= V."""
    found, whole = found.to(whole).float(), whole[: found.size(-1)]
    if not torch.equal(found.isfinite(), whole.isfinite()):
        return math.inf
    return _rms(_centred(found) - _centred(whole)).item()


def _centred(logits: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) less their mean, zero where they are minus infinity."""
    is_finite = logits.isfinite()
    logits = logits.masked_fill(~is_finite, 0)
    return (logits - logits.sum(dim=-1, keepdim=True) / is_finite.sum(dim=-1, keepdim=True)).masked_fill(~is_finite, 0)


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt()
