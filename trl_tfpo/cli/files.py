# SPDX-License-Identifier: Apache-2.0

"""Reading and atomic writing of datasets."""

import os
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import DatasetCard

from ..annotation.token_rewards import annotation_settings
from ..common.atomic import atomic_write, check_writable
from ..data.tokenization import columns_of
from ..training.cards import annotation_card


def read_dataset(
    name: str, config: str | None = None, *, streaming: bool = False, data_dir: str | None = None
) -> DatasetDict:
    """
    Read all splits of a dataset.

    Args:
        name (`str`):
            Hub name, folder (of files, or written by `save_to_disk`), JSON Lines file or Parquet file.
        config, streaming, data_dir:
            Arguments of `load_dataset` for datasets of the Hub. `streaming` also applies to files.

    Raises:
        `ValueError`: when a path does not exist, or a file cannot be read.
    """
    path = Path(name)
    if path.is_file():
        builder = "parquet" if ".parquet" in path.suffixes else "json"
        try:
            return load_dataset(builder, data_files={"train": str(path)}, streaming=streaming)
        except (
            DatasetGenerationError,
            StopIteration,
            ValueError,
        ) as error:  # the type depends on the version of Datasets
            raise ValueError(
                "A file must be JSON Lines, or Parquet with the suffix `.parquet`. Got "
                f"{name!r}, which cannot be read: {error.__cause__ or str(error) or 'it is empty'}; correct it."
            ) from error
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        dataset = load_from_disk(path)
        return dataset if isinstance(dataset, DatasetDict) else DatasetDict(train=dataset)
    if (
        not name
        or not path.is_dir()
        and (path.suffix in (".json", ".jsonl", ".parquet") or name.startswith((".", "/", "~")))
    ):
        raise ValueError(
            f"A dataset must be a Hub name, a folder or a file. Got {name!r}, which does not exist; check the path."
        )
    return load_dataset(name, config, data_dir=data_dir, streaming=streaming)


def read_split(name: str, split: str, config: str | None = None) -> Dataset:
    """Read one split of a dataset, see [`read_dataset`] and [`take_split`]."""
    return take_split(read_dataset(name, config), split, name)


def take_split(dataset: DatasetDict, split: str, name: str) -> Dataset:
    """Return one split of the dataset `name`. Raises `ValueError` when the split is missing or empty."""
    if split not in dataset:
        raise ValueError(f"The split must be one of {sorted(dataset)}. Got {split!r} of {name!r}; pass another.")
    columns_of(dataset[split])
    return dataset[split]


def check_output(path: str | os.PathLike, *, overwrite: bool) -> None:
    """Raise `ValueError` when an output exists and may not be replaced, or its folder is not writable."""
    path = Path(path)
    check_writable(path.absolute().parent)
    if path.exists() and not overwrite and (path.is_file() or any(path.iterdir())):
        raise ValueError(
            f"The output must not exist. Got the existing {str(path)!r}; choose another path, or pass `--overwrite`."
        )
    if path.is_dir() and overwrite and any(path.iterdir()) and not (path / "dataset_info.json").is_file():
        raise ValueError(
            f"A folder can be overwritten only if it is a dataset. Got {str(path)!r}, with other files; choose "
            "another path."
        )


def write_dataset(dataset: Dataset, path: str | os.PathLike) -> None:
    """Write JSON Lines (`.jsonl`, `.json`), Parquet (`.parquet`) or a folder for `load_from_disk`, atomically."""
    with atomic_write(path) as part:
        if Path(path).suffix in (".json", ".jsonl"):
            dataset.to_json(part, force_ascii=False)
        elif Path(path).suffix == ".parquet":
            dataset.to_parquet(part)
        else:
            dataset.save_to_disk(part)
            if annotation_settings(dataset):
                annotation_card(dataset).save(part / "README.md")


def push_dataset(dataset: Dataset, name: str) -> None:
    """Push a dataset to the Hub. The card of an annotated dataset describes the annotation."""
    dataset.push_to_hub(name)
    if annotation_settings(dataset):
        card = annotation_card(dataset)
        pushed = DatasetCard.load(name)  # lists the features and files; keep them
        pushed.data["tags"] = card.data["tags"]
        pushed.text = card.text
        pushed.push_to_hub(name, repo_type="dataset")
