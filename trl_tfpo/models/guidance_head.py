# SPDX-License-Identifier: Apache-2.0

r"""
The head of a doctor that guides: its logits lie in the span of the vocabulary embeddings.

$$g(y \mid s) = c \, e_y^\top M h_s$$

$e_y$ is the embedding of token $y$, frozen, and $M$ a square matrix that starts at zero. $c$ is 1, or more where embeddings are
shorter than 1 on average, so that they learn as fast. A new head of one free row for each
token learns nothing about tokens that the pairs do not show. Here a token moves with those whose embeddings are like its own,
and there are H x H weights to train in place of V x H.

A saved doctor has an ordinary head, $W = (E - \bar e) M$: it loads as any causal language model does. Rows that add up to zero
change no probability, see `adapters.py`. [`GuidanceHead`] finds $M$ again when it is given these weights.
"""

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor


class GuidanceHead(torch.nn.Module):
    """
    Language model head with logits in the span of the vocabulary embeddings; guides nowhere until it is trained.

    Args:
        embeddings (`torch.nn.Parameter` of shape `(V, H)`):
            Weights of the head so far. They are frozen, and stay shared with the input embeddings where they are tied.
    """

    bias = None

    def __init__(self, embeddings: torch.nn.Parameter):
        super().__init__()
        self.froze_embeddings = embeddings.requires_grad
        embeddings.requires_grad_(False)
        size = getattr(embeddings, "ds_shape", embeddings.shape)[1]  # of DeepSpeed ZeRO-3, which leaves a part of them
        self.weight = embeddings
        is_known = embeddings.numel() > 0 and embeddings.device.type != "meta"
        self.scale = (
            1 / min(1.0, max(embeddings.detach().float().norm(dim=1).mean().item(), 1e-6)) if is_known else 1.0
        )
        self.map = torch.nn.Parameter(embeddings.new_zeros(size, size))
        self._compared: tuple | None = None

    @property
    def in_features(self) -> int:
        return self.map.size(1)

    def to_embedding_space(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`M h`, scaled, of the shape `(..., H)` of the hidden states: the product with the embeddings gives the logits."""
        return F.linear(hidden_states, self.map) * self.scale

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(self.to_embedding_space(hidden_states), self.weight)

    def has_embeddings(self, weight: torch.Tensor) -> bool:
        """Whether another head has these weights too, so that its hidden states can be added. The answer is kept."""
        key = tuple((x.data_ptr(), x._version, x.dtype, x.shape) for x in (self.weight, weight))
        if self._compared is None or self._compared[0] != key:
            is_alike = self.weight.dtype == weight.dtype and self.weight.device == weight.device
            self._compared = key, is_alike and torch.equal(self.weight, weight)
        return self._compared[1]

    @torch.no_grad()
    def start_at(self, logits: torch.Tensor, hidden_states: torch.Tensor) -> None:
        r"""
        Let the head start with the same logits at every state, as nearly as it can.

        A direction $b$ in embedding space is fitted to the logits. As the head has no bias, $M = b a^\top$, where
        $a^\top h \approx 1$ is fitted to hidden states.

        Args:
            logits (`torch.Tensor` of shape `(V,)`):
                Of the tokens, in nats, up to a constant.
            hidden_states (`torch.Tensor` of shape `(N, H)`):
                Where completion tokens are predicted, N larger than H if possible.
        """
        direction = fitted_direction(self.weight, logits)
        self.map.copy_(torch.outer(direction, constant_over(hidden_states)) / self.scale)

    @torch.no_grad()
    def folded(self, embeddings: torch.Tensor, map: torch.Tensor) -> torch.Tensor:
        """The weights (V, H) of an ordinary head with the same probabilities, in rows that add up to zero."""
        weight = embeddings.float() @ (map.float() * self.scale)
        return (weight - weight.mean(dim=0)).to(embeddings.dtype)

    @torch.no_grad()
    def unfolded(self, embeddings: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The map (H, H) of which [`folded`] makes this weight (V, H); of any other the closest in least squares."""
        centered = embeddings.double() - embeddings.double().mean(dim=0)
        map = torch.linalg.lstsq(centered.T @ centered, centered.T @ weight.double()).solution / self.scale
        return map.to(embeddings.dtype)

    # On disk the head is an ordinary one. Engines that shard it ask for its parameters, and `fold_map` comes later.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if isinstance(self.map, DTensor) or hasattr(self.map, "ds_id"):
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.folded(self.weight, self.map)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args):
        if f"{prefix}map" in state_dict:
            return super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        weight = state_dict.get(f"{prefix}weight")
        if weight is None:
            missing_keys.append(f"{prefix}weight")
        else:
            with torch.no_grad():
                self.map.copy_(self.unfolded(self.weight, weight.to(self.weight.device)))


def fitted_direction(embeddings: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The direction (H,), in double precision, whose products with the embeddings (V, H) are nearest to logits (V,), up to a constant."""
    embeddings = embeddings.detach().double()
    centered, logits = embeddings - embeddings.mean(dim=0), logits.to(embeddings) - logits.mean().to(embeddings)
    return _ridge(centered.T @ centered, centered.T @ logits, 1e-4)


def constant_over(hidden_states: torch.Tensor) -> torch.Tensor:
    """Direction (H,) whose product with each of the hidden states (N, H) is about 1, in float64."""
    hidden_states = hidden_states.double()
    return _ridge(hidden_states.T @ hidden_states, hidden_states.sum(dim=0), 1e-3)


def _ridge(second_moments: torch.Tensor, products: torch.Tensor, ridge: float) -> torch.Tensor:
    """Least squares (H,) with a ridge that is a share of the mean variance."""
    diagonal = torch.eye(len(second_moments)).to(second_moments) * ridge * second_moments.diagonal().mean()
    return torch.linalg.solve(second_moments + diagonal, products)
