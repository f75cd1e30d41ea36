# SPDX-License-Identifier: Apache-2.0

"""
Completions and log-likelihoods of a guided policy at an endpoint: `trl-tfpo serve`, or vLLM with the plugin.

Units: nats.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..annotation.backends import EndpointScorer
from ..common.arguments import check_counts
from ..common.endpoint import Endpoint
from ..common.progress import Progress
from ..data.tokenization import tokenize_prompt
from ..faces import Prompt
from .completions import Completion, altering_settings
from .reward_and_kl import sampled_kl


# The endpoint may have other defaults, from the generation config of the model
WHOLE_POLICY = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
WHOLE_POLICY |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}


def endpoint_completions(
    endpoint: Endpoint,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    weights: Mapping[str, float] | None = None,
    alpha: float | None = None,
    num_samples_per_prompt: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
) -> tuple[list[Completion], dict[str, torch.Tensor]]:
    """
    Sample completions from a guided policy at an endpoint, and measure their log-likelihood.

    Prompts are tokenized here and sent as token ids. Each sample has its own request and its own seed. Another engine
    gives other samples for the same seed.

    Args:
        endpoint ([`~trl_tfpo.common.endpoint.Endpoint`]):
            `trl-tfpo serve`, or vLLM, which needs `trl-tfpo-vllm` for doctors.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The patient's tokenizer.
        prompts (sequence of `str` or `list[dict]`):
            Texts, or conversations for the chat template.
        weights (`Mapping[str, float]`, *optional*):
            Exponents of doctors, by name. The other doctors of the endpoint have 0. By default the patient is alone.
        alpha (`float`, *optional*):
            Exponent of the patient. By default that of the endpoint, and 1 for the patient alone.
        num_samples_per_prompt (`int`, *optional*, defaults to `1`):
            Independent samples of each prompt.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum length of a completion, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the samples; 0 is greedy search.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the first sample. Sample i has the seed `seed + i`.

    Returns:
        `tuple`: the completions, the samples of the first prompt first; and measures of shape `(N,)` for
        [`evaluate_completions`]: `log_likelihood`, the log-probability of each completion under its policy at
        temperature 1, whatever `temperature` is; and `kl`, as in [`sampled_kl`], if `temperature` is 1.

    Raises:
        `ValueError`: if there is no prompt; if a setting is out of range; if the endpoint lacks the model or a doctor,
            or refuses a request; if `alpha` is not 1 at an endpoint that cannot guide; if an answer has no token ids
            or no finite log-probabilities.
        `ConnectionError`: if the endpoint does not answer.
    """
    if isinstance(prompts, str) or len(prompts) == 0 or not 0 <= temperature < math.inf:
        given = "a text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(
            "There must be a sequence of at least one prompt, and a temperature of at least 0. Got "
            f"{given} and {temperature}; pass a list, and 1 for samples of the policy itself."
        )
    check_counts(num_samples_per_prompt=num_samples_per_prompt, max_new_tokens=max_new_tokens)
    rows = [(x, tokenize_prompt(x, processing_class)) for x in prompts for _ in range(num_samples_per_prompt)]
    settings = {"model": endpoint.model, "max_tokens": max_new_tokens, "temperature": temperature}
    settings |= {"logprobs": 0, "return_token_ids": True, **WHOLE_POLICY, **endpoint.policy(weights, alpha)}
    requests = [{**settings, "prompt": ids, "seed": seed + index} for index, (_, ids) in enumerate(rows)]
    altered_by = altering_settings({"temperature": temperature})
    found: dict[int, tuple[Completion, torch.Tensor]] = {}
    with Progress(len(rows), "Generating", "completions") as progress:
        for index, reply in endpoint.send_all("/completions", requests):
            prompt, prompt_ids = rows[index]
            ids, found_logps, is_complete = _read(reply, prompt_ids, endpoint)
            text = str(processing_class.decode(ids, skip_special_tokens=True))
            sample = Completion(prompt, prompt_ids, ids, text, is_complete, altered_by=altered_by)
            found[index] = sample, torch.tensor(found_logps, dtype=torch.float64)
            progress.update(1)
    completions = [found[index][0] for index in range(len(rows))]
    logps = [found[index][1] for index in range(len(rows))]
    measures = {"log_likelihood": torch.stack([x.sum() for x in logps])}
    if temperature == 1:
        measures["kl"] = sampled_kl(logps, _patient_logps(endpoint, completions))
    return completions, measures


def _patient_logps(endpoint: Endpoint, completions: Sequence[Completion]) -> list[torch.Tensor]:
    """Log-probabilities (T,) of completions under the patient alone."""
    with Progress(len(completions), "Scoring", "completions") as progress:
        return EndpointScorer(endpoint).score_completions(
            [completion.prompt_ids for completion in completions],
            [completion.completion_ids for completion in completions],
            on_progress=lambda share: progress.update(share * len(completions)),
        )


def _read(reply: dict[str, Any], prompt_ids: list[int], endpoint: Endpoint) -> tuple[list[int], list[float], bool]:
    """Return ids and log-probabilities of a completion, and whether it is complete, or raise `ValueError`."""
    try:
        (choice,) = reply["choices"]
        ids, logps = list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"])
        is_usable = choice["prompt_token_ids"] == prompt_ids and len(ids) == len(logps) > 0
        is_usable = is_usable and all(isinstance(x, float) and math.isfinite(x) for x in logps)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{endpoint.base_url} must return token ids (`return_token_ids`) and `logprobs`. Got an answer without "
            f"them ({type(error).__name__}: {error}); use `trl-tfpo serve` or vLLM."
        ) from error
    if not is_usable:
        raise ValueError(
            f"{endpoint.base_url} must complete the prompt that was sent, with a finite log-probability for each "
            f"token. Got {len(ids)} tokens and {len(logps)} log-probabilities after a prompt of "
            f"{len(choice['prompt_token_ids'])} tokens; use `trl-tfpo serve` or vLLM."
        )
    return ids, logps, choice["finish_reason"] == "stop"
