# SPDX-License-Identifier: Apache-2.0

"""
Scores of a dataset, computed shard by shard: divided among processes, kept as they come, and never computed twice.
"""

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
from ..common.atomic import written_whole
from ..common.progress import Progress


logger = logging.getLogger(__name__)

SHARD_SIZE = 16  # pairs; at most as many are scored again after an interruption
SHARDS_IN_WINDOW = 64  # the pairs of a window are divided among its shards by their length


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

    Each process scores its share of the shards, and all get the whole result. A shard that is done is a file in the
    cache of Datasets, written whole or not at all, so an interrupted call goes on where it was, with any number of
    processes, and ends with the same bytes. Caching can be switched off with `datasets.disable_caching()`.

    A shard is small, so that little is lost. Its pairs have like lengths, longest first in a window of some shards, so that
    little of a batch is padding.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenized preferences.
        function (`Callable`):
            From a batch of rows to the new columns. It is given `on_progress` as well, a callable to be told the share of
            the batch, in [0, 1], that has been scored since it was last told.
        lengths (`np.ndarray` of shape `(len(dataset),)`):
            Tokens of each row, by which rows are put together in shards.
        key (`object`):
            What the scores depend on beside the token ids of the dataset and the version of this package. The same on
            every process.
        columns (`list[str]`):
            The new columns.
        desc (`str`):
            Label of the progress, see [`~trl_tfpo.common.progress.Progress`].

    Returns:
        [`~datasets.Dataset`]: the dataset with the columns.
    """
    state = PartialState()
    windows = _windows(lengths)
    sizes = (SHARD_SIZE, SHARDS_IN_WINDOW, lengths.tobytes())
    fingerprint = Hasher.hash((__version__, sizes, _hash_of_ids(dataset), key, columns))
    is_kept = datasets.is_caching_enabled()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "trl_tfpo" / fingerprint
    schema = pa.schema({name: pa.list_(pa.float32()) for name in columns})
    shards = [shard for window in windows for shard in window]
    plain, done = dataset.with_format(None), {}
    with Progress(len(dataset), desc, "pairs", is_shown=state.is_main_process) as progress:
        for index in range(state.process_index, len(shards), state.num_processes):
            rows, file = shards[index], folder / f"{index:06d}.arrow"
            share = len(rows) * state.num_processes  # the others are about as far
            table = _read_shard(file, len(rows)) if is_kept else None
            if table is None:
                told = []

                def on_progress(part, told=told, share=share):
                    told.append(part)
                    progress.update(part * share)

                table = pa.table(function(plain[rows], on_progress=on_progress), schema)
                if is_kept:
                    with written_whole(file) as part, pa.ipc.new_stream(str(part), schema) as stream:
                        stream.write_table(table)
                progress.update((1 - sum(told)) * share)
            else:
                progress.update(share, is_skipped=True)
            done[index] = table
    if state.num_processes > 1:
        parts = [None] * state.num_processes
        torch.distributed.all_gather_object(parts, done)
        done = {index: table for part in parts for index, table in part.items()}
    tables = iter([done[index] for index in range(len(shards))])
    table = pa.concat_tables(
        pa.concat_tables([next(tables) for _ in window]).take(np.argsort(np.concatenate(window))) for window in windows
    )
    return concatenate_datasets([dataset, Dataset(table, fingerprint=fingerprint)], axis=1)


def _windows(lengths: np.ndarray) -> list[list[np.ndarray]]:
    """Row numbers of each shard of each window: in a window the longest rows come first."""
    window_size = SHARD_SIZE * SHARDS_IN_WINDOW
    windows = []
    for start in range(0, len(lengths), window_size):
        order = start + np.argsort(-lengths[start : start + window_size], kind="stable")
        windows.append(np.split(order, range(SHARD_SIZE, len(order), SHARD_SIZE)))
    return windows


def _read_shard(file: Path, num_rows: int) -> pa.Table | None:
    """The scores in a file; None where there is none, or one that has been damaged since it was written."""
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
    """Hash of all columns of token ids, whatever the dataset's other columns, its file and its history."""
    hasher, table = Hasher(), dataset.with_format("arrow")[:]
    for name, feature in sorted(dataset.features.items()):
        if isinstance(feature, datasets.List) and getattr(feature.feature, "dtype", "").startswith("int"):
            column = table.column(name)
            hasher.update(name)
            for part in (pc.list_value_length(column), pc.list_flatten(column)):
                hasher.m.update(part.cast(pa.int64()).to_numpy().tobytes())
    return hasher.hexdigest()
