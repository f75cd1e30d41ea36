# SPDX-License-Identifier: Apache-2.0

"""Atomic writing of files and folders, and the version of their format."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


FORMAT = 1  # format version of written files; increase it if an older version of the package could misread them


def check_format(found: int, name: str) -> None:
    """Raise `ValueError`, with `name` as its subject, if a format version is not supported."""
    if found != FORMAT:
        raise ValueError(
            f"{name} must have format {FORMAT}. Got format {found}; use the version of trl-tfpo that wrote it, or a "
            "later one."
        )


def check_writable(folder: str | os.PathLike) -> None:
    """
    Raise `ValueError` if a folder is not writable, before long work whose result would be lost.

    Args:
        folder (`str` or `os.PathLike`):
            The folder. If it does not exist, its nearest existing parent is checked.
    """
    nearest = Path(folder)
    while not nearest.exists():
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(1024))
    except OSError as error:
        raise ValueError(
            f"The output folder must be writable. Got {str(folder)!r}: {error.strerror}; choose another folder, or "
            "free disk space."
        ) from error


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """
    Write to a temporary path, then replace `path` atomically. After an error the temporary path is deleted.

    An existing folder cannot be replaced atomically: it is renamed first, and deleted last.

    Args:
        path (`str` or `os.PathLike`):
            A file or folder. It is replaced if it exists, and its parents are created.

    Yields:
        `Path`: temporary path for the new file or folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = (path.with_name(f"{path.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        yield part
        if part.is_file():
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():  # `os.replace` replaces only empty folders
            os.replace(path, old)
        os.replace(part, path)
    finally:
        for rest in (part, old):
            if rest.is_dir():
                shutil.rmtree(rest)
            rest.unlink(missing_ok=True)
