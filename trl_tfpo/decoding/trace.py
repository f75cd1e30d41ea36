# SPDX-License-Identifier: Apache-2.0

"""
Traces: the log-probability of each generated token under the patient, each doctor and the guided policy.

Shapes: B rows, L tokens so far, T generated tokens, V vocabulary, D doctors and references. Units: nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ..common.heat_map import TokenMap, token_texts


MAX_REJECTED = 32  # tokens in assisted decoding


@dataclass(frozen=True)
class GuidanceTrace:
    """
    Log-probabilities of generated tokens, before temperature, top-k and top-p.

    Args:
        token_ids (`torch.LongTensor` of shape `(B, T)`):
            The tokens. Shorter texts are padded at the end.
        patient_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities under the patient alone.
        doctor_logps (`torch.Tensor` of shape `(D, B, T)`):
            Log-probabilities under each doctor, then each reference; NaN where the doctor did not run.
        guided_logps (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities under the guided policy.
    """

    token_ids: torch.Tensor
    patient_logps: torch.Tensor
    doctor_logps: torch.Tensor
    guided_logps: torch.Tensor

    @property
    def shift(self) -> torch.Tensor:
        """Log-ratio (B, T) of the guided policy to the patient for each token, in nats."""
        return self.guided_logps - self.patient_logps


class TraceRecorder:
    """
    Records the [`GuidanceTrace`] of a generation.

    The distributions after the last prefixes are kept. The ids of the next step show which token was chosen, and in
    assisted decoding also which tokens were rejected.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Discard the trace."""
        self._tokens: torch.Tensor | None = None  # (B, L) of the last step
        self._prompt_length = 0
        self._pending: dict[int, list[torch.Tensor | None]] = {}  # log-probabilities (B, V) after so many tokens
        self._steps: list[tuple[torch.Tensor, list[torch.Tensor]]] = []  # chosen tokens (B,), log-probabilities (B,)

    def record(
        self,
        input_ids: torch.Tensor,
        patient_logits: torch.Tensor,
        doctor_logits: Sequence[torch.Tensor | None],
        guided_logps: torch.Tensor,
    ) -> None:
        """
        Record the distributions (B, V) of the next token. Logits are `None` for a doctor that did not run.

        Ids (B, L) of an unexpected shape begin a new trace.

        Raises:
            `ValueError`: when the ids do not continue those of the previous step, as with beams.
        """
        length = input_ids.size(1)
        if not self._continue_with(input_ids):
            if self._tokens is not None and input_ids[:, :-1].shape == self._tokens.shape:
                raise ValueError(
                    "A trace needs texts that keep their rows. Got tokens that do not continue the previous step; "
                    "leave out `return_trace` with beams, or call `reset()` before other prompts."
                )
            self.restart()
            self._tokens, self._prompt_length = input_ids.clone(), length
        logits = [patient_logits, *doctor_logits]
        logps = [None if x is None else x.float().log_softmax(dim=-1) for x in logits] + [guided_logps]
        first = length - MAX_REJECTED if len(input_ids) == 1 else length
        self._pending = {n: x for n, x in self._pending.items() if first <= n < length} | {length: logps}

    def _continue_with(self, ids: torch.Tensor) -> bool:
        """
        Adopt `ids` (B, L) if they are the recorded text, a prefix of it, or either with one more token.

        A prefix that ends before the last step has rejected tokens after it. Only assisted decoding rejects tokens, in
        one row. With several rows, the rows may have been reordered instead, so such ids are not adopted.
        """
        if self._tokens is None or len(ids) != len(self._tokens):
            return False
        num_both = min(ids.size(1), self._tokens.size(1))
        is_same = (ids[:, :num_both] == self._tokens[:, :num_both].to(ids.device)).all(dim=0)
        num_same = int(is_same.int().cumprod(dim=0).sum())
        has_rejected = num_same < self._tokens.size(1)
        if num_same < self._prompt_length or ids.size(1) > num_same + 1 or (has_rejected and len(ids) > 1):
            return False
        has_token = num_same < ids.size(1)
        if has_token and num_same not in self._pending:
            return False
        del self._steps[num_same - self._prompt_length :]
        if has_token:
            self._choose(self._pending[num_same], ids[:, num_same])
        self._tokens = ids.clone()
        return True

    def _choose(self, distributions: Sequence[torch.Tensor | None], tokens: torch.Tensor) -> None:
        """Record the chosen tokens (B,) and their log-probabilities under the distributions (B, V)."""
        index = tokens[:, None]

        def chosen(logps: torch.Tensor | None) -> torch.Tensor:
            if logps is None:
                return torch.full(index.shape, torch.nan)
            inside = (index < logps.size(-1)).to(logps.device)
            found = logps.gather(1, index.to(logps.device).clamp(max=logps.size(-1) - 1))
            return found.masked_fill(~inside, -torch.inf).cpu()

        self._steps.append((tokens.cpu(), [chosen(logps).squeeze(1) for logps in distributions]))

    def finish(self, sequences: torch.Tensor) -> GuidanceTrace:
        """
        Return the trace, given the output (B, L + T) of `generate`, which includes the last token.

        Raises:
            `ValueError`: when `sequences` are not the output of the recorded generation.
        """
        if self._tokens is None:
            raise ValueError("A trace needs a generation. Got none; call `generate` first.")
        if sequences.size(1) <= self._prompt_length or not self._continue_with(sequences.to(self._tokens.device)):
            raise ValueError(
                f"A trace belongs to the last generation. Got other tokens, of shape {tuple(sequences.shape)}; pass "
                "the output of `generate`."
            )
        tokens, logps = zip(*self._steps, strict=True)
        patient, *doctors, guided = (torch.stack(rows, dim=1) for rows in zip(*logps, strict=True))  # (B, T)
        return GuidanceTrace(torch.stack(tokens, dim=1), patient, torch.stack(doctors), guided)


def show_trace(
    trace: GuidanceTrace, processing_class: PreTrainedTokenizerBase, eos_token_ids: Sequence[int] = ()
) -> TokenMap:
    """
    Show a trace as a heat map: the color of a token shows how guidance changed its log-probability.

    Args:
        trace ([`GuidanceTrace`]):
            Result of [`DoctorGuidedLogitsProcessor.trace`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        eos_token_ids (`Sequence[int]`, *optional*):
            Further ids that end a text, besides the tokenizer's EOS.

    Returns:
        [`TokenMap`]: one row for each text, up to its end.
    """
    rows = []
    for row, ids in enumerate(trace.token_ids.tolist()):
        ends = {processing_class.eos_token_id, *eos_token_ids}
        length = next((at for at, token_id in enumerate(ids, start=1) if token_id in ends), len(ids))
        notes = [
            f"patient {trace.patient_logps[row, t]:.2f}, guided {trace.guided_logps[row, t]:.2f}, doctors "
            + " ".join(f"{x:.2f}" for x in trace.doctor_logps[:, row, t].tolist())
            + " nats"
            for t in range(length)
        ]
        shifts = trace.shift[row, :length].tolist()
        rows.append((f"{row}", token_texts(ids[:length], processing_class), shifts, notes))
    return TokenMap(rows, "⁺ likelier under guidance, ⁻ less likely. Darker: larger changes of log-probability")
