# SPDX-License-Identifier: Apache-2.0

r"""
A language model head whose logits lie in the span of the vocabulary embeddings.

$$g(y \mid s) = c \, e_y^\top M h_s$$

$e_y$ is the frozen embedding of token $y$. $M$ is a square matrix that starts at zero. $c$ is 1, or the inverse of the
mean norm of the embeddings if this norm is below 1. Small embeddings therefore do not slow training down.

A head with a free row for each token learns nothing about tokens that the pairs do not contain. With this head, tokens
with similar embeddings get similar logits, and H x H weights are trained instead of V x H.

A saved doctor has an ordinary head, $W = (E - \bar e) M$, and loads as any causal language model does. Subtracting the
mean row changes no probability. [`GuidanceHead`] recovers $M$ when it loads $W$.
"""

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor


class GuidanceHead(torch.nn.Module):
    """
    Language model head with logits in the span of the vocabulary embeddings. All logits are zero before training.

    Args:
        embeddings (`torch.nn.Parameter` of shape `(V, H)`):
            Weights of the language model's head. They are frozen. Tied weights stay tied to the input embeddings.
    """

    bias = None

    def __init__(self, embeddings: torch.nn.Parameter):
        super().__init__()
        self.froze_embeddings = embeddings.requires_grad
        embeddings.requires_grad_(False)
        size = getattr(embeddings, "ds_shape", embeddings.shape)[1]  # under ZeRO-3 the parameter itself is a shard
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
        """
        Scaled product `M h` of shape `(..., H)`. Its product with the embeddings gives the logits.
        """
        return F.linear(hidden_states, self.map) * self.scale

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(self.to_embedding_space(hidden_states), self.weight)

    def has_embeddings(self, weight: torch.Tensor) -> bool:
        """Whether another head has the same weights. Hidden states of both can then be added. The answer is cached."""
        key = tuple((x.data_ptr(), x._version, x.dtype, x.shape) for x in (self.weight, weight))
        if self._compared is None or self._compared[0] != key:
            is_alike = self.weight.dtype == weight.dtype and self.weight.device == weight.device
            self._compared = key, is_alike and torch.equal(self.weight, weight)
        return self._compared[1]

    @torch.no_grad()
    def start_at(self, logits: torch.Tensor, hidden_states: torch.Tensor) -> None:
        r"""
        Start with the same logits at every state, by least squares.

        A direction $b$ in embedding space is fitted to the logits. The head has no bias, so $M = b a^\top$, where
        $a^\top h \approx 1$ is fitted to hidden states.

        Args:
            logits (`torch.Tensor` of shape `(V,)`):
                Logit of each token, in nats, up to a constant.
            hidden_states (`torch.Tensor` of shape `(N, H)`):
                Hidden states that predict completion tokens. N should be larger than H.
        """
        direction = fitted_direction(self.weight, logits)
        self.map.copy_(torch.outer(direction, constant_over(hidden_states)) / self.scale)

    @torch.no_grad()
    def folded(self, embeddings: torch.Tensor, map: torch.Tensor) -> torch.Tensor:
        """Weights (V, H) of an ordinary head with the same probabilities. Their mean row is zero."""
        weight = embeddings.float() @ (map.float() * self.scale)
        return (weight - weight.mean(dim=0)).to(embeddings.dtype)

    @torch.no_grad()
    def unfolded(self, embeddings: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The map (H, H) that [`folded`] turns into these weights (V, H), or the nearest one by least squares."""
        centered = embeddings.double() - embeddings.double().mean(dim=0)
        map = torch.linalg.lstsq(centered.T @ centered, centered.T @ weight.double()).solution / self.scale
        return map.to(embeddings.dtype)

    # The head is saved as an ordinary one. Engines that shard it save its parameters, which `fold_map` converts later.

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
    """
    The direction (H,), float64, whose products with embeddings (V, H) are nearest to logits (V,), up to a constant.
    """
    embeddings = embeddings.detach().double()
    centered, logits = embeddings - embeddings.mean(dim=0), logits.to(embeddings) - logits.mean().to(embeddings)
    return _ridge(centered.T @ centered, centered.T @ logits, 1e-4)


def constant_over(hidden_states: torch.Tensor) -> torch.Tensor:
    """The direction (H,), float64, whose product with each of the hidden states (N, H) is about 1."""
    hidden_states = hidden_states.double()
    return _ridge(hidden_states.T @ hidden_states, hidden_states.sum(dim=0), 1e-3)


def _ridge(second_moments: torch.Tensor, products: torch.Tensor, ridge: float) -> torch.Tensor:
    """
    Ridge regression (H,) from second moments (H, H) and products (H,). The ridge is a share of the mean variance.
    """
    diagonal = torch.eye(len(second_moments)).to(second_moments) * ridge * second_moments.diagonal().mean()
    return torch.linalg.solve(second_moments + diagonal, products)
