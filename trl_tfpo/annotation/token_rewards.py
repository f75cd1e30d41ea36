# SPDX-License-Identifier: Apache-2.0

"""
Token rewards from preference pairs (Stage 1 of LLMdoctor).

A frozen language model, the patient, scores each completion under two *faces*: contrastive prompts with a positive and
a negative instruction. The *gap* at a token is the difference of its log-probabilities: positive minus negative face.
"""

import inspect
import json
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypedDict

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .. import functional
from ..common.arguments import check_counts
from ..common.atomic import FORMAT, check_format
from ..common.precision import HALF_PRECISION, in_float32
from ..data.tokenization import (
    FACE_COLUMNS,
    ID_COLUMNS,
    MASK_COLUMNS,
    all_eos_token_ids,
    check_is_tokenizer,
    column_lengths,
    tokenize_preferences,
)
from ..data.tokenizer_identity import check_embeddings, check_same_tokenizer, tokenizer_fingerprint
from ..faces import Faces, resolve_faces
from ..models.fingerprint import model_fingerprint
from ..models.named_model import NamedModel, outline_of, resolve_model
from ..models.trained_exponents import check_is_language_model
from .backends import CompletionScorer
from .score_cache import SHARD_SIZE, add_scores
from .scoring import check_unsharded, score_completions


REWARD_COLUMNS = ["chosen_token_rewards", "rejected_token_rewards"]
GAP_COLUMNS = ["chosen_gaps", "rejected_gaps"]
SETTINGS_KEY = "trl_tfpo settings: "
NUM_STREAMED = 64  # pairs of a streamed dataset that are checked before training; reading one may run the patient
NUM_CHECKED_PAIRS = 8  # pairs that a patient in half precision also scores in float32
MAX_FLIPPED = 0.1  # share of rewarded tokens that may depend on rounding without a warning

logger = logging.getLogger(__name__)


