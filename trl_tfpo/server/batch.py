# SPDX-License-Identifier: Apache-2.0

"""
A batch of generations, with the caches and logits of the models.

Shapes: B rows, L tokens so far (left padding included), V vocabulary.
"""

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from .generation import Row


@dataclass
class Batch:
    """Generations that are decoded together."""

    rows: list[Row]
    mask: torch.Tensor  # (B, L): 1 for tokens, 0 for padding
    caches: list[DynamicCache]  # of the patient and each doctor
    logits: list[torch.Tensor]  # (B, V) each: next-token logits of the patient and each doctor

    def join(self, other: "Batch") -> "Batch":
        """Return a batch with the rows of both batches."""
        size = max(self.mask.size(1), other.mask.size(1))
        return Batch(
            rows=self.rows + other.rows,
            mask=torch.cat([_pad_left(mask, size, dim=1) for mask in (self.mask, other.mask)]),
            caches=[_join(*caches, size) for caches in zip(self.caches, other.caches, strict=True)],
            logits=[torch.cat(pair) for pair in zip(self.logits, other.logits, strict=True)],
        )

    def select(self, indices: list[int]) -> "Batch":
        """Return a batch with the rows at `indices`, at least one. Columns that contain only padding are dropped."""
        index = torch.tensor(indices)
        mask = self.mask[index]
        first = int(mask.any(dim=0).int().argmax())

        def select(states: torch.Tensor) -> torch.Tensor:
            return states.index_select(0, index.to(states.device))[:, :, first:]

        return Batch(
            rows=[self.rows[i] for i in indices],
            mask=mask[:, first:],
            caches=[DynamicCache([(select(keys), select(values)) for keys, values, _ in x]) for x in self.caches],
            logits=[logits[index] for logits in self.logits],
        )


def _join(first: DynamicCache, second: DynamicCache, size: int) -> DynamicCache:
    """Concatenate the rows of two caches, left-padded to `size` tokens."""
    layers: list[tuple[torch.Tensor, ...]] = []
    for (keys, values, _), (more_keys, more_values, _) in zip(first, second, strict=True):
        pairs = ((keys, more_keys), (values, more_values))  # each (B, heads, L, width)
        layers.append(tuple(torch.cat([_pad_left(x, size, dim=2) for x in pair]) for pair in pairs))
    return DynamicCache(layers)


def _pad_left(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Pad `x` with leading zeros along a dimension, up to a size."""
    return torch.nn.functional.pad(x, [0, 0] * (x.dim() - 1 - dim) + [size - x.size(dim), 0])
