# SPDX-License-Identifier: Apache-2.0

r"""
Guided decoding: a logits processor through which doctors guide `patient.generate(...)`.

`generate` passes only the ids and the patient's scores to a processor. It passes no mask and no indices of reordered
beams, and does not announce a new generation. The doctors' logits are therefore a function of the tokens alone, and
their KV caches are addressed by tokens, see [`DoctorMemory`].

Shapes: B rows, L tokens so far (padding included), T generated tokens, V vocabulary. Units: nats.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import CompileConfig, LogitsProcessor, PreTrainedTokenizerBase

from ..common.language_model import LanguageModel
from ..data.tokenizer_identity import check_all_same
from ..functional import guided_logps, next_token_entropy, plausible_mask
from ..models.strengths import StrengthTable, beta_for_kl
from .checks import check_counts, check_settings
from .doctors import Doctor, DoctorMemory, check_reference
from .exponents import (
    DEFAULT_BETA,
    Exponent,
    Number,
    check_exponent,
    default_beta,
    exponent_at,
    opposite_exponent,
    remaining_exponent,
)
from .loading import load_guiding_doctor
from .padding import Prompts
from .trace import GuidanceTrace, TraceRecorder


MIN_DRAFT_WEIGHT = 1e-6  # replaces smaller and negative exponents in a draft


class DoctorGuidedLogitsProcessor(LogitsProcessor):
    r"""
    Logits processor that multiplies the patient's next-token distribution by those of doctors: $\pi \propto
    \pi_{\text{patient}}^\alpha \prod_i \pi_{\text{doctor}_i}^{\beta_i}$.

    It supports greedy search, sampling, beams, `num_return_sequences` and assisted decoding, in any number of
    consecutive `generate` calls. Each doctor reads each token once. The processor runs after the repetition penalty
    and processors that ban tokens. Temperature, top-k and top-p act on the guided distribution.

    Args:
        doctor ([`~transformers.PreTrainedModel`] or [`Doctor`], or list of them):
            Causal language models with the patient's tokenizer, in eval mode. A PEFT model is used with its active
            adapter. A [`Doctor`] may name another adapter, and have prompts of its own.
        alpha (`float`, `torch.Tensor` of shape `(B,)` or callable, *optional*):
            Exponent of the patient. The default is 1 minus the exponents of the doctors, so that all exponents add up
            to 1 (the *mixture*). Exponents of doctors with a `reference` (the *ratio*) and of doctors of guided flow
            are not subtracted. The *product* of the paper is `alpha=1`.
        beta (`float`, `torch.Tensor` of shape `(B,)` or callable, or list of them, *optional*, defaults to `0.5`):
            One exponent for all doctors, or a list with one for each doctor. A doctor does not run where its exponent
            is the number 0. A negative exponent guides away from the doctor. A tensor has one number for each prompt
            of the batch. A callable is a schedule: it maps the number of tokens since the prompt to a number or a
            tensor.
        reference ([`~transformers.PreTrainedModel`] or [`Doctor`], or list of them, *optional*):
            The doctor before training, or a list with one for each doctor (`None` for none). Its exponent is `-beta`.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
            Mask of the prompts, as given to `generate`. Pass the mask of a later batch to [`reset`]. Without a mask,
            leading padding ids count as padding. This is a guess if the padding id is also BOS or EOS.
        processing_classes (sequence of [`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizers to compare: those of the patient, each doctor and each reference. They must be the same.
        min_patient_prob (`float`, *optional*, defaults to `0.0`):
            Fraction in [0, 1]. Tokens whose probability under the patient is below this fraction of the largest
            probability are ruled out, see [`~functional.plausible_mask`]. 0 rules out none.
        min_patient_entropy (`float`, *optional*, defaults to `0.0`):
            Threshold in nats. If the entropy of the patient's distribution is lower, the doctors have no effect on
            the next token. If it is lower in all rows of a batch, the doctors do not run at this step.
        return_trace (`bool`, *optional*, defaults to `False`):
            Whether to keep the log-probabilities of generated tokens for [`~DoctorGuidedLogitsProcessor.trace`]. Not
            supported with beams.
        cache_implementation (`str`, *optional*):
            `"static"`: the doctors have KV caches of fixed shape, and a compiled forward pass reads each token, as in
            `generate` with this argument. By default the caches grow. In [`guided_generate`] they are also static if
            the patient's cache is.
        compile_config ([`~transformers.CompileConfig`], *optional*):
            Settings of the compiler, for static caches. Without them, doctors are compiled on accelerators only.

    Attributes:
        alpha (`float`, `torch.Tensor` or callable): exponent of the patient.
        doctors (`list` of [`Doctor`]): the doctors, then their references.
        betas (`list`): exponent of each of `doctors`.
        num_references (`int`): number of references in `doctors`.
        memories (`list` of [`DoctorMemory`]): KV cache of each of `doctors`.
        num_calls (`int`): number of calls of the processor.
        strengths ([`~trl_tfpo.models.strengths.StrengthTable`], *optional*): table by which `from_pretrained`
            chose `beta` for its argument `kl`.

    Raises:
        `ValueError`: at construction, on a wrong number of exponents or references, exponents that are not finite, a
            mixture with a negative `alpha`, thresholds out of range, doctors that [`Doctor`] refuses, a language model
            as `reference` of a doctor of guided flow, a doctor as its own `reference`, a missing `alpha` if a doctor
            of guided flow has no record of its exponents, different tokenizers, a mask that is not left-padded, and
            an unknown `cache_implementation`. At a call, on prompts that do not match the mask, `inputs_embeds`
            without ids, a tensor of exponents or a doctor's `prompt` without one entry for each prompt, invalid values
            of a schedule, padding that changes a doctor's logits, too many tokens for a doctor, ids unknown to a
            doctor, and NaN.

    Examples:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from trl_tfpo.decoding.logits_processor import DoctorGuidedLogitsProcessor
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> config = LlamaConfig(vocab_size=11, pad_token_id=0, **sizes)
    >>> patient, doctor = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    >>> ids, mask = torch.tensor([[0, 3, 4], [5, 6, 7]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    >>> guide = DoctorGuidedLogitsProcessor(doctor, alpha=1.0, beta=0.5, attention_mask=mask)
    >>> patient.generate(
    ...     input_ids=ids, attention_mask=mask, logits_processor=[guide], max_new_tokens=4, eos_token_id=None
    ... ).shape
    torch.Size([2, 7])

    ```
    """

    supports_continuous_batching = False  # it passes the last token only, and mixes requests in one row

    def __init__(
        self,
        doctor: "LanguageModel | Doctor | Sequence[LanguageModel | Doctor]",
        alpha: Exponent | None = None,
        beta: Exponent | Sequence[Exponent] = DEFAULT_BETA,
        *,
        reference: "LanguageModel | Doctor | Sequence[LanguageModel | Doctor | None] | None" = None,
        attention_mask: torch.Tensor | None = None,
        processing_classes: Sequence[PreTrainedTokenizerBase] | None = None,
        min_patient_prob: float = 0.0,
        min_patient_entropy: float = 0.0,
        return_trace: bool = False,
        cache_implementation: str | None = None,
        compile_config: CompileConfig | None = None,
    ):
        models = _as_list(doctor)
        betas, references = _as_list(beta, len(models)), _as_list(reference, len(models))
        check_counts(len(models), len(betas), len(references))
        doctors = [x if isinstance(x, Doctor) else Doctor(x) for x in models]
        references = [x if x is None or isinstance(x, Doctor) else Doctor(x) for x in references]
        for one, ref in zip(doctors, references, strict=True):
            check_reference(one, ref)
        betas = [check_exponent("beta", beta) for beta in betas]
        if alpha is None:
            rows = zip(doctors, betas, references, strict=True)
            alpha = remaining_exponent([beta for one, beta, ref in rows if ref is None and not one.exponents])
        check_settings(min_patient_prob, min_patient_entropy, cache_implementation)
        opposite = [opposite_exponent(beta) for beta, ref in zip(betas, references, strict=True) if ref is not None]
        self.alpha = check_exponent("alpha", alpha)
        self.betas: list[Exponent] = betas + opposite
        self.doctors: list[Doctor] = doctors + [ref for ref in references if ref is not None]
        self.num_references = len(self.doctors) - len(doctors)
        self.min_patient_prob = min_patient_prob
        self.min_patient_entropy = min_patient_entropy
        self.num_calls = 0
        self.strengths: StrengthTable | None = None
        if processing_classes is not None:
            check_all_same(processing_classes, len(doctors), self.num_references)
        self._has_same_tokenizer = processing_classes is not None
        self._warned: set[str] = set()
        self._trace = TraceRecorder() if return_trace else None
        self.cache_implementation, self.compile_config = cache_implementation, compile_config
        self.memories = [DoctorMemory(doctor) for doctor in self.doctors]
        self.use_caches(cache_implementation, compile_config)
        self._external: Mapping[int, Callable[[torch.Tensor], torch.Tensor]] = {}  # by index of `doctors`
        self._num_read: int | None = None  # tokens of the last call, in `appended_tokens`
        self._num_common_tokens = min(memory.num_embeddings for memory in self.memories)
        self.reset(attention_mask)

    @classmethod
    def from_pretrained(
        cls,
        doctor: str | os.PathLike | Sequence[str],
        alpha: Exponent | None = None,
        beta: Exponent | Sequence[Exponent] | None = None,
        *,
        kl: float | None = None,
        model_init_kwargs: dict | None = None,
        **settings: object,
    ) -> "DoctorGuidedLogitsProcessor":
        """
        Make a processor with saved doctors and the exponents of their training.

        Args:
            doctor (`str` or sequence of `str`):
                Folders or Hub ids of doctors that [`TFPOTrainer`] saved.
            alpha, beta (*optional*):
                Exponents, as above. By default `beta` is 1 for doctors of guided flow, as in their training, and 0.5
                for language models.
            kl (`float`, *optional*):
                Strength of a single doctor by its KL from the patient, in nats per completion, instead of exponents.
                The doctor needs a table from [`~trl_tfpo.evaluation.measure_strengths`]. The KL holds for the patient,
                prompts and length of that table, at temperature 1.
            model_init_kwargs (`dict`, *optional*):
                Keyword arguments of the doctors' `from_pretrained`, such as `dtype` and `device_map`.
            settings:
                Further arguments of the processor.

        Returns:
            [`DoctorGuidedLogitsProcessor`]: the processor, with its doctors in eval mode.

        Raises:
            `ValueError`: if `kl` is out of range, or comes with several doctors, a doctor without a table, exponents
                or other settings of the policy. Also on errors of [`load_doctor`] and of the constructor.
        """
        names = [doctor] if isinstance(doctor, (str, os.PathLike)) else list(doctor)
        load, table = model_init_kwargs or {}, None
        if kl is not None:
            beta, table = beta_for_kl(names, kl, {"alpha": alpha, "beta": beta, **settings}, **load)
        doctors = [load_guiding_doctor(name, **load) for name in names]
        if beta is None:
            beta = [default_beta(doctor.exponents) for doctor in doctors]
        arguments: dict = settings
        guide = cls(doctors, alpha, beta, **arguments)
        guide.strengths = table
        return guide

    def reset(self, attention_mask: torch.Tensor | None = None, *, keep_memory: bool = False) -> None:
        """
        Prepare for other prompts.

        Args:
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
                Mask of the next prompts. Without a mask, padding is guessed from the ids.
            keep_memory (`bool`, *optional*, defaults to `False`):
                Whether to keep the caches of the doctors, for prompts that continue the generated texts.

        Raises:
            `ValueError`: when the mask is not left-padded.
        """
        self._prompts = Prompts(self.doctors[0].model, attention_mask)
        if self._trace:
            self._trace.restart()
        if not keep_memory:
            self._forget()

    def use_caches(
        self, implementation: str | None, compile_config: CompileConfig | None = None, disable_compile: bool = False
    ) -> None:
        """
        Choose static (`"static"`) or growing caches (any other value), see [`DoctorMemory.use_static_cache`].
        """
        for memory in self.memories:
            memory.use_static_cache(implementation == "static", compile_config, disable_compile)

    def _forget(self) -> None:
        for memory in self.memories:
            memory.forget()

    @contextmanager
    def external_logits(self, sources: Mapping[int, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
        """
        Within the context, replace the forward passes of some doctors.

        Args:
            sources (mapping from `int` to callable):
                Functions, by index of `doctors`. Each call of the processor calls each of them at most once. They map
                the tokens `(B, L)` to the doctor's next-token logits `(B, V)`.
        """
        before, self._external = self._external, sources
        try:
            yield
        finally:
            self._external = before

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """Within the context, calls are not recorded in the trace."""
        before, self._trace = self._trace, None
        try:
            yield
        finally:
            self._trace = before

    @contextmanager
    def appended_tokens(self) -> Iterator[None]:
        """
        Within the context, each call must have the rows of the previous call, with one more token each.

        This holds for greedy search and sampling. The ids are then not compared with those of the previous call. On an
        accelerator each comparison would wait for the patient's forward pass.
        """
        self._num_read = 0
        try:
            yield
        finally:
            self._num_read = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """
        Compute the log-probabilities of the guided policy.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Prompts and completions so far.
            scores (`torch.FloatTensor` of shape `(B, V)`):
                Logits or log-probabilities of the patient. Not modified.

        Returns:
            `torch.FloatTensor` of shape `(B, V)`: log-probabilities in nats, float64 for float64 scores, else float32.
        """
        self.num_calls += 1
        is_next = self._num_read not in (None, 0) and input_ids.size(1) - 1 == self._num_read
        tokens = self._tokens(input_ids, is_next)
        doctor_logits: list[torch.Tensor | None]
        if self.min_patient_entropy and self._is_confident(scores).all():
            doctor_logits = [None] * len(self.doctors)
            guided = self._only_common(_float(scores)).log_softmax(dim=-1)
        else:
            doctor_logits = self._doctor_logits(tokens, scores.size(-1), is_next)
            guided = self.combine(scores, doctor_logits, self._step(tokens))
        if self._num_read is not None:
            self._num_read = input_ids.size(1)
        if self._trace:
            self._trace.record(input_ids, scores, doctor_logits, guided)
        return guided

    def trace(self, sequences: torch.Tensor) -> GuidanceTrace:
        """
        Return the log-probabilities of the tokens of the last generation.

        Args:
            sequences (`torch.LongTensor` of shape `(B, L + T)`):
                The output of `generate`.

        Raises:
            `ValueError`: when the processor was made without `return_trace=True`, or `sequences` are the output of
                another generation.
        """
        if self._trace is None:
            raise ValueError("A trace must be recorded. Got none; make the processor with `return_trace=True`.")
        return self._trace.finish(sequences)

    @torch.no_grad()
    def draft_logits(self, input_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """
        Approximate the patient's logits by the mean (B, V) of the doctors' logits, weighted by their exponents.

        Called with these logits, the processor approximates the guided policy. `input_ids` have shape (B, L), and
        `vocab_size` is V.
        """
        tokens = self._tokens(input_ids)
        step = self._step(tokens)
        total = torch.zeros(len(tokens), vocab_size, device=input_ids.device)
        total_weight: Number = 0.0
        for logits, beta in zip(self._doctor_logits(tokens, vocab_size), self.betas, strict=True):
            if logits is not None:
                weight = torch.as_tensor(self._per_row(exponent_at(beta, step), total))
                weight = weight.clamp(min=MIN_DRAFT_WEIGHT).to(total)
                total = total + weight * self._over_patient_tokens(logits, total)
                total_weight = total_weight + weight
        return total / total_weight if isinstance(total_weight, torch.Tensor) else total

    def combine(
        self, patient_logits: torch.Tensor, doctor_logits: Sequence[torch.Tensor | None], step: int = 0
    ) -> torch.Tensor:
        """
        Compute the log-probabilities of the guided policy from the logits of patient and doctors.

        Args:
            patient_logits (`torch.Tensor` of shape `(B, V)`):
                Logits or log-probabilities of the patient.
            doctor_logits (sequence of `torch.Tensor` of shape `(B, V')`):
                Logits or log-probabilities of each of `doctors`; `None` where the exponent is 0. V' may differ from V
                by padding of the vocabulary.
            step (`int`, *optional*, defaults to `0`):
                Number of tokens since the prompt, for schedules of exponents.

        Returns:
            `torch.Tensor` of shape `(B, V)`: log-probabilities in nats, float64 for a float64 patient, else float32.

        Raises:
            `ValueError`: on NaN, or when no token has a positive probability under all models.
        """
        patient_logits = logits = self._only_common(_float(patient_logits))
        if self.min_patient_prob:
            plausible = plausible_mask(patient_logits=logits, min_patient_prob=self.min_patient_prob)
            logits = logits.masked_fill(~plausible, -math.inf)
        factors = [
            (self._over_patient_tokens(doctor, logits), self._per_row(exponent_at(beta, step), logits))
            for doctor, beta in zip(doctor_logits, self.betas, strict=True)
            if doctor is not None
        ]
        guided = guided_logps(
            patient_logits=logits,
            doctor_logits=[doctor for doctor, _ in factors],
            alpha=self._per_row(exponent_at(self.alpha, step), logits),
            beta=[beta for _, beta in factors],
        )
        if self.min_patient_entropy:
            guided = torch.where(self._is_confident(patient_logits), patient_logits.log_softmax(dim=-1), guided)
        if guided[:, 0].isnan().any():  # the softmax spreads a NaN over its row
            self._forget()
            named = {"the patient": patient_logits} | {f"doctor {i}": x for i, (x, _) in enumerate(factors)}
            culprits = [name for name, logits in named.items() if logits.log_softmax(dim=-1).isnan().any()]
            raise ValueError(
                "Patient and doctors must allow at least one token in common, and their logits must not be NaN. Got "
                f"NaN from {' and '.join(culprits) or 'their product'}; check the weights, the dtype (float16 "
                "overflows) and the processors that ban tokens."
            )
        return guided

    def _tokens(self, input_ids: torch.Tensor, is_next: bool = False) -> torch.Tensor:
        """Return the ids (B, L), with `PADDING` in place of padding ids."""
        tokens = self._prompts.mark_padding(input_ids, is_next)
        if self._prompts.warning:
            self._warn_once(self._prompts.warning)
        return tokens

    def _step(self, tokens: torch.Tensor) -> int:
        """Return the number of tokens since the prompt."""
        return tokens.size(1) - self._prompts.length

    def _doctor_logits(
        self, tokens: torch.Tensor, vocab_size: int, is_next: bool = False
    ) -> list[torch.Tensor | None]:
        """Return the logits (B, V) of each doctor after `tokens` (B, L); `None` if its exponent is 0."""
        doctor_logits: list[torch.Tensor | None] = []
        for index, (doctor, memory) in enumerate(zip(self.doctors, self.memories, strict=True)):
            beta = exponent_at(self.betas[index], self._step(tokens))
            if isinstance(beta, float) and beta == 0:
                doctor_logits.append(None)
                continue
            if vocab_size > memory.num_embeddings and (largest := tokens.max()) >= memory.num_embeddings:
                raise ValueError(
                    f"Ids must be below {memory.num_embeddings}, the number of embeddings of the doctor. Got "
                    f"{largest}; use a doctor with the patient's tokenizer, and a `pad_token_id` that both know."
                )
            if doctor.prompt_tokens is not None:
                self._check_by_prompt("A doctor's `prompt` must have", len(doctor.prompt_tokens), len(tokens))
            read = self._external.get(index) or partial(memory.logits, is_next=is_next)
            doctor_logits.append(read(doctor.with_own_prompt(tokens, self._prompts.length)))
        return doctor_logits

    def _only_common(self, logits: torch.Tensor) -> torch.Tensor:
        """Set the logits (B, V) of tokens without an embedding in some doctor to minus infinity."""
        if logits.size(-1) <= self._num_common_tokens:
            return logits
        is_unknown = torch.arange(logits.size(-1), device=logits.device) >= self._num_common_tokens
        return logits.masked_fill(is_unknown, -math.inf)

    def _per_row(self, weight: Number, scores: torch.Tensor) -> Number:
        """Repeat the exponent of each prompt for its beams or return sequences: (B, 1). Return a number unchanged."""
        if not isinstance(weight, torch.Tensor):
            return weight
        self._check_by_prompt("`alpha` and `beta` must be numbers, or tensors with", len(weight), len(scores))
        return weight.to(scores).repeat_interleave(len(scores) // len(weight))[:, None]

    def _check_by_prompt(self, rule: str, num_entries: int, num_rows: int) -> None:
        is_mask_given = self._prompts.is_mask_given
        num_prompts = len(self._prompts) if is_mask_given else num_rows
        if num_rows % num_entries or (is_mask_given and num_entries != num_prompts):
            raise ValueError(
                f"{rule} an entry for each prompt. Got {num_entries} entries for {num_prompts} "
                f"{'prompts' if is_mask_given else 'rows'}; pass one for each."
            )

    def _is_confident(self, patient_logits: torch.Tensor) -> torch.Tensor:
        """Whether the entropy of the patient is below `min_patient_entropy`, for each row (B, 1)."""
        return next_token_entropy(_float(patient_logits))[:, None] < self.min_patient_entropy

    def _over_patient_tokens(self, logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Slice a doctor's logits to the patient's vocabulary, or pad them with minus infinity."""
        size = scores.size(-1)
        if logits.size(-1) != size and not self._has_same_tokenizer:
            self._warn_once(
                f"The patient has logits for {size} tokens, and a doctor for {logits.size(-1)}. This is correct only "
                "if they have the same tokenizer, and embeddings padded to different sizes. Pass `processing_classes` "
                "to check the tokenizers."
            )
        logits = logits[:, :size].to(device=scores.device, dtype=scores.dtype)
        num_missing = size - logits.size(-1)
        return nn.functional.pad(logits, (0, num_missing), value=-math.inf) if num_missing else logits

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)


def _as_list(value: object, num: int = 1) -> list:
    """Return the items of a list or tuple, or `num` copies of any other value."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * num


def _float(scores: torch.Tensor) -> torch.Tensor:
    """Convert half precision to float32, because it would round the product."""
    return scores if scores.dtype == torch.float64 else scores.float()
