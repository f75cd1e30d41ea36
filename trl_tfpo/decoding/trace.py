# SPDX-License-Identifier: Apache-2.0

"""
What guidance did to each token of a completion: how likely it was to the patient, to the doctors, and to both together.

Shapes: B rows, L tokens so far, T generated tokens, V vocabulary, D doctors. Units: nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ..data.token_map import TokenMap, token_texts


@dataclass(frozen=True)
class GuidanceTrace:
    """
    Log-probabilities of the tokens that were generated, before temperature, top-k and top-p.

    Args:
        token_ids (`torch.LongTensor` of shape `(B, T)`):
            The tokens; padding follows the end of a text that is shorter than others.
        patient_logps (`torch.Tensor` of shape `(B, T)`):
            Their log-probability under the patient alone.
        doctor_logps (`torch.Tensor` of shape `(D, B, T)`):
            Under each doctor, then each reference; NaN where one did not have to read.
        guided_logps (`torch.Tensor` of shape `(B, T)`):
            Under the guided policy.
    """

    token_ids: torch.LongTensor
    patient_logps: torch.Tensor
    doctor_logps: torch.Tensor
    guided_logps: torch.Tensor

    @property
    def shift(self) -> torch.Tensor:
        """How much likelier guidance made each token, (B, T); negative where it would rather have had another."""
        return self.guided_logps - self.patient_logps


class TraceRecorder:
    """Collects the [`GuidanceTrace`] of a generation: a step is known when the next one tells which token was taken."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self._tokens, self._pending, self._steps = None, None, []

    def record(
        self,
        input_ids: torch.LongTensor,
        patient_logits: torch.Tensor,
        doctor_logits: Sequence[torch.Tensor | None],
        guided_logps: torch.Tensor,
    ) -> None:
        """
        Remember what was said after `input_ids`. Tokens that do not go on from the ones before begin a new trace.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Prompts and completions so far.
            patient_logits, guided_logps (`torch.Tensor` of shape `(B, V)`):
                Of the next token.
            doctor_logits (sequence of `torch.Tensor` of shape `(B, V)`):
                Of the next token, of each doctor; `None` where one did not read.

        Raises:
            `ValueError`: when rows have changed places: beams have no single trace.
        """
        if self._tokens is None or input_ids[:, :-1].shape != self._tokens.shape:
            self.restart()
        elif torch.equal(input_ids[:, :-1], self._tokens):
            self._settle(input_ids[:, -1])
        else:
            raise ValueError(
                "A trace needs texts that keep their rows. Got tokens that do not go on from the step before; leave out "
                "`return_trace` with beams, or call `reset()` before other prompts."
            )
        heard = [patient_logits, *doctor_logits]
        self._tokens = input_ids.clone()
        self._pending = [None if x is None else x.float().log_softmax(dim=-1) for x in heard] + [guided_logps]

    def _settle(self, taken: torch.LongTensor) -> None:
        """Keep of each distribution the tokens (B,) that were taken."""
        index = taken[:, None]

        def of(logps: torch.Tensor | None) -> torch.Tensor:
            if logps is None:
                return torch.full(index.shape, torch.nan)
            inside = (index < logps.size(-1)).to(logps.device)
            found = logps.gather(1, index.to(logps.device).clamp(max=logps.size(-1) - 1))
            return found.masked_fill(~inside, -torch.inf).cpu()

        self._steps.append((taken.cpu(), [of(logps).squeeze(1) for logps in self._pending]))
        self._pending = None

    def finish(self, sequences: torch.LongTensor) -> GuidanceTrace:
        """
        The trace of what `generate` returned.

        Args:
            sequences (`torch.LongTensor` of shape `(B, L + T)`):
                The output of `generate`, which tells the last token.

        Raises:
            `ValueError`: when it is not the output of the generation that was traced.
        """
        if self._tokens is None or sequences.shape[1] < self._tokens.size(1) or len(sequences) != len(self._tokens):
            raise ValueError(
                "A trace is of the last generation. Got sequences of shape "
                f"{tuple(sequences.shape)}, and {'none was traced' if self._tokens is None else 'another one was'}; pass "
                "what `generate` returned."
            )
        sequences = sequences.to(self._tokens.device)
        if not torch.equal(sequences[:, : self._tokens.size(1)], self._tokens):
            raise ValueError("A trace is of the last generation. Got other tokens; pass what `generate` returned.")
        if self._pending is not None and sequences.size(1) > self._tokens.size(1):
            self._settle(sequences[:, self._tokens.size(1)])
            self._tokens = sequences.clone()
        tokens, logps = zip(*self._steps, strict=True)
        patient, *doctors, guided = (torch.stack(rows, dim=1) for rows in zip(*logps, strict=True))  # (B, T)
        return GuidanceTrace(torch.stack(tokens, dim=1), patient, torch.stack(doctors), guided)


def show_trace(
    trace: GuidanceTrace, processing_class: PreTrainedTokenizerBase, eos_token_ids: Sequence[int] = ()
) -> TokenMap:
    """
    Where the doctors changed the patient's mind, as a heat map.

    Args:
        trace ([`GuidanceTrace`]):
            From [`DoctorGuidedLogitsProcessor.trace`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        eos_token_ids (`Sequence[int]`, *optional*):
            Ids that end a text beside the tokenizer's EOS, such as those of the patient's generation config.

    Returns:
        [`TokenMap`]: a row for each text, up to its end; the shift of each token as a color.
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
    return TokenMap(rows, "⁺ likelier under guidance, ⁻ less likely; the darker, the more (log-probability, nats).")
