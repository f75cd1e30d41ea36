# SPDX-License-Identifier: Apache-2.0

"""Metrics as means over pairs, independent of how pairs are divided among batches and processes."""

from collections import defaultdict
from collections.abc import Callable

import torch


NUM_PAIRS = "num_pairs"


class PairMeans:
    """Sums of metrics over pairs since the last call of `take`, separate for training and evaluation."""

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
        Add the metrics of a batch.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            metrics (`dict[str, torch.Tensor]`):
                Scalars, means over the pairs of the batch. All processes must record the same names.
            num_pairs (`int`):
                Pairs in the batch.
            gather (`Callable`):
                Function from a tensor (1, M) to those of all processes, (P, M).
        """
        weighted = [metric.float() * num_pairs for _, metric in sorted(metrics.items())]
        sums = torch.stack([*weighted, weighted[0].new_tensor(num_pairs)])
        totals = gather(sums[None]).sum(dim=0).tolist()  # over the pairs of all processes
        for name, value in zip([*sorted(metrics), NUM_PAIRS], totals, strict=True):
            self._sums[mode][name] += value

    def take(self, mode: str, prefix: str = "") -> dict[str, float]:
        """Return the means since the last call, with a prefix to their names; empty if nothing was recorded."""
        sums = self._sums[mode]
        num_pairs = sums.pop(NUM_PAIRS, 0)
        means = {f"{prefix}{name}": value / num_pairs for name, value in sums.items()}
        sums.clear()
        return means
