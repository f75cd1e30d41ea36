# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

r"""
Token rewards calibrated on the preference labels.

The gap between the faces at one token is mostly noise of its context. What *such a token usually gets* is the signal: a ridge
regression of the gaps on the token embeddings, over the whole data set. The labels then say how much each source of token
rewards counts, in a Bradley-Terry model of the pairs:

$$\log \frac{P(\text{chosen})}{P(\text{rejected})} = \sum_t r_t^{\text{chosen}} - \sum_t r_t^{\text{rejected}}, \qquad
r_t = a\,u(y_t) + b\,s_t + c\,\Delta_t + w^\top (e_{y_t} - \bar e)$$

$u$ is the usual gap of a token, $s_t$ its sparse reward (`functional.token_rewards` by the faces), $\Delta_t$ its gap, $e$ the
embeddings, of which $w$ is a ridge regression as well. The number of tokens is a further term of the fit, and no part of the
reward: what labels think of length teaches a doctor nothing about tokens. EOS gets no reward. A unit of reward is a nat of
the log-odds of a label. No network is trained, and no model is read.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from .functional import token_rewards
from .token_rewards import GAP_COLUMNS, REWARD_COLUMNS
from .tokenization import ID_COLUMNS, MASK_COLUMNS


logger = logging.getLogger(__name__)
MIN_PAIRS = 32  # with fewer, labels say nothing about weights
NUM_FOLDS = 5
NUM_COMPONENTS = 256  # of the embeddings of a pair
SMOOTHING = (0.03, 0.1, 0.3, 1.0, 3.0)  # ridge of the usual gap, in units of the mean variance of an embedding
PENALTIES = (30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)  # ridge of the embeddings, whose features have variance 1
SCALAR_PENALTY = 0.01  # share of it that the other terms pay
SCALARS = ("usual gap", "sparse reward", "gap", "number of tokens")


@dataclass(frozen=True)
class Calibration:
    """
    Token rewards that explain the labels, made by [`calibrate`].

    Args:
        credits (`torch.Tensor` of shape `(V,)`):
            Reward of each token of the vocabulary, whatever its context, in nats. On average over the data it is zero.
        usual (`torch.Tensor` of shape `(V,)`):
            What such a token usually gets: the gap that its embedding predicts, in nats.
        weights (`dict[str, float]`):
            Of the terms that depend on the context, `"sparse reward"` and `"gap"`, of the usual gap and of the number of tokens,
            which is not a part of the rewards.
        accuracy, log_likelihood (`float`):
            Share of held-out pairs whose chosen completion has the larger reward, and mean log-probability of their labels in
            nats; -0.693 is chance.
        standard_error (`float`):
            Of the log-likelihood.
        num_pairs (`int`):
            Pairs that were fitted.
        eos_token_ids (`Sequence[int]`):
            Tokens without a reward.
    """

    credits: torch.Tensor
    usual: torch.Tensor
    weights: dict[str, float]
    accuracy: float
    log_likelihood: float
    standard_error: float
    num_pairs: int
    eos_token_ids: Sequence[int]

    def apply(self, dataset: Dataset | dict) -> Dataset | dict:
        """
        The dataset, or each of a dict of them, with these rewards in the place of its own.

        Raises:
            `ValueError`: when the dataset has no gaps.
        """
        if isinstance(dataset, dict):
            return {name: self.apply(split) for name, split in dataset.items()}
        if not set(GAP_COLUMNS) <= set(dataset.column_names):
            raise ValueError(
                f"Calibrated rewards need the columns {GAP_COLUMNS}. Got {dataset.column_names}; annotate the dataset with "
                "`annotate_token_rewards`."
            )
        is_eos = torch.zeros(len(self.credits), dtype=torch.bool)
        is_eos[list(self.eos_token_ids)] = True

        def add_rewards(batch: dict[str, list]) -> dict[str, list]:
            rewards = {}
            for side, name in enumerate(REWARD_COLUMNS):
                ids, gaps, mask = _columns(batch, side)
                mask &= ~is_eos[ids]
                values = (
                    self.credits[ids]
                    + self.weights["gap"] * gaps
                    + self.weights["sparse reward"] * _sparse_rewards(gaps, mask)
                ).masked_fill(~mask, 0)
                lengths = [len(row) for row in batch[ID_COLUMNS[1 + side]]]
                rewards[name] = [row[:n].tolist() for row, n in zip(values, lengths, strict=True)]
            return rewards

        return dataset.map(add_rewards, batched=True, desc="Calibrating token rewards")

    def report(self) -> None:
        """
        Log how well the rewards predict held-out labels, and warn when they do it no better than chance, to two standard errors.
        """
        logger.info(
            "Calibrated token rewards prefer the chosen completion of %.0f%% of %d held-out pairs; log-likelihood %.3f ± %.3f "
            "nats, chance is -0.693.",
            100 * self.accuracy,
            self.num_pairs,
            self.log_likelihood,
            self.standard_error,
        )
        if self.log_likelihood < -np.log(2) + 2 * self.standard_error:
            warnings.warn(
                f"The token rewards do not explain the labels: on held-out pairs they prefer the chosen completion in "
                f"{self.accuracy:.0%} of {self.num_pairs}, with a log-likelihood of {self.log_likelihood:.3f} ± "
                f"{self.standard_error:.3f} nats (chance is -0.693). Word the faces by what the labels reward, use a stronger "
                "patient, or label more pairs."
            )


def calibrate(dataset: Dataset, embeddings: torch.Tensor, eos_token_ids: Sequence[int]) -> Calibration:
    """
    Fit token rewards to the labels of an annotated dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            Annotated by [`~trl_tfpo.annotate_token_rewards`], with gaps; at least 32 pairs.
        embeddings (`torch.Tensor` of shape `(V, H)`):
            Embeddings of the tokens, by any model with this vocabulary.
        eos_token_ids (`Sequence[int]`):
            Tokens that end a completion.

    Returns:
        [`Calibration`]

    Raises:
        `ValueError`: when the dataset has no gaps, or fewer than 32 pairs.
    """
    if not set(GAP_COLUMNS) <= set(dataset.column_names) or len(dataset) < MIN_PAIRS:
        raise ValueError(
            f"Calibration needs at least {MIN_PAIRS} pairs with the columns {GAP_COLUMNS}. Got {len(dataset)} pairs with "
            f"{dataset.column_names}; annotate the dataset with `annotate_token_rewards`, or set `calibrate_rewards=False`."
        )
    embeddings = embeddings.detach().float().cpu()
    scalars = []  # of the chosen completions, then of the rejected
    ids, gaps, pair_of, sides = [], [], [], []
    for side in range(2):
        for first in range(0, len(dataset), 1000):
            batch = dataset[first : first + 1000]
            tokens, gap, mask = _columns(batch, side)
            mask &= ~torch.isin(tokens, torch.tensor(list(eos_token_ids)))
            ids.append(tokens[mask])
            gaps.append(gap[mask])
            pair = torch.arange(first, first + len(tokens))[:, None].expand_as(tokens)[mask]
            pair_of.append(pair)
            sides.append(torch.full_like(pair, side))
            scalars.append((_sparse_rewards(gap, mask).sum(1), gap.masked_fill(~mask, 0).sum(1), mask.sum(1).float()))
    ids, gaps, pair_of, sides = (torch.cat(x) for x in (ids, gaps, pair_of, sides))
    used, ids = ids.unique(return_inverse=True)
    mean = embeddings[used[ids]].mean(dim=0)
    centered = embeddings[used] - mean  # (U, H), of the tokens that occur
    usual = _usual_gap(centered, ids, gaps, pair_of)  # (H,)

    # Features of a pair: chosen minus rejected
    sign = 1.0 - 2.0 * sides
    num_pairs, width = len(dataset), centered.size(1)
    bag = torch.zeros(num_pairs, width)
    for some in torch.arange(len(ids)).split(4096):
        bag.index_add_(0, pair_of[some], centered[ids[some]] * sign[some, None])
    chosen, rejected = (
        [torch.cat(x) for x in zip(*scalars[side * len(scalars) // 2 :][: len(scalars) // 2], strict=True)]
        for side in (0, 1)
    )
    terms = torch.stack(
        [bag @ usual, *(a - b for a, b in zip(chosen, rejected, strict=True))], dim=1
    ).double()  # (P, 4)
    scale = terms.square().mean(dim=0).sqrt().clamp(min=1e-8)
    basis = torch.linalg.svd(bag, full_matrices=False).Vh[:NUM_COMPONENTS]  # (K, H)
    bag_scale = (bag @ basis.T).square().mean().sqrt().clamp(min=1e-8)
    features = torch.cat([terms / scale, (bag @ basis.T).double() / bag_scale], dim=1)
    ridge = torch.ones(features.size(1), dtype=torch.double)
    ridge[: len(SCALARS)] = SCALAR_PENALTY

    held_out = {penalty: _cross_validated(features, penalty * ridge) for penalty in PENALTIES}
    penalty = max(PENALTIES, key=lambda x: F.logsigmoid(held_out[x]).mean())
    log_probs = F.logsigmoid(held_out[penalty])
    fitted = _fit(features, penalty * ridge)
    weights = fitted[: len(SCALARS)] / scale
    direction = weights[0].float() * usual + (fitted[len(SCALARS) :].float() / bag_scale) @ basis  # (H,)
    credits, usual = ((embeddings - mean) @ x for x in (direction, usual))
    credits[list(eos_token_ids)] = usual[list(eos_token_ids)] = 0
    return Calibration(
        credits=credits,
        usual=usual,
        weights=dict(zip(SCALARS, weights.tolist(), strict=True)),
        accuracy=((held_out[penalty] > 0) + (held_out[penalty] == 0) / 2).double().mean().item(),
        log_likelihood=log_probs.mean().item(),
        standard_error=(log_probs.std() / num_pairs**0.5).item(),
        num_pairs=num_pairs,
        eos_token_ids=list(eos_token_ids),
    )


def _columns(batch: dict[str, list], side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, gaps and mask (B, T) of the chosen (0) or of the rejected (1) completions."""
    ids = [torch.tensor(row) for row in batch[ID_COLUMNS[1 + side]]]
    gaps = [torch.tensor(row, dtype=torch.float32) for row in batch[GAP_COLUMNS[side]]]
    masks = batch.get(MASK_COLUMNS[side]) or [[True] * len(row) for row in ids]
    masks = [torch.tensor(row, dtype=torch.bool) for row in masks]
    return tuple(pad_sequence(rows, batch_first=True) for rows in (ids, gaps, masks))


