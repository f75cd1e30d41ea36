# SPDX-License-Identifier: Apache-2.0

"""Patients that another engine runs: an endpoint, or vLLM."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import options


if TYPE_CHECKING:
    from ..annotation.backends import CompletionScorer
    from ..common.endpoint import Endpoint

BACKENDS = ("transformers", "vllm", "openai")
OWNERS = {"base_url": "openai", "model": "openai", "engine_args": "vllm"}  # the backend to which an option belongs
KEY = "OPENAI_API_KEY"  # environment variable


@dataclass
class EngineArguments:
    """Options of `trl-tfpo annotate` about the engine of the patient."""

    backend: str = field(default="transformers", metadata=options.BACKEND)
    base_url: str | None = field(default=None, metadata=options.BASE_URL)
    model: str | None = field(default=None, metadata=options.MODEL)
    num_requests: int = field(default=32, metadata=options.NUM_REQUESTS)
    engine_args: str | None = field(default=None, metadata=options.ENGINE_ARGS)


def check_engine(args: EngineArguments, *, for_transformers: Sequence[str]) -> None:
    """
    Raise `ValueError` on options that do not belong to the backend.

    `for_transformers` names options, given by the user, that belong to the backend "transformers".
    """
    if args.backend not in BACKENDS:
        raise ValueError(f"`--backend` must be one of {BACKENDS}. Got {args.backend!r}; leave it out for the first")
    if args.backend == "openai" and not args.base_url:
        raise ValueError("`--backend openai` needs an endpoint. Pass `--base_url`, such as http://localhost:8000/v1")
    owners = {name: owner for name, owner in OWNERS.items() if getattr(args, name)}
    owners |= dict.fromkeys(for_transformers, "transformers")
    for name, owner in owners.items():
        if args.backend != owner:
            raise ValueError(
                f"`--{name}` belongs to `--backend {owner}`. Got it with {args.backend!r}; leave one of the two out"
            )


def name_endpoint(base_url: str, model: str, num_requests: int) -> "Endpoint":
    """Return an endpoint, with the API key from the environment variable `OPENAI_API_KEY`."""
    from ..common.endpoint import Endpoint

    return Endpoint(base_url, model, api_key=os.environ.get(KEY) or None, num_requests=num_requests)


def name_scorer(
    args: EngineArguments, patient: str | None, *, dtype: str, trust_remote_code: bool
) -> "tuple[CompletionScorer | None, list[int]]":
    """
    Return the scorer for a patient in another engine, and the ids that end completions.

    The ids come from the generation config of the patient, if it has one.

    With the backend "transformers" there is no scorer and no id: the model is loaded, with its generation config.
    """
    if args.backend == "transformers":
        return None, []
    from transformers import GenerationConfig

    from ..annotation.backends import EndpointScorer, VllmScorer
    from .models import check_dtype

    eos_token_ids: list[int] = []
    if patient is not None:
        try:
            found = GenerationConfig.from_pretrained(patient).eos_token_id
            eos_token_ids = [x for x in (found if isinstance(found, list) else [found]) if x is not None]
        except OSError:  # many models have none
            pass
    if args.backend == "openai":
        model = args.model or patient or "world"
        return EndpointScorer(name_endpoint(str(args.base_url), model, args.num_requests)), eos_token_ids
    settings = {} if args.engine_args is None else read_object("--engine_args", args.engine_args)
    trust = {"trust_remote_code": True} if trust_remote_code else {}
    return VllmScorer(str(patient), **{"dtype": check_dtype(dtype), **trust, **settings}), eos_token_ids


def read_object(option: str, text: str) -> Mapping[str, object]:
    """Return a JSON object, or raise `ValueError`."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"`{option}` must be a JSON object. Got {text!r}; write for example '{{\"seed\": 0}}'")
    return value
