# SPDX-License-Identifier: Apache-2.0

"""What [`TFPOTrainer`] refuses, or warns of, before any work begins."""

import warnings

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.data.data_collator import DataCollator

from ..annotation.token_rewards import check_given
from ..common._upstream import is_peft_model, is_sharded
from ..data.tokenization import columns_of
from ..faces import Faces
from ..models.guidance import is_guidance
from ..models.head_adapter import starts_at_zero
from ..models.named_model import NamedModel
from .collator import TokenRewardCollator


def check_callables(**functions: object) -> None:
    """Raise `ValueError` when a function of the user is none."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ValueError(f"`{name}` must be callable. Got {function!r}; leave it out for that of the paper.")


def check_split(dataset: object, name: str) -> None:
    """Raise `ValueError` when there is no dataset, or a dict of datasets where one belongs."""
    if dataset is None:
        raise ValueError(f"`{name}` is required. Got None; pass a preference dataset.")
    if isinstance(dataset, dict):
        splits = sorted(dataset)
        split = "train" if "train" in splits else next(iter(splits), "train")
        raise ValueError(
            f"`{name}` must be one split. Got a `{type(dataset).__name__}` of {splits}; pass one, as in "
            f"`{name}=dataset[{split!r}]`."
        )


def check_language_model(model: PreTrainedModel) -> None:
    """Raise `ValueError` when the doctor is an encoder-decoder."""
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"The doctor must be a causal language model. Got the encoder-decoder {type(model).__name__}; use a "
            "decoder-only model of the patient's family."
        )


def check_collator(data_collator: DataCollator, args: TrainingArguments) -> None:
    """Raise `ValueError` when a collator would read its patient in a worker process."""
    if isinstance(data_collator, TokenRewardCollator) and data_collator.faces and args.dataloader_num_workers > 0:
        raise ValueError(
            "A `TokenRewardCollator` with a patient must run in the main process. Got "
            f"`dataloader_num_workers={args.dataloader_num_workers}`; set it to 0, or annotate the dataset "
            "beforehand with `annotate_token_rewards`."
        )


def check_can_annotate(
    dataset: Dataset | IterableDataset, faces: Faces | str | None, patient: PreTrainedModel | NamedModel | None
) -> None:
    """Raise `ValueError` when a training would have to annotate a dataset and cannot."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "A streamed dataset must have token rewards already. Got an `IterableDataset` with the columns "
            f"{sorted(columns_of(dataset))}; pass it through `annotate_token_rewards`, which streams as well."
        )
    if faces is None:
        raise ValueError(
            "A dataset without token rewards needs `faces` to be annotated. Got None; pass "
            "`Faces(positive=..., negative=...)` or the name of a built-in pair."
        )
    check_given(patient)


def check_one_device(args: TrainingArguments) -> None:
    """Raise `ValueError` when `Trainer` would use `nn.DataParallel`."""
    if args.n_gpu > 1:
        raise ValueError(
            f"TFPOTrainer does not support `nn.DataParallel`, which `Trainer` uses for the {args.n_gpu} GPUs "
            "visible to one process. Use `accelerate launch`, or set `CUDA_VISIBLE_DEVICES` to a single GPU."
        )


def warn_of_ignored(model: object, name: str, init_kwargs: dict | None) -> None:
    """Warn when there are keyword arguments of `from_pretrained` for a model that is loaded already."""
    if init_kwargs and isinstance(model, torch.nn.Module):
        warnings.warn(
            f"`{name}_init_kwargs` are for a `{name}` given by name or path. Got a loaded {type(model).__name__}, so "
            f"{sorted(init_kwargs)} are ignored; load it with them, or pass its name."
        )


def check_can_calibrate(dataset: Dataset | IterableDataset, model: PreTrainedModel, *, is_online: bool) -> None:
    """
    Raise `ValueError` if token rewards are unknown before training, or the embeddings are sharded.

    Warn if the doctor is an adapter that cannot start at the calibrated credits.
    """
    if is_sharded(model):
        raise ValueError(
            "`calibrate_rewards` needs the whole embeddings of the doctor. Got a doctor that was loaded in shards; load "
            "it yourself and pass it as a model, or set `calibrate_rewards=False`."
        )
    if not isinstance(dataset, Dataset) or is_online:
        found = "a data collator that queries the patient batch by batch" if is_online else "a streamed dataset"
        raise ValueError(
            f"`calibrate_rewards` needs all token rewards before training. Got {found}; annotate a `Dataset` first, or "
            "set `calibrate_rewards=False`."
        )
    if is_peft_model(model) and not starts_at_zero(model):
        warnings.warn(
            "Only a new LoRA adapter of a language model can start at the calibrated credits. Got "
            f"{'an adapter of guided flow' if is_guidance(model) else 'another adapter'}, which starts as it is; use "
            "`policy='doctor'` with a `LoraConfig`."
        )
