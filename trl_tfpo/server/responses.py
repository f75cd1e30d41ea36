# SPDX-License-Identifier: Apache-2.0

"""Bodies of responses in OpenAI's format, whole and in chunks."""

import json
import time
import uuid
from collections.abc import Iterator, Sequence

from .generation import Event
from .token_texts import TokenTexts


LOWEST_LOGP = -9999.0  # replaces lower values, because JSON has no minus infinity
Json = dict[str, object]


class Answer:
    """
    The answer to a request, in OpenAI's format.

    Args:
        model (`str`):
            Model name in the request.
        is_chat (`bool`):
            Whether the choices are chat completions.
        texts ([`TokenTexts`]):
            Texts of tokens.
        prompts (sequence of `list[int]`):
            Token ids of the prompt, for each choice.
        echoes (sequence of `str`, *optional*):
            Text of the prompt, for each choice, if choices begin with it.
        with_logps (`bool`, *optional*, defaults to `False`):
            Whether the choices have log-probabilities.
        with_ids (`bool`, *optional*, defaults to `False`):
            Whether whole answers have the token ids of prompt and completion.
        num_prompt_tokens (`int`, *optional*, defaults to `0`):
            Total number of tokens in the prompts, not repeated for several choices.
    """

    def __init__(
        self,
        *,
        model: str,
        is_chat: bool,
        texts: TokenTexts,
        prompts: Sequence[list[int]],
        echoes: Sequence[str] | None = None,
        with_logps: bool = False,
        with_ids: bool = False,
        num_prompt_tokens: int = 0,
    ):
        self.is_chat, self.texts, self.with_logps = is_chat, texts, with_logps
        self.prompts = prompts if with_ids else None
        self.num_prompt_tokens, self.num_tokens = num_prompt_tokens, 0
        prefix = "chatcmpl" if is_chat else "cmpl"
        self.head: Json = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.echoes = echoes or []
        self.echoes_first = bool(echoes) and not with_logps  # otherwise the prompt comes with its scores
        # The last token of each choice decides whether the text of its next token begins with a space
        self.last = [None if is_chat or (echoes and with_logps) else ids[-1] for ids in prompts]

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of tokens so far."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_tokens,
        }

    def first_chunks(self) -> Iterator[Json]:
        """Yield the chunks before the first token: the role, or the prompt."""
        for index in range(len(self.last)):
            if self.is_chat:
                yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})
            elif self.echoes_first:
                yield self._chunk(index, {"text": self.echoes[index]})

    def chunk(self, index: int, event: Event) -> Json:
        """Return the chunk of an event."""
        self.num_tokens += event.get("num_tokens", 0)
        reason, text = event.get("finish_reason"), self._text(index, event)
        content: Json = {"delta": {} if reason else {"content": text}} if self.is_chat else {"text": text}
        return self._chunk(index, content, self._logprobs(index, event), reason)

    def last_chunk(self) -> Json:
        """Return the chunk with the usage and no choices."""
        return self.head | {"object": self._object(True), "choices": [], "usage": self.usage}

    def whole(self, events: Sequence[Sequence[Event]]) -> Json:
        """Return the whole answer, given the events of each choice."""
        choices = []
        for index, choice_events in enumerate(events):
            text = "".join(self._text(index, event) for event in choice_events)
            if self.echoes_first:
                text = self.echoes[index] + text
            end = choice_events[-1]
            self.num_tokens += end["num_tokens"]
            logps = None
            if self.with_logps:
                keys = ["content"] if self.is_chat else ["tokens", "token_logprobs", "top_logprobs"]
                parts = [x for event in choice_events if (x := self._logprobs(index, event)) is not None]
                logps = {key: [x for part in parts for x in part[key]] for key in keys}
            content: Json = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
            if self.prompts is not None:
                ids = [token["id"] for event in choice_events for token in event.get("tokens", [])]
                content |= {"prompt_token_ids": self.prompts[index], "token_ids": ids}
            choices.append({"index": index, **content, "logprobs": logps, "finish_reason": end["finish_reason"]})
        return self.head | {"object": self._object(False), "choices": choices, "usage": self.usage}

    def _object(self, is_chunk: bool) -> str:
        return ("chat.completion.chunk" if is_chunk else "chat.completion") if self.is_chat else "text_completion"

    def _chunk(
        self, index: int, content: Json, logps: dict[str, list] | None = None, reason: str | None = None
    ) -> Json:
        choice = {"index": index, **content, "logprobs": logps, "finish_reason": reason}
        return self.head | {"object": self._object(True), "choices": [choice]}

    def _text(self, index: int, event: Event) -> str:
        if "prompt" in event:
            return "" if self.echoes_first else self.echoes[index]
        return event.get("text", "")

    def _logprobs(self, index: int, event: Event) -> dict[str, list] | None:
        """Return the log-probabilities of the tokens of an event, or `None` without tokens or `with_logps`."""
        tokens = event.get("prompt") or event.get("tokens")
        if not (self.with_logps and tokens):
            return None
        entries, likeliest = [], []
        for token in tokens:
            before = self.last[index]
            entries.append(self._entry(token["id"], token["logp"], before))
            likeliest.append([self._entry(token_id, logp, before) for token_id, logp in token["top"]])
            self.last[index] = token["id"]
        if self.is_chat:
            pairs = zip(entries, likeliest, strict=True)
            return {"content": [entry | {"top_logprobs": top} for entry, top in pairs]}
        return {
            "tokens": [x["token"] for x in entries],
            "token_logprobs": [x["logprob"] for x in entries],
            "top_logprobs": [
                # The token itself is included, even if it is not among the likeliest
                None if x["logprob"] is None else {y["token"]: y["logprob"] for y in [x, *top]}
                for x, top in zip(entries, likeliest, strict=True)
            ],
        }

    def _entry(self, token_id: int, logp: float | None, before: int | None) -> Json:
        text, spelled = self.texts.spell(token_id, before)
        return {"token": text, "logprob": None if logp is None else max(logp, LOWEST_LOGP), "bytes": list(spelled)}


def server_sent_event(data: Json) -> str:
    """Encode data as a server-sent event."""
    return f"data: {json.dumps(data)}\n\n"
