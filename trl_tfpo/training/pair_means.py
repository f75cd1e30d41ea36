# SPDX-License-Identifier: Apache-2.0

"""Means of metrics over pairs, independent of batch size and number of processes."""

from collections import defaultdict
from collections.abc import Callable

import torch


NUM_PAIRS = "num_pairs"


class PairMeans:
    """Metrics over the pairs since the last call of `take`, separate for training and evaluation."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, float]] = {"train": defaultdict(float), "eval": defaultdict(float)}

    def record(
        self,
        mode: str,
        metrics: dict[str, torch.Tensor],
        num_pairs: int,
        gather: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """
        Add the metrics of a batch to mode `"train"` or `"eval"`.

        Args:
            metrics (`dict[str, torch.Tensor]`):
                Scalars, means over the pairs of the batch. All processes must record the same names.
            num_pairs (`int`):
                Pairs in the batch.
            gather (`Callable`):
                Gathers a tensor (1, M) from all R processes to (R, M).
        """
        weighted = [metric.float() * num_pairs for _, metric in sorted(metrics.items())]
        sums = torch.stack([*weighted, weighted[0].new_tensor(num_pairs)])
        totals = gather(sums[None]).sum(dim=0).tolist()
        for name, value in zip([*sorted(metrics), NUM_PAIRS], totals, strict=True):
            self._sums[mode][name] += value

    def take(self, mode: str, prefix: str = "") -> dict[str, float]:
        """Return the means since the last call, with `prefix` before their names; empty if nothing was recorded."""
        sums = self._sums[mode]
        num_pairs = sums.pop(NUM_PAIRS, 0)
        means = {f"{prefix}{name}": value / num_pairs for name, value in sums.items()}
        sums.clear()
        return means
