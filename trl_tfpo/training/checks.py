# SPDX-License-Identifier: Apache-2.0

"""Checks of the arguments of [`TFPOTrainer`], and of each loss."""

import warnings
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import save_file
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.data.data_collator import DataCollator

from ..annotation.token_rewards import check_has_patient
from ..common.atomic import atomic_write
from ..common.language_model import LanguageModel, is_peft_model, is_sharded
from ..data.tokenization import columns_of
from ..faces import Faces
from ..models.head_adapter import has_zero_lora
from ..models.named_model import NamedModel
from ..models.trained_exponents import trained_exponents
from .collator import TokenRewardCollator
from .config import output_folder


def check_callables(**functions: object) -> None:
    """Raise `ValueError` if an optional argument is not callable."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ValueError(f"`{name}` must be callable. Got {function!r}; leave it out for the default.")


def check_split(dataset: object, name: str) -> None:
    """Raise `ValueError` if a dataset is missing or a dict of splits."""
    if dataset is None:
        raise ValueError(f"`{name}` is required. Got None; pass a preference dataset.")
    if isinstance(dataset, dict):
        splits = sorted(dataset)
        split = "train" if "train" in splits else next(iter(splits), "train")
        raise ValueError(
            f"`{name}` must be one split. Got a `{type(dataset).__name__}` of {splits}; pass one of them, for example "
            f"`{name}=dataset[{split!r}]`."
        )


def check_decoder_only(model: LanguageModel) -> None:
    """Raise `ValueError` if the doctor is an encoder-decoder."""
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"The doctor must be a causal language model. Got the encoder-decoder {type(model).__name__}; use a "
            "decoder-only model of the patient's family."
        )


def check_collator(data_collator: DataCollator, args: TrainingArguments) -> None:
    """Raise `ValueError` if a collator with a patient would run in worker processes."""
    if isinstance(data_collator, TokenRewardCollator) and data_collator.faces and args.dataloader_num_workers > 0:
        raise ValueError(
            "A `TokenRewardCollator` with a patient must run in the main process. Got "
            f"`dataloader_num_workers={args.dataloader_num_workers}`; set it to 0, or annotate the dataset first with "
            "`annotate_token_rewards`."
        )


def check_can_annotate(
    dataset: Dataset | IterableDataset, faces: Faces | str | None, patient: PreTrainedModel | NamedModel | None
) -> None:
    """Raise `ValueError` if a dataset without token rewards cannot be annotated."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "A streamed dataset must have token rewards. Got an `IterableDataset` with the columns "
            f"{sorted(columns_of(dataset))}; annotate it with `annotate_token_rewards`, which supports streaming."
        )
    if faces is None:
        raise ValueError(
            "A dataset without token rewards needs `faces` to be annotated. Got None; pass "
            "`Faces(positive=..., negative=...)` or the name of a built-in pair."
        )
    check_has_patient(patient)


def check_can_calibrate(dataset: Dataset | IterableDataset, model: LanguageModel, *, is_online: bool) -> None:
    """
    Raise `ValueError` if token rewards are unknown before training, or the embeddings are sharded.

    Warn if the doctor is an adapter that cannot start at token credits.
    """
    if is_sharded(model):
        raise ValueError(
            "`calibrate_rewards` needs the whole embeddings of the doctor. Got a sharded doctor; pass its name "
            "or path, load it before you create the `TFPOConfig`, or set `calibrate_rewards=False`."
        )
    if not isinstance(dataset, Dataset) or is_online:
        found = "a data collator that queries the patient batch by batch" if is_online else "a streamed dataset"
        raise ValueError(
            f"`calibrate_rewards` needs all token rewards before training. Got {found}; annotate a `Dataset` first, "
            "or set `calibrate_rewards=False`."
        )
    if is_peft_model(model) and not has_zero_lora(model):
        warnings.warn(
            "Of all adapters, only a new LoRA with `policy='doctor'` can start at the calibrated credits. Got "
            f"{'an adapter of guided flow' if trained_exponents(model) else 'another adapter'}, which starts without "
            "them; use `policy='doctor'` with a `LoraConfig`."
        )


def check_one_device(args: TrainingArguments) -> None:
    """Raise `ValueError` if `Trainer` would use `nn.DataParallel`."""
    if args.n_gpu > 1:
        raise ValueError(
            "`TFPOTrainer` does not support `nn.DataParallel`, which `Trainer` uses with several GPUs in one process. "
            f"Got {args.n_gpu} GPUs; use `accelerate launch`, or set `CUDA_VISIBLE_DEVICES` to one GPU."
        )


def warn_of_ignored(model: object, name: str, init_kwargs: dict[str, Any] | str | None) -> None:
    """Warn about keyword arguments of `from_pretrained` for a model that is already loaded."""
    if init_kwargs and isinstance(model, torch.nn.Module):
        warnings.warn(
            f"`{name}_init_kwargs` apply only to a `{name}` given by name or path. Got a loaded "
            f"{type(model).__name__}, and ignored {sorted(init_kwargs)}; pass its name, or load it with them."
        )


def check_loss(loss: torch.Tensor, inputs: dict[str, torch.Tensor], trainer: Trainer) -> None:
    """
    Raise `ValueError` if the loss of a batch is not a finite scalar, before the optimizer step.

    If the loss is not finite, the batch is first saved as `not-finite-STEP/batch-PROCESS.safetensors` in the output
    folder, with the model next to it unless it is sharded.
    """
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"`objective` must return a scalar loss, and metrics. Got {got}; take a mean.")
    if loss.isfinite():
        return
    folder = output_folder(trainer.args) / f"not-finite-{trainer.state.global_step}"
    with atomic_write(folder / f"batch-{trainer.args.process_index}.safetensors") as part:
        save_file({name: tensor.contiguous().cpu() for name, tensor in inputs.items()}, part)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.args.should_save and not is_sharded(model):
        model.save_pretrained(folder)
    raise ValueError(
        f"The loss must be finite. Got {loss.item()} at step {trainer.state.global_step}; lower `learning_rate`, "
        f"raise `reward_temperature`, or train in float32 or bfloat16. The batch, and the model unless it is sharded, "
        f"are in {str(folder)!r}."
    )
