# SPDX-License-Identifier: Apache-2.0

"""Agreement of the two faces with the preference labels."""

import math
import warnings
from itertools import islice

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from .token_rewards import GAP_COLUMNS, NUM_STREAMED, annotation_settings


MIN_PAIRS = 16  # fewer pairs do not show whether the faces separate chosen from rejected


def agreement_of_faces(dataset: Dataset | IterableDataset) -> tuple[float, float, int] | None:
    """
    Share of pairs in which the gaps of the chosen completion have the larger sum. A tie counts as one half.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with `chosen_gaps` and `rejected_gaps`. Only the first 64 pairs of a streamed dataset are read.

    Returns:
        `float`, `float` and `int`: the share, its standard error under chance, and the number of pairs; `None` if
        there are no gaps.
    """
    if isinstance(dataset, IterableDataset):
        rows = [row for row in islice(dataset, NUM_STREAMED) if row.keys() >= set(GAP_COLUMNS)]
        dataset = Dataset.from_list([{name: row[name] for name in GAP_COLUMNS} for row in rows])
    if len(dataset) == 0 or not set(GAP_COLUMNS) <= set(dataset.column_names):
        return None
    table = dataset.select_columns(GAP_COLUMNS).with_format("arrow")[:]
    sums = []
    for name in GAP_COLUMNS:
        ends = pc.list_value_length(table.column(name)).to_numpy().cumsum()
        gaps = pc.list_flatten(table.column(name)).to_numpy()
        totals = np.concatenate([[0.0], gaps.cumsum(dtype=np.float64)])[np.concatenate([[0], ends])]
        sums.append(np.diff(totals))
    preferred = sums[0] - sums[1]
    return float(((preferred > 0) + (preferred == 0) / 2).mean()), math.sqrt(0.25 / len(dataset)), len(dataset)


def warn_unless_faces_separate(dataset: Dataset | IterableDataset) -> None:
    """
    Warn if the faces do not distinguish chosen from rejected completions. A doctor could then not learn the labels.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Annotated dataset. Datasets without gaps, with fewer than 16 pairs, or with `reward_direction="faces"`
            (which ignores labels) are not checked.

    Warns:
        `UserWarning`: if [`agreement_of_faces`] is less than two standard errors above one half.
    """
    found = agreement_of_faces(dataset)
    if found is None:
        return
    agreement, error, num_pairs = found
    ignores_labels = (annotation_settings(dataset) or {}).get("reward", {}).get("reward_direction") == "faces"
    if num_pairs >= MIN_PAIRS and agreement < 0.5 + 2 * error and not ignores_labels:
        warnings.warn(
            f"The faces do not separate these data: they prefer the chosen completion of {agreement:.0%} of "
            f"{num_pairs} pairs, and chance is 50 ± {200 * error:.0f}%. Describe in the faces what the labels reward, "
            "or use a stronger patient."
        )
