# SPDX-License-Identifier: Apache-2.0

"""Checkpoints that are whole or not used: what belongs to one is written down last."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from .. import __version__
from ..common._upstream import is_sharded
from ..common.atomic import FORMAT, check_format, written_whole


logger = logging.getLogger(__name__)

CONTENTS_FILE = "checkpoint.json"  # the sizes of all other files
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json", "adapter_model.bin")


@contextmanager
def kept_whole(trainer: Trainer, folder: str | os.PathLike) -> Iterator[None]:
    """
    Within the context the trainer writes a checkpoint, from all processes; it counts only once that went well, and only
    then older ones are deleted.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer.
        folder (`str` or `os.PathLike`):
            The checkpoint.
    """
    args, folder = trainer.args, Path(folder)
    if args.should_save:
        (folder / CONTENTS_FILE).unlink(missing_ok=True)  # of an earlier run, whose files are replaced one by one
    trainer.accelerator.wait_for_everyone()
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield
    finally:
        args.save_total_limit = limit
    trainer.accelerator.wait_for_everyone()
    if args.should_save:
        mark_whole(folder)
        best = trainer.state.best_model_checkpoint
        rotate_checkpoints(str(folder.parent), limit, best_model_checkpoint=best, use_mtime=True)


def check_loss(loss: torch.Tensor, inputs: dict[str, torch.Tensor], trainer: Trainer) -> None:
    """
    Stop a training before a loss that is not finite spoils the weights, and keep what made it.

    Args:
        loss (`torch.Tensor`):
            Of one batch, scalar.
        inputs (`dict[str, torch.Tensor]`):
            The batch.
        trainer ([`~transformers.Trainer`]):
            The trainer.

    Raises:
        `ValueError`: when the loss is not one number, or not finite. In the latter case the output folder then has `not-finite-STEP/batch-PROCESS.safetensors`,
        the batch with its token ids, and the model as it was, unless an engine has shared it out.
    """
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"`objective` must return a loss that is one number, and metrics. Got {got}; take a mean.")
    if loss.isfinite():
        return
    folder = Path(trainer.args.output_dir) / f"not-finite-{trainer.state.global_step}"
    with written_whole(folder / f"batch-{trainer.args.process_index}.safetensors") as part:
        save_file({name: tensor.contiguous().cpu() for name, tensor in inputs.items()}, part)
    if trainer.args.should_save and not is_sharded(trainer.model):
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
    raise ValueError(
        f"The loss must be finite. Got {loss.item()} at step {trainer.state.global_step}; lower `learning_rate`, raise "
        f"`reward_temperature`, or train in float32 or bfloat16. The batch and the model are in {str(folder)!r}."
    )


def mark_whole(folder: str | os.PathLike) -> None:
    """
    Say that a checkpoint is written, and of which files it is made.

    Args:
        folder (`str` or `os.PathLike`):
            The checkpoint. Its files are on disk afterwards, also if the machine loses power.
    """
    folder = Path(folder)
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CONTENTS_FILE):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    contents = {"format": FORMAT, "written_by": f"trl-tfpo {__version__}", "sizes": sizes}
    with written_whole(folder / CONTENTS_FILE) as part:
        part.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def check_checkpoint(folder: str | os.PathLike) -> None:
    """
    Check a checkpoint before it is read.

    Args:
        folder (`str` or `os.PathLike`):
            The checkpoint.

    Raises:
        `ValueError`: when it is not there, was not written to its end, or lost something since; when a later version of
        this package wrote it; or when its weights are pickles.
    """
    folder = Path(folder)
    try:
        contents = json.loads((folder / CONTENTS_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"A checkpoint must have been written to its end, by a `TFPOTrainer`. Got {str(folder)!r} without a "
            f"readable {CONTENTS_FILE!r}, which is written last; go on from the one before it, or from none."
        ) from error
    check_format(contents["format"], f"The checkpoint {str(folder)!r}, by {contents['written_by']},")
    for name, size in contents["sizes"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            raise ValueError(
                f"A checkpoint must be whole. {str(folder / name)!r} had {size} bytes, and "
                f"{'is gone' if found is None else f'has {found}'}; go on from the one before it, or from none."
            )
    if pickled := sorted(path.name for pattern in PICKLED_WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(
            f"A checkpoint must have its weights in safetensors. Got {pickled} in {str(folder)!r}, pickles, which this "
            "package does not write; go on from a checkpoint of your own."
        )


def resolve_checkpoint(asked: str | os.PathLike | bool | None, output_dir: str | os.PathLike) -> str | None:
    """
    The checkpoint from which a training goes on.

    Args:
        asked (`str`, `os.PathLike` or `bool`, *optional*):
            A checkpoint; or `True` for the last whole one, and for none where there is none, so that a training that may be
            cut short is always started in the same way.
        output_dir (`str` or `os.PathLike`):
            Where the training writes its checkpoints.

    Returns:
        `str` or `None`: its path.

    Raises:
        `ValueError`: when the checkpoint that was asked for is not whole, see [`check_checkpoint`].
    """
    if not asked or str(asked).lower() == "false":
        return None
    if str(asked).lower() != "true":
        check_checkpoint(asked)
        return os.fspath(asked)
    for path in reversed(sort_checkpoints(output_dir=output_dir)):
        try:
            check_checkpoint(path)
            return path
        except ValueError as error:
            logger.warning("Not used: %s", error)
    logger.warning("There is no whole checkpoint in %r: training starts from the beginning.", os.fspath(output_dir))
    return None
