# SPDX-License-Identifier: Apache-2.0

"""
Log-probabilities of given completions under a model, which reads each common beginning of texts once.

A text is a prompt with a completion, without the last token, which predicts nothing. The completions of a pair have a
common prompt, and prompts of different faces or pairs may begin alike. A model reads texts in one of three ways:

- on a CPU, all texts of a forward pass in one row, without padding;
- otherwise, up to four texts in a row, in rows of similar length, with a 4D attention mask;
- each text in a row of its own, if the model supports neither.

Shapes: B rows of a forward pass, L tokens of a row, N completion tokens of a forward pass.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch

from ..common._upstream import unsharded
from ..common.language_model import LanguageModel, device_of, inference, is_sharded, unwrap_peft
from ..common.precision import HALF_PRECISION, float32_residuals
from ..functional import token_logps
from ..models.logits import read_logits
from ..models.pair_rows import reads_pairs
from ..models.token_trees import (
    attention_along_branches,
    common_length,
    masked_rows,
    plain_rows,
    reads_trees,
    token_tree,
    tree_row,
)
from ..models.trained_exponents import check_is_language_model


logger = logging.getLogger(__name__)

MAX_PACKED = 2048  # tokens of a forward pass on a CPU, so that its tensors fit in `LARGEST_REUSED`
LARGEST_REUSED = 2**25 - 2**16  # bytes, just below the largest block that glibc considers
MAX_TEXTS = 4  # in a row with a mask: two completions under two faces


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

    Common beginnings of sequences are read once if the model supports it. The (tokens, vocabulary) logits are not
    stored if the head allows it, see [`~trl_tfpo.models.logits.read_logits`]. For an unquantized model in half
    precision the residual stream, the norms and the head are computed in float32, if its kernels support this.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model. It runs in eval mode, without gradients.
        prompt_ids (`list[list[int]]`):
            Prompts of at least one token.
        completion_ids (`list[list[int]]`):
            One completion for each prompt.
        batch_size (`int`):
            Number of sequences in one forward pass if all have the greatest length. A pass of shorter sequences may
            have more of them, but not more tokens. On a CPU a pass may be limited to 2,048 tokens, or to one group
            of up to four sequences with a common beginning if that is longer.
        longest (`int`, *optional*, defaults to `0`):
            Number of tokens of the longest sequence (prompt and completion) of other calls. With it, the maximum
            number of tokens in a pass is the same in all calls.
        on_progress (`Callable`, *optional*):
            Called after each forward pass with the share of `completion_ids`, in [0, 1], that this pass has scored.

    Returns:
        `list[torch.Tensor]` of shape `(T_i,)`: log-probabilities in nats, float32, on the CPU, in the given order.

    Raises:
        `ValueError`: if the model is sharded, is a doctor of guided flow, or has adapters that add tokens; if a
            log-probability is not finite.
    """
    check_unsharded(model)
    check_is_language_model(model)
    texts = [prompt + completion[:-1] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    logps: dict[int, torch.Tensor] = {}
    with inference(model), unsharded(), _with_float32_residuals(model):
        in_trees = reads_trees(model)
        if in_trees:
            _reuse_memory()
        rows = _rows(texts, prompt_ids, max_texts=MAX_TEXTS if in_trees or reads_pairs(model) else 1)
        lengths = [_length([texts[index] for index in row]) for row in rows]
        num_longest = batch_size // 2 if len(rows) < len(texts) else batch_size  # a row of a pair counts as two texts
        max_tokens = max([num_longest * max([longest, *map(len, texts)]), *lengths])
        passes = _packed(rows, lengths, max_tokens) if in_trees else _of_similar_length(rows, lengths, max_tokens)
        for rows in passes:
            indices = [index for row in rows for index in row]
            completions = [completion_ids[index] for index in indices]
            found = _score_rows(model, [[texts[index] for index in row] for row in rows], completions, in_trees)
            logps |= dict(zip(indices, found, strict=True))
            if on_progress is not None:
                on_progress(len(indices) / len(texts))
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


def _rows(texts: list[list[int]], prompt_ids: list[list[int]], max_texts: int) -> list[list[int]]:
    """Indices of the texts in each row: at most `max_texts`, which have at least half of their prompts in common."""
    rows: list[list[int]] = []
    for index in sorted(range(len(texts)), key=texts.__getitem__):
        row = rows[-1] if rows else []
        if row and len(row) < max_texts:
            if 2 * common_length(texts[row[-1]], texts[index]) >= len(prompt_ids[index]):
                row.append(index)
                continue
        rows.append([index])
    return rows


def _length(texts: list[list[int]]) -> int:
    """Number of tokens of texts in one row, each common beginning once."""
    return sum(map(len, texts)) - sum(common_length(one, other) for one, other in pairwise(texts))


def _reuse_memory() -> None:
    """
    Let glibc keep up to 64 MiB of freed memory for later tensors.

    glibc keeps twice the largest block, of at most 32 MiB, that was freed. It returns the rest to the system, which
    clears each page when it is used again.
    """
    torch.empty(LARGEST_REUSED, dtype=torch.uint8)


def _packed(rows: list[list[int]], lengths: list[int], max_tokens: int) -> list[list[list[int]]]:
    """
    Combine the rows, in their order, into one row for each forward pass.

    A combined row has at most `max_tokens` tokens, and at most [`MAX_PACKED`] unless it consists of a single row.
    """
    max_tokens = min(max_tokens, MAX_PACKED)
    passes: list[list[list[int]]] = []
    num_tokens = 0
    for row, length in zip(rows, lengths, strict=True):
        num_tokens += length
        if not passes or num_tokens > max_tokens:
            passes.append([[]])
            num_tokens = length
        passes[-1][0].extend(row)
    return passes


def _of_similar_length(rows: list[list[int]], lengths: list[int], max_tokens: int) -> list[list[list[int]]]:
    """Rows of each forward pass, from the longest on, with at most `max_tokens` tokens, padding included."""
    order = sorted(range(len(rows)), key=lengths.__getitem__, reverse=True)
    passes = []
    while order:
        num_rows = max_tokens // max(1, lengths[order[0]])
        passes.append([rows[index] for index in order[:num_rows]])
        order = order[num_rows:]
    return passes


def _score_rows(
    model: LanguageModel, rows: list[list[list[int]]], completions: list[list[int]], in_trees: bool
) -> list[torch.Tensor]:
    """
    Log-probabilities of the completions, which are in the order of the texts of the rows.

    The texts of a row are sorted. With `in_trees` there is one row, and attention is computed along its branches.
    """
    trees = [token_tree(texts) for texts in rows]
    if in_trees:
        inputs = tree_row(trees[0], model)
    elif max(map(len, rows)) > 1:
        inputs = masked_rows(trees, model)
    else:
        inputs = plain_rows(trees, model)
    length = inputs["input_ids"].size(1)
    paths = [[row * length + place for place in path] for row, tree in enumerate(trees) for path in tree.paths]
    pairs = list(zip(paths, completions, strict=True))
    predicting = [place for path, completion in pairs for place in path[len(path) - len(completion) :]]
    places = torch.tensor(predicting, dtype=torch.long)  # (N,)
    targets = torch.tensor([token for completion in completions for token in completion], dtype=torch.long)

    def forward(**inputs):
        with attention_along_branches(model) if in_trees else nullcontext():
            return model(**inputs)

    logits, hidden = read_logits(model, places, forward=forward, in_float32=True, **inputs)
    with torch.autocast(hidden.device.type, enabled=False):
        logps = token_logps(logits=logits, targets=targets.to(hidden.device))  # (N,)
    return list(logps.float().cpu().split([len(completion) for completion in completions]))


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
