# SPDX-License-Identifier: Apache-2.0

"""
Log-probabilities of given completions under a model. Two completions of one prompt share a row.

Shapes: B rows of a forward pass, L tokens of a row.

    prompt[:-1] | prompt[-1] completion_0 | prompt[-1] completion_1 | padding

A branch is the last token of the prompt, followed by one completion. It attends to the prompt and to itself. Its
positions continue those of the prompt.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.utils.rnn import pad_sequence

from ..common._upstream import unsharded
from ..common.language_model import LanguageModel, device_of, inference, is_sharded, unwrap_peft
from ..common.precision import HALF_PRECISION, float32_residuals
from ..functional import token_logps
from ..models.logits import read_logits
from ..models.pair_rows import COMMON, PADDING, branch_mask, reads_pairs
from ..models.trained_exponents import check_is_language_model


logger = logging.getLogger(__name__)


def score_completions(
    model: LanguageModel,
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    *,
    batch_size: int,
    longest: int = 0,
    on_progress: Callable[[float], None] | None = None,
) -> list[torch.Tensor]:
    """
    Log-probability of every completion token after its prompt.

    Completions of one prompt share a row if the model's attention supports the mask. Rows of similar length share a
    forward pass. The (tokens, vocabulary) logits are never stored. For an unquantized model in half precision the
    residual stream, the norms and the head are computed in float32, if its kernels support this.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model. It runs in eval mode, without gradients.
        prompt_ids (`list[list[int]]`):
            Prompts of at least one token.
        completion_ids (`list[list[int]]`):
            One completion for each prompt.
        batch_size (`int`):
            Number of sequences in one forward pass if all have the greatest length. A pass of shorter sequences may
            have more of them, but not more tokens.
        longest (`int`, *optional*, defaults to `0`):
            Number of tokens of the longest sequence (prompt and completion) of other calls. With it, all calls use the
            same number of tokens in a pass.
        on_progress (`Callable`, *optional*):
            Called after each forward pass with the share of `completion_ids`, in [0, 1], that this pass has scored.

    Returns:
        `list[torch.Tensor]` of shape `(T_i,)`: log-probabilities in nats, float32, on the CPU, in the given order.

    Raises:
        `ValueError`: if the model is sharded, is a doctor of guided flow or has adapters that add tokens, or a
            log-probability is not finite.
    """
    check_unsharded(model)
    check_is_language_model(model)
    logps: dict[int, torch.Tensor] = {}
    with inference(model), unsharded(), _with_float32_residuals(model):
        rows = _rows(prompt_ids, max_branches=2)
        if max(map(len, rows), default=1) > 1 and not reads_pairs(model):
            rows = _rows(prompt_ids, max_branches=1)

        def length(row: list[int]) -> int:
            return len(prompt_ids[row[0]]) - 1 + sum(len(completion_ids[index]) + 1 for index in row)

        rows.sort(key=length, reverse=True)
        max_rows = max(1, batch_size // max(map(len, rows), default=1))
        max_tokens = max_rows * max([longest, *map(length, rows)])
        while rows:
            num_rows = max_tokens // length(rows[0])
            batch, rows = rows[:num_rows], rows[num_rows:]
            sequences = [(prompt_ids[row[0]], [completion_ids[index] for index in row]) for row in batch]
            for row, branches in zip(batch, _score_rows(model, sequences), strict=True):
                for index, branch in zip(row, branches, strict=True):
                    logps[index] = branch
            if on_progress is not None:
                on_progress(sum(map(len, batch)) / len(completion_ids))
    for index, scored in logps.items():
        if not scored.isfinite().all():
            raise ValueError(
                f"Log-probabilities must be finite. {type(model).__name__} gives "
                f"{scored[~scored.isfinite()][0].item()} to a token of sequence {index} "
                f"({len(prompt_ids[index]) + len(scored)} tokens); load it in float32 or bfloat16, check its weights, "
                "and check that it gives every token of the data a finite logit."
            )
    return [logps[index] for index in range(len(completion_ids))]


def check_unsharded(model: torch.nn.Module) -> None:
    """Raise `ValueError` if the parameters of the model are sharded."""
    if is_sharded(model):
        raise ValueError(
            "A model that scores completions must have all its parameters in each process. Got a "
            f"{type(model).__name__} with sharded parameters; pass its name or path, or load it before you create the "
            "`TFPOConfig`."
        )


def _rows(prompt_ids: list[list[int]], max_branches: int) -> list[list[int]]:
    """Indices of the completions in each row: at most `max_branches`, all with the same prompt."""
    rows: dict[tuple[int, ...], list[list[int]]] = {}
    for index, prompt in enumerate(prompt_ids):
        of_prompt = rows.setdefault(tuple(prompt), [[]])
        if len(of_prompt[-1]) == max_branches:
            of_prompt.append([])
        of_prompt[-1].append(index)
    return [row for of_prompt in rows.values() for row in of_prompt]


def _score_rows(model: LanguageModel, rows: list[tuple[list[int], list[list[int]]]]) -> list[list[torch.Tensor]]:
    """Log-probabilities of the completions of each row. A row is a prompt and its completions."""
    device = device_of(model)
    ids, labels, positions, branches = [], [], [], []
    for prompt, completions in rows:
        last = len(prompt) - 1
        ids.append(prompt[:last] + [token for completion in completions for token in prompt[last:] + completion])
        labels.append([-100] * last + [token for completion in completions for token in [-100] + completion])
        positions.append([*range(last), *(last + t for completion in completions for t in range(len(completion) + 1))])
        branches.append([COMMON] * last + [b for b, completion in enumerate(completions, 1) for _ in [0, *completion]])

    def pad(values, padding_value):
        tensors = [torch.tensor(row) for row in values]
        return pad_sequence(tensors, batch_first=True, padding_value=padding_value).to(device)  # (B, L)

    branch = pad(branches, PADDING)
    inputs = {"attention_mask": (branch != PADDING).long()}
    if branch.max() > 1:
        inputs = {"attention_mask": branch_mask(branch, model), "position_ids": pad(positions, 0)}
    inputs["input_ids"] = pad(ids, 0)
    targets = pad(labels, -100)[:, 1:]  # (B, L - 1)
    is_target = targets != -100
    logits, hidden = read_logits(model, is_target, in_float32=True, **inputs)
    with torch.autocast(hidden.device.type, enabled=False):
        logps = token_logps(logits=logits, targets=targets[is_target])  # (N,)
    log_probs = logps.new_zeros(targets.shape).masked_scatter(is_target.to(logps.device), logps)
    scored = []
    for row, (prompt, completions) in zip(log_probs.float().cpu(), rows, strict=True):
        ends = torch.tensor([len(completion) + 1 for completion in completions]).cumsum(0) + len(prompt) - 2
        scored.append([row[end - len(one) : end] for end, one in zip(ends.tolist(), completions, strict=True)])
    return scored


def _with_float32_residuals(model: LanguageModel) -> AbstractContextManager[None]:
    """
    [`float32_residuals`] if the model is in half precision, is not quantized, and can run in that context; otherwise a
    context without effect. Call it within [`inference`].
    """
    base = unwrap_peft(model)
    if model.dtype not in HALF_PRECISION or getattr(base, "is_quantized", False):
        return nullcontext()
    tokens = torch.arange(1, 5, device=device_of(model))[None] % base.config.get_text_config().vocab_size
    try:
        with float32_residuals(base):
            is_finite = model(input_ids=tokens, use_cache=False).logits.isfinite().all()
    except Exception as error:  # kernels raise errors of any type if the dtype is not supported
        logger.info("%s computes its residual stream in %s: %r", type(model).__name__, model.dtype, error)
        return nullcontext()
    return float32_residuals(base) if is_finite else nullcontext()
