# SPDX-License-Identifier: Apache-2.0

r"""
Calibrated token rewards, fitted to the preference labels.

Most of the gap between the faces at one token is noise from its context. The signal is the *usual gap* of the token,
predicted by a ridge regression of all gaps on the token embeddings. A Bradley-Terry model of the pairs then weights
each source of token rewards:

$$\log \frac{P(\text{chosen})}{P(\text{rejected})} = \sum_t r_t^{\text{chosen}} - \sum_t r_t^{\text{rejected}}, \qquad
r_t = a\,u(y_t) + b\,s_t + c\,\Delta_t + w^\top (e_{y_t} - \bar e)$$

$u$ is the usual gap of a token, $s_t$ its sparse reward (`functional.token_rewards` without labels), $\Delta_t$ its
gap, and $e$ its embedding; $w$ has a separate ridge. The fit also includes the number of tokens, but the reward does
not: a preference for length says nothing about single tokens. EOS gets no reward. A reward of 1 is one nat of the
log-odds of a label. No network is trained or run.

If sparse rewards explain the labels well, the other terms only add noise. Held-out labels therefore decide whether
calibrated rewards are used, see [`Calibration.is_better`].
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset

from ..annotation.token_rewards import GAP_COLUMNS, REWARD_COLUMNS
from ..data.tokenization import ID_COLUMNS, columns_of
from .token_gaps import centered_embeddings, padded_columns, predict_gaps, read_gaps, sample_pairs, sparse_rewards


AnyDataset: TypeAlias = Dataset | IterableDataset | dict[str, Dataset | IterableDataset]

logger = logging.getLogger(__name__)
MIN_PAIRS, MAX_PAIRS = 32, 10_000  # in a fit
NUM_FOLDS = 5
NUM_COMPONENTS = 256  # principal components of the embeddings of a pair
USUAL_GAP_RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # in units of the mean variance of an entry of the embeddings
PENALTIES = (10000.0, 3000.0, 1000.0, 300.0, 100.0, 30.0)  # ridges of the components, whose mean square is 1
SCALAR_PENALTY = 0.01  # ridge of the scalar terms, as a share of the ridge of the components
SCALARS = ("usual gap", "sparse reward", "gap", "number of tokens")
SPARSE = [SCALARS.index(name) for name in ("sparse reward", "number of tokens")]
NUM_ERRORS = 1.5  # a larger difference, in standard errors, is significant
MIN_ADVANTAGE = 0.25  # relative to the gain of sparse rewards over chance; reason in docs/results/choices.md
CHANCE = -np.log(2)  # log-likelihood of a label without any information


@dataclass(frozen=True)
class Calibration:
    """
    Fit of token rewards to labels, from [`calibrate`].

    Args:
        credits (`torch.Tensor` of shape `(V,)`):
            Part of the reward that depends on the token alone, for each token of the vocabulary, in nats. The mean
            over the data is zero.
        usual (`torch.Tensor` of shape `(V,)`):
            Usual gap: the gap that the embedding of the token predicts, minus the mean gap, in nats.
        weights (`dict[str, float]`):
            Weights of the usual gap, the sparse reward, the gap, and the number of tokens. The last is not part of the
            rewards.
        accuracy (`float`):
            Share of held-out pairs that the fit predicts correctly.
        log_likelihood, standard_error (`float`):
            Mean log-probability of held-out labels in nats, and its standard error. Chance is -0.693.
        sparse_log_likelihood, sparse_standard_error (`float`):
            The same for a fit with sparse rewards and number of tokens only, on the same folds.
        advantage_error (`float`):
            Standard error of [`advantage`].
        num_pairs (`int`):
            Pairs in the fit.
        eos_token_ids (`Sequence[int]`):
            Tokens without a reward.
    """

    credits: torch.Tensor
    usual: torch.Tensor
    weights: dict[str, float]
    accuracy: float
    log_likelihood: float
    standard_error: float
    sparse_log_likelihood: float
    sparse_standard_error: float
    advantage_error: float
    num_pairs: int
    eos_token_ids: Sequence[int]

    @property
    def advantage(self) -> float:
        """Mean log-likelihood of held-out labels minus that with sparse rewards, in nats."""
        return self.log_likelihood - self.sparse_log_likelihood

    @property
    def is_better(self) -> bool:
        """Whether `advantage` exceeds 1.5 standard errors, and a quarter of the gain of sparse rewards over chance."""
        sparse_gain = max(self.sparse_log_likelihood - CHANCE, 0.0)
        return bool(self.advantage > max(NUM_ERRORS * self.advantage_error, MIN_ADVANTAGE * sparse_gain))

    def apply(self, dataset: AnyDataset, *, needs_gaps: bool = True) -> AnyDataset:
        """
        Replace the token rewards of an annotated dataset.

        Args:
            dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], or `dict` of them):
                The dataset, or its splits.
            needs_gaps (`bool`, *optional*, defaults to `True`):
                Whether a dataset without gaps is an error. Otherwise it is returned unchanged, with a warning.

        Returns:
            The dataset, or its splits, with calibrated rewards.

        Raises:
            `ValueError`: with `needs_gaps`, if the dataset has no gaps.
        """
        if isinstance(dataset, dict):
            return {name: self._apply(split, needs_gaps) for name, split in dataset.items()}
        return self._apply(dataset, needs_gaps)

    def _apply(self, dataset: Dataset | IterableDataset, needs_gaps: bool) -> Dataset | IterableDataset:
        if not set(GAP_COLUMNS) <= columns_of(dataset):
            found = f"Got {sorted(columns_of(dataset))}; annotate the dataset with `annotate_token_rewards`."
            if needs_gaps:
                raise ValueError(f"Calibrated rewards need the columns {GAP_COLUMNS}. {found}")
            warnings.warn(
                f"The doctor is trained on calibrated rewards, which need the columns {GAP_COLUMNS}. {found} The "
                "token rewards of this dataset are used as they are: its loss is not comparable to the training loss. "
                "Metrics that do not depend on token rewards, such as `rewards/accuracies`, are comparable."
            )
            return dataset
        is_eos = torch.zeros(len(self.credits), dtype=torch.bool)
        is_eos[list(self.eos_token_ids)] = True

        def add_rewards(batch: dict[str, list]) -> dict[str, list]:
            rewards = {}
            for side, name in enumerate(REWARD_COLUMNS):
                ids, gaps, mask = padded_columns(batch, side)
                mask &= ~is_eos[ids]
                values = (
                    self.credits[ids]
                    + self.weights["gap"] * gaps
                    + self.weights["sparse reward"] * sparse_rewards(gaps, mask)
                ).masked_fill(~mask, 0)
                lengths = [len(row) for row in batch[ID_COLUMNS[1 + side]]]
                rewards[name] = [row[:n].tolist() for row, n in zip(values, lengths, strict=True)]
            return rewards

        if isinstance(dataset, Dataset):
            return dataset.map(add_rewards, batched=True, desc="Calibrating token rewards")
        return dataset.map(add_rewards, batched=True)

    def describe(self, *, is_used: bool) -> str:
        """Summarize which rewards are used, and how well calibrated and sparse rewards explain held-out labels."""
        return (
            f"{'Calibrated' if is_used else 'Sparse'} token rewards are used: the mean log-likelihood of "
            f"{self.num_pairs} held-out labels is {self.log_likelihood:.3f} ± {self.standard_error:.3f} nats with "
            f"calibrated rewards (accuracy {self.accuracy:.0%}) and {self.sparse_log_likelihood:.3f} with sparse "
            f"rewards, a difference of {self.advantage:.3f} ± {self.advantage_error:.3f}; chance is {CHANCE:.3f}."
        )

    def report(self, *, is_used: bool) -> None:
        """
        Log the summary, and warn if the log-likelihood is less than 1.5 standard errors above chance.

        `is_used` says whether calibrated rather than sparse rewards are used.
        """
        logger.info(self.describe(is_used=is_used))
        log_likelihood, error = self.sparse_log_likelihood, self.sparse_standard_error
        if is_used:
            log_likelihood, error = self.log_likelihood, self.standard_error
        if log_likelihood < CHANCE + NUM_ERRORS * error:
            warnings.warn(
                f"The token rewards do not explain the labels. {self.describe(is_used=is_used)} Let the faces "
                'describe the preferred behaviour, try `Faces(..., placement="user")`, use a stronger patient, or '
                "label more pairs."
            )


def calibrate(dataset: Dataset, embeddings: torch.Tensor, eos_token_ids: Sequence[int]) -> Calibration:
    """
    Fit token rewards to the labels of an annotated dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset from [`~trl_tfpo.annotate_token_rewards`], with gaps and at least 32 pairs. At most 10,000 pairs
            are used, drawn at random. If there are at least 32 prompts, pairs of one prompt are held out together.
        embeddings (`torch.Tensor` of shape `(V, H)`):
            Embeddings of the tokens, from any model with this vocabulary.
        eos_token_ids (`Sequence[int]`):
            Tokens that end a completion.

    Returns:
        [`Calibration`]

    Raises:
        `ValueError`: if the dataset has no gaps, or fewer than 32 pairs.
    """
    if not set(GAP_COLUMNS) <= set(dataset.column_names) or len(dataset) < MIN_PAIRS:
        raise ValueError(
            f"Calibration needs at least {MIN_PAIRS} pairs with the columns {GAP_COLUMNS}. Got {len(dataset)} pairs "
            f"with {dataset.column_names}; annotate the dataset with `annotate_token_rewards`, or set "
            "`calibrate_rewards=False`."
        )
    dataset = sample_pairs(dataset, MAX_PAIRS)
    tokens = read_gaps(dataset, eos_token_ids)

    # Features of each pair: four scalar terms, and K components of the embeddings
    centered, mean, rows = centered_embeddings(embeddings, tokens.ids)
    usual_direction, _ = predict_gaps(centered, rows, tokens, USUAL_GAP_RIDGES)  # (H,)
    size = (len(dataset), len(centered))
    signs = torch.sparse_coo_tensor(torch.stack([tokens.pair, rows]), tokens.sign, size, check_invariants=False)
    bag = signs @ centered  # (P, H), sum over the chosen minus sum over the rejected completion
    terms = torch.cat([(bag @ usual_direction)[:, None], tokens.sums], dim=1).double()  # (P, 4)
    scale = terms.square().mean(dim=0).sqrt().clamp(min=1e-8)
    basis = torch.linalg.eigh((bag.T @ bag).double()).eigenvectors[:, -NUM_COMPONENTS:].float()  # (H, K)
    components = (bag @ basis).double()
    component_scale = components.square().mean().sqrt().clamp(min=1e-8)
    features = torch.cat([terms / scale, components / component_scale], dim=1)  # (P, 4 + K)

    # Weights of the features, and log-odds of held-out labels
    ridge = torch.ones(features.size(1), dtype=torch.double)
    ridge[: len(SCALARS)] = SCALAR_PENALTY
    penalty, log_odds = _held_out_log_odds(features, ridge, tokens.prompt)
    _, sparse_log_odds = _held_out_log_odds(features[:, SPARSE], ridge[SPARSE], tokens.prompt)
    log_probs, sparse_log_probs = F.logsigmoid(log_odds), F.logsigmoid(sparse_log_odds)
    fitted = _fit_bradley_terry(features, penalty * ridge)
    weights = fitted[: len(SCALARS)] / scale
    component_weights = (fitted[len(SCALARS) :] / component_scale).float()
    direction = weights[0].float() * usual_direction + basis @ component_weights  # (H,)

    credits, usual = _project(embeddings, mean, torch.stack([direction, usual_direction], dim=1))
    credits[list(eos_token_ids)] = usual[list(eos_token_ids)] = 0
    return Calibration(
        credits=credits,
        usual=usual,
        weights=dict(zip(SCALARS, weights.tolist(), strict=True)),
        accuracy=((log_odds > 0) + (log_odds == 0) / 2).double().mean().item(),
        log_likelihood=log_probs.mean().item(),
        standard_error=_standard_error(log_probs, tokens.prompt),
        sparse_log_likelihood=sparse_log_probs.mean().item(),
        sparse_standard_error=_standard_error(sparse_log_probs, tokens.prompt),
        advantage_error=_standard_error(log_probs - sparse_log_probs, tokens.prompt),
        num_pairs=len(dataset),
        eos_token_ids=list(eos_token_ids),
    )


def _project(embeddings: torch.Tensor, mean: torch.Tensor, directions: torch.Tensor) -> list[torch.Tensor]:
    """Products of the centered embeddings (V, H) with D directions (H, D), as D tensors (V,)."""
    products = [chunk.float().cpu() @ directions for chunk in embeddings.detach().split(8192)]
    return list((torch.cat(products) - mean @ directions).unbind(dim=1))


def _held_out_log_odds(features: torch.Tensor, ridge: torch.Tensor, group: torch.Tensor) -> tuple[float, torch.Tensor]:
    """
    Cross-validate a Bradley-Terry model of pairs. All pairs of a group are in the same fold.

    Returns the best factor of the ridge (K,), and the log-odds (P,) of held-out labels under it.
    """
    fold, log_odds = group % NUM_FOLDS, torch.empty(len(PENALTIES), len(features), dtype=features.dtype)
    for k in range(NUM_FOLDS):
        weights, training = torch.zeros_like(ridge), features[fold != k]
        for row, penalty in enumerate(PENALTIES):
            weights = _fit_bradley_terry(training, penalty * ridge, weights)
            log_odds[row, fold == k] = features[fold == k] @ weights
    best = int(F.logsigmoid(log_odds).mean(dim=1).argmax())
    return PENALTIES[best], log_odds[best]


def _fit_bradley_terry(
    features: torch.Tensor, ridge: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Fit the weights (K,) of a Bradley-Terry model by Newton's method, with a ridge (K,).

    The features (P, K) are differences: chosen minus rejected completion. A float32 Hessian needs one more step, but
    takes half the time.
    """
    weights, rounded = torch.zeros_like(ridge) if weights is None else weights, features.float()
    for _ in range(25):
        wrong = torch.sigmoid(-(features @ weights))  # (P,), probability of the opposite label
        gradient = ridge * weights - features.T @ wrong
        hessian = (rounded * (wrong * (1 - wrong)).float()[:, None]).T @ rounded
        step = torch.linalg.solve(hessian.double() + ridge.diag(), gradient)
        weights = weights - step
        if step.abs().max() < 1e-6:
            break
    return weights


def _standard_error(values: torch.Tensor, group: torch.Tensor) -> float:
    """Standard error of the mean of values (P,) that are correlated within each group (P,)."""
    sums = torch.zeros(int(group.max()) + 1, dtype=values.dtype).index_add_(0, group, values - values.mean())
    return (sums.square().sum().sqrt() / len(values)).item()
