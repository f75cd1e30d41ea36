# SPDX-License-Identifier: Apache-2.0

"""
Many requests, one batch: rows join and leave between tokens, and each has its own weights, sampling and end.

Shapes: B rows, L tokens so far (left padding included), V vocabulary. A thread of its own owns models, caches and rows;
all that others touch is the queue.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenization import all_eos_token_ids
from ..decoding.doctors import check_is_doctor
from ..decoding.exponents import check_weight, default_beta, remaining_weight
from ..decoding.reading import reading_fault
from ..evaluation.completions import pad
from ..functional import guided_logps
from ..models.adapters import check_speaks, trained_exponents
from .sampling import Generation, Row
from .text import TokenTexts


logger = logging.getLogger(__name__)
NUM_SCORED = 1024  # tokens of prompts whose logits over the vocabulary are held at once


@dataclass(frozen=True)
class Limits:
    """
    What a client may ask for.

    Args:
        max_prompt_tokens (`int`, *optional*, defaults to `4096`):
            Longest prompt.
        max_new_tokens (`int`, *optional*, defaults to `2048`):
            Longest completion.
        max_rows (`int`, *optional*, defaults to `32`):
            Completions decoded at once; memory grows with it.
        max_queue (`int`, *optional*, defaults to `256`):
            Completions that wait for a row.
        max_seconds (`float`, *optional*, defaults to `600.0`):
            From the request to the last token.
        max_choices (`int`, *optional*, defaults to `8`):
            Completions of one request, over all its prompts.
        max_bytes (`int`, *optional*, defaults to `1_000_000`):
            Size of a request.
        max_body_seconds (`float`, *optional*, defaults to `30.0`):
            Until a request has arrived.

    Raises:
        `ValueError`: when a limit is not positive.
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


