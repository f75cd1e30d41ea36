# SPDX-License-Identifier: Apache-2.0

r"""
Choice of the next token, the same with and without drafts.

A draft is accepted if it is the token that the guided policy chooses. The choice must therefore not depend on drafts.
In greedy search it does not. In sampling it does not if the noise is fixed for each place in the text: with
independent, exponentially distributed $E_y$,

$$y = \arg\max_y p(y) / E_y$$

is a sample of $p$. A drafting model chooses by its own distribution and the same noise. The text then depends only on
the seed, not on drafter, draft lengths or clock ("drafter-invariant speculative decoding",
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
        if self.states:  # rewind over noise that no token used
            self.generator.set_rng_state(self.states[min(self.states)])
