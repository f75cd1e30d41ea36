# SPDX-License-Identifier: Apache-2.0

"""Reference log-probabilities of the doctor before training, cached as columns of the dataset."""

from contextlib import nullcontext
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import Trainer

from ..annotation.score_cache import add_scores
from ..annotation.scoring import score_completions
from ..common._upstream import adapter_layers, using_adapters
from ..common.language_model import LanguageModel, is_peft_model, is_sharded
from ..data.tokenization import ID_COLUMNS, column_lengths, row_lengths


REFERENCE_COLUMNS = ["chosen_ref_logps", "rejected_ref_logps"]


def check_not_streamed(dataset: Dataset | IterableDataset, columns: set[str], reference_weight: float) -> None:
    """Raise `ValueError` if a dataset is streamed, and its `columns` have no reference log-probabilities."""
    if isinstance(dataset, IterableDataset) and not columns.issuperset(REFERENCE_COLUMNS):
        raise ValueError(
            "The reference cannot score a streamed dataset before training. Got a streamed dataset with "
            f"`reference_weight={reference_weight}`; load it with `streaming=False`, or use `policy='ratio'`."
        )


def with_reference_logps(dataset: Dataset | dict, trainer: Trainer, *, fingerprint: str) -> Dataset | dict:
    """
    Add reference log-probabilities to a dataset, or to each split of a dict, unless it has them.

    The doctor is the model of the trainer, see [`add_reference_logps`].

    Raises:
        `ValueError`: if the doctor has been trained or is sharded.
    """
    if isinstance(dataset, dict):
        return {name: with_reference_logps(split, trainer, fingerprint=fingerprint) for name, split in dataset.items()}
    if set(REFERENCE_COLUMNS) <= set(dataset.column_names or next(iter(dataset))):
        return dataset
    doctor: Any = trainer.model
    args: Any = trainer.args
    if trainer.state.global_step > 0 or is_sharded(doctor):
        raise ValueError(
            "The reference must be the doctor before training, not sharded. Got a new dataset without the columns "
            f"{REFERENCE_COLUMNS}, and a trained or sharded doctor; pass the dataset as `eval_dataset` of the "
            "trainer, and with DeepSpeed ZeRO-3 pass the doctor by name."
        )
    if args.world_size > 1 and not getattr(doctor, "is_quantized", False):
        doctor.to(args.device)  # engines that shard move it only in `train`
    return add_reference_logps(dataset, doctor, fingerprint=fingerprint, batch_size=args.scoring_batch_size)


def add_reference_logps(dataset: Dataset, doctor: LanguageModel, *, fingerprint: str, batch_size: int) -> Dataset:
    """
    Add the log-probability of each completion token under the doctor, or under the base model of its adapter.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenized preferences.
        doctor ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The doctor before training, not sharded.
        fingerprint (`str`):
            Key of the doctor in the cache, from [`~trl_tfpo.models.fingerprint.model_fingerprint`].
        batch_size (`int`):
            Completions in a forward pass, see [`~trl_tfpo.annotation.scoring.score_completions`].

    Returns:
        [`~datasets.Dataset`]: the dataset with `chosen_ref_logps` and `rejected_ref_logps`, in nats.

    Raises:
        `ValueError`: if the doctor is sharded, or a log-probability is not finite.
    """
    return add_scores(
        dataset,
        partial(_score_reference, doctor=doctor, batch_size=batch_size, longest=max(row_lengths(dataset))),
        lengths=column_lengths(dataset, ID_COLUMNS).sum(axis=0),
        key=(fingerprint, "reference"),
        columns=REFERENCE_COLUMNS,
        desc="Scoring the reference",
    )


def _score_reference(batch: dict[str, list], *, doctor: LanguageModel, **settings: Any) -> dict[str, list]:
    prompts, completions = batch["prompt_ids"] * 2, batch["chosen_ids"] + batch["rejected_ids"]
    # PEFT's `disable_adapter` makes frozen parts of an adapter trainable
    with using_adapters(adapter_layers(doctor), ()) if is_peft_model(doctor) else nullcontext():
        scored = score_completions(doctor, prompts, completions, **settings)
    logps = [row.numpy() for row in scored]
    num_pairs = len(batch["prompt_ids"])
    return dict(zip(REFERENCE_COLUMNS, (logps[:num_pairs], logps[num_pairs:]), strict=True))
