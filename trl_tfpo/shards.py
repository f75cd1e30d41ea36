# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Scores of a dataset, computed shard by shard: shared among processes, kept as they come, and never computed twice.
"""

import logging
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from datasets.utils import tqdm


logger = logging.getLogger(__name__)

SHARD_SIZE = 128  # pairs; at most as many are scored again after an interruption


def add_scores(
    dataset: Dataset, function: Callable[[dict], dict], *, key: object, columns: list[str], desc: str
) -> Dataset:
    """
    Add columns of one float for each completion token.

    Each process scores its share of the shards, and all get the whole result. A shard that is done is a file in the
    cache of Datasets, written whole or not at all, so an interrupted call goes on where it was, with any number of
    processes, and ends with the same bytes. Caching can be switched off with `datasets.disable_caching()`.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenized preferences.
        function (`Callable`):
            From a batch of rows to the new columns.
        key (`object`):
            What the scores depend on beside the token ids of the dataset and the version of this package. The same on
            every process.
        columns (`list[str]`):
            The new columns.
        desc (`str`):
            Label of the progress bar.

    Returns:
        [`~datasets.Dataset`]: the dataset with the columns.
    """
    state = PartialState()
    fingerprint = Hasher.hash((version("trl-tfpo"), SHARD_SIZE, _hash_of_ids(dataset), key, columns))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "trl_tfpo" / fingerprint
    if datasets.is_caching_enabled():
        folder.mkdir(parents=True, exist_ok=True)
    num_shards = -(-len(dataset) // SHARD_SIZE)
    shards = range(state.process_index, num_shards, state.num_processes)
    progress = tqdm(total=len(dataset), desc=desc, unit=" pairs", disable=None if state.is_main_process else True)
    done = {}
    with progress, _without_progress_bars():
        for shard in shards:
            rows = range(shard * SHARD_SIZE, min((shard + 1) * SHARD_SIZE, len(dataset)))
            file = folder / f"{shard:06d}.arrow"
            _drop_unless_whole(file, len(rows))
            scores = dataset.select(rows).map(
                function,
                batched=True,
                batch_size=SHARD_SIZE,
                remove_columns=dataset.column_names,
                new_fingerprint=f"{fingerprint}-{shard}",
                cache_file_name=str(file) if datasets.is_caching_enabled() else None,
                features=datasets.Features({name: datasets.List(datasets.Value("float32")) for name in columns}),
            )
            done[shard] = scores.with_format("arrow")[:]
            progress.update(min(len(rows) * state.num_processes, len(dataset) - progress.n))
    if state.num_processes > 1:
        parts = [None] * state.num_processes
        torch.distributed.all_gather_object(parts, done)
        done = {shard: table for part in parts for shard, table in part.items()}
    table = pa.concat_tables(done[shard] for shard in range(num_shards))
    return concatenate_datasets([dataset, Dataset(table, fingerprint=fingerprint)], axis=1)


def _drop_unless_whole(file: Path, num_rows: int) -> None:
    """Delete a shard that was written whole, as all are, but has been damaged since."""
    if not file.is_file():
        return
    try:
        with pa.OSFile(str(file)) as source:
            is_whole = pa.ipc.open_stream(source).read_all().num_rows == num_rows
    except (pa.ArrowException, OSError):
        is_whole = False
    if not is_whole:
        logger.warning("%s is damaged: its shard is scored again.", file)
        file.unlink()


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


@contextmanager
def _without_progress_bars():
    """Within the context each shard has no progress bar of its own."""
    are_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not are_disabled:
            datasets.enable_progress_bars()
