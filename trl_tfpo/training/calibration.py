# SPDX-License-Identifier: Apache-2.0

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

Where faces see every token that counts, context included, the sparse rewards explain the labels alone, and the rest of the
model adds noise. So held-out labels decide, see [`Calibration.is_better`].
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence

from ..annotation.token_rewards import GAP_COLUMNS, REWARD_COLUMNS, annotation_settings, warn_unless_faces_separate
from ..common._upstream import is_peft_model, is_sharded
from ..data.tokenization import ID_COLUMNS, MASK_COLUMNS, columns_of
from ..functional import token_rewards
from .config import TFPOConfig


logger = logging.getLogger(__name__)
MIN_PAIRS = 32  # with fewer, labels say nothing about weights
MIN_DECIDED = 128  # with fewer, standard errors are too rough to choose by
MAX_PAIRS = 10_000  # that are fitted
NUM_FOLDS = 5
NUM_COMPONENTS = 256  # of the embeddings of a pair
SMOOTHING = (0.03, 0.1, 0.3, 1.0, 3.0)  # ridge of the usual gap, in units of the mean variance of an embedding
PENALTIES = (10000.0, 3000.0, 1000.0, 300.0, 100.0, 30.0)  # ridge of the embeddings, whose features have variance 1
SCALAR_PENALTY = 0.01  # share of it that the other terms pay
SCALARS = ("usual gap", "sparse reward", "gap", "number of tokens")
SPARSE = [SCALARS.index(name) for name in ("sparse reward", "number of tokens")]
NUM_ERRORS = 1.5  # standard errors by which rewards must be better than others, or than chance; see docs/results.md
DEFAULT_REWARDS = f"{token_rewards.__module__}.{token_rewards.__qualname__}"  # as an annotation records them
CHANCE = -np.log(2)  # log-likelihood of a label that nothing is known of


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
        sparse_log_likelihood, sparse_standard_error (`float`):
            The same of the sparse token rewards alone, with one weight, and of the number of tokens. Folds are the same.
        advantage_error (`float`):
            Standard error of the difference between the two log-likelihoods, by pairs.
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
    sparse_log_likelihood: float
    sparse_standard_error: float
    advantage_error: float
    num_pairs: int
    eos_token_ids: Sequence[int]

    @property
    def advantage(self) -> float:
        """How much better than the sparse token rewards alone these explain a held-out label, in nats."""
        return self.log_likelihood - self.sparse_log_likelihood

    @property
    def is_better(self) -> bool:
        """Whether the advantage is larger than 1.5 of its standard errors."""
        return self.advantage > NUM_ERRORS * self.advantage_error

    def apply(self, dataset: Dataset | dict) -> Dataset | dict:
        """
        The dataset, or each of a dict of them, with these rewards in the place of its own.

        Raises:
            `ValueError`: when the dataset has no gaps.
        """
        if isinstance(dataset, dict):
            return {name: self.apply(split) for name, split in dataset.items()}
        if not set(GAP_COLUMNS) <= columns_of(dataset):
            raise ValueError(
                f"Calibrated rewards need the columns {GAP_COLUMNS}. Got {sorted(columns_of(dataset))}; annotate the dataset with "
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

        told = {"desc": "Calibrating token rewards"} if isinstance(dataset, Dataset) else {}
        return dataset.map(add_rewards, batched=True, **told)

    def describe(self, *, is_used: bool) -> str:
        """What was found on held-out pairs, and which rewards are used, in one sentence."""
        return (
            f"{'Calibrated' if is_used else 'Sparse'} token rewards are used: the log-likelihood of {self.num_pairs} held-out "
            f"labels is {self.log_likelihood:.3f} ± {self.standard_error:.3f} nats with calibrated rewards (they prefer the "
            f"chosen completion of {self.accuracy:.0%}) and {self.sparse_log_likelihood:.3f} with sparse ones, a difference "
            f"of {self.advantage:.3f} ± {self.advantage_error:.3f}; chance is {CHANCE:.3f}."
        )

    def report(self, *, is_used: bool) -> None:
        """
        Log what was found. Warn when the rewards that are used explain held-out labels better than chance by no more than 1.5
        standard errors.

        Args:
            is_used (`bool`):
                Whether calibrated rewards are used, not the sparse ones.
        """
        logger.info(self.describe(is_used=is_used))
        found = (self.log_likelihood, self.standard_error)
        if not is_used:
            found = (self.sparse_log_likelihood, self.sparse_standard_error)
        if found[0] < CHANCE + NUM_ERRORS * found[1]:
            warnings.warn(
                f"The token rewards do not explain the labels. {self.describe(is_used=is_used)} Word the faces by what the "
                "labels reward, put them in the user turn, use a stronger patient, or label more pairs."
            )


def calibrate(dataset: Dataset, embeddings: torch.Tensor, eos_token_ids: Sequence[int]) -> Calibration:
    """
    Fit token rewards to the labels of an annotated dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            Annotated by [`~trl_tfpo.annotate_token_rewards`], with gaps; at least 32 pairs. Of more than 10,000 pairs so many
            are drawn at random. Pairs of one prompt are held out together.
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
    dataset = draw_pairs(dataset, MAX_PAIRS)
    tokens = read_tokens(dataset, eos_token_ids)

    # Sources of rewards
    used, ids = tokens.ids.unique(return_inverse=True)
    centered = embeddings.detach()[used.to(embeddings.device)].float().cpu()  # (U, H), of the tokens that occur
    mean = torch.bincount(ids).float() @ centered / len(ids)
    centered -= mean
    usual = _usual_gap(centered, ids, tokens.gaps, tokens.pair)  # (H,)
    size = (len(dataset), len(used))
    signs = torch.sparse_coo_tensor(torch.stack([tokens.pair, ids]), tokens.sign, size, check_invariants=False)
    bag = signs @ centered  # (P, H), chosen minus rejected
    terms = torch.cat([(bag @ usual)[:, None], tokens.sums], dim=1).double()  # (P, 4)
    scale = terms.square().mean(dim=0).sqrt().clamp(min=1e-8)
    basis = torch.linalg.eigh((bag.T @ bag).double()).eigenvectors[:, -NUM_COMPONENTS:].float()  # (H, K)
    components = (bag @ basis).double()
    component_scale = components.square().mean().sqrt().clamp(min=1e-8)

    # What they are worth
    features = torch.cat([terms / scale, components / component_scale], dim=1)  # (P, 4 + K)
    ridge = torch.ones(features.size(1), dtype=torch.double)
    ridge[: len(SCALARS)] = SCALAR_PENALTY
    penalty, log_odds = _held_out(features, ridge, tokens.prompt)
    _, sparse_log_odds = _held_out(features[:, SPARSE], ridge[SPARSE], tokens.prompt)
    log_probs, sparse_log_probs = F.logsigmoid(log_odds), F.logsigmoid(sparse_log_odds)
    fitted = _fit(features, penalty * ridge)
    weights = fitted[: len(SCALARS)] / scale
    direction = weights[0].float() * usual + basis @ (fitted[len(SCALARS) :] / component_scale).float()  # (H,)
    credits, usual = _along(torch.stack([direction, usual], dim=1), embeddings, mean)
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


def choose_rewards(
    dataset: Dataset | IterableDataset,
    eval_dataset: Dataset | IterableDataset | dict | None,
    model: torch.nn.Module,
    args: TFPOConfig,
    eos_token_ids: Sequence[int],
    *,
    is_online: bool = False,
) -> tuple[Calibration | None, str | None]:
    """
    Calibrate token rewards where the settings ask for it; where they leave it open, use the result if it explains held-out labels
    better than the sparse rewards alone.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The annotated training data.
        eval_dataset (the same, or a `dict` of them, *optional*):
            For evaluation; needs gaps as well.
        model (`torch.nn.Module`):
            The doctor, whose embeddings are read.
        args ([`TFPOConfig`]):
            With `calibrate_rewards`.
        eos_token_ids (`Sequence[int]`):
            Tokens that end a completion.
        is_online (`bool`, *optional*, defaults to `False`):
            Whether the data collator asks the patient batch by batch.

    Returns:
        [`Calibration`], the same in all processes, or `None` where it is not used; and `str`, what was found, or `None` where
        nothing was compared.

    Raises:
        `ValueError`: when the settings ask for it, and there are no gaps or fewer than 32 pairs.

    Warns:
        `UserWarning`: when the rewards that are used do not explain the labels.
    """
    held_out = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    is_open = args.calibrate_rewards is None and _is_open(dataset, model, args.policy, is_online)
    is_open &= all(split is None or set(GAP_COLUMNS) <= columns_of(split) for split in held_out)
    if not args.calibrate_rewards and not is_open:
        if args.process_index == 0:
            warn_unless_faces_separate(dataset)
        return None, None
    found = calibrate(dataset, model.get_input_embeddings().weight, eos_token_ids)
    (found,) = broadcast_object_list([found])  # machines may round differently, and the choice must be one
    is_used = args.calibrate_rewards or found.is_better
    if args.process_index == 0:
        found.report(is_used=is_used)
    return found if is_used else None, found.describe(is_used=is_used)


def _is_open(dataset: Dataset | IterableDataset, model: torch.nn.Module, policy: str, is_online: bool) -> bool:
    """
    Whether labels may decide on the token rewards: by guided flow, with all gaps there before training, enough pairs, embeddings
    that are whole and not those of an adapter, and a record by which nobody has chosen the rewards by `reward_fn` or
    `reward_direction`.
    """
    if (
        policy == "doctor"
        or is_online
        or is_sharded(model)
        or is_peft_model(model)
        or not isinstance(dataset, Dataset)
    ):
        return False
    recorded = annotation_settings(dataset)
    if recorded is None:  # as in a file, whose rewards may be anybody's
        return False
    rewards = recorded.get("reward", {})
    is_default = rewards.get("function", DEFAULT_REWARDS) == DEFAULT_REWARDS
    is_default &= rewards.get("reward_direction", "agreement") == "agreement"
    return is_default and set(GAP_COLUMNS) <= set(dataset.column_names) and len(dataset) >= MIN_DECIDED


def draw_pairs(dataset: Dataset, max_pairs: int) -> Dataset:
    """The dataset, or so many of its pairs, drawn at random."""
    if len(dataset) <= max_pairs:
        return dataset
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:max_pairs]
    return dataset.select(drawn.sort().values.tolist())


@dataclass
class Tokens:
    """The N tokens of P pairs that may have a reward: of the assistant, without EOS."""

    ids: torch.Tensor  # (N,)
    gaps: torch.Tensor  # (N,), in nats
    pair: torch.Tensor  # (N,), number of its pair
    sign: torch.Tensor  # (N,), 1 of chosen and -1 of rejected completions
    sums: torch.Tensor  # (P, 3), sparse reward, gap, number of tokens: sum of the chosen minus that of the rejected
    prompt: torch.Tensor  # (P,), number of its prompt; of the pair itself where there are few prompts


def read_tokens(dataset: Dataset, eos_token_ids: Sequence[int]) -> Tokens:
    """The tokens of an annotated dataset that may have a reward."""
    names = [name for name in (*ID_COLUMNS, *GAP_COLUMNS, *MASK_COLUMNS) if name in dataset.column_names]
    dataset, eos_token_ids = dataset.select_columns(names), torch.tensor(list(eos_token_ids))
    tokens, sums, prompts = [], torch.zeros(len(dataset), 3), {}
    prompt = torch.arange(len(dataset))
    for first in range(0, len(dataset), 1000):
        batch = dataset[first : first + 1000]
        for side, sign in enumerate((1.0, -1.0)):
            ids, gaps, mask = _columns(batch, side)
            mask &= ~torch.isin(ids, eos_token_ids)
            pair = torch.arange(first, first + len(ids))
            of = pair[:, None].expand_as(ids)[mask]
            tokens.append((ids[mask], gaps[mask], of, torch.full(of.shape, sign)))
            found = (_sparse_rewards(gaps, mask).sum(1), gaps.masked_fill(~mask, 0).sum(1), mask.sum(1).float())
            sums[pair] += sign * torch.stack(found, dim=1)
        for row, prompt_ids in enumerate(batch.get(ID_COLUMNS[0], [])):
            prompt[first + row] = prompts.setdefault(tuple(prompt_ids), len(prompts))
    if len(prompts) < MIN_PAIRS:
        prompt = torch.arange(len(dataset))
    return Tokens(*(torch.cat(x) for x in zip(*tokens, strict=True)), sums, prompt)


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
        there = centered[count > 0]
        return there.T @ (there * count[count > 0, None]), there.T @ total[count > 0]

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


def _along(directions: torch.Tensor, embeddings: torch.Tensor, mean: torch.Tensor) -> list[torch.Tensor]:
    """How far each embedding, less the mean, lies along each of D directions (H, D): D tensors (V,)."""
    far = [some.float().cpu() @ directions for some in embeddings.detach().split(8192)]
    return list((torch.cat(far) - mean @ directions).unbind(dim=1))


def _held_out(features: torch.Tensor, ridge: torch.Tensor, group: torch.Tensor) -> tuple[float, torch.Tensor]:
    """
    The penalty that predicts labels best, a factor of the ridge (K,), and the log-odds (P,) of the label of each pair by models that
    have not seen its group (P,).
    """
    fold, log_odds = group % NUM_FOLDS, torch.empty(len(PENALTIES), len(features), dtype=features.dtype)
    for k in range(NUM_FOLDS):
        weights, seen = torch.zeros_like(ridge), features[fold != k]
        for row, penalty in enumerate(PENALTIES):
            weights = _fit(seen, penalty * ridge, weights)
            log_odds[row, fold == k] = features[fold == k] @ weights
    best = int(F.logsigmoid(log_odds).mean(dim=1).argmax())
    return PENALTIES[best], log_odds[best]


def _fit(features: torch.Tensor, ridge: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """
    Weights (K,) of a Bradley-Terry model of pairs (P, K), chosen minus rejected, with a ridge (K,) on each, by Newton's method from
    the weights given. Second derivatives are float32: that takes a step more, and half the time.
    """
    weights, rounded = torch.zeros_like(ridge) if weights is None else weights, features.float()
    for _ in range(25):
        wrong = torch.sigmoid(-(features @ weights))  # (P,)
        gradient = ridge * weights - features.T @ wrong
        hessian = (rounded * (wrong * (1 - wrong)).float()[:, None]).T @ rounded
        step = torch.linalg.solve(hessian.double() + ridge.diag(), gradient)
        weights = weights - step
        if step.abs().max() < 1e-6:
            break
    return weights


def _standard_error(values: torch.Tensor, group: torch.Tensor) -> float:
    """Of the mean of values (P,), of which those of one group (P,) are not independent."""
    sums = torch.zeros(int(group.max()) + 1, dtype=values.dtype).index_add_(0, group, values - values.mean())
    return (sums.square().sum().sqrt() / len(values)).item()