def _sparse_rewards(gaps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Token rewards (B, T) by the faces alone."""
    return token_rewards(
        positive_logps=gaps,
        negative_logps=torch.zeros_like(gaps),
        preference_sign=torch.ones(len(gaps)),
        completion_mask=mask,
        reward_direction="faces",
    )


def _usual_gap(centered: torch.Tensor, ids: torch.Tensor, gaps: torch.Tensor, pair_of: torch.Tensor) -> torch.Tensor:
    """
    Direction (H,) along which embeddings predict gaps. The ridge is that which predicts best the gaps of one half of the pairs from
    the other.
    """
    gaps = gaps - gaps.mean()

    def moments(some: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Second moments (H, H) of the embeddings, and their products (H,) with the gaps."""
        count = torch.bincount(ids[some], minlength=len(centered)).float()
        total = torch.zeros(len(centered)).index_add_(0, ids[some], gaps[some])
        return centered.T @ (centered * count[:, None]), centered.T @ total

    def solve(second: torch.Tensor, product: torch.Tensor, ridge: float) -> torch.Tensor:
        ridge = ridge * second.diagonal().mean().clamp(min=1e-8)
        return torch.linalg.solve(second.double() + ridge * torch.eye(len(second)), product.double()).float()

    halves = [moments(pair_of % 2 == parity) for parity in (0, 1)]

    def error(ridge: float) -> float:
        """Of each half, predicted from the other, up to a constant."""
        found = [solve(*half, ridge) for half in halves]
        return sum(
            (v @ second @ v - 2 * v @ product).item() for v, (second, product) in zip(found, halves[::-1], strict=True)
        )

    best = min(SMOOTHING, key=error)
    return solve(*(a + b for a, b in zip(*halves, strict=True)), best)


def _fit(features: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """Weights (K,) of a Bradley-Terry model of pairs (P, K), chosen minus rejected, with a ridge (K,) on each, by Newton's method."""
    weights = torch.zeros_like(ridge)
    for _ in range(25):
        wrong = torch.sigmoid(-(features @ weights))  # (P,)
        gradient = ridge * weights - features.T @ wrong
        hessian = (features * (wrong * (1 - wrong))[:, None]).T @ features + ridge.diag()
        step = torch.linalg.solve(hessian, gradient)
        weights = weights - step
        if step.abs().max() < 1e-8:
            break
    return weights


def _cross_validated(features: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """Log-odds (P,) of the label of each pair, by a model that has not seen it."""
    fold = torch.arange(len(features)) % NUM_FOLDS
    log_odds = torch.empty(len(features), dtype=features.dtype)
    for k in range(NUM_FOLDS):
        log_odds[fold == k] = features[fold == k] @ _fit(features[fold != k], ridge)
    return log_odds
