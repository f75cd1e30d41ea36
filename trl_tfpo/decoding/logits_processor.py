# SPDX-License-Identifier: Apache-2.0

r"""
Guided decoding: a logits processor with which doctors steer `patient.generate(...)`.

`generate` passes a processor the ids and the patient's scores only. It passes no mask, does not say from which row a
beam came, and does not announce a new generation. The doctors' logits are therefore a function of the tokens alone,
and their KV caches are addressed by the tokens in them, [`DoctorMemory`].

Shapes: B rows, L tokens so far (padding included), V vocabulary. Units: nats.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import CompileConfig, LogitsProcessor, PreTrainedTokenizerBase

from ..common.language_model import LanguageModel
from ..data.tokenizer_identity import check_all_same
from ..functional import guided_logps, next_token_entropy, plausible_mask
from ..models.saved_doctor import load_doctor
from ..models.token_credits import load_credits
from .doctors import Doctor, DoctorMemory, check_reference
from .exponents import (
    DEFAULT_BETA,
    Number,
    Weight,
    check_weight,
    default_beta,
    opposite_weight,
    remaining_weight,
    weight_at,
)
from .padding import Prompts
from .trace import GuidanceTrace, TraceRecorder


MIN_DRAFT_WEIGHT = 1e-6  # of a doctor in the draft, where its exponent is smaller or negative


class DoctorGuidedLogitsProcessor(LogitsProcessor):
    r"""
    Logits processor that multiplies the patient's next-token distribution with those of doctors: $\pi \propto
    \pi_{\text{patient}}^\alpha \prod_i \pi_{\text{doctor}_i}^{\beta_i}$.

    It works with greedy search, sampling, beams, `num_return_sequences` and assisted decoding, and with any number of
    `generate` calls, one at a time. Each doctor reads each token once. The processor comes after the repetition
    penalty and processors that ban tokens. It comes before temperature, top-k and top-p: these act on the guided
    distribution.

    Args:
        doctor ([`~transformers.PreTrainedModel`] or [`Doctor`], or list of them):
            Causal language models with the patient's tokenizer, in eval mode. A PEFT model is used with its adapter. A
            [`Doctor`] may name an adapter or have prompts of its own.
        alpha (`float`, `torch.Tensor` of shape `(B,)` or callable, *optional*):
            Exponent of the patient. By default it is `1 - sum(beta)`, so that the exponents add up to 1 (the
            *mixture*). Doctors with a `reference` (the *ratio*) and doctors of guided flow leave the patient's
            exponent at 1. The *product* of the paper is `alpha=1`.
        beta (`float`, `torch.Tensor` of shape `(B,)` or callable, or list of them, *optional*, defaults to `0.5`):
            Exponent of the doctor, or of each doctor. At 0 the patient generates alone, and the doctor is not read. A
            negative exponent steers away from the doctor. A tensor has one number for each prompt of the batch. A
            callable is a schedule: it maps the number of tokens since the prompt to a number or a tensor.
        reference ([`~transformers.PreTrainedModel`] or [`Doctor`], or list of them, *optional*):
            The doctor before training, or one for each doctor (`None` for none). Its exponent is `-beta`.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
            Mask of the prompts, as given to `generate`. Pass the mask of a later batch to [`reset`]. Without a mask,
            the first ids seen are the prompts, and a leading run of padding ids is padding. This is a guess where the
            padding id is also BOS or EOS.
        processing_classes (sequence of [`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the patient, then of each doctor, then of each reference. They are checked to be the same, and
            not kept.
        min_patient_prob (`float`, *optional*, defaults to `0.0`):
            Rule out tokens to which the patient gives less than this share of its likeliest token's probability, in
            [0, 1]: [`~functional.plausible_mask`]. 0 rules out none.
        min_patient_entropy (`float`, *optional*, defaults to `0.0`):
            Leave the patient's distribution as it is where its entropy is below this many nats. Where that holds in
            all rows of a batch the doctors are not read; they read the missing tokens later.
        return_trace (`bool`, *optional*, defaults to `False`):
            Keep the log-probabilities of the generated tokens, for [`~DoctorGuidedLogitsProcessor.trace`]. Not
            supported with beams.
        cache_implementation (`str`, *optional*):
            `"static"`: the doctors have KV caches of fixed shape, and each token is read by a compiled forward pass,
            as in `generate` with the same argument. By default the caches grow. [`guided_generate`] takes over the
            setting of the patient.
        compile_config ([`~transformers.CompileConfig`], *optional*):
            How the doctors are compiled, for `cache_implementation="static"`. Without it they are compiled on
            accelerators only.

    Attributes:
        alpha (`float`, `torch.Tensor` or callable): exponent of the patient.
        doctors (`list` of [`Doctor`]): the doctors, then their references.
        betas (`list`): exponent of each of `doctors`.
        num_references (`int`): how many of `doctors`, at the end, are references.
        memories (`list` of [`DoctorMemory`]): logits and KV cache of each of `doctors`.
        num_calls (`int`): number of calls by `generate`.

    Raises:
        `ValueError`: at construction, on exponents that are not finite or of the wrong number, a mixture with a
            negative `alpha`, thresholds out of range, doctors that [`Doctor`] refuses, a doctor of guided flow without
            a record of it (unless `alpha` is given) or with a `reference`, different tokenizers, a mask that is not
            left-padded, and an unknown `cache_implementation`. At a call, on prompts other than those of the mask,
            `inputs_embeds` without ids, ids or positions that a doctor does not have, and NaN.

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

    supports_continuous_batching = False  # there, rows are not requests, and only the last token is passed

    def __init__(
        self,
        doctor: "LanguageModel | Doctor | Sequence[LanguageModel | Doctor]",
        alpha: Weight | None = None,
        beta: Weight | Sequence[Weight] = DEFAULT_BETA,
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
        if not models or not len(models) == len(betas) == len(references):
            raise ValueError(
                f"There must be at least one doctor, and a `beta` and a `reference` for each. Got {len(models)}, "
                f"{len(betas)} and {len(references)}; for a doctor without a reference, give None."
            )
        doctors = [x if isinstance(x, Doctor) else Doctor(x) for x in models]
        references = [x if x is None or isinstance(x, Doctor) else Doctor(x) for x in references]
        for one, ref in zip(doctors, references, strict=True):
            check_reference(one, ref)
        betas = [check_weight("beta", beta) for beta in betas]
        if alpha is None:
            rows = zip(doctors, betas, references, strict=True)
            alpha = remaining_weight([beta for one, beta, ref in rows if ref is None and not one.exponents])
        if not (0 <= min_patient_prob <= 1 and 0 <= min_patient_entropy < math.inf):
            raise ValueError(
                "`min_patient_prob` must be in [0, 1] and `min_patient_entropy` a number of nats, at least 0. Got "
                f"{min_patient_prob} and {min_patient_entropy}; 0 switches them off."
            )
        # The factors of the product besides the patient: doctors, then their references
        opposite = [opposite_weight(beta) for beta, ref in zip(betas, references, strict=True) if ref is not None]
        self.alpha = check_weight("alpha", alpha)
        self.betas: list[Weight] = betas + opposite
        self.doctors: list[Doctor] = doctors + [ref for ref in references if ref is not None]
        self.num_references = len(self.doctors) - len(doctors)
        self.min_patient_prob = min_patient_prob
        self.min_patient_entropy = min_patient_entropy
        self.num_calls = 0
        if processing_classes is not None:
            check_all_same(processing_classes, len(doctors), self.num_references)
        self._has_same_tokenizer = processing_classes is not None
        self._warned: set[str] = set()
        self._trace = TraceRecorder() if return_trace else None
        if cache_implementation not in (None, "static"):
            raise ValueError(
                f"`cache_implementation` of doctors must be 'static' or None. Got {cache_implementation!r}; leave it "
                "out for caches that grow."
            )
        self.cache_implementation, self.compile_config = cache_implementation, compile_config
        self.memories = [DoctorMemory(doctor) for doctor in self.doctors]
        self.use_caches(cache_implementation, compile_config)
        self._external: Mapping[int, Callable[[torch.Tensor], torch.Tensor]] = {}  # by index of `doctors`
        self._num_common_tokens = min(memory.num_embeddings for memory in self.memories)
        self.reset(attention_mask)

    @classmethod
    def from_pretrained(
        cls,
        doctor: str | os.PathLike | Sequence[str],
        alpha: Weight | None = None,
        beta: Weight | Sequence[Weight] | None = None,
        *,
        model_init_kwargs: dict | None = None,
        **settings: object,
    ) -> "DoctorGuidedLogitsProcessor":
        """
        Load doctors, and guide with the exponents for which they were trained.

        Args:
            doctor (`str` or sequence of `str`):
                Folders or Hub ids of doctors that [`TFPOTrainer`] saved, full models or adapters.
            alpha, beta (*optional*):
                As above. By default a doctor of guided flow and the patient have the exponents of its training, 1 and
                1. A doctor that is a language model has 0.5, and the patient 1 minus the exponents of these doctors.
            model_init_kwargs (`dict`, *optional*):
                Keyword arguments of `from_pretrained` of the doctors, such as `dtype` and `device_map`.
            settings:
                Further arguments of the processor.

        Returns:
            [`DoctorGuidedLogitsProcessor`]: with the doctors in eval mode.
        """
        names = [doctor] if isinstance(doctor, (str, os.PathLike)) else list(doctor)
        load = model_init_kwargs or {}
        doctors = [
            Doctor(load_doctor(name, with_value_head=False, **load).eval(), credits=load_credits(name, **load))
            for name in names
        ]
        if beta is None:
            beta = [default_beta(doctor.exponents) for doctor in doctors]
        arguments: dict = settings
        return cls(doctors, alpha, beta, **arguments)

    def reset(self, attention_mask: torch.Tensor | None = None, *, keep_memory: bool = False) -> None:
        """
        Prepare for other prompts, and free the caches of the doctors.

        Args:
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
                Mask of the next prompts. Without it padding is guessed from the ids.
            keep_memory (`bool`, *optional*, defaults to `False`):
                Keep the caches, for prompts that continue the generated texts.

        Raises:
            `ValueError`: when the mask is not left-padded.
        """
        self._prompts = Prompts(self.doctors[0].model, attention_mask)
        if self._trace:
            self._trace.restart()
        if not keep_memory:
            self._forget()

    def use_caches(
        self,
        cache_implementation: str | None,
        compile_config: CompileConfig | None = None,
        disable_compile: bool = False,
    ) -> None:
        """
        Choose the kind of the doctors' caches for the next generations.

        Args:
            cache_implementation (`str`, *optional*), compile_config ([`~transformers.CompileConfig`], *optional*):
                As above. Other implementations than `"static"` leave the caches growing.
            disable_compile (`bool`, *optional*, defaults to `False`):
                Never compile, as the argument of `generate`.
        """
        for memory in self.memories:
            memory.use_static_cache(cache_implementation == "static", compile_config, disable_compile)

    def _forget(self) -> None:
        for memory in self.memories:
            memory.forget()

    @contextmanager
    def external_logits(self, sources: Mapping[int, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
        """
        Within the context, get the logits of some doctors from elsewhere, such as a forward pass of the patient.

        Args:
            sources (mapping from `int` to callable):
                For each index of `doctors` concerned a function, called once at each step, from the tokens `(B, L)` to
                the doctor's logits `(B, V)` of the next token.
        """
        before, self._external = self._external, sources
        try:
            yield
        finally:
            self._external = before

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """
        Log-probabilities of the guided policy.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Prompts and completions so far.
            scores (`torch.FloatTensor` of shape `(B, V)`):
                Logits or log-probabilities of the patient. Not modified.

        Returns:
            `torch.FloatTensor` of shape `(B, V)`: log-probabilities in nats, in float64 if `scores` are, else float32.
        """
        self.num_calls += 1
        tokens = self._tokens(input_ids)
        doctor_logits: list[torch.Tensor | None]
        if self.min_patient_entropy and self._is_confident(scores).all():
            doctor_logits = [None] * len(self.doctors)
            guided = self._only_common(_float(scores)).log_softmax(dim=-1)
        else:
            doctor_logits = self._doctor_logits(tokens, scores.size(-1))
            guided = self.combine(scores, doctor_logits, self._step(tokens))
        if self._trace:
            self._trace.record(input_ids, scores, doctor_logits, guided)
        return guided

    def trace(self, sequences: torch.Tensor) -> GuidanceTrace:
        """
        Log-probabilities of the last generation, for a processor made with `return_trace=True`.

        Args:
            sequences (`torch.LongTensor` of shape `(B, L + T)`):
                What `generate` returned.

        Raises:
            `ValueError`: when there is no trace, or it is of another generation.
        """
        if self._trace is None:
            raise ValueError("There is no trace. Got a processor made without `return_trace=True`; make one with it.")
        return self._trace.finish(sequences)

    @torch.no_grad()
    def draft_logits(self, input_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """
        A guess at the patient's logits: the mean of the doctors' logits, weighted by their exponents.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Prompts and completions so far.
            vocab_size (`int`):
                V of the patient.

        Returns:
            `torch.FloatTensor` of shape `(B, V)`: logits. Called with them, the processor returns a guess at the
            guided policy.
        """
        tokens = self._tokens(input_ids)
        step = self._step(tokens)
        total = torch.zeros(len(tokens), vocab_size, device=input_ids.device)
        total_weight: Number = 0.0
        for logits, beta in zip(self._doctor_logits(tokens, vocab_size), self.betas, strict=True):
            if logits is not None:
                weight = torch.as_tensor(self._per_row(weight_at(beta, step), total))
                weight = weight.clamp(min=MIN_DRAFT_WEIGHT).to(total)
                total = total + weight * self._over_patient_tokens(logits, total)
                total_weight = total_weight + weight
        return total / total_weight if isinstance(total_weight, torch.Tensor) else total

    def combine(
        self, patient_logits: torch.Tensor, doctor_logits: Sequence[torch.Tensor | None], step: int = 0
    ) -> torch.Tensor:
        """
        Log-probabilities of the guided policy, given logits of patient and doctors.

        Args:
            patient_logits (`torch.Tensor` of shape `(B, V)`):
                Logits or log-probabilities of the patient.
            doctor_logits (sequence of `torch.Tensor` of shape `(B, V)`):
                The same of each of `doctors`, whose V may include other padding. `None` where the exponent is 0.
            step (`int`, *optional*, defaults to `0`):
                Tokens generated since the prompt, for exponents that follow a schedule.

        Returns:
            `torch.Tensor` of shape `(B, V)`: log-probabilities in nats, in float64 if the patient's are, else float32.

        Raises:
            `ValueError`: on NaN, or when no token is allowed by all models.
        """
        patient_logits = logits = self._only_common(_float(patient_logits))
        if self.min_patient_prob:
            plausible = plausible_mask(patient_logits=logits, min_patient_prob=self.min_patient_prob)
            logits = logits.masked_fill(~plausible, -math.inf)
        factors = [
            (self._over_patient_tokens(doctor, logits), self._per_row(weight_at(beta, step), logits))
            for doctor, beta in zip(doctor_logits, self.betas, strict=True)
            if doctor is not None
        ]
        guided = guided_logps(
            patient_logits=logits,
            doctor_logits=[doctor for doctor, _ in factors],
            alpha=self._per_row(weight_at(self.alpha, step), logits),
            beta=[beta for _, beta in factors],
        )
        if self.min_patient_entropy:
            guided = torch.where(self._is_confident(patient_logits), patient_logits.log_softmax(dim=-1), guided)
        if guided[:, 0].isnan().any():  # the softmax spreads a NaN over its row
            self._forget()
            named = {"the patient": patient_logits} | {f"doctor {i}": x for i, (x, _) in enumerate(factors)}
            culprits = [name for name, logits in named.items() if logits.log_softmax(dim=-1).isnan().any()]
            raise ValueError(
                "Patient and doctors must allow at least one token in common and give no NaN. Got NaN from "
                f"{' and '.join(culprits) or 'their product'}; check the weights, the dtype (float16 overflows) and "
                "the processors that ban tokens."
            )
        return guided

    def _tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The ids (B, L), with `PADDING` in place of padding ids."""
        tokens = self._prompts.hide_padding(input_ids)
        if self._prompts.doubt:
            self._warn_once(self._prompts.doubt)
        return tokens

    def _step(self, tokens: torch.Tensor) -> int:
        """Tokens generated since the prompt."""
        return tokens.size(1) - self._prompts.length

    def _doctor_logits(self, tokens: torch.Tensor, vocab_size: int) -> list[torch.Tensor | None]:
        """Logits (B, V) of each doctor after `tokens` (B, L), `None` where its exponent is 0."""
        doctor_logits: list[torch.Tensor | None] = []
        for index, (doctor, memory) in enumerate(zip(self.doctors, self.memories, strict=True)):
            beta = weight_at(self.betas[index], self._step(tokens))
            if isinstance(beta, float) and beta == 0:
                doctor_logits.append(None)
                continue
            if vocab_size > memory.num_embeddings and (largest := tokens.max()) >= memory.num_embeddings:
                raise ValueError(
                    f"The doctor must know every token. Got id {largest}, and it knows {memory.num_embeddings}; take "
                    "a doctor with the patient's tokenizer, and a `pad_token_id` that both know."
                )
            if doctor.prompt_tokens is not None:
                self._check_by_prompt("A doctor's `prompt` must have", len(doctor.prompt_tokens), len(tokens))
            read = self._external.get(index, memory.logits)
            doctor_logits.append(read(doctor.own_tokens(tokens, self._prompts.length)))
        return doctor_logits

    def _only_common(self, logits: torch.Tensor) -> torch.Tensor:
        """Rule out tokens, in logits (B, V), that have no embedding in one of the doctors."""
        if logits.size(-1) <= self._num_common_tokens:
            return logits
        is_unknown = torch.arange(logits.size(-1), device=logits.device) >= self._num_common_tokens
        return logits.masked_fill(is_unknown, -math.inf)

    def _per_row(self, weight: Number, scores: torch.Tensor) -> Number:
        """Expand an exponent for each prompt to one for each row, (B, 1): beams and return sequences copy prompts."""
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
                f"{'prompts' if is_mask_given else 'rows'}; give as many."
            )

    def _is_confident(self, patient_logits: torch.Tensor) -> torch.Tensor:
        """Rows (B, 1) in which the entropy of the patient is below `min_patient_entropy`."""
        return next_token_entropy(_float(patient_logits))[:, None] < self.min_patient_entropy

    def _over_patient_tokens(self, logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Slice logits of a doctor to the vocabulary of the patient, or fill them up with minus infinity."""
        size = scores.size(-1)
        if logits.size(-1) != size and not self._has_same_tokenizer:
            self._warn_once(
                f"The patient has logits for {size} tokens and a doctor for {logits.size(-1)}. That is right only if "
                "one tokenizer was padded to two sizes: pass `processing_classes` to have it checked."
            )
        logits = logits[:, :size].to(device=scores.device, dtype=scores.dtype)
        num_missing = size - logits.size(-1)
        return nn.functional.pad(logits, (0, num_missing), value=-math.inf) if num_missing else logits

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)


def _as_list(value: object, num: int = 1) -> list:
    """The items of a list or tuple; else the value, `num` times."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * num


def _float(scores: torch.Tensor) -> torch.Tensor:
    """Convert to float32, unless in float64: the product would be rounded in half precision."""
    return scores if scores.dtype == torch.float64 else scores.float()
