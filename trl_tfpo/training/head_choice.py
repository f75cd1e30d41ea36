# SPDX-License-Identifier: Apache-2.0

r"""
Whether the logits of a doctor stay in the span of its vocabulary embeddings.

They do (`guidance_head.py`) where these embeddings know what the faces reward. Those of a small model that has seen few words
may only know which words can follow each other. So the gaps of one half of the pairs are predicted from the other half, in two
ways: by the mean gap of the same token, and by a ridge regression on its embedding. A head with a free row for each token is
trained where embeddings explain less than half of the variance that tokens do, if these explain a twentieth of it.
"""

import logging
from collections.abc import Sequence

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset

from ..annotation.token_rewards import GAP_COLUMNS
from ..common._upstream import is_sharded
from ..models.guidance import free_head
from ..models.guidance_head import GuidanceHead
from .calibration import draw_pairs, read_tokens


logger = logging.getLogger(__name__)
MIN_PAIRS, MAX_PAIRS = 64, 1000  # that are compared
MIN_KNOWN = 0.05  # of the variance of gaps, that tokens must explain to be listened to
MIN_SHARE = 0.5  # of what tokens explain, that embeddings must explain
SHRINKAGES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # gaps of zero that are added to those of a token
RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 1.0)  # in units of the mean variance of an embedding


def choose_head(
    model: torch.nn.Module,
    dataset: Dataset | IterableDataset,
    eos_token_ids: Sequence[int],
    *,
    is_online: bool = False,
) -> None:
    """
    Give a new doctor whose head is a [`~trl_tfpo.models.guidance_head.GuidanceHead`] one with a free row for each token, in place, where
    its embeddings do not know what the faces reward. Fewer than 64 pairs, or pairs without gaps, change nothing.

    Args:
        model (`torch.nn.Module`):
            The doctor.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The annotated training data.
        eos_token_ids (`Sequence[int]`):
            Tokens that end a completion.
        is_online (`bool`, *optional*, defaults to `False`):
            Whether the data collator asks the patient batch by batch.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, GuidanceHead) or is_sharded(model) or head.map.any() or is_online:
        return
    has_gaps = isinstance(dataset, Dataset) and set(GAP_COLUMNS) <= set(dataset.column_names)
    if not has_gaps or len(dataset) < MIN_PAIRS:
        return
    found = explained_gaps(dataset, head.weight, eos_token_ids)
    ((by_token, by_embedding),) = broadcast_object_list([found])  # one choice, in all processes
    if by_token > MIN_KNOWN and by_embedding < MIN_SHARE * by_token:
        free_head(model)
        logger.info(
            "The doctor gets a head with a free row for each token: its embeddings explain %.3f of the variance of held-out gaps, "
            "tokens themselves %.3f.",
            by_embedding,
            by_token,
        )


def explained_gaps(dataset: Dataset, embeddings: torch.Tensor, eos_token_ids: Sequence[int]) -> tuple[float, float]:
    """
    Share of the variance of held-out gaps that is explained by the mean gap of the same token, and by its embedding.

    Args:
        dataset ([`~datasets.Dataset`]):
            With gaps. Of more than 1,000 pairs so many are drawn at random.
        embeddings (`torch.Tensor` of shape `(V, H)`):
            Of the tokens.
        eos_token_ids (`Sequence[int]`):
            Tokens that are left out.

    Returns:
        `float` and `float`, at most 1, 0 or less where nothing is known: each with the amount of smoothing that does best.
    """
    tokens = read_tokens(draw_pairs(dataset, MAX_PAIRS), eos_token_ids)
    used, ids = tokens.ids.unique(return_inverse=True)
    gaps, size = tokens.gaps - tokens.gaps.mean(), len(used)
    half = tokens.pair % 2 * size + ids  # of the pairs, and the token
    count = torch.bincount(half, minlength=2 * size).float().view(2, size)
    total = torch.zeros(2 * size).index_add_(0, half, gaps).view(2, size)
    centered = embeddings.detach()[used.to(embeddings.device)].float().cpu()  # (U, H)
    centered -= count.sum(dim=0) @ centered / count.sum()

    def explained(predicted: Sequence[torch.Tensor]) -> float:
        """By predictions (U,) for each half, from the other."""
        parts = [2 * p @ t - p.square() @ n for p, t, n in zip(predicted, total, count, strict=True)]
        return (sum(parts) / gaps.square().sum().clamp(min=1e-12)).item()

    def by_embedding(ridge: float) -> list[torch.Tensor]:
        predicted = []
        for n, t in zip(count.flip(0), total.flip(0), strict=True):
            second = (centered.T @ (centered * n[:, None])).double()
            diagonal = ridge * second.diagonal().mean().clamp(min=1e-8) * torch.eye(len(second))
            predicted.append(centered @ torch.linalg.solve(second + diagonal, (centered.T @ t).double()).float())
        return predicted

    return (
        max(explained((total / (count + k)).flip(0)) for k in SHRINKAGES),
        max(explained(by_embedding(ridge)) for ridge in RIDGES),
    )