def annotate_token_rewards(
    dataset: Dataset | IterableDataset | DatasetDict | IterableDatasetDict,
    patient: str | PreTrainedModel | NamedModel | CompletionScorer,
    processing_class: PreTrainedTokenizerBase,
    *,
    faces: Faces | str,
    reward_fn: Callable[..., torch.Tensor] = functional.token_rewards,
    max_length: int | None = None,
    drop_unusable: bool = False,
    batch_size: int = 16,
    convert_transcripts: bool = False,
    eos_token_ids: Sequence[int] = (),
    **reward_settings,
) -> Dataset | IterableDataset | DatasetDict | IterableDatasetDict:
    r"""
    Add a reward for each token to a preference dataset, from a frozen patient under two contrastive prompts.

    The ids of a completion are the same under both faces and for the doctor. Under `accelerate launch`, each process
    scores a share of the dataset, and all processes get the whole result. Scores are cached shard by shard in the
    cache of Datasets: an interrupted call resumes, and a repeated call scores nothing.

    A streamed dataset is annotated as it is read, 16 pairs at a time, and nothing is cached: each pass over the
    dataset queries the patient again. Each process scores all pairs that it reads (see
    `datasets.distributed.split_dataset_by_node`).

    Args:
        dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], or a dict of them):
            Preference dataset in any of TRL's formats: standard or conversational, with an explicit or implicit
            prompt.
        patient (`str`, [`~transformers.PreTrainedModel`], [`~trl_tfpo.models.named_model.NamedModel`] or
            [`~trl_tfpo.annotation.backends.CompletionScorer`]):
            Causal language model, its name or path, or a name with keyword arguments of `from_pretrained`. Its weights
            do not change. A patient given by name is loaded only if a score is not cached. A scorer is a patient that
            another engine runs: [`~trl_tfpo.annotation.backends.EndpointScorer`] or
            [`~trl_tfpo.annotation.backends.VllmScorer`]. It has no generation config: pass its `eos_token_ids`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the patient and of the doctor.
        faces ([`~trl_tfpo.faces.Faces`] or `str`):
            Contrastive prompts: a pair of opposite instructions, or `"helpfulness"`, `"harmlessness"` or `"honesty"`.
        reward_fn (`Callable`, *optional*, defaults to [`~trl_tfpo.functional.token_rewards`]):
            Function from the keyword arguments `positive_logps` and `negative_logps` (B, T) in nats, `preference_sign`
            (B,) and `completion_mask` (B, T) to rewards (B, T).
        max_length (`int`, *optional*):
            Maximum number of tokens of prompt and completion together; longer completions are truncated at the end. By
            default nothing is truncated.
        drop_unusable (`bool`, *optional*, defaults to `False`):
            Whether to drop unusable pairs instead of raising an error. A pair is unusable if its prompt or a
            completion is empty, if its prompt has `max_length` or more tokens, or if the chat template cannot render
            it. See [`~trl_tfpo.data.tokenization.tokenize_pair`].
        batch_size (`int`, *optional*, defaults to `16`):
            Number of sequences in one forward pass of the patient if all have the greatest length. A pass of shorter
            sequences may have more of them, but not more tokens. A pair has four sequences. On a CPU a pass may be
            limited to 2,048 tokens, or to one pair if that is longer.
        convert_transcripts (`bool`, *optional*, defaults to `False`):
            Whether to convert texts with turns of `"\n\nHuman:"` and `"\n\nAssistant:"` (HH-RLHF) to messages, the
            format of chat models.
        eos_token_ids (`Sequence[int]`, *optional*):
            Further ids that end a completion, such as the doctor's. The ids of the tokenizer and of the patient's
            generation config are always included.
        reward_settings:
            Further keyword arguments of `reward_fn`, such as `reward_direction` and `sparsity_threshold`.

    Returns:
        the dataset, of the same type, with these columns: `prompt_ids`, `chosen_ids`, `rejected_ids`; `chosen_mask`,
        `rejected_mask` (1 for tokens of the assistant, 0 for users and tools); `chosen_token_rewards`,
        `rejected_token_rewards`; `chosen_gaps`, `rejected_gaps` (positive minus negative log-probability, in nats).
        Masks, rewards and gaps have one value for each token of the completion. Rewards and gaps are 0 where the mask
        is 0. The settings are stored in the info of the dataset, see [`annotation_settings`].

    Raises:
        `ValueError`: if the patient is sharded, or is not a causal language model with this tokenizer; if the dataset
            has images or lacks columns; if a pair is unusable; if the engine of a scorer cannot be imported or refuses
            a request; if a log-probability is not finite; if `reward_fn` returns another shape, or values that are not
            finite; if all rewards are zero, unless the dataset is streamed; if a setting is unknown or out of range.
        `ConnectionError`: if the endpoint of a scorer does not answer.

    Examples:

    ```python
    >>> from trl_tfpo import annotate_token_rewards
    >>> from trl_tfpo.testbed import load_world
    >>> world = load_world()
    >>> dataset = world.preference_dataset("praise", num_pairs=4, seed=0)
    >>> annotated = annotate_token_rewards(
    ...     dataset, world.patient, world.tokenizer, faces=world.attributes["praise"].faces
    ... )
    >>> len(annotated[0]["chosen_ids"]) == len(annotated[0]["chosen_token_rewards"])
    True

    ```
    """
    if isinstance(patient, CompletionScorer):
        check_is_tokenizer(processing_class)
        patient.check(processing_class)
        patient_name, outline = patient.name, None
    else:
        patient = resolve_model(patient, "patient", dtype="auto")
        check_patient(patient, processing_class)
        outline = outline_of(patient)
        patient_name = outline.config._name_or_path
    check_counts(batch_size=batch_size, max_length=max_length)
    if not callable(reward_fn):
        raise ValueError(
            f"`reward_fn` must be callable. Got {reward_fn!r}; leave it out to use `functional.token_rewards`."
        )
    faces = resolve_faces(faces)
    reward_fn = partial(reward_fn, **reward_settings)
    eos_token_ids = sorted({*eos_token_ids, *all_eos_token_ids(processing_class, outline)})
    settings = {
        "format": FORMAT,
        "faces": vars(faces),
        "reward": describe(reward_fn),
        "max_length": max_length,
        "patient": patient_name,
        "tokenizer": tokenizer_fingerprint(processing_class),
        "eos_token_ids": eos_token_ids,
    }
    tokenize = partial(
        tokenize_preferences,
        processing_class=processing_class,
        faces=faces,
        eos_token_ids=eos_token_ids,
        max_length=max_length,
        drop_unusable=drop_unusable,
        convert_transcripts=convert_transcripts,
    )
    score = partial(_score_pairs, patient=patient, reward_fn=reward_fn, batch_size=batch_size)
    annotate = partial(_annotate_split, patient=patient, tokenize=tokenize, score=score, settings=settings)
    if isinstance(dataset, dict):
        return type(dataset)({name: annotate(split) for name, split in dataset.items()})
    return annotate(dataset)


