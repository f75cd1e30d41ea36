# SPDX-License-Identifier: Apache-2.0

"""Measurement of the KL from the patient at several strengths of a doctor."""

from collections.abc import Sequence

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common.language_model import LanguageModel
from ..data.tokenizer_identity import tokenizer_fingerprint
from ..decoding.doctors import Doctor
from ..decoding.logits_processor import DoctorGuidedLogitsProcessor
from ..faces import Prompt
from ..models.fingerprint import patient_fingerprint
from ..models.strengths import Strength, StrengthTable
from .bootstrap import mean_with_interval
from .completions import generate_completions
from .reward_and_kl import next_token_statistics


GUIDED_FLOW_STRENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0)  # of doctors whose trained exponent is 1
MIXTURE_STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)  # of language models; at 1 the patient has no part


def measure_strengths(
    patient: PreTrainedModel,
    doctor: "LanguageModel | Doctor",
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt | list[int]],
    *,
    strengths: Sequence[float] | None = None,
    num_samples_per_prompt: int = 4,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    seed: int = 0,
) -> StrengthTable:
    """
    Measure the KL from the patient at several exponents of a doctor. No reward is needed.

    At each exponent the guided patient generates completions, always with the same seed. Estimates from
    samples of the unguided patient, with importance weights, would be unreliable at large KL. The exponent of the
    patient is the default of [`DoctorGuidedLogitsProcessor`].

    Args:
        patient ([`~transformers.PreTrainedModel`]):
            The patient, in eval mode.
        doctor ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or [`Doctor`]):
            The doctor, in eval mode.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of both.
        prompts (sequence of `str`, `list[dict]` or `list[int]`):
            Validation prompts: texts, conversations, or token ids. Do not use the prompts of the final evaluation.
        strengths (sequence of `float`, *optional*):
            Exponents of the doctor, above 0 and ascending. Defaults to 0.125, 0.25, 0.5, 1 and 2 times the trained
            exponent for a doctor of guided flow, and to 0.2, 0.4, 0.6, 0.8 and 1 for a language model.
        num_samples_per_prompt (`int`, *optional*, defaults to `4`):
            Completions of each prompt at each exponent.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum length of a completion. The KL grows with the length: use the length of the application.
        batch_size (`int`, *optional*, defaults to `16`):
            Completions per batch.
        seed (`int`, *optional*, defaults to `0`):
            Random seed.

    Returns:
        [`~trl_tfpo.models.strengths.StrengthTable`]: the KLs. `table.save(folder)` writes them to the folder of the
        doctor.

    Raises:
        `ValueError`: if exponents are not positive and ascending, or exceed 1 for a language model; on errors of
            [`generate_completions`].

    Examples:

    ```python
    >>> from trl_tfpo.evaluation import measure_strengths
    >>> from trl_tfpo.testbed import load_world
    >>> world = load_world()
    >>> prompts = world.prompts("validation")[:2]
    >>> table = measure_strengths(
    ...     world.patient, world.doctor, world.tokenizer, prompts, strengths=[0.2, 0.4], max_new_tokens=8
    ... )
    >>> 0 < table.beta_at(table.rows[0].kl / 4) < 0.2
    True

    ```
    """
    one = doctor if isinstance(doctor, Doctor) else Doctor(doctor)
    exponents = one.exponents
    if strengths is None:
        trained = exponents.get("beta", 1.0)
        strengths = [trained * x for x in (GUIDED_FLOW_STRENGTHS if exponents else MIXTURE_STRENGTHS)]
    betas = [float(x) for x in strengths]
    if not betas or not all(low < high for low, high in zip([0.0, *betas], betas, strict=False)):
        raise ValueError(
            f"`strengths` must be exponents above 0, in ascending order. Got {list(strengths)}; sort them, without 0."
        )
    guides = [DoctorGuidedLogitsProcessor(one, beta=beta) for beta in betas]  # refused before anything is sampled
    rows = []
    for beta, guide in zip(betas, guides, strict=True):
        completions = generate_completions(
            patient,
            processing_class,
            prompts,
            guide=guide,
            num_samples_per_prompt=num_samples_per_prompt,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
        )
        kls = next_token_statistics(patient, guide, completions, batch_size=batch_size)["kl"]
        lengths = torch.tensor([float(len(completion.completion_ids)) for completion in completions])
        found = mean_with_interval(kls.view(1, len(prompts), -1))
        low, high = (None if x is None else _rounded(x) for x in (found["low"], found["high"]))
        rows.append(Strength(beta, _rounded(kls.mean().item()), low, high, round(lengths.mean().item(), 1)))
    return StrengthTable(
        rows=tuple(rows),
        alpha=1.0 if exponents else None,
        patient=patient.config._name_or_path,
        patient_fingerprint=patient_fingerprint(patient),
        tokenizer=tokenizer_fingerprint(processing_class),
        num_prompts=len(prompts),
        num_samples_per_prompt=num_samples_per_prompt,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )


def different_prompts(dataset: Dataset | IterableDataset, num_prompts: int) -> list[list[int]]:
    """Token ids of up to `num_prompts` different prompts, from the start of a dataset with the column `prompt_ids`."""
    found: dict[tuple[int, ...], None] = {}
    for row in dataset.select_columns(["prompt_ids"]):
        found[tuple(row["prompt_ids"])] = None
        if len(found) == num_prompts:
            break
    return [list(ids) for ids in found]


def _rounded(kl: float) -> float:
    """Round to the digits that the model card shows, so that its largest KL can be chosen."""
    return float(f"{kl:.4g}")