class Engine:
    """
    Decodes generations as they come.

    Args:
        patient ([`~transformers.PreTrainedModel`]):
            The patient, in eval mode.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, and the doctors'.
        doctors (`Mapping[str, PreTrainedModel]`):
            Doctors by name, in eval mode.
        limits ([`Limits`], *optional*):
            What a client may ask for.

    Raises:
        `ValueError`: when a model is in training mode, the patient is a doctor of guided flow, or a model has a state that
            rows cannot leave and join.
    """

    def __init__(
        self,
        patient: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        doctors: Mapping[str, PreTrainedModel],
        limits: Limits | None = None,
    ):
        self.names, self.models = list(doctors), [patient, *doctors.values()]
        for model in self.models:
            check_is_doctor(model)
        check_speaks(patient)
        self.processing_class, self.limits = processing_class, limits or Limits()
        self.texts = TokenTexts(processing_class)
        self.eos = set(all_eos_token_ids(processing_class, patient))
        self.vocab_size = min(model.get_input_embeddings().num_embeddings for model in self.models)
        trained = {name: trained_exponents(model) for name, model in doctors.items()}
        self.language_models = [name for name in self.names if not trained[name]]
        self.default_weights = {name: default_beta(x, len(self.language_models)) for name, x in trained.items()}
        sizes = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in self.models]
        self.max_positions = min(filter(None, sizes), default=2**31)
        self._check_caches()
        self._waiting: deque[Row] = deque()
        self._arrivals: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # of `num_waiting`; a listener may submit
        self.num_waiting = self.num_rows = self.num_tokens = 0
        self._rows: list[Row] = []
        self._joining: list[Row] = []
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="trl-tfpo engine", daemon=True)
        self._thread.start()

    # What others call

    def exponents(self, generation: Generation) -> tuple[float, list[float]]:
        """
        Exponents of the patient and of each doctor.

        Raises:
            `ValueError`: on an unknown doctor, weights that leave the patient less than nothing, or penalties where the
                patient has no say.
        """
        if unknown := set(generation.weights) - set(self.names):
            raise ValueError(
                f"`weights` must name doctors among {self.names}. Got {sorted(unknown)}; see `/v1/models`."
            )
        weights = {name: float(x) for name, x in (self.default_weights | dict(generation.weights)).items()}
        for name, weight in weights.items():
            check_weight(f"weights.{name}", weight)
        if generation.alpha is None:
            alpha = remaining_weight([weights[name] for name in self.language_models])
        else:
            alpha = float(generation.alpha)
            check_weight("alpha", alpha)
        if alpha <= 0 and generation.changes_patient:
            raise ValueError(
                "Penalties and `logit_bias` act on the patient, so its exponent must be above 0. Got "
                f"{alpha:.3g}; lower `weights`, raise `alpha`, or leave the penalties out."
            )
        return alpha, list(weights.values())

    def submit(self, generation: Generation) -> None:
        """
        Take a generation; its events follow.

        Raises:
            `ValueError`: on weights or sampling out of range, or a prompt that is empty or too long.
            `OverflowError`: when too many wait already.
        """
        limits, num_prompt = self.limits, len(generation.prompt_ids)
        longest = min(limits.max_prompt_tokens, self.max_positions - 1)
        if not 1 <= num_prompt <= longest:
            raise ValueError(f"The prompt must have 1 to {longest} tokens. Got {num_prompt}; shorten it.")
        generation.max_new_tokens = min(generation.max_new_tokens, self.max_positions - num_prompt)
        generation.check(self.vocab_size)
        if not 0 <= min(generation.prompt_ids) <= max(generation.prompt_ids) < self.vocab_size:
            raise ValueError(
                "The prompt must consist of tokens that all models know. Got one that is not; leave it out."
            )
        row = Row(generation, *self.exponents(generation))
        with self._lock:
            if self._is_closed or self.num_waiting >= limits.max_queue:
                raise OverflowError(f"At most {limits.max_queue} completions wait. Got one more; try again later.")
            self.num_waiting += 1
        self._arrivals.put(row)

    def close(self) -> None:
        """Stop; what is in progress ends as cancelled."""
        with self._lock:
            self._is_closed = True
        self._arrivals.put(None)
        self._thread.join()

    # The thread

    def _run(self) -> None:
        while True:
            self._welcome()
            if self._is_closed:
                for row in [*self._rows, *self._waiting]:
                    self._finish(row, "cancelled")
                return
            try:
                with torch.inference_mode():
                    self._step()
            except Exception:  # a request must end, whatever happened to the batch it was in
                logger.exception("A step failed, and %d completions with it", len(self._rows) + len(self._joining))
                for row in [*self._rows, *self._joining]:
                    self._finish(row, "error")
                self._rows, self._joining, self.num_rows = [], [], 0

    def _welcome(self) -> None:
        """Queue arrivals; sleep while there is nothing to do."""
        while not self._is_closed:
            try:
                row = self._arrivals.get(block=not self._rows and not self._waiting)
            except queue.Empty:
                return
            if row is not None:
                self._waiting.append(row)

    def _step(self) -> None:
        """Let rows join, sample a token for each, let rows leave, and read the tokens."""
        with self._lock:  # whoever hears that a row has left the queue finds room there
            num_before = len(self._waiting)
            waiting = [row for row in self._waiting if not self._is_over(row)]
            num_free = self.limits.max_rows - len(self._rows)
            self._joining, self._waiting = waiting[:num_free], deque(waiting[num_free:])
            self.num_waiting -= num_before - len(self._waiting)
        if self._joining:
            self._join(self._joining)
            self._joining = []
            self._send_prompts()
        if not self._rows:
            return
        rows = self._rows
        guided = self._guide(rows, self._logits)  # (B, V)
        decoded = self._with_changes(rows, guided)
        is_broken = decoded.isnan().any(dim=1).tolist()  # an overflow in one row is not the end of the others
        self.num_tokens += len(rows)
        stays = [
            not (self._finish(row, "error") if broken else self._take(row, row.sample(choice), logps, patient))
            for row, broken, choice, logps, patient in zip(
                rows, is_broken, decoded, guided, self._logits[0], strict=True
            )
        ]
        stays = [stay and not self._is_over(row) for row, stay in zip(rows, stays, strict=True)]
        if not all(stays):
            self._leave([index for index, stay in enumerate(stays) if stay])
        if self._rows:
            taken = torch.tensor([[row.ids[-1]] for row in self._rows])  # (B, 1)
            self._mask = torch.cat([self._mask, torch.ones_like(taken)], dim=1)
            self._logits = [
                self._read(model, cache, taken, self._mask)
                for model, cache in zip(self.models, self._caches, strict=True)
            ]

    def _join(self, joining: list[Row]) -> None:
        """Read the prompts, and put their states below those of the others."""
        ids, mask = pad([row.generation.prompt_ids for row in joining], padding_side="left", device="cpu")
        caches = [DynamicCache() for _ in self.models]
        read = zip(self.models, caches, strict=True)
        if any(row.generation.with_prompt for row in joining):
            logits = self._read_and_score(joining, list(read), ids, mask)
        else:
            logits = [self._read(model, cache, ids, mask) for model, cache in read]
        if self._rows:
            size = max(self._mask.size(1), mask.size(1))
            caches = [_stack(a, b, size) for a, b in zip(self._caches, caches, strict=True)]
            mask = torch.cat([_widen(self._mask, size, dim=1), _widen(mask, size, dim=1)])
            logits = [torch.cat(pair) for pair in zip(self._logits, logits, strict=True)]
        self._rows = self._rows + joining
        self._caches, self._mask, self._logits = caches, mask, logits
        self.num_rows = len(self._rows)

    def _read_and_score(
        self, joining: list[Row], models: list[tuple], ids: torch.Tensor, mask: torch.Tensor
    ) -> list[torch.Tensor]:
        """
        Read prompts (B, L) in parts, and score the tokens of those that are to be scored.

        Returns:
            `list[torch.Tensor]`: logits (B, V) of each model after the prompts.
        """
        num_columns, size = ids.size(1), max(NUM_SCORED // len(ids), 1)
        for start in range(0, num_columns, size):
            end = min(start + size, num_columns)
            part, seen = ids[:, start:end], mask[:, :end]
            logits = [self._read_all(model, cache, part, seen) for model, cache in models]  # (B, C, V) each
            for index, row in enumerate(joining):
                first = num_columns - len(row.generation.prompt_ids)
                begin, stop = max(start, first), min(end, num_columns - 1)
                if not row.generation.with_prompt or begin >= stop:
                    continue
                at = slice(begin - start, stop - start)
                guided = self._guide([row], [x[index : index + 1, at].to(logits[0].device) for x in logits])[0].cpu()
                row.is_broken |= bool(guided.isnan().any())
                row.prompt += [
                    self._entry(row, token, logps)
                    for token, logps in zip(ids[index, begin + 1 : stop + 1].tolist(), guided, strict=True)
                ]
        return [x[:, -1].cpu() for x in logits]

    def _send_prompts(self) -> None:
        """Send the scores of prompts that were asked for; who wanted nothing else leaves."""
        staying = []
        for index, row in enumerate(self._rows):
            if row.generation.with_prompt and not row.ids and not row.is_broken:
                first = {"id": row.generation.prompt_ids[0], "logp": None, "top": []}
                row.generation.on_event({"prompt": [first, *row.prompt]})
                row.prompt = []
            if row.is_broken or row.generation.max_new_tokens == 0:
                self._finish(row, "error" if row.is_broken else "length")
            else:
                staying.append(index)
        if len(staying) < len(self._rows):
            self._leave(staying)

    def _leave(self, staying: list[int]) -> None:
        """Keep some rows, and no more columns than the longest of them needs."""
        self._rows = [self._rows[index] for index in staying]
        self.num_rows = len(self._rows)
        if not staying:
            self._caches = self._mask = self._logits = None
            return
        index = torch.tensor(staying)
        mask = self._mask[index]
        first = int(mask.any(dim=0).int().argmax())
        self._mask = mask[:, first:]
        self._logits = [logits[index] for logits in self._logits]
        self._caches = [
            _map(cache, lambda x: x.index_select(0, index.to(x.device))[:, :, first:]) for cache in self._caches
        ]

    def _read(
        self, model: PreTrainedModel, cache: DynamicCache, ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Logits (B, V) after `ids`, which go on from the cache."""
        return self._read_all(model, cache, ids, mask, num_kept=1)[:, -1].cpu()

    def _read_all(
        self,
        model: PreTrainedModel,
        cache: DynamicCache,
        ids: torch.Tensor,
        mask: torch.Tensor,
        num_kept: int | None = None,
    ) -> torch.Tensor:
        """Logits (B, C, V) after each of the last columns of `ids`, by default of all."""
        position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.size(1) :]
        output = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            position_ids=position_ids.to(model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=num_kept or ids.size(1),
        )
        return output.logits[..., : self.vocab_size].float()

    def _guide(self, rows: list[Row], logits: list[torch.Tensor]) -> torch.Tensor:
        """Log-probabilities (B, ..., V) of the guided policy, given the logits of patient and doctors."""

        def per_row(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, device=logits[0].device).view(-1, *[1] * (logits[0].dim() - 1))

        return guided_logps(
            patient_logits=logits[0],
            doctor_logits=logits[1:],
            alpha=per_row([row.alpha for row in rows]),
            beta=[per_row([row.betas[i] for row in rows]) for i in range(len(self.names))],
        )

    def _with_changes(self, rows: list[Row], guided: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (B, V) of what is decoded: the guided policy, with the bias and penalties of each row."""
        changed = [index for index, row in enumerate(rows) if row.generation.changes_patient]
        if not changed:
            return guided
        patient = torch.stack([rows[index].change_patient(self._logits[0][index]) for index in changed])
        logits = [patient, *(x[changed] for x in self._logits[1:])]
        decoded = guided.clone()
        decoded[changed] = self._guide([rows[index] for index in changed], logits)
        return decoded

    def _entry(self, row: Row, token: int, logps: torch.Tensor) -> dict:
        """A token, its log-probability and the likeliest ones, given the log-probabilities (V,) of the guided policy."""
        top = logps.topk(min(row.generation.num_top, len(logps)))
        best = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return {"id": token, "logp": float(logps[token]), "top": best}

    def _take(self, row: Row, token: int, logps: torch.Tensor, patient_logits: torch.Tensor) -> bool:
        """Add a token to a row and send what can be shown; whether the row has come to its end."""
        generation = row.generation
        row.ids.append(token)
        row.held.append(self._entry(row, token, logps))
        if generation.with_patient:
            row.held[-1]["patient_logp"] = float(patient_logits.log_softmax(dim=-1)[token])
        is_end = token in self.eos
        ids = [x for x in row.ids if x not in self.eos]
        text = self.texts.continuation(generation.prompt_ids if generation.continues_prompt else [], ids)
        stops = [at for stop in generation.stop if (at := text.find(stop)) >= 0]
        if stops:
            return self._finish(row, "stop", text[: min(stops)])
        if is_end or len(row.ids) >= generation.max_new_tokens:
            return self._finish(row, "stop" if is_end else "length", text)
        # Held back: what may be the beginning of a stop, and bytes of a character that is not whole
        kept = max((n for stop in generation.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        safe = text[: len(text) - kept].rstrip("\ufffd")
        if len(safe) > row.num_shown:
            self._show(row, safe)
        return False

    def _show(self, row: Row, text: str) -> None:
        piece, row.num_shown = text[row.num_shown :], max(len(text), row.num_shown)
        tokens, row.held = row.held, []
        row.generation.on_event({"text": piece, "tokens": tokens})

    def _finish(self, row: Row, reason: str, text: str | None = None) -> bool:
        """Send the end, after what is left of the text; True, as the row is over."""
        if text is not None and (len(text) > row.num_shown or row.held):
            self._show(row, text)
        row.generation.on_event({"finish_reason": reason, "num_tokens": len(row.ids)})
        return True

    def _is_over(self, row: Row) -> bool:
        """Whether nobody waits for it any more, or for too long."""
        if row.generation.is_cancelled:
            return self._finish(row, "cancelled")
        if time.monotonic() - row.generation.started > self.limits.max_seconds:
            return self._finish(row, "timeout")
        return False

    def _check_caches(self) -> None:
        for name, model in zip(["the patient", *self.names], self.models, strict=True):
            if fault := reading_fault(model, "rows", partial(self._read_rows, model)):
                raise ValueError(
                    "Models must keep keys and values of all tokens, so that requests can share a batch. Got "
                    f"{name}, a {type(model).__name__}, which does not ({fault}); serve a transformer."
                )

    def _read_rows(self, model: PreTrainedModel, text: torch.LongTensor) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """Two requests, of which one joins the other."""
        text, caches, places = text.cpu(), [DynamicCache(), DynamicCache()], [8, 2]
        for cache, last in zip(caches, places, strict=True):
            ids = text[None, : last + 1]
            yield self._read(model, cache, ids, torch.ones_like(ids)), [last]
        cache, mask = _stack(*caches, size=9), _widen(torch.ones(1, 3, dtype=torch.long), 9, dim=1)
        mask = torch.cat([torch.ones_like(mask), mask])
        for _ in range(2):
            places = [place + 1 for place in places]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            yield self._read(model, cache, text[places][:, None], mask), places


def _map(cache: DynamicCache, function: Callable[[torch.Tensor], torch.Tensor]) -> DynamicCache:
    """A cache of what a function makes of all keys and values, (B, heads, L, size) each."""
    mapped = DynamicCache()
    for index, layer in enumerate(cache.layers):
        mapped.update(function(layer.keys), function(layer.values), index)
    return mapped


def _stack(above: DynamicCache, below: DynamicCache, size: int) -> DynamicCache:
    """The rows of two caches, with padding on the left to `size` tokens."""
    stacked = DynamicCache()
    for index, (a, b) in enumerate(zip(above.layers, below.layers, strict=True)):
        states = [
            torch.cat([_widen(x, size, dim=2), _widen(y, size, dim=2)])
            for x, y in ((a.keys, b.keys), (a.values, b.values))
        ]
        stacked.update(*states, index)
    return stacked


def _widen(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Zeros before `x` along a dimension, up to a size."""
    missing = size - x.size(dim)
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x.new_zeros(shape), x], dim=dim)
