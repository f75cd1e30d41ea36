# SPDX-License-Identifier: Apache-2.0

"""
A model provider for [Inspect](https://inspect.aisi.org.uk): `inspect eval TASK --model trl-tfpo/PATIENT`.

Inspect finds the provider by the entry point in `inspect_entry.py`. Requests go through Inspect's client for OpenAI's
API to the app of an [`Engine`] in the same process. Samples of an eval are therefore rows of one batch.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
from datasets.fingerprint import Hasher
from inspect_ai.model import GenerateConfig, ModelAPI, ModelCall, ModelOutput, get_model
from inspect_ai.tool import ToolChoice, ToolInfo

from ..models.fingerprint import model_fingerprint
from ..server import Engine, Limits, make_app
from ..server.generation import Generation
from .models import load_models
from .serve import read_weights


UNLIMITED = 2**31  # Inspect bounds the work, and the context of the models bounds prompts and answers
IGNORED = (
    "best_of",
    "reasoning_tokens",
    "reasoning_mode",
    "effort",
    "verbosity",
    "fallback_models",
    "modalities",
    "batch",
)


class GuidedModelAPI(ModelAPI):
    """
    Guided completions for Inspect, with log-probabilities of the guided policy.

    Args:
        model_name (`str`):
            The patient: a Hub name, a folder, or `world` for the controlled world.
        base_url, api_key (`str`, *optional*):
            Not used, and refused if given.
        config ([`~inspect_ai.model.GenerateConfig`], *optional*):
            Default settings of requests.
        doctor (`str` or sequence of `str`, *optional*):
            Doctors, each `PATH` or `NAME=PATH`.
        weights (`str`, sequence of `str`, or mapping from `str` to `float`, *optional*):
            Exponents of doctors, such as `"helpful:0.5,harmless:0.2"`. Other doctors have the default
            exponents of [`Engine`]. `weights` in the `extra_body` of a request replace these by name.
        alpha (`float`, *optional*):
            Exponent of the patient, see [`Generation`]. `alpha` in `extra_body` replaces it.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of patient and doctors.
        in_4bit, trust_remote_code (`bool`, *optional*, default to `False`):
            Whether to load the patient in 4 bits, and whether to run code of model repositories.
        max_rows (`int`, *optional*, defaults to `32`):
            Maximum number of completions in the batch, and default of Inspect's `max_connections`.
        **unknown:
            Refused.

    Raises:
        `ValueError`: on unknown arguments, and on doctors, weights and models that [`Engine`] refuses.

    Examples:

    ```python
    >>> from inspect_ai.model import get_model
    >>> get_model("trl-tfpo/world", max_rows=4).api.max_connections()
    4

    ```
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        doctor: str | Sequence[str] = (),
        weights: str | Sequence[str] | Mapping[str, float] = (),
        alpha: float | None = None,
        dtype: str = "auto",
        in_4bit: bool = False,
        trust_remote_code: bool = False,
        max_rows: int = 32,
        **unknown: object,
    ):
        others = unknown | {"base_url": base_url, "api_key": api_key}
        if refused := sorted(name for name, value in others.items() if value is not None):
            raise ValueError(
                "Model arguments must be `doctor`, `weights`, `alpha`, `dtype`, `in_4bit`, `trust_remote_code` and "
                f"`max_rows`. Got {', '.join(refused)}; leave it out. For a running server use `openai-api`."
            )
        super().__init__(model_name, config=config or GenerateConfig())
        doctors = [doctor] if isinstance(doctor, str) else doctor
        name = None if model_name == "world" else model_name
        patient, tokenizer, loaded = load_models(
            name, doctors, dtype=dtype, in_4bit=in_4bit, trust_remote_code=trust_remote_code
        )
        self.max_rows, self.weights, self.alpha = max_rows, _as_mapping(weights), alpha
        limits = Limits(
            max_prompt_tokens=UNLIMITED,
            max_new_tokens=UNLIMITED,
            max_rows=max_rows,
            max_queue=UNLIMITED,
            max_seconds=math.inf,
            max_choices=UNLIMITED,
            max_bytes=UNLIMITED,
        )
        self.engine = Engine(patient, tokenizer, loaded, limits)
        try:
            exponents = self._exponents(alpha, self.weights)
            # Inspect's cache of answers distinguishes models by their name and this attribute
            self.base_url = Hasher.hash((exponents, dtype, in_4bit, [*map(model_fingerprint, loaded.values())]))
            served_name = Path(model_name).name
            app = make_app(self.engine, model_name=served_name)
            self.client = get_model(
                f"openai-api/trl-tfpo/{served_name}",
                base_url="http://trl-tfpo/v1",  # not resolved, because the transport calls the app
                api_key="none",
                http_client=httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), timeout=None),
                max_retries=0,  # a failure in this process would repeat itself
                memoize=False,
            ).api
        except BaseException:
            self.engine.close()
            raise

    def _exponents(self, alpha: float | None, weights: Mapping[str, float]) -> dict[str, Any]:
        """Return all exponents, with defaults."""
        alpha, betas = self.engine.exponents(Generation([], lambda event: None, alpha=alpha, weights=weights))
        return {"alpha": alpha, "weights": dict(zip(self.engine.names, betas, strict=True))}

    async def generate(
        self, input: list[Any], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput | tuple[ModelOutput | Exception, ModelCall]:
        """
        Complete a conversation.

        `metadata` of the output has the exponents of the patient and of all doctors. The stop reason is
        `"model_length"` if the prompt does not fit the context, or if the answer fills it before `max_tokens`.

        Raises:
            `ValueError`: on settings of Inspect that would be ignored. The server refuses unsupported ones itself.
        """
        if given := [name for name in IGNORED if getattr(config, name, None)]:
            raise ValueError(f"Guided models do not support `{given[0]}`. Got {getattr(config, given[0])!r}.")
        body = {"alpha": self.alpha, "top_k": config.top_k} | (config.extra_body or {})
        body["weights"] = self.weights | _as_mapping(body.get("weights") or ())
        found = await self.client.generate(input, tools, tool_choice, config.model_copy(update={"extra_body": body}))
        output = found[0] if isinstance(found, tuple) else found
        if isinstance(output, ModelOutput) and output.usage is not None:
            output.metadata = self._exponents(body["alpha"], body["weights"])
            num_free = self.engine.max_positions - output.usage.input_tokens
            for choice in output.choices:
                if choice.stop_reason == "max_tokens" and num_free < (config.max_tokens or UNLIMITED):
                    choice.stop_reason = "model_length"
        return found

    def max_connections(self) -> int:
        """Return the number of concurrent requests, unless Inspect adapts it or the user sets it."""
        return self.max_rows

    def max_tokens(self) -> int:
        """Return the default maximum length of answers, the same as in the server."""
        return Limits().max_new_tokens

    async def aclose(self) -> None:
        """Close the client and the engine."""
        await self.client.aclose()
        await asyncio.to_thread(self.engine.close)


def _as_mapping(weights: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Return exponents by doctor. Inspect splits values of the command line at commas."""
    if isinstance(weights, Mapping):
        return dict(weights)
    text = weights if isinstance(weights, str) else ",".join(weights)
    return read_weights(text) if text else {}
