# SPDX-License-Identifier: Apache-2.0

"""Complete checkpoints: a list of the files is written last, and a checkpoint without the list is incomplete."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from .. import __version__
from ..common.atomic import FORMAT, atomic_write, check_format


logger = logging.getLogger(__name__)

CONTENTS_FILE = "checkpoint.json"  # sizes of all other files
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json", "adapter_model.bin")


@contextmanager
def complete_checkpoint(trainer: Trainer, folder: str | os.PathLike[str]) -> Iterator[None]:
    """
    Context in which all processes write a checkpoint. It is then marked as complete.

    Older checkpoints are deleted afterwards, if there are more than `save_total_limit`.
    """
    args, folder = trainer.args, Path(folder)
    if args.should_save:
        (folder / CONTENTS_FILE).unlink(missing_ok=True)  # an earlier run may have written the same checkpoint
    trainer.accelerator.wait_for_everyone()
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield
    finally:
        args.save_total_limit = limit
    trainer.accelerator.wait_for_everyone()
    if args.should_save:
        mark_complete(folder)
        best = trainer.state.best_model_checkpoint
        rotate_checkpoints(str(folder.parent), limit, best_model_checkpoint=best, use_mtime=True)


def mark_complete(folder: str | os.PathLike[str]) -> None:
    """Flush all files of a checkpoint to the disk, then write the list that marks it as complete."""
    folder = Path(folder)
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CONTENTS_FILE):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    contents = {"format": FORMAT, "written_by": f"trl-tfpo {__version__}", "sizes": sizes}
    with atomic_write(folder / CONTENTS_FILE) as part:
        part.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def check_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Raise `ValueError` for a missing or damaged checkpoint, another format version, or pickled weights."""
    folder = Path(folder)
    try:
        contents = json.loads((folder / CONTENTS_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"A checkpoint must be complete and written by `TFPOTrainer`. Got {str(folder)!r} without a readable "
            f"{CONTENTS_FILE!r}, which is written last; resume from an earlier checkpoint, or start from the "
            "beginning."
        ) from error
    check_format(contents["format"], f"The checkpoint {str(folder)!r}, by {contents['written_by']},")
    for name, size in contents["sizes"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            raise ValueError(
                f"A checkpoint must have all its files. Got {'no file' if found is None else f'{found} bytes'} "
                f"instead of {size} bytes at {str(folder / name)!r}; resume from an earlier checkpoint, or start from "
                "the beginning."
            )
    if pickled := sorted(path.name for pattern in PICKLED_WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(
            f"The weights of a checkpoint must be safetensors. Got the pickles {pickled} in {str(folder)!r}, which "
            "`TFPOTrainer` does not write; resume from a checkpoint of your own."
        )


def resolve_checkpoint(
    checkpoint: str | os.PathLike[str] | bool | None, output_dir: str | os.PathLike[str] | None
) -> str | None:
    """
    Find the checkpoint from which training resumes, or `None` to start from the beginning.

    Args:
        checkpoint (`str`, `os.PathLike` or `bool`, *optional*):
            A checkpoint, or `True` for the last complete one. Without a complete one, `True` starts from the
            beginning: a job that may be interrupted can always be started with the same command.
        output_dir (`str` or `os.PathLike`):
            Folder of the checkpoints.

    Raises:
        `ValueError`: if the given checkpoint cannot be loaded, see [`check_checkpoint`].
    """
    if not checkpoint or str(checkpoint).lower() == "false":
        return None
    if not isinstance(checkpoint, bool) and str(checkpoint).lower() != "true":
        check_checkpoint(checkpoint)
        return os.fspath(checkpoint)
    folder = os.fspath(output_dir or "")
    for path in reversed(sort_checkpoints(output_dir=folder)):
        try:
            check_checkpoint(path)
            return path
        except ValueError as error:
            logger.warning("Checkpoint ignored: %s", error)
    logger.warning("No complete checkpoint in %r: training starts from the beginning.", folder)
    return None
