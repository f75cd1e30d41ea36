# SPDX-License-Identifier: Apache-2.0

r"""
A language model head whose logits lie in the span of the vocabulary embeddings.

$$g(y \mid s) = c \, e_y^\top M h_s$$

$e_y$ is the frozen embedding of token $y$. $M$ is a square matrix that starts at zero. $c$ is 1, or the inverse of the
mean norm of the embeddings if this norm is below 1: without this factor, small embeddings would slow training down.

An ordinary head learns little about tokens that do not occur in the pairs. With this head, tokens with similar
embeddings get similar logits. It trains H x H weights instead of V x H.

A saved doctor has an ordinary head, $W = c \, (E - \bar e) M$, and loads as a causal language model. Subtracting the
mean row $\bar e$ changes no probability. [`GuidanceHead`] recovers $M$ when it loads $W$.
"""

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor


class GuidanceHead(torch.nn.Module):
    """
    Language model head with logits in the span of the vocabulary embeddings. A new head gives zero logits.

    Args:
        embeddings (`torch.nn.Parameter` of shape `(V, H)`):
            Weights of the current head, which are frozen. Tied weights stay tied to the input embeddings.
    """

    bias = None

    def __init__(self, embeddings: torch.nn.Parameter):
        super().__init__()
        self.froze_embeddings = embeddings.requires_grad
        embeddings.requires_grad_(False)
        size = getattr(embeddings, "ds_shape", embeddings.shape)[1]  # `ds_shape` is the whole shape under ZeRO-3
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
        """Vectors `c M h` of shape `(..., H)`. Their products with the embeddings are the logits."""
        return F.linear(hidden_states, self.map) * self.scale

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(self.to_embedding_space(hidden_states), self.weight)

    def has_embeddings(self, weight: torch.Tensor) -> bool:
        """Whether these weights of another head equal the embeddings. The answer is cached."""
        key = tuple((x.data_ptr(), x._version, x.dtype, x.shape) for x in (self.weight, weight))
        if self._compared is None or self._compared[0] != key:
            is_alike = self.weight.dtype == weight.dtype and self.weight.device == weight.device
            self._compared = key, is_alike and torch.equal(self.weight, weight)
        return self._compared[1]

    @torch.no_grad()
    def start_at(self, logits: torch.Tensor, hidden_states: torch.Tensor) -> None:
        r"""
        Start at the same logits in every state, approximately.

        The head has no bias. Therefore $M = b a^\top / c$, with two directions from ridge regression: the products of
        $b$ with the embeddings approximate the logits, and $a^\top h \approx 1$ for the hidden states.

        Args:
            logits (`torch.Tensor` of shape `(V,)`):
                Logit of each token, in nats, up to a constant.
            hidden_states (`torch.Tensor` of shape `(N, H)`):
                Hidden states that predict completion tokens, with N larger than H.
        """
        direction = fitted_direction(self.weight, logits)
        self.map.copy_(torch.outer(direction, constant_over(hidden_states)) / self.scale)

    @torch.no_grad()
    def folded(self, embeddings: torch.Tensor, map: torch.Tensor) -> torch.Tensor:
        """Weights (V, H) of an ordinary head with the same probabilities and mean row zero."""
        weight = embeddings.float() @ (map.float() * self.scale)
        return (weight - weight.mean(dim=0)).to(embeddings.dtype)

    @torch.no_grad()
    def unfolded(self, embeddings: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Map (H, H) of the weights (V, H) of an ordinary head: the inverse of [`folded`], by least squares."""
        centered = embeddings.double() - embeddings.double().mean(dim=0)
        map = torch.linalg.lstsq(centered.T @ centered, centered.T @ weight.double()).solution / self.scale
        return map.to(embeddings.dtype)

    # The head is saved as an ordinary head. Engines that shard it save the map instead, which `fold_map` converts.

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
    """Ridge regression (H,), float64, of logits (V,) on embeddings (V, H), with an intercept."""
    embeddings = embeddings.detach().double()
    centered, logits = embeddings - embeddings.mean(dim=0), logits.to(embeddings) - logits.mean().to(embeddings)
    return _ridge(centered.T @ centered, centered.T @ logits, 1e-4)


def constant_over(hidden_states: torch.Tensor) -> torch.Tensor:
    """Direction (H,), float64, whose product with each of the hidden states (N, H) is about 1."""
    hidden_states = hidden_states.double()
    return _ridge(hidden_states.T @ hidden_states, hidden_states.sum(dim=0), 1e-3)


def _ridge(second_moments: torch.Tensor, products: torch.Tensor, ridge: float) -> torch.Tensor:
    """
    Ridge regression (H,) from second moments (H, H) and products (H,).

    `ridge` is relative to the mean of the diagonal of the second moments.
    """
    diagonal = torch.eye(len(second_moments)).to(second_moments) * ridge * second_moments.diagonal().mean()
    return torch.linalg.solve(second_moments + diagonal, products)
