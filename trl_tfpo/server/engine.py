# SPDX-License-Identifier: Apache-2.0

"""
Continuous batching: completions join and leave the batch between tokens.

Each completion has its own exponents and sampling settings. One thread owns the models, their caches and the rows.
Other threads send it completions through a queue.

Shapes: B rows, L tokens so far (left padding included), C columns in one forward pass, V vocabulary.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from ..common.language_model import LanguageModel, unwrap_peft
from ..data.tokenization import all_eos_token_ids
from ..decoding.doctors import check_causal_lm
from ..decoding.exponents import check_exponent, default_beta, remaining_exponent
from ..decoding.reading import reading_fault
from ..evaluation.completions import pad
from ..functional import guided_logps
from ..models.trained_exponents import check_is_language_model, trained_exponents
from .batch import Batch
from .generation import Event, Generation, Row, TokenScore
from .token_texts import REPLACEMENT, TokenTexts


logger = logging.getLogger(__name__)
NUM_SCORED = 1024  # prompt tokens per forward pass when prompts are scored


@dataclass(frozen=True)
class Limits:
    """
    Limits on requests.

    Args:
        max_prompt_tokens (`int`, *optional*, defaults to `4096`):
            Maximum length of a prompt, in tokens.
        max_new_tokens (`int`, *optional*, defaults to `2048`):
            Maximum length of a completion, in tokens. The app enforces it, not [`Engine`].
        max_rows (`int`, *optional*, defaults to `32`):
            Maximum number of completions in the batch. The memory of the caches grows with it.
        max_queue (`int`, *optional*, defaults to `256`):
            Maximum number of waiting completions.
        max_seconds (`float`, *optional*, defaults to `600.0`):
            Maximum time from the request to the last token, in seconds.
        max_choices (`int`, *optional*, defaults to `8`):
            Maximum number of completions of a request, over all its prompts.
        max_bytes (`int`, *optional*, defaults to `1_000_000`):
            Maximum size of a request, in bytes.
        max_body_seconds (`float`, *optional*, defaults to `30.0`):
            Maximum time until the body of a request has arrived, in seconds.

    Raises:
        `ValueError`: when a limit is not positive. Only `max_queue` may be 0.
    """

    max_prompt_tokens: int = 4096
    max_new_tokens: int = 2048
    max_rows: int = 32
    max_queue: int = 256
    max_seconds: float = 600.0
    max_choices: int = 8
    max_bytes: int = 1_000_000
    max_body_seconds: float = 30.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (value > 0 or (name == "max_queue" and value == 0)):
                raise ValueError(f"`{name}` must be positive. Got {value}; leave it out for the default.")


class PromptTooLong(ValueError):
    """A prompt that has more tokens than the models or the limits allow."""


class Engine:
    """
    Decodes the completions of many clients in one batch.

    Args:
        patient ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The patient, in eval mode.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of patient and doctors.
        doctors (mapping from `str` to [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Doctors by name, in eval mode.
        limits ([`Limits`], *optional*):
            Limits on requests.

    Attributes:
        default_weights (`dict[str, float]`): default exponent of each doctor.
        num_tokens (`int`): number of tokens sampled so far.
        num_waiting (`int`): number of waiting completions.

    Raises:
        `ValueError`: when a model is not a causal language model in eval mode, the patient is a doctor of guided flow,
            or a model has a state other than keys and values. Rows of such a model cannot join and leave a batch.
    """

    def __init__(
        self,
        patient: LanguageModel,
        processing_class: PreTrainedTokenizerBase,
        doctors: Mapping[str, LanguageModel],
        limits: Limits | None = None,
    ):
        self.names, self.models = list(doctors), [patient, *doctors.values()]
        for model in self.models:
            check_causal_lm(model, "The patient" if model is patient else "A doctor")
        check_is_language_model(patient)
        self.processing_class, self.limits = processing_class, limits or Limits()
        self.texts = TokenTexts(processing_class)
        self.eos = set(all_eos_token_ids(processing_class, patient))
        embeddings: list[Any] = [unwrap_peft(model).get_input_embeddings() for model in self.models]
        self.vocab_size: int = min(x.num_embeddings for x in embeddings)
        trained = {name: trained_exponents(model) for name, model in doctors.items()}
        self.language_models = [name for name in self.names if not trained[name]]
        self.default_weights = {name: default_beta(x, len(self.language_models)) for name, x in trained.items()}
        sizes = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in self.models]
        self.max_positions: int = min(filter(None, sizes), default=2**31)
        self._check_caches()
        self._arrivals: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # guards `num_waiting`; reentrant, because a listener may submit
        self._is_closed = False
        self.num_waiting = self.num_tokens = 0
        # Used by the engine's thread only
        self._waiting: deque[Row] = deque()
        self._joining: list[Row] = []
        self._batch: Batch | None = None
        self._thread = threading.Thread(target=self._run, name="trl-tfpo engine", daemon=True)
        self._thread.start()

    @property
    def num_rows(self) -> int:
        """Number of completions in the batch."""
        batch = self._batch
        return len(batch.rows) if batch else 0

    def exponents(self, generation: Generation) -> tuple[float, list[float]]:
        """
        Return the exponents of the patient and of each doctor.

        Raises:
            `ValueError`: on unknown doctors, exponents that are not finite, exponents of language models above 1 in
                sum without `alpha`, and penalties without a positive exponent of the patient.
        """
        if unknown := set(generation.weights) - set(self.names):
            raise ValueError(
                f"`weights` must name doctors among {self.names}. Got {sorted(unknown)}; see `/v1/models`."
            )
        weights = {name: float(x) for name, x in (self.default_weights | dict(generation.weights)).items()}
        for name, weight in weights.items():
            check_exponent(f"weights.{name}", weight)
        if generation.alpha is None:
            alpha = remaining_exponent([weights[name] for name in self.language_models])
        else:
            alpha = float(generation.alpha)
            check_exponent("alpha", alpha)
        if alpha <= 0 and generation.adjusts_patient:
            raise ValueError(
                "Penalties and `logit_bias` act on the patient, so its exponent must be above 0. Got "
                f"{alpha:.3g}; lower `weights`, raise `alpha`, or leave out the penalties."
            )
        return alpha, list(weights.values())

    def submit(self, generation: Generation) -> None:
        """
        Queue a generation.

        Raises:
            `ValueError`: on exponents that [`Engine.exponents`] refuses, sampling settings out of range, and prompts
                that are empty, are too long or contain unknown ids.
            `OverflowError`: when the queue is full or the engine is closed.
        """
        limits, num_prompt = self.limits, len(generation.prompt_ids)
        longest = min(limits.max_prompt_tokens, self.max_positions - 1)
        if not 1 <= num_prompt <= longest:
            error = PromptTooLong if num_prompt else ValueError
            raise error(f"The prompt must have 1 to {longest} tokens. Got {num_prompt}; change its length.")
        generation.max_new_tokens = min(generation.max_new_tokens, self.max_positions - num_prompt)
        generation.check(self.vocab_size)
        if unknown := [x for x in generation.prompt_ids if not 0 <= x < self.vocab_size]:
            raise ValueError(
                f"The prompt must consist of ids that all models know, from 0 to {self.vocab_size - 1}. Got "
                f"{unknown[0]}; leave it out."
            )
        row = Row(generation, *self.exponents(generation))
        with self._lock:
            if self._is_closed or self.num_waiting >= limits.max_queue:
                raise OverflowError(
                    f"At most {limits.max_queue} completions can wait, and none in a closed engine. Got one more; try "
                    "again later."
                )
            self.num_waiting += 1
            self._arrivals.put(row)  # before `close`, which waits for the lock

    def close(self) -> None:
        """Stop the thread. Unfinished completions end as cancelled."""
        with self._lock:
            self._is_closed = True
        self._arrivals.put(None)
        self._thread.join()

    # The engine's thread

    def _run(self) -> None:
        while True:
            self._receive()
            if self._is_closed:
                for row in [*self._rows_in_progress(), *self._waiting]:
                    self._finish(row, "cancelled")
                return
            try:
                with torch.inference_mode():
                    self._step()
            except Exception:  # every client must receive a final event
                failed = self._rows_in_progress()
                logger.exception("A step failed; %d completions end with an error", len(failed))
                for row in failed:
                    self._finish(row, "error")
                self._batch, self._joining = None, []

    def _rows_in_progress(self) -> list[Row]:
        return [*(self._batch.rows if self._batch else []), *self._joining]

    def _receive(self) -> None:
        """Move arrivals to the waiting rows. Wait for an arrival if there are no rows and the engine is open."""
        while True:
            try:
                row = self._arrivals.get(block=not (self._batch or self._waiting or self._is_closed))
            except queue.Empty:
                return
            if row is not None:
                self._waiting.append(row)

    def _step(self) -> None:
        """Admit waiting rows, sample a token for each row, remove finished rows, and read the tokens."""
        self._admit()
        if self._batch is not None:
            self._keep_rows(self._batch, self._sample(self._batch))
        if self._batch is not None:
            batch = self._batch
            new_ids = torch.tensor([[row.ids[-1]] for row in batch.rows])  # (B, 1)
            batch.mask = torch.cat([batch.mask, torch.ones_like(new_ids)], dim=1)
            read = zip(self.models, batch.caches, strict=True)
            batch.logits = [self._read(model, cache, new_ids, batch.mask) for model, cache in read]

    def _admit(self) -> None:
        """Move waiting rows to the batch, up to `max_rows`."""
        with self._lock:  # clients may submit as soon as a row ends, and must then find `num_waiting` updated
            num_before = len(self._waiting)
            waiting = [row for row in self._waiting if not self._finish_if_expired(row)]
            num_free = self.limits.max_rows - self.num_rows
            self._joining, self._waiting = waiting[:num_free], deque(waiting[num_free:])
            self.num_waiting -= num_before - len(self._waiting)
        if self._joining:
            joining = self._read_prompts(self._joining)
            self._batch = self._batch.join(joining) if self._batch else joining
            self._joining = []
            self._keep_rows(self._batch, self._send_prompt_scores(self._batch))

    def _keep_rows(self, batch: Batch, indices: list[int]) -> None:
        """Keep the rows at `indices`, and remove the others from the batch."""
        if len(indices) < len(batch.rows):
            self._batch = batch.select(indices) if indices else None

    def _read_prompts(self, rows: list[Row]) -> Batch:
        """Read the prompts of rows, and score prompts with `with_prompt`."""
        ids, mask = pad([row.generation.prompt_ids for row in rows], padding_side="left", device=torch.device("cpu"))
        caches = [DynamicCache() for _ in self.models]
        read = list(zip(self.models, caches, strict=True))
        if any(row.generation.with_prompt for row in rows):
            logits = self._read_and_score(rows, read, ids, mask)
        else:
            logits = [self._read(model, cache, ids, mask) for model, cache in read]
        return Batch(rows, mask, caches, logits)

    def _read_and_score(
        self, rows: list[Row], models: list[tuple[LanguageModel, DynamicCache]], ids: torch.Tensor, mask: torch.Tensor
    ) -> list[torch.Tensor]:
        """Read prompts (B, L) in parts, and score prompts with `with_prompt`. Returns the last logits (B, V)."""
        num_columns, size = ids.size(1), max(NUM_SCORED // len(ids), 1)
        for start in range(0, num_columns, size):
            end = min(start + size, num_columns)
            part, mask_so_far = ids[:, start:end], mask[:, :end]
            logits = [self._read_all(model, cache, part, mask_so_far) for model, cache in models]  # (B, C, V) each
            for index, row in enumerate(rows):
                first = num_columns - len(row.generation.prompt_ids)
                begin, stop = max(start, first), min(end, num_columns - 1)
                if not row.generation.with_prompt or begin >= stop:
                    continue
                at = slice(begin - start, stop - start)
                guided = self._guide([row], [x[index : index + 1, at].to(logits[0].device) for x in logits])[0].cpu()
                row.has_nan |= bool(guided.isnan().any())
                next_ids = ids[index, begin + 1 : stop + 1].tolist()
                row.prompt_scores += [self._score(row, x, logps) for x, logps in zip(next_ids, guided, strict=True)]
        return [x[:, -1].cpu() for x in logits]

    def _send_prompt_scores(self, batch: Batch) -> list[int]:
        """Send the scores of new prompts. Returns the indices of rows that need tokens."""
        continuing = []
        for index, row in enumerate(batch.rows):
            generation = row.generation
            if generation.with_prompt and not row.ids and not row.has_nan:
                first = TokenScore(id=generation.prompt_ids[0], logp=None, top=[])
                self._notify(row, {"prompt": [first, *row.prompt_scores]})
                row.prompt_scores = []
            if row.has_nan or generation.max_new_tokens == 0:
                self._finish(row, "error" if row.has_nan else "length")
            else:
                continuing.append(index)
        return continuing

    def _sample(self, batch: Batch) -> list[int]:
        """Sample a token for each row. Returns the indices of unfinished rows."""
        guided = self._guide(batch.rows, batch.logits)  # (B, V)
        decoded = self._adjusted(batch, guided)
        has_nan = decoded.isnan().any(dim=1).tolist()  # a NaN ends only its own row
        self.num_tokens += len(batch.rows)
        continuing = []
        for index, row in enumerate(batch.rows):
            if has_nan[index]:
                self._finish(row, "error")
                continue
            token = row.sample(decoded[index])
            is_end = self._add_token(row, token, guided[index], batch.logits[0][index])
            if not is_end and not self._finish_if_expired(row):
                continuing.append(index)
        return continuing

    def _read(self, model: LanguageModel, cache: DynamicCache, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Read `ids` (B, C) after the cached tokens. Returns the last logits (B, V)."""
        return self._read_all(model, cache, ids, mask, num_kept=1)[:, -1].cpu()

    def _read_all(
        self, model: LanguageModel, cache: DynamicCache, ids: torch.Tensor, mask: torch.Tensor, num_kept: int = 0
    ) -> torch.Tensor:
        """Read `ids` (B, C) after the cached tokens. Returns the last logits (B, num_kept, V); 0 keeps all."""
        position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.size(1) :]
        output = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            position_ids=position_ids.to(model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=num_kept,
        )
        return output.logits[..., : self.vocab_size].float()

    def _guide(self, rows: list[Row], logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Compute log-probabilities (B, ..., V) of the guided policy from the logits of patient and doctors."""

        def per_row(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, device=logits[0].device).view(-1, *[1] * (logits[0].dim() - 1))

        return guided_logps(
            patient_logits=logits[0],
            doctor_logits=logits[1:],
            alpha=per_row([row.alpha for row in rows]),
            beta=[per_row([row.betas[i] for row in rows]) for i in range(len(self.names))],
        )

    def _adjusted(self, batch: Batch, guided: torch.Tensor) -> torch.Tensor:
        """Return the guided policy (B, V) with the bias and penalties of each row."""
        changed = [index for index, row in enumerate(batch.rows) if row.generation.adjusts_patient]
        if not changed:
            return guided
        patient = torch.stack([batch.rows[index].adjust_patient_logits(batch.logits[0][index]) for index in changed])
        logits = [patient, *(x[changed] for x in batch.logits[1:])]
        decoded = guided.clone()
        decoded[changed] = self._guide([batch.rows[index] for index in changed], logits)
        return decoded

    def _score(self, row: Row, token: int, logps: torch.Tensor) -> TokenScore:
        """Score a token, given log-probabilities (V,) of the guided policy."""
        top = logps.topk(min(row.generation.num_top, len(logps)))
        likeliest = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return {"id": token, "logp": float(logps[token]), "top": likeliest}

    def _add_token(self, row: Row, token: int, logps: torch.Tensor, patient_logits: torch.Tensor) -> bool:
        """Add a token to a row, and send text that can no longer change. Returns whether the row is finished."""
        generation = row.generation
        score = self._score(row, token, logps)
        if generation.with_patient:
            score["patient_logp"] = float(patient_logits.log_softmax(dim=-1)[token])
        row.ids.append(token)
        row.unsent.append(score)
        ids = [x for x in row.ids if x not in self.eos]
        text = self.texts.continuation(generation.prompt_ids if generation.continues_prompt else [], ids)
        stops = [at for stop in generation.stop if (at := text.find(stop)) >= 0]
        if stops:
            self._finish(row, "stop", text[: min(stops)])
        elif token in self.eos:
            self._finish(row, "stop", text)
        elif len(row.ids) >= generation.max_new_tokens:
            self._finish(row, "length", text)
        else:
            final = _without_partial_stop(text, generation.stop).rstrip(REPLACEMENT)
            if len(final) > row.num_sent:
                self._send(row, final)
            return False
        return True

    def _send(self, row: Row, text: str) -> None:
        """Send the new part of the text of a row, with its tokens."""
        piece, row.num_sent = text[row.num_sent :], max(len(text), row.num_sent)
        tokens, row.unsent = row.unsent, []
        self._notify(row, {"text": piece, "tokens": tokens})

    def _notify(self, row: Row, event: Event) -> None:
        """Send an event. If the listener raises an error, only its own completion ends."""
        try:
            row.generation.on_event(event)
        except Exception:
            logger.exception("A listener failed; its completion is cancelled")
            row.generation.is_cancelled = True

    def _finish(self, row: Row, reason: str, text: str | None = None) -> None:
        """Send the rest of the text and the final event."""
        if text is not None and (len(text) > row.num_sent or row.unsent):
            self._send(row, text)
        self._notify(row, {"finish_reason": reason, "num_tokens": len(row.ids)})

    def _finish_if_expired(self, row: Row) -> bool:
        """Finish a row that is cancelled or out of time. Returns whether the row was finished."""
        is_late = time.monotonic() - row.generation.started > self.limits.max_seconds
        if row.generation.is_cancelled or is_late:
            self._finish(row, "cancelled" if row.generation.is_cancelled else "timeout")
            return True
        return False

    def _check_caches(self) -> None:
        """Raise `ValueError` when the cache of a model does not support changing rows."""
        for name, model in zip(["the patient", *self.names], self.models, strict=True):
            if fault := reading_fault(model, "rows", partial(self._read_rows, model)):
                raise ValueError(
                    "Models must keep keys and values of all tokens, so that requests can share a batch. Got "
                    f"{name}, a {type(model).__name__}, which does not ({fault}); serve a transformer."
                )

    def _read_rows(self, model: LanguageModel, text: torch.Tensor) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """Read two prefixes of a text alone, then both as rows of one batch."""
        ids, places, batches = text.cpu(), [8, 2], []
        for last in places:
            prefix, cache = ids[None, : last + 1], DynamicCache()
            mask = torch.ones_like(prefix)
            logits = self._read(model, cache, prefix, mask)
            yield logits, [last]
            batches.append(Batch([], mask, [cache], [logits]))
        batch = batches[0].join(batches[1])
        for _ in range(2):
            places = [place + 1 for place in places]
            batch.mask = torch.cat([batch.mask, torch.ones_like(batch.mask[:, :1])], dim=1)
            yield self._read(model, batch.caches[0], ids[places][:, None], batch.mask), places


def _without_partial_stop(text: str, stops: Sequence[str]) -> str:
    """Return a text without its longest suffix that is a prefix of a stop text."""
    num_held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - num_held]
