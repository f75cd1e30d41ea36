# SPDX-License-Identifier: Apache-2.0

"""Files and folders that are whole or not there, whatever happens while they are written, and the format they are in."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


FORMAT = 1  # of what this package writes; the next one when an older version could misread it


def check_format(found: int, name: str) -> None:
    """Raise `ValueError` when what `name` calls by its name was written in a format that this version cannot know."""
    if found != FORMAT:
        raise ValueError(
            f"{name} must have format {FORMAT}. Got format {found}; use the version of trl-tfpo that wrote it, or a later one."
        )


def check_writable(folder: str | os.PathLike) -> None:
    """
    Check that there can be files in a folder, before the work that would be lost; nothing is left of the check.

    Args:
        folder (`str` or `os.PathLike`):
            The folder. Where it does not exist yet, the nearest that does is looked at.

    Raises:
        `ValueError`: when nothing can be written there.
    """
    nearest = Path(folder)
    while not nearest.exists():
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(1024))
    except OSError as error:
        raise ValueError(
            f"The output must be in a folder that can be written to. Got {str(folder)!r}: {error.strerror}; choose "
            "another, or make room."
        ) from error


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """
    Something to write instead of `path`, whose place it takes when all went well; otherwise nothing is left of it.

    Args:
        path (`str` or `os.PathLike`):
            A file or a folder, which is replaced if it exists. Its parents are made.

    Yields:
        `Path`: where to write the file, or to make the folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = (path.with_name(f"{path.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        yield part
        if part.is_file():
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():  # a folder is not replaced in one step: the old one steps aside
            os.replace(path, old)
        os.replace(part, path)
    finally:
        for rest in (part, old):
            if rest.is_dir():
                shutil.rmtree(rest)
            rest.unlink(missing_ok=True)
