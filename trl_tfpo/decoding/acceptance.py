# SPDX-License-Identifier: Apache-2.0

r"""
How the next token is chosen, so that a draft can be compared with it.

A draft is accepted where it is the token that the guided policy chooses. The policy must therefore choose the same
token whether something was drafted or not. Greedy search does. Sampling does with noise that belongs to the place in
the text: with $E_y$ independent and exponentially distributed,

$$y = \arg\max_y p(y) / E_y$$

is a sample of $p$. The drafter chooses by its own distribution and the same noise. The text then depends on the seed
alone, not on drafter, draft lengths or clock ("drafter-invariant speculative decoding",
https://huggingface.co/papers/2408.07978). `torch.multinomial` takes the same noise from its generator, so the samples
are those of plain guided decoding too.

Shapes: one row, V vocabulary.
"""

import torch


class GreedySearch:
    """Chooses the likeliest token."""

    def token(self, scores: torch.Tensor, place: int) -> torch.Tensor:
        """
        Choose a token.

        Args:
            scores (`torch.Tensor` of shape `(1, V)`):
                Log-probabilities up to a constant.
            place (`int`):
                Index of the token in the text.

        Returns:
            `torch.LongTensor` of shape `(1,)`.
        """
        return scores.argmax(dim=-1)

    def release(self, place: int) -> None:
        """Forget everything that belongs to earlier places."""

    def finish(self) -> None:
        """Leave the random generator as plain decoding would leave it."""


class Sampling(GreedySearch):
    """Samples tokens, with noise that is drawn once for each place, in the order of the places."""

    def __init__(self) -> None:
        self.noise: dict[int, torch.Tensor] = {}  # (1, V), by place
        self.states: dict[int, torch.Tensor] = {}  # of the generator, before the noise of a place is drawn

    def token(self, scores: torch.Tensor, place: int) -> torch.Tensor:
        probs = scores.softmax(dim=-1)
        if place not in self.noise:
            self.generator = torch if probs.device.type == "cpu" else torch.get_device_module(probs.device)
            self.states[place] = self.generator.get_rng_state()
            self.noise[place] = torch.empty_like(probs).exponential_()
        return (probs / self.noise[place]).argmax(dim=-1)

    def release(self, place: int) -> None:
        for earlier in [known for known in self.noise if known < place]:
            del self.noise[earlier], self.states[earlier]

    def finish(self) -> None:
        if self.states:  # noise that no token needed
            self.generator.set_rng_state(self.states[min(self.states)])