def _annotate_split(
    dataset: Dataset | IterableDataset,
    *,
    patient: PreTrainedModel | NamedModel | CompletionScorer,
    tokenize: Callable[..., Dataset | IterableDataset],
    score: "partial[dict[str, list]]",
    settings: dict[str, Any],
) -> Dataset | IterableDataset:
    """Annotate one dataset, and store the settings in its info."""
    tokenized, rounding = tokenize(dataset), None
    annotated: Dataset | IterableDataset
    if isinstance(tokenized, Dataset):
        key = (settings, score.keywords["reward_fn"])
        annotated, rounding = _annotate_cached(tokenized, patient, score, key=key)
    else:
        annotated = tokenized.map(score, batched=True, batch_size=SHARD_SIZE)
    annotated = annotated.remove_columns(FACE_COLUMNS)
    recorded = settings if rounding is None else {**settings, "rounding": rounding}
    annotated.info.description = f"{annotated.info.description}\n{SETTINGS_KEY}{json.dumps(recorded)}".strip()
    return annotated


def _annotate_cached(
    tokenized: Dataset,
    patient: PreTrainedModel | NamedModel | CompletionScorer,
    score: Callable[..., dict[str, list]],
    *,
    key: tuple,
) -> tuple[Dataset, dict[str, float] | None]:
    """
    Score a tokenized dataset through the cache of Datasets.

    Returns the dataset with rewards and gaps, and the result of [`_measure_rounding`] for a patient in half precision.
    """
    is_named = isinstance(patient, (NamedModel, CompletionScorer))
    fingerprint = patient.fingerprint if is_named else model_fingerprint(patient)  # type: ignore[arg-type]
    positive, negative, chosen, rejected = column_lengths(tokenized, [*FACE_COLUMNS, *ID_COLUMNS[1:]])
    prompt = np.maximum(positive, negative)
    score = partial(score, longest=int((prompt + np.maximum(chosen, rejected)).max()))
    scoring: _Scoring = {
        "lengths": prompt + chosen + rejected,
        "key": (fingerprint, *key),
        "columns": REWARD_COLUMNS + GAP_COLUMNS,
    }
    annotated = add_scores(tokenized, score, desc="Annotating token rewards", **scoring)
    is_rounded = not isinstance(patient, CompletionScorer) and patient.dtype in HALF_PRECISION
    rounding = _measure_rounding(tokenized, annotated, score, **scoring) if is_rounded else None
    table = annotated.data
    if not any(pc.any(pc.not_equal(pc.list_flatten(table.column(name)), 0.0)).as_py() for name in REWARD_COLUMNS):
        raise ValueError(
            "At least one token must have a reward that is not zero. Got zeros only: the patient's two faces do not "
            "differ on this dataset, or no token passes the `sparsity_threshold`; use faces that the patient "
            "understands, a lower threshold, or a stronger patient."
        )
    return annotated, rounding


class _Scoring(TypedDict):
    """Arguments of [`add_scores`] that are the same for the annotation and for its check in float32."""

    lengths: np.ndarray
    key: tuple
    columns: list[str]


def annotation_settings(dataset: Dataset | IterableDataset) -> dict[str, Any] | None:
    """Return the settings that [`annotate_token_rewards`] stored in the info of a dataset, or `None`."""
    for line in reversed((dataset.info.description or "").splitlines()):
        if line.startswith(SETTINGS_KEY):
            return json.loads(line.removeprefix(SETTINGS_KEY))
    return None


