# SPDX-License-Identifier: Apache-2.0

"""
Check the weights of a request when it arrives. An exception in a worker would end the engine.

vLLM checks requests with the class method `validate_params` of logits processors, without a config. It finds a class
by the text `module:qualified.name`. So the name of the class holds the doctors: `trl_tfpo_vllm.admission:of.NAME`.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

from .guidance import Guidance


if TYPE_CHECKING:
    import torch
    from vllm.sampling_params import SamplingParams

PREFIX = f"{__name__}:of."


class Admission(LogitsProcessor):
    """Refuses requests with unusable weights, and changes no logits. Subclasses have the doctors of an engine."""

    guidance: ClassVar[Guidance]

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Raise `ValueError` on weights that [`Guidance.request_weights`] refuses; over HTTP that is status 400."""
        cls.guidance.request_weights(sampling_params.extra_args)

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        """Return False: logits of the request are not changed."""
        return False

    def apply(self, logits: "torch.Tensor", ctx: LogitsContext) -> "torch.Tensor":
        """Return the logits (rows, V) as they are."""
        return logits


class _Namespace:
    """Turns an attribute that [`Guidance.encoded`] returned into a class."""

    def __getattr__(self, name: str) -> type[Admission]:
        try:
            return _admission(name)
        except ValueError as error:
            raise AttributeError(name) from error


@lru_cache
def _admission(name: str) -> type[Admission]:
    return type("Admission", (Admission,), {"guidance": Guidance.decoded(name), "__module__": __name__})


of = _Namespace()


def admission_of(guidance: Guidance) -> str:
    """Return the text by which vLLM finds the [`Admission`] of an engine with these doctors."""
    return PREFIX + guidance.encoded()
