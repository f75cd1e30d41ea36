# SPDX-License-Identifier: Apache-2.0

"""Methods at an endpoint, for `trl-tfpo evaluate`. A method is a set of exponents."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import options
from .engines import name_endpoint


if TYPE_CHECKING:
    import torch

    from ..evaluation.completions import Completion


@dataclass
class EndpointArguments:
    """Options of `trl-tfpo evaluate` about an endpoint."""

    base_url: str | None = field(default=None, metadata=options.BASE_URL)
    model: str | None = field(default=None, metadata=options.MODEL)
    patient: str | None = field(
        default=None, metadata={"help": "With --base_url: the patient's tokenizer, a Hub name or a folder."}
    )
    method: list[str] = field(
        default_factory=list,
        metadata={
            "action": options.Repeated,
            "help": "With --base_url: methods to sample, NAME=DOCTOR:WEIGHT,DOCTOR:WEIGHT. `alpha:X` sets the "
            "exponent of the patient; other doctors have 0. NAME alone is the patient.",
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "With --base_url: dataset with prompts in a column `prompt`."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of this dataset."})
    num_samples_per_prompt: int = field(default=1, metadata={"help": "With --base_url: completions of each prompt."})
    max_new_tokens: int = field(default=256, metadata={"help": "Maximum length of these completions, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of these completions. 0 is greedy search."})
    num_requests: int = field(default=32, metadata=options.NUM_REQUESTS)


def check_endpoint(args: EndpointArguments, *, has_completions: bool) -> None:
    """Raise `ValueError` if there are neither completions nor an endpoint, or its options are incomplete."""
    if args.base_url is None:
        given = [name for name in ("model", "patient", "method", "dataset_name") if getattr(args, name)]
        if given:
            raise ValueError(f"`--{given[0]}` is for an endpoint. Got it without `--base_url`; pass both")
        if not has_completions:
            raise ValueError("`evaluate` needs completions. Pass `--completions`, or `--base_url` and `--method`")
    elif not args.method:
        raise ValueError("An endpoint needs methods to sample. Pass, for example, `--method patient mild=helpful:0.2`")


def sample_methods(
    args: EndpointArguments, prompts: Sequence[str], *, is_world: bool, seed: int
) -> "tuple[dict[str, list[Completion]], dict[str, dict[str, torch.Tensor]]]":
    """
    Return completions and measures of each method of an endpoint.

    `prompts` are JSON texts. If there are none, the options name their source. With `is_world`, tokenizer and prompts
    are those of the controlled world, unless options name others.
    """
    if args.base_url is None:
        return {}, {}
    from ..evaluation import endpoint_completions
    from .generate import GenerateArguments, read_prompts

    is_world = is_world and args.patient is None
    if is_world:
        from ..testbed import load_world

        tokenizer = load_world().tokenizer
    elif args.patient is None:
        raise ValueError("Prompts are sent as token ids. Pass the patient's tokenizer with `--patient`")
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.patient, trust_remote_code=False)
    known = [json.loads(prompt) for prompt in prompts]
    if not known:
        source = GenerateArguments(
            world=is_world and args.dataset_name is None,
            dataset_name=args.dataset_name,
            dataset_split=args.dataset_split,
        )
        known = read_prompts(source, tokenizer)
    endpoint = name_endpoint(args.base_url, args.model or args.patient or "world", args.num_requests)
    sampled, measures = {}, {}
    for name, (weights, alpha) in read_exponents(args.method).items():
        sampled[name], measures[name] = endpoint_completions(
            endpoint,
            tokenizer,
            known,
            weights=weights,
            alpha=alpha,
            num_samples_per_prompt=args.num_samples_per_prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=seed,
        )
    return sampled, measures


def read_exponents(given: Sequence[str]) -> dict[str, tuple[dict[str, float], float | None]]:
    """Parse methods NAME or NAME=DOCTOR:WEIGHT,... and return exponents of doctors and of the patient, by method."""
    from .serve import read_aliases

    methods: dict[str, tuple[dict[str, float], float | None]] = {}
    for text in given:
        name, _, pairs = text.partition("=")
        try:
            weights = read_aliases([text])[name] if pairs else {}
        except ValueError:
            weights = {"": 0.0}
        if not name or name in methods or "" in weights:
            raise ValueError(
                "`--method` must be NAME or NAME=DOCTOR:WEIGHT,DOCTOR:WEIGHT, each name and each doctor once. Got "
                f"{text!r}; write for example `mild=helpful:0.2`"
            )
        alpha = weights.pop("alpha", None)
        methods[name] = weights, alpha
    return methods


def grouped_texts(completions: "Sequence[Completion]") -> dict[str, list[str]]:
    """Group the texts of completions by their prompts, which become JSON texts."""
    grouped: dict[str, list[str]] = {}
    for completion in completions:
        grouped.setdefault(json.dumps(completion.prompt), []).append(completion.text)
    return grouped
