# SPDX-License-Identifier: Apache-2.0

r"""
Guided decoding: doctors steer `patient.generate(...)` through a logits processor.

Shapes: B rows, L tokens so far (padding included), V vocabulary. Units: nats.

A processor is told the ids and the patient's scores, nothing else: not the mask, not which beam a row came from, not
that a new generation began. So nothing here depends on being told. What the doctors say is a pure function of the
tokens, and their KV caches are only a memory of it, addressed by content, [`DoctorMemory`].
"""

import math
import os
import warnings
from collections.abc import Sequence

import torch
from torch import nn
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenizer_identity import check_all_same
from ..functional import guided_logps, next_token_entropy, plausible_mask
from ..models.doctor import load_doctor
from ..models.token_credits import load_credits
from .doctors import PADDING, Doctor, DoctorMemory, check_left_padded, check_reference, guess_mask
from .exponents import (
    DEFAULT_BETA,
    Weight,
    check_weight,
    default_beta,
    opposite_weight,
    remaining_weight,
    weight_at,
)
from .trace import GuidanceTrace, TraceRecorder


class DoctorGuidedLogitsProcessor(LogitsProcessor):
    r"""
    Next-token distribution of the patient, guided by doctors: $\pi \propto \pi_{\text{patient}}^\alpha \prod_i
    \pi_{\text{doctor}_i}^{\beta_i}$.

    Works with greedy search, sampling, beams, `num_return_sequences` and assisted decoding. One processor may serve
    any number of `generate` calls, one at a time; the doctors read every token once. It comes after repetition penalty
    and the like, and before temperature, top-k and top-p, which therefore act on the guided distribution.

    Args:
        doctor ([`~transformers.PreTrainedModel`] or [`Doctor`], or list of them):
            Causal language models with the patient's tokenizer, in eval mode. A PEFT model is used with its adapter. A
            [`Doctor`] says more: which adapter, or a prompt of its own.
        alpha (`float`, `torch.Tensor` of shape `(B,)` or callable, *optional*):
            Exponent of the patient. By default the exponents add up to 1: the *mixture*, `1 - sum(beta)`, or with a
            `reference` the *ratio*, `1`. The *product* (the paper) is `alpha=1`; a doctor of guided flow is made for
            it, and takes nothing from the patient by default.
        beta (`float`, `torch.Tensor` of shape `(B,)` or callable, or list of them, *optional*, defaults to `0.5`):
            Exponent of the doctor, or of each doctor. 0 leaves the patient alone, without a doctor's forward pass;
            negative steers away. A tensor has a weight for each prompt of the batch. A callable is a schedule: it is
            given how many tokens have been generated since the prompt, and returns either.
        reference ([`~transformers.PreTrainedModel`] or [`Doctor`], or list of them, *optional*):
            What the doctor was before training, or one for each doctor (`None` for none). Gets the exponent `-beta`.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
            Mask of the prompts, as given to `generate`. For a later batch give its mask to [`reset`]. Without it the
            leading run of padding ids is taken for padding, which is a guess where the padding id is also BOS or EOS,
            and the first ids seen are taken for the prompt.
        processing_classes (sequence of [`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the patient, then of each doctor and reference. Checked to be the same, then let go.
        min_patient_prob (`float`, *optional*, defaults to `0.0`):
            Rule out tokens to which the patient gives less than this share of its likeliest token's probability, in
            [0, 1]: [`~functional.plausible_mask`]. 0 rules out none.
        min_patient_entropy (`float`, *optional*, defaults to `0.0`):
            Leave the patient alone where its entropy is below this many nats. Where that is so in every row of a batch
            the doctors do not read; they catch up when they are needed.
        return_trace (`bool`, *optional*, defaults to `False`):
            Keep the log-probabilities of what is generated, for [`~DoctorGuidedLogitsProcessor.trace`]. Not with beams.

    Attributes:
        alpha (`float`, `torch.Tensor` or callable): exponent of the patient.
        doctors (`list` of [`Doctor`]): the doctors, then their references.
        betas (`list`): exponent of each of `doctors`.
        num_references (`int`): how many of `doctors`, at the end, are references.
        memories (`list` of [`DoctorMemory`]): what each of `doctors` has said and holds in its cache.
        num_calls (`int`): how often `generate` has asked.

    Raises:
        `ValueError`: at construction, on exponents that are not finite or of the wrong number, a mixture whose `alpha`
            would be negative, thresholds out of range, what [`Doctor`] refuses, a doctor of guided flow without a record
            of it (unless `alpha` is given) or with a `reference`, different tokenizers, a mask that is not left-padded.
            At a call, on prompts that the mask is not for, `inputs_embeds` without ids, ids or positions that a doctor
            does not have, NaN.

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

    supports_continuous_batching = False  # its rows are not requests, and it hands over the last token only

    def __init__(
        self,
        doctor: PreTrainedModel | Doctor | Sequence[PreTrainedModel | Doctor],
        alpha: Weight | None = None,
        beta: Weight | Sequence[Weight] = DEFAULT_BETA,
        *,
        reference: PreTrainedModel | Doctor | Sequence[PreTrainedModel | Doctor | None] | None = None,
        attention_mask: torch.Tensor | None = None,
        processing_classes: Sequence[PreTrainedTokenizerBase] | None = None,
        min_patient_prob: float = 0.0,
        min_patient_entropy: float = 0.0,
        return_trace: bool = False,
    ):
        doctors = list(doctor) if isinstance(doctor, (list, tuple)) else [doctor]
        betas = list(beta) if isinstance(beta, (list, tuple)) else [beta] * len(doctors)
        references = list(reference) if isinstance(reference, (list, tuple)) else [reference] * len(doctors)
        if not doctors or not len(doctors) == len(betas) == len(references):
            raise ValueError(
                f"There must be at least one doctor, and a `beta` and a `reference` for each. Got {len(doctors)}, "
                f"{len(betas)} and {len(references)}; for a doctor without a reference, give None."
            )
        doctors = [x if isinstance(x, Doctor) else Doctor(x) for x in doctors]
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
        # What enters the product beside the patient: doctors, then their references with the opposite exponent
        self.alpha = check_weight("alpha", alpha)
        self.betas = betas + [
            opposite_weight(beta) for beta, ref in zip(betas, references, strict=True) if ref is not None
        ]
        self.doctors = doctors + [ref for ref in references if ref is not None]
        self.num_references = len(self.doctors) - len(doctors)
        self.min_patient_prob = min_patient_prob
        self.min_patient_entropy = min_patient_entropy
        self.num_calls = 0
        if processing_classes is not None:
            check_all_same(processing_classes, len(doctors), len(self.doctors) - len(doctors))
        self._same_tokenizer = processing_classes is not None
        self._warned = set()
        self._trace = TraceRecorder() if return_trace else None
        self.memories = [DoctorMemory(doctor) for doctor in self.doctors]
        self._num_common_tokens = min(memory.num_embeddings for memory in self.memories)
        self.reset(attention_mask)

    @classmethod
    def from_pretrained(
        cls,
        doctor: str | Sequence[str],
        alpha: Weight | None = None,
        beta: Weight | Sequence[Weight] | None = None,
        *,
        model_init_kwargs: dict | None = None,
        **settings,
    ) -> "DoctorGuidedLogitsProcessor":
        """
        Load doctors, and guide with the exponents for which they were trained.

        Args:
            doctor (`str` or sequence of `str`):
                Folders or Hub ids of doctors that [`TFPOTrainer`] saved: full models or adapters.
            alpha, beta (*optional*):
                As above. By default a doctor of guided flow, and the patient, have the exponents of its training, 1 and
                1; doctors that were trained on their own get 0.5 each, which is taken from the patient.
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
        return cls(doctors, alpha, beta, **settings)

    def reset(self, attention_mask: torch.Tensor | None = None, *, keep_memory: bool = False) -> None:
        """
        Take the mask of the prompts that come next, and free what the doctors remember.

        Args:
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
                Mask of the next prompts. Without it padding is guessed from the ids.
            keep_memory (`bool`, *optional*, defaults to `False`):
                Keep the doctors' caches, for prompts that go on from what was generated.
        """
        if attention_mask is not None:
            check_left_padded(attention_mask)
            attention_mask = attention_mask.bool()
        self._is_mask_given = attention_mask is not None
        self._prompt_mask = attention_mask  # (B, prompt), True where there is a token
        self._prompt_ids = None  # (B, prompt), the prompts that the mask belongs to
        if self._trace:
            self._trace.restart()
        if not keep_memory:
            self._forget()

    def _forget(self) -> None:
        for memory in self.memories:
            memory.forget()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """
        Log-probabilities of the guided policy.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Prompts and completions so far.
            scores (`torch.FloatTensor` of shape `(B, V)`):
                Logits or log-probabilities of the patient. Left as they are.

        Returns:
            `torch.FloatTensor` of shape `(B, V)`: log-probabilities in nats, in float64 if `scores` are, else float32.
        """
        self.num_calls += 1
        tokens = self._hide_padding(input_ids)
        if self.min_patient_entropy and self._is_sure(scores).all():
            heard = [None] * len(self.doctors)
            guided = self._only_common(_float(scores)).log_softmax(dim=-1)
        else:
            heard = self._listen(tokens, scores.size(-1))
            guided = self.combine(scores, heard, self._step(tokens))
        if self._trace:
            self._trace.record(input_ids, scores, heard, guided)
        return guided

    def trace(self, sequences: torch.LongTensor) -> GuidanceTrace:
        """
        What guidance did to each token of the last generation, with `return_trace=True`.

        Args:
            sequences (`torch.LongTensor` of shape `(B, L + T)`):
                What `generate` returned.
        """
        if self._trace is None:
            raise ValueError("There is no trace. Got a processor made without `return_trace=True`; make one with it.")
        return self._trace.finish(sequences)

    @torch.no_grad()
    def draft_logits(self, input_ids: torch.LongTensor, vocab_size: int) -> torch.FloatTensor:
        """
        What a patient would say who agrees with the doctors: the mean of those that it is drawn to.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Prompts and completions so far.
            vocab_size (`int`):
                V of the patient.

        Returns:
            `torch.FloatTensor` of shape `(B, V)`: logits. Called on them, the processor gives a guess at the guided
            policy, without the patient.
        """
        tokens = self._hide_padding(input_ids)
        step = self._step(tokens)
        total, total_weight = torch.zeros(len(tokens), vocab_size, device=input_ids.device), 0.0
        for logits, beta in zip(self._listen(tokens, vocab_size), self.betas, strict=True):
            if logits is not None:
                weight = torch.as_tensor(self._per_row(weight_at(beta, step), total)).clamp(min=1e-6).to(total)
                total = total + weight * self._over_same_tokens(logits, total)
                total_weight = total_weight + weight
        return total / total_weight if isinstance(total_weight, torch.Tensor) else total

    def combine(
        self, patient_logits: torch.Tensor, doctor_logits: Sequence[torch.Tensor | None], step: int = 0
    ) -> torch.Tensor:
        """
        Log-probabilities of the guided policy, given what patient and doctors say.

        Args:
            patient_logits (`torch.Tensor` of shape `(B, V)`):
                Logits or log-probabilities of the patient.
            doctor_logits (sequence of `torch.Tensor` of shape `(B, V)`):
                The same of each of `doctors`. Their V may be padded otherwise; `None` where the exponent is 0.
            step (`int`, *optional*, defaults to `0`):
                Tokens generated since the prompt, for exponents that follow a schedule.

        Returns:
            `torch.Tensor` of shape `(B, V)`: log-probabilities in nats, in float64 if the patient's are, else float32.
        """
        patient_logits = logits = self._only_common(_float(patient_logits))
        if self.min_patient_prob:
            plausible = plausible_mask(patient_logits=logits, min_patient_prob=self.min_patient_prob)
            logits = logits.masked_fill(~plausible, -math.inf)
        heard = [
            (self._over_same_tokens(doctor, logits), self._per_row(weight_at(beta, step), logits))
            for doctor, beta in zip(doctor_logits, self.betas, strict=True)
            if doctor is not None
        ]
        guided = guided_logps(
            patient_logits=logits,
            doctor_logits=[doctor for doctor, _ in heard],
            alpha=self._per_row(weight_at(self.alpha, step), logits),
            beta=[beta for _, beta in heard],
        )
        if self.min_patient_entropy:
            guided = torch.where(self._is_sure(patient_logits), patient_logits.log_softmax(dim=-1), guided)
        if guided[:, 0].isnan().any():  # a NaN anywhere in a row is a NaN everywhere, by the softmax
            self._forget()
            named = {"the patient": patient_logits} | {f"doctor {i}": x for i, (x, _) in enumerate(heard)}
            culprits = [name for name, logits in named.items() if logits.log_softmax(dim=-1).isnan().any()]
            raise ValueError(
                "Patient and doctors must allow at least one token in common and give no NaN. Got NaN from "
                f"{' and '.join(culprits) or 'their product'}; check the weights, the dtype (float16 overflows) and "
                "the processors that ban tokens."
            )
        return guided

    def _step(self, tokens: torch.LongTensor) -> int:
        """Tokens generated since the prompt."""
        return tokens.size(1) - self._prompt_mask.size(1)

    def _listen(self, tokens: torch.LongTensor, vocab_size: int) -> list[torch.Tensor | None]:
        """Logits (B, V) of each doctor after `tokens` (B, L), `None` where it does not count."""
        heard = []
        for doctor, beta, memory in zip(self.doctors, self.betas, self.memories, strict=True):
            beta = weight_at(beta, self._step(tokens))
            if isinstance(beta, float) and beta == 0:
                heard.append(None)
                continue
            if vocab_size > memory.num_embeddings and (largest := tokens.max()) >= memory.num_embeddings:
                raise ValueError(
                    f"The doctor must know every token. Got id {largest}, and it knows {memory.num_embeddings}; take "
                    "a doctor with the patient's tokenizer, and a `pad_token_id` that both know."
                )
            if doctor.prompt is not None:
                self._check_by_prompt("A doctor's `prompt` must have", len(doctor.prompt["input_ids"]), len(tokens))
            heard.append(memory.logits(doctor.own_tokens(tokens, self._prompt_mask.size(1))))
        return heard

    def _only_common(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits (B, V), without tokens that a doctor does not know: it could not read them later."""
        if logits.size(-1) <= self._num_common_tokens:
            return logits
        is_unknown = torch.arange(logits.size(-1), device=logits.device) >= self._num_common_tokens
        return logits.masked_fill(is_unknown, -math.inf)

    def _per_row(self, weight: float | torch.Tensor, scores: torch.Tensor) -> float | torch.Tensor:
        """A weight for each prompt, (B,), as one for each row, (rows, 1): beams and return sequences copy prompts."""
        if not isinstance(weight, torch.Tensor):
            return weight
        self._check_by_prompt("`alpha` and `beta` must be numbers, or tensors with", len(weight), len(scores))
        return weight.to(scores).repeat_interleave(len(scores) // len(weight))[:, None]

    def _check_by_prompt(self, rule: str, num_entries: int, num_rows: int) -> None:
        num_prompts = len(self._prompt_mask) if self._is_mask_given else num_rows
        if num_rows % num_entries or (self._is_mask_given and num_entries != num_prompts):
            raise ValueError(
                f"{rule} an entry for each prompt. Got {num_entries} entries for {num_prompts} "
                f"{'prompts' if self._is_mask_given else 'rows'}; give as many."
            )

    def _is_sure(self, patient_logits: torch.Tensor) -> torch.BoolTensor:
        """Rows (B, 1) in which the patient needs no doctor."""
        return next_token_entropy(_float(patient_logits))[:, None] < self.min_patient_entropy

    def _hide_padding(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """The tokens (B, L), with `PADDING` in place of padding ids."""
        if input_ids.dim() != 2 or input_ids.size(1) == 0:
            raise ValueError(
                "`input_ids` must have shape (B, L) with at least one token, for the doctors read them. Got shape "
                f"{tuple(input_ids.shape)}; give `generate` the `input_ids`, not `inputs_embeds` alone."
            )
        if self._is_mask_given and self._prompt_ids is None and input_ids.size(1) == self._prompt_mask.size(1):
            num_copies = max(input_ids.size(0) // self._prompt_mask.size(0), 1)  # beams, return sequences
            self._prompt_ids = input_ids[::num_copies].clone()
        if not self._continues_prompt(input_ids):
            if self._is_mask_given:
                raise ValueError(
                    f"`attention_mask` must be that of the prompts. Got a mask {tuple(self._prompt_mask.shape)} and "
                    f"ids {tuple(input_ids.shape)} that do not continue its prompts; call `reset(attention_mask=...)` "
                    "before generating from others."
                )
            self._prompt_ids = input_ids.clone()
            self._prompt_mask, doubt = guess_mask(input_ids, self.doctors[0].model)
            if doubt:
                self._warn_once(doubt)
        prompt_mask = self._prompt_mask.to(input_ids.device)
        prompt_mask = prompt_mask.repeat_interleave(input_ids.size(0) // prompt_mask.size(0), dim=0)
        tokens = input_ids.clone()
        tokens[:, : prompt_mask.size(1)].masked_fill_(~prompt_mask, PADDING)
        return tokens

    def _continues_prompt(self, input_ids: torch.LongTensor) -> bool:
        """Whether every row begins with its prompt, each prompt copied to as many rows in sequence."""
        if self._prompt_ids is None or input_ids.size(0) % self._prompt_mask.size(0):
            return False
        num_copies = input_ids.size(0) // self._prompt_mask.size(0)
        prompts = self._prompt_ids.to(input_ids.device).repeat_interleave(num_copies, dim=0)
        return torch.equal(input_ids[:, : prompts.size(1)], prompts)

    def _over_same_tokens(self, logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits of a doctor over the tokens of the patient: sliced, or padded with minus infinity."""
        size = scores.size(-1)
        if logits.size(-1) != size and not self._same_tokenizer:
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


def _float(scores: torch.Tensor) -> torch.Tensor:
    """In float64 if they are, else in float32: halves would round the product."""
    return scores if scores.dtype == torch.float64 else scores.float()
