# SPDX-License-Identifier: Apache-2.0

"""Cache of the scores of a dataset. Shards are divided among processes, and each shard is computed once."""

import logging
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher

from .. import __version__
from ..common.atomic import atomic_write
from ..common.progress import Progress


logger = logging.getLogger(__name__)

SHARD_SIZE = 16  # pairs in a shard; an interruption loses at most one shard of each process
SHARDS_IN_WINDOW = 64  # shards of a window, in which pairs are sorted by length to reduce padding


def add_scores(
    dataset: Dataset,
    function: Callable[..., dict],
    *,
    lengths: np.ndarray,
    key: object,
    columns: list[str],
    desc: str,
) -> Dataset:
    """
    Add columns of one float for each completion token.

    Each process scores a share of the shards, and all processes get the whole result. A finished shard is written
    atomically to a file in the cache of Datasets. After an interruption the same call resumes, even with another
    number of processes, and returns the same bytes. `datasets.disable_caching()` turns the cache off.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenized preferences.
        function (`Callable`):
            Function from a batch of rows to the new columns. It calls its keyword argument `on_progress` with the
            share of the batch, in [0, 1], that it has scored since the last call.
        lengths (`np.ndarray` of shape `(len(dataset),)`):
            Number of tokens of each row. Rows of similar length share a shard.
        key (`object`):
            Everything that the scores depend on, except the token ids and masks of the dataset and the version of this
            package; the same in all processes.
        columns (`list[str]`):
            Names of the new columns.
        desc (`str`):
            Label of the progress bar, see [`~trl_tfpo.common.progress.Progress`].

    Returns:
        [`~datasets.Dataset`]: the dataset with the columns.
    """
    state = PartialState()
    windows = _windows(lengths)
    sizes = (SHARD_SIZE, SHARDS_IN_WINDOW, lengths.tobytes())
    fingerprint = Hasher.hash((__version__, sizes, _hash_of_ids(dataset), key, columns))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "trl_tfpo" / fingerprint
    is_cached = datasets.is_caching_enabled()
    schema = pa.schema({name: pa.list_(pa.float32()) for name in columns})
    shards = [shard for window in windows for shard in window]
    unformatted, done = dataset.with_format(None), {}
    with Progress(len(dataset), desc, "pairs", is_shown=state.is_main_process) as progress:
        for index in range(state.process_index, len(shards), state.num_processes):
            rows, file = shards[index], folder / f"{index:06d}.arrow"
            share = len(rows) * state.num_processes  # assumes that all processes advance at the same rate
            table = _read_shard(file, len(rows)) if is_cached else None
            if table is not None:
                progress.update(share, is_skipped=True)
            else:
                table = _score_shard(function, unformatted[rows], schema, progress, share)
                if is_cached:
                    with atomic_write(file) as part, pa.ipc.new_stream(str(part), schema) as stream:
                        stream.write_table(table)
            done[index] = table
    if state.num_processes > 1:
        parts: list[dict[int, pa.Table]] = [{} for _ in range(state.num_processes)]
        torch.distributed.all_gather_object(parts, done)
        done = {index: table for part in parts for index, table in part.items()}
    tables = iter([done[index] for index in range(len(shards))])
    table = pa.concat_tables(
        pa.concat_tables([next(tables) for _ in window]).take(np.argsort(np.concatenate(window))) for window in windows
    )
    return concatenate_datasets([dataset, Dataset(table, fingerprint=fingerprint)], axis=1)


def _score_shard(
    function: Callable[..., dict], batch: dict[str, list], schema: pa.Schema, progress: Progress, share: int
) -> pa.Table:
    """Score one shard, which counts as `share` units of progress."""
    reported: list[float] = []

    def on_progress(part: float) -> None:
        reported.append(part)
        progress.update(part * share)

    table = pa.table(function(batch, on_progress=on_progress), schema)
    progress.update((1 - sum(reported)) * share)
    return table


def _windows(lengths: np.ndarray) -> list[list[np.ndarray]]:
    """Row numbers of each shard of each window. Within a window, rows are sorted from the longest to the shortest."""
    window_size = SHARD_SIZE * SHARDS_IN_WINDOW
    windows = []
    for start in range(0, len(lengths), window_size):
        order = start + np.argsort(-lengths[start : start + window_size], kind="stable")
        windows.append(np.split(order, range(SHARD_SIZE, len(order), SHARD_SIZE)))
    return windows


def _read_shard(file: Path, num_rows: int) -> pa.Table | None:
    """Read the scores in a file, or return `None` if the file is missing or damaged."""
    if not file.is_file():
        return None
    try:
        with pa.OSFile(str(file)) as source:
            table = pa.ipc.open_stream(source).read_all()
        if table.num_rows == num_rows:
            return table
    except (pa.ArrowException, OSError):
        pass
    logger.warning("%s is damaged: its shard is scored again.", file)
    return None


def _hash_of_ids(dataset: Dataset) -> str:
    """Hash the lists of integers: token ids and masks. Other columns, file and history of the dataset do not count."""
    hasher, table = Hasher(), dataset.with_format("arrow")[:]
    for name, feature in sorted(dataset.features.items()):
        if isinstance(feature, datasets.List) and getattr(feature.feature, "dtype", "").startswith("int"):
            column = table.column(name)
            hasher.update(name)
            for part in (pc.list_value_length(column), pc.list_flatten(column)):
                hasher.m.update(part.cast(pa.int64()).to_numpy().tobytes())
    return hasher.hexdigest()