def check_annotated_for(dataset: Dataset | IterableDataset, processing_class: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` if a dataset was annotated with another tokenizer, or has an unsupported format."""
    settings = annotation_settings(dataset) or {}
    check_format(settings.get("format", FORMAT), "An annotated dataset")
    if settings.get("tokenizer") not in (None, tokenizer_fingerprint(processing_class)):
        raise ValueError(
            "A dataset must be annotated with the doctor's tokenizer. Got token ids of another tokenizer (vocabulary "
            f"{settings['tokenizer'][:8]}, patient {settings.get('patient')!r}); annotate it again with this "
            "tokenizer, or use a doctor of the patient's family."
        )
    largest = max(processing_class.get_vocab().values())
    num_rows = 1000 if isinstance(dataset, Dataset) else NUM_STREAMED
    for row in islice(dataset, num_rows):  # the info is lost if the dataset is read from a file
        for token_id in (token_id for name in ID_COLUMNS for token_id in row[name]):
            if not 0 <= token_id <= largest:
                raise ValueError(
                    f"A dataset must be annotated with the doctor's tokenizer, whose ids are 0 to {largest}. Got the "
                    f"token id {token_id}; annotate the dataset again, or use a doctor of the patient's family."
                )


def check_has_patient(patient: PreTrainedModel | NamedModel | None) -> None:
    """Raise `ValueError` if the patient is `None`."""
    if patient is None:
        raise ValueError(
            "A dataset without token rewards needs a patient, and so does training with `policy='guided'`. Got "
            "`patient_model=None`; pass a patient, or a dataset with the columns "
            f"{ID_COLUMNS + REWARD_COLUMNS} from `annotate_token_rewards`. After annotation the trainer releases a "
            "patient that was given as a model; pass its name to annotate another dataset."
        )


def check_patient(patient: PreTrainedModel | NamedModel, processing_class: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` unless the patient is an unsharded causal language model with this tokenizer."""
    check_is_tokenizer(processing_class)
    patient = outline_of(patient)
    if patient.config.is_encoder_decoder:
        raise ValueError(
            f"The patient must be a causal language model. Got the encoder-decoder {type(patient).__name__}; use a "
            "decoder-only model."
        )
    check_unsharded(patient)
    check_is_language_model(patient)
    own_tokenizer = _tokenizer_of(patient)
    if own_tokenizer is not None:
        check_same_tokenizer(own_tokenizer, processing_class)
    check_embeddings("patient", patient, processing_class)


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder or repository of the model, or `None`."""
    if not model.config._name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(model.config._name_or_path, trust_remote_code=False)
    except (OSError, ValueError):
        return None


# Scores


def _measure_rounding(
    tokenized: Dataset,
    annotated: Dataset,
    score: Callable[..., dict],
    *,
    lengths: np.ndarray,
    key: tuple,
    columns: list[str],
) -> dict[str, float] | None:
    """
    Compare the gaps of a patient in half precision with its gaps in float32, on at most eight pairs.

    Returns:
        `dict[str, float]`: `mean` and `p95` of the error in nats, and `flipped`, the share of rewarded tokens with a
        reward in only one of the two precisions. `None` if the patient's kernels do not support float32.
    """
    some = range(0, len(tokenized), -(-len(tokenized) // NUM_CHECKED_PAIRS))

    def score_exactly(batch: dict[str, list], on_progress: Callable[[float], None]) -> dict[str, list]:
        try:
            with in_float32():
                return score(batch, on_progress=on_progress)
        except Exception as error:  # kernels raise errors of any type; other processes wait for a result
            logger.info("The rounding of gaps could not be measured: %r", error)
            return {
                f"{name}_{kind}": [[math.nan] * len(ids) for ids in batch[f"{name}_ids"]]
                for name in ("chosen", "rejected")
                for kind in ("token_rewards", "gaps")
            }

    exact = add_scores(
        tokenized.select(some),
        score_exactly,
        lengths=lengths[some],
        key=(*key, "float32"),
        columns=columns,
        desc="Measuring the rounding of gaps",
    )

    def values(dataset: Dataset, columns: list[str]) -> torch.Tensor:
        """Values at the tokens of the assistant, chosen completions first."""
        masks = (mask for name in MASK_COLUMNS for mask in rounded[name])
        rows = (row for name in columns for row in dataset[name])
        return torch.tensor(
            [x for row, mask in zip(rows, masks, strict=True) for x, y in zip(row, mask, strict=True) if y]
        )

    rounded = annotated.select(some)
    errors = (values(rounded, GAP_COLUMNS) - values(exact, GAP_COLUMNS)).abs()
    if errors.isnan().any():
        return None
    is_rewarded = torch.stack([values(dataset, REWARD_COLUMNS) != 0 for dataset in (rounded, exact)])
    flipped = (is_rewarded[0] ^ is_rewarded[1]).sum() / is_rewarded.any(dim=0).sum().clamp(min=1)
    measured = {"mean": errors.mean().item(), "p95": errors.quantile(0.95).item(), "flipped": flipped.item()}
    if measured["flipped"] > MAX_FLIPPED:
        logger.warning(
            "The patient computes in half precision: on %d pairs the mean error of its gaps is %.3f nats, and %.0f%% "
            "of the rewards depend on rounding. Load the patient in float32 (`dtype`), or set `gap_floor` above the "
            "error.",
            len(some),
            measured["mean"],
            100 * measured["flipped"],
        )
    return measured


def _score_pairs(
    batch: dict[str, list],
    *,
    patient: PreTrainedModel | NamedModel | CompletionScorer,
    **settings,
) -> dict[str, list]:
    """Rewards and gaps of a batch of tokenized pairs, as columns."""
    if isinstance(patient, NamedModel):
        patient = patient.loaded
    rewards, gaps = score_token_rewards(batch, patient=patient, **settings)
    num_pairs = len(batch["prompt_ids"])
    return {
        "chosen_token_rewards": [row.tolist() for row in rewards[:num_pairs]],
        "rejected_token_rewards": [row.tolist() for row in rewards[num_pairs:]],
        "chosen_gaps": [row.tolist() for row in gaps[:num_pairs]],
        "rejected_gaps": [row.tolist() for row in gaps[num_pairs:]],
    }


def score_token_rewards(
    batch: dict[str, list],
    *,
    patient: PreTrainedModel | CompletionScorer,
    reward_fn: Callable[..., torch.Tensor],
    **settings,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    Score P tokenized pairs with the patient.

    Args:
        batch (`dict[str, list]`):
            `chosen_ids`, `rejected_ids`, `positive_prompt_ids` and `negative_prompt_ids` of P pairs, and optionally
            `chosen_mask` and `rejected_mask`.
        patient ([`~transformers.PreTrainedModel`] or [`~trl_tfpo.annotation.backends.CompletionScorer`]):
            Model that scores the completions.
        reward_fn (`Callable`):
            See [`annotate_token_rewards`].
        settings:
            `batch_size`, and further arguments of [`~trl_tfpo.annotation.scoring.score_completions`].

    Returns:
        two lists of 2P `torch.Tensor` of shape `(T_i,)`, chosen completions first: rewards, and gaps in nats. Both are
        zero where the mask is zero.

    Raises:
        `ValueError`: if a log-probability is not finite, or if `reward_fn` returns another shape or values that are
            not finite.
    """
    completions = batch["chosen_ids"] + batch["rejected_ids"]  # 2P
    num_rows = len(completions)
    score = patient.score_completions if isinstance(patient, CompletionScorer) else partial(score_completions, patient)
    logps = score(
        batch["positive_prompt_ids"] * 2 + batch["negative_prompt_ids"] * 2,
        completions * 2,
        **settings,
    )  # 4P
    padded = torch.nn.utils.rnn.pad_sequence(logps, batch_first=True)  # (4P, T)
    positive_logps, negative_logps = padded.chunk(2)  # (2P, T)
    lengths = torch.tensor([len(ids) for ids in completions])
    completion_mask = torch.arange(padded.size(1)) < lengths[:, None]
    if MASK_COLUMNS[0] in batch:
        masks = [torch.tensor(mask, dtype=torch.bool) for name in MASK_COLUMNS for mask in batch[name]]
        completion_mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    preference_sign = torch.ones(num_rows).masked_fill(torch.arange(num_rows) >= num_rows // 2, -1)
    rewards = reward_fn(
        positive_logps=positive_logps,
        negative_logps=negative_logps,
        preference_sign=preference_sign,
        completion_mask=completion_mask,
    )
    shape = tuple(rewards.shape) if isinstance(rewards, torch.Tensor) else type(rewards).__name__
    if shape != tuple(completion_mask.shape) or not rewards[completion_mask].isfinite().all():
        raise ValueError(
            "`reward_fn` must return one finite reward for each token, in a tensor of shape "
            f"{tuple(completion_mask.shape)}. Got {shape}, or values that are not finite; correct the function."
        )
    rewards = rewards.masked_fill(~completion_mask, 0)
    gaps = (positive_logps - negative_logps).masked_fill(~completion_mask, 0)
    return (
        [row[:length].float() for row, length in zip(rewards, lengths, strict=True)],
        [row[:length] for row, length in zip(gaps, lengths, strict=True)],
    )


def describe(function: partial) -> dict[str, Any]:
    """Return the name and the settings, defaults included, of a reward function."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise ValueError(
            f"`reward_fn` must accept the reward settings. Got {sorted(function.keywords)} for "
            f"`{function.func.__name__}`; look for a mistyped name."
        ) from error
    settings = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    inner = function.func
    return {
        "function": f"{inner.__module__}.{inner.__qualname__}",
        **{k: v for k, v in settings.items() if v is not None},
    }
