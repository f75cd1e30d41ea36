# SPDX-License-Identifier: Apache-2.0

"""Metrics of training and of evaluation: means over pairs, whatever batches and processes the pairs come in."""

from collections import defaultdict
from collections.abc import Callable

import torch


NUM_PAIRS = "num_pairs"


class PairMeans:
    """Sums over pairs since the last time that the means were taken, of training and of evaluation apart."""

    def __init__(self):
        self._sums = {"train": defaultdict(float), "eval": defaultdict(float)}

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
                Scalars, means over the pairs of the batch; of the same names in all processes.
            num_pairs (`int`):
                Pairs in the batch.
            gather (`Callable`):
                From a tensor (1, M) to those of all processes, (P, M).
        """
        weighted = [metric.float() * num_pairs for _, metric in sorted(metrics.items())]
        sums = torch.stack([*weighted, weighted[0].new_tensor(num_pairs)])
        sums = gather(sums[None]).sum(dim=0).tolist()  # over pairs, in all processes
        for name, value in zip([*sorted(metrics), NUM_PAIRS], sums, strict=True):
            self._sums[mode][name] += value

    def take(self, mode: str, prefix: str = "") -> dict[str, float]:
        """The means since the last time, with a prefix to their names; empty where nothing was recorded."""
        sums = self._sums[mode]
        num_pairs = sums.pop(NUM_PAIRS, None)
        means = {f"{prefix}{name}": value / num_pairs for name, value in sums.items()}
        sums.clear()
        return means
