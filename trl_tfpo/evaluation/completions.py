# SPDX-License-Identifier: Apache-2.0

"""Sampling of completions, and their grouping by prompt."""

import math
import reprlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..common.arguments import check_counts
from ..common.language_model import unwrap_peft
from ..common.progress import Progress
from ..data.tokenization import all_eos_token_ids, tokenize_prompt
from ..decoding.generation import check_reads, guided_generate
from ..decoding.logits_processor import DoctorGuidedLogitsProcessor
from ..decoding.shared_forward import patient_adapters
from ..faces import Prompt
from ..models.trained_exponents import check_is_language_model


# Settings of the generation config that change the computation, not the policy
COMPUTATION_SETTINGS = ("use_cache", "cache_implementation", "cache_config", "compile_config", "disable_compile")
# Settings of `generate` that never change the policy
NEUTRAL_SETTINGS = {
    *("keep_memory", "speculative", "num_draft_tokens", "statistics", "synced_gpus", "prefill_chunk_size"),
    *COMPUTATION_SETTINGS,
}
# Settings of `generate` that do not change the policy at this value
NEUTRAL_VALUES: dict[str, float] = {
    **{"do_sample": True, "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1},
    **{"num_beams": 1, "num_return_sequences": 1, "length_penalty": 1, "no_repeat_ngram_size": 0},
}


@dataclass(frozen=True)
class Completion:
    """
    A sampled completion.

    Args:
        prompt (`str` or `list[dict]`):
            Text or messages of the prompt.
        prompt_ids (`list[int]`):
            Token ids of the prompt, as read by the patient.
        completion_ids (`list[int]`):
            Token ids of the completion, EOS included.
        text (`str`):
            The completion without special tokens.
        is_complete (`bool`):
            Whether the completion ends in EOS.
        seconds (`float`, *optional*):
            Generation time of the batch, divided by its number of completions. Ignored in comparisons.
        altered_by (`Mapping`, *optional*):
            Settings of `generate` that changed the policy, such as `{"top_k": 1}`. Ignored in comparisons.
    """

    prompt: Prompt
    prompt_ids: list[int]
    completion_ids: list[int]
    text: str
    is_complete: bool
    seconds: float | None = field(default=None, compare=False)
    altered_by: Mapping[str, object] = field(default_factory=dict, compare=False)


Completions = Sequence[Completion | str] | Sequence[Sequence[Completion | str]]  # of one seed, or of each seed
Grouped = list[list[list[Completion | str]]]  # by seed, prompt and sample


@torch.no_grad()
def generate_completions(
    patient: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt | list[int]],
    *,
    guide: DoctorGuidedLogitsProcessor | None = None,
    num_samples_per_prompt: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    **generate_kwargs: object,
) -> list[Completion]:
    """
    Sample completions from the patient, with or without guidance.

    By default these are samples of the unaltered policy: sampling settings, penalties and banned tokens in the
    generation config of the patient are ignored. The random state of the caller is preserved.

    Args:
        patient ([`~transformers.PreTrainedModel`]):
            A causal language model in eval mode.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (sequence of `str`, `list[dict]` or `list[int]`):
            Texts, conversations for the chat template, or token ids. `Completion.prompt` of token ids is their text.
        guide ([`DoctorGuidedLogitsProcessor`], *optional*):
            The guidance. `None` is the patient alone.
        num_samples_per_prompt (`int`, *optional*, defaults to `1`):
            Independent samples of each prompt.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum length of a completion, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature, or 0 for greedy search.
        batch_size (`int`, *optional*, defaults to `16`):
            Completions generated at once. The samples and their `seconds` depend on it.
        seed (`int`, *optional*, defaults to `0`):
            Random seed.
        **generate_kwargs:
            Other arguments of `patient.generate`. Completions record those that change the policy, such as `top_k`.

    Returns:
        `list[Completion]`: the samples of the first prompt, then those of the second, and so on.

    Raises:
        `ValueError`: when there is no prompt; a prompt has no tokens; a setting is out of range; the patient or a
            doctor is in training mode; the patient is a doctor of guided flow or has adapters that add tokens; an
            exponent of the guide is a tensor or a schedule; a doctor has its own `prompt`; or padding changes the
            logits of a model.
    """
    check_policy(patient, guide)
    if isinstance(prompts, str) or len(prompts) == 0 or num_samples_per_prompt < 1:
        raise ValueError(
            "`prompts` must be a sequence of at least one prompt, each sampled at least once. Got "
            f"{reprlib.repr(prompts)} and `num_samples_per_prompt` {num_samples_per_prompt}; pass a list."
        )
    check_counts(batch_size=batch_size)
    arguments: dict = generate_kwargs
    top_p = arguments.get("top_p", 1.0)
    if not (0 <= temperature < math.inf and 0 < top_p <= 1):
        raise ValueError(
            f"`temperature` must be at least 0, and `top_p` in (0, 1]. Got {temperature} and {top_p}; 0 is greedy "
            "search."
        )
    tokenized = [_tokenized(prompt, processing_class) for prompt in prompts]
    for prompt, prompt_ids in tokenized:
        if not prompt_ids:
            raise ValueError(f"A prompt must have at least one token. Got none for {prompt!r}; leave it out.")
    rows = [row for row in tokenized for _ in range(num_samples_per_prompt)]
    altered_by = altering_settings({"temperature": temperature, **generate_kwargs})
    eos_ids = all_eos_token_ids(processing_class, patient)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    settings = {
        **sampling,
        **{"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "max_new_tokens": max_new_tokens},
        "pad_token_id": next(x for x in (processing_class.pad_token_id, *eos_ids, 0) if x is not None),
        "eos_token_id": eos_ids or None,
        **generate_kwargs,
    }
    completions = []
    with (
        _without_generation_config(patient),
        torch.random.fork_rng(devices=[patient.device] if patient.device.type == "cuda" else []),
        Progress(len(rows), "Generating", "completions") as progress,
    ):
        torch.manual_seed(seed)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            generated, seconds = _generate_batch(patient, guide, [ids for _, ids in batch], settings)
            for (prompt, prompt_ids), ids in zip(batch, generated, strict=True):
                end = next((i + 1 for i, x in enumerate(ids) if x in eos_ids), None)
                text = str(processing_class.decode(ids[:end], skip_special_tokens=True))
                sample = Completion(prompt, prompt_ids, ids[:end], text, end is not None, seconds, altered_by)
                completions.append(sample)
            progress.update(len(batch))
    if guide is not None:
        guide.reset()
    return completions


def _tokenized(prompt: Prompt | list[int], processing_class: PreTrainedTokenizerBase) -> tuple[Prompt, list[int]]:
    """Return a prompt as text or messages, and its token ids."""
    if isinstance(prompt, list) and prompt and all(isinstance(x, int) for x in prompt):
        ids = cast(list[int], prompt)
        return str(processing_class.decode(ids)), ids
    prompt = cast(Prompt, prompt)
    return prompt, tokenize_prompt(prompt, processing_class)


def _generate_batch(
    patient: PreTrainedModel,
    guide: DoctorGuidedLogitsProcessor | None,
    prompts: list[list[int]],
    settings: dict,
) -> tuple[list[list[int]], float]:
    """Generate one completion per prompt. Returns padded ids, and the seconds per completion."""
    generate: Callable = patient.generate if guide is None else partial(guided_generate, patient, guide)  # type: ignore[assignment]
    ids, mask = pad(prompts, padding_side="left", device=patient.device)
    if guide is None:
        check_reads(patient, mask)
    start = time.perf_counter()
    output = generate(input_ids=ids.masked_fill(mask == 0, settings["pad_token_id"]), attention_mask=mask, **settings)
    generated = output[:, ids.size(1) :].tolist()  # waits for the accelerator
    return generated, (time.perf_counter() - start) / len(prompts)


def altering_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """
    Select the settings of `generate` that change the policy. Unknown settings count as changes.

    Examples:

    ```python
    >>> from trl_tfpo.evaluation.completions import altering_settings
    >>> altering_settings({"top_p": 1.0, "top_k": 50, "use_cache": False, "min_p": None})
    {'top_k': 50}

    ```
    """
    return {
        name: value
        for name, value in settings.items()
        if name not in NEUTRAL_SETTINGS and value is not None and value != NEUTRAL_VALUES.get(name)
    }


@contextmanager
def _without_generation_config(patient: PreTrainedModel) -> Iterator[None]:
    """Context manager that keeps only computation settings in the generation config of the patient."""
    base = unwrap_peft(patient)
    config = base.generation_config
    base.generation_config = GenerationConfig(**{name: getattr(config, name, None) for name in COMPUTATION_SETTINGS})
    try:
        yield
    finally:
        base.generation_config = config


def group_by_prompt(prompts: Sequence[Prompt], completions: Completions) -> Grouped:
    """
    Group completions by seed, prompt and sample.

    `completions` has the samples of the first prompt, then those of the second, and so on, or one such sequence per
    seed. Raises `ValueError` when there is no completion, prompts have different numbers of samples, or a completion
    belongs to another prompt.
    """
    seeds: list[list[Completion | str]] = []
    for item in completions:
        if isinstance(item, (Completion, str)):
            seeds = seeds or [[]]
            seeds[0].append(item)
        else:
            seeds.append(list(item))
    counts = sorted({len(seed) for seed in seeds})
    if len(prompts) == 0 or len(counts) != 1 or counts[0] == 0 or counts[0] % len(prompts):
        raise ValueError(
            f"All prompts and seeds must have the same number of completions. Got {counts or 'no'} completions for "
            f"{len(prompts)} prompts; pass them in the order of `generate_completions`."
        )
    num = counts[0] // len(prompts)
    grouped = [[seed[i * num : (i + 1) * num] for i in range(len(prompts))] for seed in seeds]
    for of_seed in grouped:
        for prompt, samples in zip(prompts, of_seed, strict=True):
            if any(isinstance(sample, Completion) and sample.prompt != prompt for sample in samples):
                raise ValueError(
                    "Completions must be in the order of the prompts. Got a completion of another prompt for "
                    f"{prompt!r}; pass the prompts used for generation."
                )
    return grouped


def text_of(completion: Completion | str) -> str:
    """Return the text of a `Completion`, or the string itself."""
    return completion if isinstance(completion, str) else completion.text


def pad(rows: Sequence[list[int]], *, padding_side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows of ids to the same length. Returns ids and mask, (B, L) each."""
    ids = [torch.tensor(row) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    padded = [pad_sequence(x, batch_first=True, padding_side=padding_side).to(device) for x in (ids, mask)]
    return padded[0], padded[1]


def check_policy(patient: PreTrainedModel, guide: DoctorGuidedLogitsProcessor | None) -> None:
    """Raise `ValueError` unless patient and guide can be evaluated as one policy."""
    doctors = guide.doctors if guide else []
    check_is_language_model(patient, patient_adapters(patient, guide) if guide else None)
    if any(model.training for model in (patient, *(doctor.model for doctor in doctors))):
        raise ValueError(
            "Patient and doctors must be in eval mode, because dropout is random. Got training mode; call `.eval()`."
        )
    if guide and not all(isinstance(weight, float) for weight in (guide.alpha, *guide.betas)):
        raise ValueError(
            "`alpha` and `beta` must be numbers in an evaluation. Got a tensor or a schedule; evaluate "
            "one strength at a time."
        )
    if any(doctor.prompt is not None for doctor in doctors):
        raise ValueError(
            "Doctors must read the prompts of the evaluation. Got a doctor with its own `prompt`; leave it out."
        )
