# SPDX-License-Identifier: Apache-2.0

"""From preferences between texts to rewards of tokens: the patient is read under its two faces (Stage 1 of LLMdoctor)."""

import inspect
import json
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .. import functional
from ..common._upstream import HALVES, in_float32
from ..common.arguments import check_counts
from ..common.atomic import FORMAT, check_format
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
from ..models.adapters import check_speaks
from ..models.fingerprint import model_fingerprint
from ..models.named_model import NamedModel, outline_of, resolve_model
from .score_cache import SHARD_SIZE, add_scores
from .scoring import check_whole, score_completions


REWARD_COLUMNS = ["chosen_token_rewards", "rejected_token_rewards"]
GAP_COLUMNS = ["chosen_gaps", "rejected_gaps"]
SETTINGS_KEY = "trl_tfpo settings: "
MIN_PAIRS = 16  # of which it is said whether the faces separate them
NUM_STREAMED = 64  # pairs of a streamed dataset that are looked at beforehand: each may ask the patient
NUM_CHECKED_PAIRS = 8  # which a patient in half precision reads in float32 as well
MAX_FLIPPED = 0.1  # share of rewarded tokens that rounding may decide about without a warning

logger = logging.getLogger(__name__)


def annotate_token_rewards(
    dataset: Dataset | IterableDataset | DatasetDict | IterableDatasetDict,
    patient: str | PreTrainedModel | NamedModel,
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
    """
    Give every token of a preference dataset a reward, by asking a frozen patient what its two faces think of it.

    The patient scores token ids: the completion's ids are the same under both faces and for the doctor. Under
    `accelerate launch` every process scores its share, and all get the whole result. What has been scored is kept in
    the cache of Datasets, shard by shard: a call that was interrupted goes on where it was, and the same call again
    takes no time.

    A streamed dataset is annotated as it is read, 16 pairs at a time, and nothing is kept: each pass asks the patient
    again, and each process asks about all that it reads (see `datasets.distributed.split_dataset_by_node`).

    Args:
        dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], or a dict of them):
            Any preference dataset of TRL: standard or conversational, with an explicit or implicit prompt.
        patient (`str`, [`~transformers.PreTrainedModel`] or [`~trl_tfpo.models.named_model.NamedModel`]):
            Causal language model, or its name or path, or that with keyword arguments of `from_pretrained`. Only read:
            never trained, its weights never change. One by name is not even loaded where all has been scored before.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the patient and of the doctor.
        faces ([`~trl_tfpo.faces.Faces`] or `str`):
            Pair of opposite instructions, or `"helpfulness"`, `"harmlessness"`, `"honesty"`.
        reward_fn (`Callable`, *optional*, defaults to [`~trl_tfpo.functional.token_rewards`]):
            Takes the keyword arguments `positive_logps`, `negative_logps` (B, T) in nats, `preference_sign` (B,) and
            `completion_mask` (B, T), and returns rewards (B, T).
        max_length (`int`, *optional*):
            Completions are cut so that prompt and completion have at most this many tokens. By default nothing is cut.
        drop_unusable (`bool`, *optional*, defaults to `False`):
            Whether to leave out unusable pairs rather than to raise: those with an empty completion or prompt, with a
            prompt of `max_length` tokens or more, or that the chat template cannot render. See
            [`~trl_tfpo.data.tokenization.tokenize_pair`].
        batch_size (`int`, *optional*, defaults to `16`):
            Sequences in one forward of the patient, of the longest; of shorter ones as many as take no more tokens. A
            pair makes four.
        convert_transcripts (`bool`, *optional*, defaults to `False`):
            Whether texts with turns of `"\n\nHuman:"` and `"\n\nAssistant:"` (HH-RLHF) are read as messages, as a chat
            model expects.
        eos_token_ids (`Sequence[int]`, *optional*):
            Ids that end a completion beside those of the tokenizer and of the patient's generation config, such as the
            doctor's.
        reward_settings:
            Further keyword arguments of `reward_fn`, such as `reward_direction` and `sparsity_threshold`.

    Returns:
        the same type as `dataset`: the dataset with `prompt_ids`, `chosen_ids`, `rejected_ids`; `chosen_mask`,
        `rejected_mask` (1 where the assistant speaks, 0 where a user or a tool does between its turns);
        `chosen_token_rewards`, `rejected_token_rewards` (one reward for each token of the completion) and `chosen_gaps`,
        `rejected_gaps` (positive minus negative log-probability, in nats), both 0 where the mask is. The settings are kept
        in its info, see [`annotation_settings`].

    Raises:
        `ValueError`: when the dataset has images or lacks the columns; when a pair is unusable; when the patient's
        log-probabilities are not finite; when all rewards are zero, unless the dataset is streamed.

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
    patient = resolve_model(patient, "patient", dtype="auto")
    check_patient(patient, processing_class)
    check_counts(batch_size=batch_size, max_length=max_length)
    if not callable(reward_fn):
        raise ValueError(
            f"`reward_fn` must be callable. Got {reward_fn!r}; leave it out for `functional.token_rewards`."
        )
    eos_token_ids = sorted({*eos_token_ids, *all_eos_token_ids(processing_class, outline_of(patient))})
    settings = {
        "format": FORMAT,
        "faces": vars(resolve_faces(faces)),
        "reward": describe(partial(reward_fn, **reward_settings)),
        "max_length": max_length,
        "patient": outline_of(patient).config._name_or_path,
        "tokenizer": tokenizer_fingerprint(processing_class),
        "eos_token_ids": eos_token_ids,
    }
    if isinstance(dataset, dict):
        annotate = partial(
            annotate_token_rewards,
            patient=patient,
            processing_class=processing_class,
            faces=faces,
            reward_fn=reward_fn,
            max_length=max_length,
            drop_unusable=drop_unusable,
            batch_size=batch_size,
            convert_transcripts=convert_transcripts,
            eos_token_ids=eos_token_ids,
            **reward_settings,
        )
        return type(dataset)({name: annotate(split) for name, split in dataset.items()})

    reward_fn = partial(reward_fn, **reward_settings)
    tokenized = tokenize_preferences(
        dataset,
        processing_class,
        faces=resolve_faces(faces),
        eos_token_ids=eos_token_ids,
        max_length=max_length,
        drop_unusable=drop_unusable,
        convert_transcripts=convert_transcripts,
    )
    score = partial(_score_pairs, patient=patient, reward_fn=reward_fn, batch_size=batch_size)
    if isinstance(dataset, IterableDataset):
        annotated = tokenized.map(score, batched=True, batch_size=SHARD_SIZE)
    else:
        fingerprint = patient.fingerprint if isinstance(patient, NamedModel) else model_fingerprint(patient)
        *prompts, chosen, rejected = column_lengths(tokenized, [*FACE_COLUMNS, *ID_COLUMNS[1:]])
        prompt = np.maximum(*prompts)
        score = partial(score, longest=int((prompt + np.maximum(chosen, rejected)).max()))
        scoring = {
            "lengths": prompt + chosen + rejected,
            "key": (fingerprint, dict(settings), reward_fn),
            "columns": REWARD_COLUMNS + GAP_COLUMNS,
        }
        annotated = add_scores(tokenized, score, desc="Annotating token rewards", **scoring)
        if patient.dtype in HALVES:
            settings["rounding"] = _measure_rounding(tokenized, annotated, score, **scoring)
        table = annotated.data
        if not any(pc.any(pc.not_equal(pc.list_flatten(table.column(name)), 0.0)).as_py() for name in REWARD_COLUMNS):
            raise ValueError(
                "At least one token must have a reward that is not zero. All are: the patient's two faces do not "
                "differ on this dataset, or no token passes the `sparsity_threshold`. Use faces the patient "
                "understands, a lower threshold, or a stronger patient."
            )
    annotated = annotated.remove_columns(FACE_COLUMNS)
    annotated.info.description = f"{annotated.info.description}\n{SETTINGS_KEY}{json.dumps(settings)}".strip()
    return annotated


def annotation_settings(dataset: Dataset) -> dict | None:
    """The settings [`annotate_token_rewards`] left in the dataset's info, or None where there are none."""
    for line in reversed((dataset.info.description or "").splitlines()):
        if line.startswith(SETTINGS_KEY):
            return json.loads(line.removeprefix(SETTINGS_KEY))
    return None


def check_annotated_for(dataset: Dataset | IterableDataset, processing_class: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` when the dataset says that it was annotated with another tokenizer, or in a later format."""
    settings = annotation_settings(dataset) or {}
    check_format(settings.get("format", FORMAT), "An annotated dataset")
    if settings.get("tokenizer") not in (None, tokenizer_fingerprint(processing_class)):
        raise ValueError(
            "A dataset must be annotated with the doctor's tokenizer. Got token ids of another one (vocabulary "
            f"{settings['tokenizer'][:8]}, patient {settings.get('patient')!r}); annotate it again with this "
            "tokenizer, or use a doctor of the patient's family."
        )
    largest = max(processing_class.get_vocab().values())
    num_rows = 1000 if isinstance(dataset, Dataset) else NUM_STREAMED
    for row in islice(dataset, num_rows):  # files keep the ids and lose the info
        for token_id in (token_id for name in ID_COLUMNS for token_id in row[name]):
            if not 0 <= token_id <= largest:
                raise ValueError(
                    f"A dataset must be annotated with the doctor's tokenizer. Got the token id {token_id}, and that "
                    f"knows 0 to {largest}; annotate the dataset again, or use a doctor of the patient's family."
                )


def agreement_of_faces(dataset: Dataset | IterableDataset) -> tuple[float, float, int] | None:
    """
    How often the faces agree with the labels: the share of pairs whose chosen completion the positive face prefers by more
    than the rejected one, in the sum of its gaps. A tie counts as one half.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            With `chosen_gaps` and `rejected_gaps`. Of a streamed one the first 64 pairs are read.

    Returns:
        the share, the standard error of one half, and the number of pairs; None where there are no gaps.
    """
    if isinstance(dataset, IterableDataset):
        rows = [row for row in islice(dataset, NUM_STREAMED) if row.keys() >= set(GAP_COLUMNS)]
        dataset = Dataset.from_list([{name: row[name] for name in GAP_COLUMNS} for row in rows])
    if len(dataset) == 0 or not set(GAP_COLUMNS) <= set(dataset.column_names):
        return None
    table = dataset.select_columns(GAP_COLUMNS).with_format("arrow")[:]
    sums = []
    for name in GAP_COLUMNS:
        ends = pc.list_value_length(table.column(name)).to_numpy().cumsum()
        gaps = pc.list_flatten(table.column(name)).to_numpy()
        totals = np.concatenate([[0.0], gaps.cumsum(dtype=np.float64)])[np.concatenate([[0], ends])]
        sums.append(np.diff(totals))
    preferred = sums[0] - sums[1]
    return float(((preferred > 0) + (preferred == 0) / 2).mean()), math.sqrt(0.25 / len(dataset)), len(dataset)


def warn_unless_faces_separate(dataset: Dataset | IterableDataset) -> None:
    """
    Warn when the faces do not tell chosen from rejected: what a doctor learns from them is not what the labels say.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            An annotated dataset. Passed over are one without gaps, of fewer than 16 pairs, or annotated with
            `reward_direction="faces"`, for which labels do not count.

    Warns:
        `UserWarning`: when [`agreement_of_faces`] is within two standard errors of one half, or below.
    """
    found = agreement_of_faces(dataset)
    if found is None:
        return
    agreement, error, num_pairs = found
    ignores_labels = (annotation_settings(dataset) or {}).get("reward", {}).get("reward_direction") == "faces"
    if num_pairs >= MIN_PAIRS and agreement < 0.5 + 2 * error and not ignores_labels:
        warnings.warn(
            f"The faces do not separate these data: they prefer the chosen completion of {agreement:.0%} of {num_pairs} "
            f"pairs, and chance is 50 ± {200 * error:.0f}%. Word the faces by what the labels reward, or use a stronger "
            "patient."
        )


def check_given(patient: PreTrainedModel | NamedModel | None) -> None:
    """Raise `ValueError` when a training needs a patient and has none."""
    if patient is None:
        raise ValueError(
            "A dataset without token rewards needs a patient to annotate it, and so does `policy='guided'`. Got "
            f"`patient_model=None`; pass one, or a dataset with the columns {ID_COLUMNS + REWARD_COLUMNS} from "
            "`annotate_token_rewards`. A patient given as a model is let go once the datasets given with it are "
            "annotated."
        )


def check_patient(patient: PreTrainedModel | NamedModel, processing_class: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` unless the patient is a whole causal language model for this tokenizer, and no ratio."""
    check_is_tokenizer(processing_class)
    patient = outline_of(patient)
    if patient.config.is_encoder_decoder:
        raise ValueError(
            "The patient must be a causal language model: its completion continues the prompt. Got the encoder-decoder "
            f"{type(patient).__name__}; use a decoder-only model."
        )
    check_whole(patient)
    check_speaks(patient)
    own_tokenizer = _tokenizer_of(patient)
    if own_tokenizer is not None:
        check_same_tokenizer(own_tokenizer, processing_class)
    check_embeddings("patient", patient, processing_class)


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved where the model came from, or None where there is none."""
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
    How far the gaps of a patient in half precision are from those that the same weights give in float32, on some pairs: `mean` and
    `p95` of the error in nats, and `flipped`, the share of rewarded tokens that have a reward in one of the two only.
    `None` where the patient's kernels take nothing but half precision.
    """
    some = range(0, len(tokenized), -(-len(tokenized) // NUM_CHECKED_PAIRS))

    def score_exactly(batch, on_progress):
        try:
            with in_float32():
                return score(batch, on_progress=on_progress)
        except Exception as error:  # whatever a kernel raises; the other processes wait for a result
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
        """Of the tokens of the assistant, those of the chosen completions first."""
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
            "The patient computes in half precision: on %d pairs its gaps are off by %.3f nats on average, and rounding decides about "
            "%.0f%% of the rewards. Load it in float32 (`dtype`), or raise `gap_floor` above the error.",
            len(some),
            measured["mean"],
            100 * measured["flipped"],
        )
    return measured


def _score_pairs(
    batch: dict[str, list],
    *,
    patient: PreTrainedModel | NamedModel,
    **settings,
) -> dict[str, list]:
    """Rewards and gaps of a batch of tokenized pairs."""
    if isinstance(patient, NamedModel):
        patient = patient.loaded
    rewards, gaps = score_token_rewards(batch, patient=patient, **settings)
    num_pairs = len(batch["prompt_ids"])
    rewards, gaps = [row.tolist() for row in rewards], [row.tolist() for row in gaps]
    return {
        "chosen_token_rewards": rewards[:num_pairs],
        "rejected_token_rewards": rewards[num_pairs:],
        "chosen_gaps": gaps[:num_pairs],
        "rejected_gaps": gaps[num_pairs:],
    }


def score_token_rewards(
    batch: dict[str, list],
    *,
    patient: PreTrainedModel,
    reward_fn: Callable[..., torch.Tensor],
    **settings,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    Token rewards of P tokenized pairs, read from the patient.

    Args:
        batch (`dict[str, list]`):
            `chosen_ids`, `rejected_ids`, `positive_prompt_ids` and `negative_prompt_ids` of P pairs, and optionally
            `chosen_mask` and `rejected_mask`.
        patient ([`~transformers.PreTrainedModel`]):
            The frozen model that is read.
        reward_fn (`Callable`):
            See [`annotate_token_rewards`].
        settings:
            `batch_size`, and what else [`~trl_tfpo.annotation.scoring.score_completions`] takes.

    Returns:
        two lists of 2P `torch.Tensor` of shape `(T_i,)`, the chosen first: rewards, and gaps in nats; zero where a mask is.

    Raises:
        `ValueError`: when a log-probability is not finite, or `reward_fn` returns another shape or values not finite.
    """
    completions = batch["chosen_ids"] + batch["rejected_ids"]  # 2P
    num_rows = len(completions)
    logps = score_completions(
        patient,
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
            f"{tuple(completion_mask.shape)}. Got {shape}, or values that are not finite; correct it."
        )
    rewards = rewards.masked_fill(~completion_mask, 0)
    gaps = (positive_logps - negative_logps).masked_fill(~completion_mask, 0)
    return (
        [row[:length].float() for row, length in zip(rewards, lengths, strict=True)],
        [row[:length] for row, length in zip(gaps, lengths, strict=True)],
    )


def describe(function: partial) -> dict:
    """Name and settings of a callable, defaults included, as plain values that identify it."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise ValueError(
            f"`reward_fn` must take the settings that it is given. Got {sorted(function.keywords)} for "
            f"`{function.func.__name__}`; look for a mistyped name."
        ) from error
    settings = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    inner = function.func
    return {
        "function": f"{inner.__module__}.{inner.__qualname__}",
        **{k: v for k, v in settings.items() if v is not None},
    }
