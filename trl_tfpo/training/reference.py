# SPDX-License-Identifier: Apache-2.0

"""The reference: what the doctor thinks of the completions before it is trained, cached as columns of the dataset."""

from contextlib import nullcontext
from functools import partial

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, Trainer

from ..annotation.score_cache import add_scores
from ..annotation.scoring import score_completions
from ..common._upstream import adapter_layers, is_peft_model, is_sharded, using_adapters
from ..data.tokenization import ID_COLUMNS, column_lengths, row_lengths


REFERENCE_COLUMNS = ["chosen_ref_logps", "rejected_ref_logps"]


def check_not_streamed(dataset: Dataset | IterableDataset, columns: set[str], reference_weight: float) -> None:
    """Raise `ValueError` when a reference would have to score a streamed dataset, whose columns are these."""
    if isinstance(dataset, IterableDataset) and not columns.issuperset(REFERENCE_COLUMNS):
        raise ValueError(
            f"With `reference_weight={reference_weight}` the reference scores the dataset before training, "
            "which a streamed dataset does not allow. Load it with `streaming=False`, or use `policy='ratio'`."
        )


def check_untrained(doctor: PreTrainedModel, num_steps: int) -> None:
    """Raise `ValueError` when the doctor is no longer what it was before training, or no longer whole."""
    if num_steps > 0 or is_sharded(doctor):
        raise ValueError(
            "The reference is the doctor before training, whole in each process; this one has been trained or "
            f"sharded. Got a new dataset without the columns {REFERENCE_COLUMNS}; pass it as `eval_dataset` when the "
            "trainer is made, and a doctor for DeepSpeed ZeRO-3 by name."
        )


def with_reference_logps(dataset: Dataset | dict, trainer: Trainer, *, fingerprint: str) -> Dataset | dict:
    """
    The dataset of a trainer, or each of a dict of them, with the columns of [`add_reference_logps`] unless they are there.

    Args:
        dataset ([`~datasets.Dataset`], or `dict` of them):
            Tokenized preferences.
        trainer ([`~transformers.Trainer`]):
            Its model is the doctor before training.
        fingerprint (`str`):
            Of that model.

    Raises:
        `ValueError`: when the doctor has been trained or sharded.
    """
    if isinstance(dataset, dict):
        return {name: with_reference_logps(split, trainer, fingerprint=fingerprint) for name, split in dataset.items()}
    if set(REFERENCE_COLUMNS) <= set(dataset.column_names or next(iter(dataset))):
        return dataset
    doctor, args = trainer.model, trainer.args
    check_untrained(doctor, trainer.state.global_step)
    if args.world_size > 1 and not getattr(doctor, "is_quantized", False):
        doctor.to(args.device)  # an engine that shards it would do so later
    return add_reference_logps(dataset, doctor, fingerprint=fingerprint, batch_size=args.scoring_batch_size)


def add_reference_logps(dataset: Dataset, doctor: PreTrainedModel, *, fingerprint: str, batch_size: int) -> Dataset:
    """
    Add the log-probability of each completion token under the doctor as it is, or under what its adapter is on.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenized preferences.
        doctor ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The doctor before training, whole in each process.
        fingerprint (`str`):
            From [`~trl_tfpo.models.fingerprint.model_fingerprint`]: what the cache knows the doctor by.
        batch_size (`int`):
            Sequences in one forward pass.

    Returns:
        [`~datasets.Dataset`]: the dataset with `chosen_ref_logps` and `rejected_ref_logps`, in nats.

    Raises:
        `ValueError`: when the doctor is sharded, or a log-probability is not finite.
    """
    return add_scores(
        dataset,
        partial(_score_reference, doctor=doctor, batch_size=batch_size, longest=max(row_lengths(dataset))),
        lengths=column_lengths(dataset, ID_COLUMNS).sum(axis=0),
        key=(fingerprint, "reference"),
        columns=REFERENCE_COLUMNS,
        desc="Scoring the reference",
    )


def _score_reference(batch: dict[str, list], *, doctor: PreTrainedModel, **settings) -> dict[str, list]:
    # PEFT's own `disable_adapter` would let frozen parts of an adapter be trained afterwards
    with using_adapters(adapter_layers(doctor), ()) if is_peft_model(doctor) else nullcontext():
        logps = score_completions(
            doctor, batch["prompt_ids"] * 2, batch["chosen_ids"] + batch["rejected_ids"], **settings
        )
    num_pairs = len(batch["prompt_ids"])
    logps = [row.numpy() for row in logps]
    return dict(zip(REFERENCE_COLUMNS, (logps[:num_pairs], logps[num_pairs:]), strict=True))
