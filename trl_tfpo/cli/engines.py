# SPDX-License-Identifier: Apache-2.0

"""Patients that another engine runs: an endpoint, or vLLM."""

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..annotation.backends import CompletionScorer
    from ..common.endpoint import Endpoint
    from .annotate import AnnotateArguments

BACKENDS = ("transformers", "vllm", "openai")
KEY = "OPENAI_API_KEY"  # environment variable


def check_backend(args: "AnnotateArguments") -> None:
    """Raise `ValueError` on options that do not belong to the backend, before anything is loaded."""
    if args.backend not in BACKENDS:
        raise ValueError(f"`--backend` must be one of {BACKENDS}. Got {args.backend!r}; leave it out for the first")
    if args.backend == "openai" and not args.base_url:
        raise ValueError("`--backend openai` needs an endpoint. Pass `--base_url`, such as http://localhost:8000/v1")
    owners = {"base_url": "openai", "model": "openai", "engine_args": "vllm"}
    owners |= dict.fromkeys(("patient_load_in_4bit", "patient_load_in_8bit"), "transformers")
    for name, owner in owners.items():
        if getattr(args, name) and args.backend != owner:
            raise ValueError(
                f"`--{name}` belongs to `--backend {owner}`. Got it with {args.backend!r}; leave one of the two out"
            )
    if args.backend == "vllm" and args.world is not None:
        raise ValueError("The patient of `--world` is not for vLLM. Got `--backend vllm`; leave one of the two out")


def name_endpoint(base_url: str, model: str, num_requests: int) -> "Endpoint":
    """Return an endpoint, with the key of the environment."""
    from ..common.endpoint import Endpoint

    return Endpoint(base_url, model, api_key=os.environ.get(KEY) or None, num_requests=num_requests)


def name_scorer(args: "AnnotateArguments") -> "tuple[CompletionScorer, list[int]]":
    """Return the patient of an engine, and the ids that end its completions, from its generation config."""
    from transformers import GenerationConfig

    from ..annotation.backends import EndpointScorer, VllmScorer
    from .models import check_dtype

    eos_token_ids: list[int] = []
    if args.patient is not None:
        try:
            found = GenerationConfig.from_pretrained(args.patient).eos_token_id
            eos_token_ids = [x for x in (found if isinstance(found, list) else [found]) if x is not None]
        except OSError:  # many models have none
            pass
    if args.backend == "openai":
        model = args.model or args.patient or "world"
        return EndpointScorer(name_endpoint(str(args.base_url), model, args.num_requests)), eos_token_ids
    settings = {} if args.engine_args is None else read_object("--engine_args", args.engine_args)
    dtype = check_dtype(args.dtype)
    trust = {"trust_remote_code": True} if args.trust_remote_code else {}
    return VllmScorer(str(args.patient), **{"dtype": dtype, **trust, **settings}), eos_token_ids


def read_object(option: str, text: str) -> Mapping[str, object]:
    """Return a JSON object, or raise `ValueError`."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"`{option}` must be a JSON object. Got {text!r}; write for example '{{\"seed\": 0}}'")
    return value
