# SPDX-License-Identifier: Apache-2.0

"""
Check of the weights of a request on arrival. A later error, in a worker, would end the engine.

vLLM checks requests with the class method `validate_params` of logits processors, without a config. It finds a class
by a text `module:qualified.name`. The name of the class therefore encodes the doctors:
`trl_tfpo_vllm.admission:of.NAME`.
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
    """Logits processor that refuses requests with invalid weights, and changes no logits. One subclass per engine."""

    guidance: ClassVar[Guidance]

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Raise `ValueError` on weights that [`Guidance.request_weights`] refuses. Over HTTP this is status 400."""
        cls.guidance.request_weights(sampling_params.extra_args)

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        """Return False: logits of the request are not changed."""
        return False

    def apply(self, logits: "torch.Tensor", ctx: LogitsContext) -> "torch.Tensor":
        """Return the logits (rows, V) unchanged."""
        return logits


class _Namespace:
    """Namespace in which each name from [`Guidance.encoded`] is a class."""

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
    """Return the text by which vLLM finds the [`Admission`] class for these doctors."""
    return PREFIX + guidance.encoded()
