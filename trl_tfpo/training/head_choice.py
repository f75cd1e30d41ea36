# SPDX-License-Identifier: Apache-2.0

r"""
Choice of the head of a new doctor: in the span of its vocabulary embeddings, or with a free row for each token.

The span (`models/guidance_head.py`) suffices if the embeddings predict the gaps between the faces. Embeddings of a
small model may only encode which words can follow each other. The gaps of each half of the pairs are therefore
predicted from the other half in two ways: by the mean gap of the same token, and by a ridge regression on its
embedding. The head gets free rows if tokens explain more than 5% of the variance of held-out gaps, and embeddings
explain less than half of this share.
"""

import logging
from collections.abc import Sequence

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset

from ..annotation.token_rewards import GAP_COLUMNS
from ..common.language_model import LanguageModel, is_sharded
from ..models.guidance_head import GuidanceHead
from ..models.initial_head import use_free_head
from .token_gaps import centered_embeddings, predict_gaps, read_gaps, sample_pairs


logger = logging.getLogger(__name__)
MIN_PAIRS, MAX_PAIRS = 64, 1000
MIN_EXPLAINED = 0.05  # share of the variance of gaps that tokens must explain for a head with free rows
MIN_RATIO = 0.5  # variance that embeddings explain, divided by variance that tokens explain
SHRINKAGES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # number of zero gaps added to the gaps of a token
RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 1.0)  # in units of the mean variance of an entry of the embeddings


def choose_head(
    model: LanguageModel,
    dataset: Dataset | IterableDataset,
    eos_token_ids: Sequence[int],
    *,
    is_online: bool = False,
) -> None:
    """
    Replace the [`~trl_tfpo.models.guidance_head.GuidanceHead`] of a new doctor if embeddings do not predict the gaps.

    The model is changed in place. It keeps its head if the dataset has no gaps or fewer than 64 pairs, or if the data
    collator annotates each batch (`is_online`).
    """
    head = model.get_output_embeddings()
    if not isinstance(head, GuidanceHead) or is_sharded(model) or head.map.any() or is_online:
        return
    has_gaps = isinstance(dataset, Dataset) and set(GAP_COLUMNS) <= set(dataset.column_names)
    if not has_gaps or len(dataset) < MIN_PAIRS:
        return
    shares = explained_variance(dataset, head.weight, eos_token_ids)
    ((by_token, by_embedding),) = broadcast_object_list([shares])  # one choice for all processes
    if by_token > MIN_EXPLAINED and by_embedding < MIN_RATIO * by_token:
        use_free_head(model)
        logger.info(
            "The doctor gets a head with a free row for each token: its embeddings explain %.3f of the variance of "
            "held-out gaps, and tokens explain %.3f.",
            by_embedding,
            by_token,
        )


def explained_variance(
    dataset: Dataset, embeddings: torch.Tensor, eos_token_ids: Sequence[int]
) -> tuple[float, float]:
    """
    Shares of the variance of held-out gaps that tokens and their embeddings explain.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset with gaps. At most 1,000 of its pairs are used, drawn at random.
        embeddings (`torch.Tensor` of shape `(V, H)`):
            Embeddings of the vocabulary.
        eos_token_ids (`Sequence[int]`):
            Tokens to exclude.

    Returns:
        `float` and `float`: share explained by the mean gap of the same token, and by its embedding, with the best
        amount of smoothing. Each is at most 1; 0 or less means that nothing is explained.
    """
    tokens = read_gaps(sample_pairs(dataset, MAX_PAIRS), eos_token_ids)
    centered, _, rows = centered_embeddings(embeddings, tokens.ids)
    _, by_embedding = predict_gaps(centered, rows, tokens, RIDGES)

    gaps, size = tokens.gaps - tokens.gaps.mean(), len(centered)
    index = tokens.pair % 2 * size + rows  # half of the pairs, and token
    count = torch.bincount(index, minlength=2 * size).float().view(2, size)
    total = torch.zeros(2 * size).index_add_(0, index, gaps).view(2, size)

    def explained(shrinkage: float) -> float:
        """Share explained by the mean gap of each token in the other half."""
        predicted = (total / (count + shrinkage)).flip(0)  # (2, U)
        explained_sum = (2 * predicted * total - predicted.square() * count).sum()
        return (explained_sum / gaps.square().sum().clamp(min=1e-12)).item()

    return max(explained(shrinkage) for shrinkage in SHRINKAGES), by_embedding
