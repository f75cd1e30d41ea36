# SPDX-License-Identifier: Apache-2.0

"""OpenAI's answers, whole and in chunks."""

import json
import time
import uuid
from collections.abc import Iterator

from .text import TokenTexts


FLOOR = -9999.0  # of log-probabilities, as JSON has no minus infinity


class Answer:
    """
    The choices of a request, in OpenAI's form.

    Args:
        model (`str`):
            What the request calls the model.
        is_chat (`bool`):
            Whether it is a chat completion.
        texts ([`TokenTexts`]):
            Spells tokens.
        prompts (`list[list[int]]`):
            Token ids of the prompt of each choice.
        echoes (`list[str]`, *optional*):
            Text of the prompt of each choice, where it is to be said again.
        with_logps (`bool`, *optional*, defaults to `False`):
            Whether choices have log-probabilities.
        num_prompt_tokens (`int`, *optional*, defaults to `0`):
            Tokens of all prompts, each once.
    """

    def __init__(
        self,
        *,
        model: str,
        is_chat: bool,
        texts: TokenTexts,
        prompts: list[list[int]],
        echoes: list[str] | None = None,
        with_logps: bool = False,
        num_prompt_tokens: int = 0,
    ):
        self.is_chat, self.texts, self.echoes, self.with_logps = is_chat, texts, echoes, with_logps
        self.num_prompt_tokens, self.num_tokens = num_prompt_tokens, 0
        prefix = "chatcmpl" if is_chat else "cmpl"
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        # The token before the next one, whose text may begin with the space between them
        self.last = [None if is_chat or (echoes and with_logps) else ids[-1] for ids in prompts]

    @property
    def usage(self) -> dict:
        """Tokens so far."""
        total = self.num_prompt_tokens + self.num_tokens
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": total,
        }

    def first_chunks(self) -> Iterator[dict]:
        """What comes before any token: who speaks, or the prompt."""
        for index in range(len(self.last)):
            if self.is_chat:
                yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})
            elif self.echoes and not self.with_logps:
                yield self._chunk(index, {"text": self.echoes[index]})

    def chunk(self, index: int, event: dict) -> dict:
        """An event of a choice."""
        self.num_tokens += event.get("num_tokens", 0)
        reason, text = event.get("finish_reason"), self._text(index, event)
        said = {"delta": {} if reason else {"content": text}} if self.is_chat else {"text": text}
        return self._chunk(index, said, self._logprobs(index, event), reason)

    def last_chunk(self) -> dict:
        """The usage, without a choice."""
        return self.head | {"object": self._object(True), "choices": [], "usage": self.usage}

    def whole(self, events: list[list[dict]]) -> dict:
        """The answer, given all events of each choice."""
        choices = []
        for index, of_choice in enumerate(events):
            text = "".join(self._text(index, event) for event in of_choice)
            if self.echoes and not self.with_logps:
                text = self.echoes[index] + text
            end = of_choice[-1]
            self.num_tokens += end["num_tokens"]
            parts = [x for event in of_choice if (x := self._logprobs(index, event)) is not None]
            keys = ["content"] if self.is_chat else ["tokens", "token_logprobs", "top_logprobs"]
            logps = {key: [x for part in parts for x in part[key]] for key in keys} if self.with_logps else None
            said = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
            choices.append({"index": index} | said | {"logprobs": logps, "finish_reason": end["finish_reason"]})
        return self.head | {"object": self._object(False), "choices": choices, "usage": self.usage}

    def _object(self, is_chunk: bool) -> str:
        return ("chat.completion.chunk" if is_chunk else "chat.completion") if self.is_chat else "text_completion"

    def _chunk(self, index: int, said: dict, logps: dict | None = None, reason: str | None = None) -> dict:
        choice = {"index": index} | said | {"logprobs": logps, "finish_reason": reason}
        return self.head | {"object": self._object(True), "choices": [choice]}

    def _text(self, index: int, event: dict) -> str:
        if "prompt" in event:  # without log-probabilities the echo came first
            return self.echoes[index] if self.with_logps else ""
        return event.get("text", "")

    def _logprobs(self, index: int, event: dict) -> dict | None:
        """Log-probabilities of the tokens of an event."""
        tokens = event.get("prompt") or event.get("tokens")
        if not (self.with_logps and tokens):
            return None
        entries = []
        for token in tokens:
            before = self.last[index]
            best = [self._entry(token_id, logp, before) for token_id, logp in token["top"]]
            entries.append(self._entry(token["id"], token["logp"], before) | {"top_logprobs": best})
            self.last[index] = token["id"]
        if self.is_chat:
            return {"content": entries}
        return {
            "tokens": [x["token"] for x in entries],
            "token_logprobs": [x["logprob"] for x in entries],
            "top_logprobs": [
                # The token itself, too, also where it is not among the likeliest
                None if x["logprob"] is None else {y["token"]: y["logprob"] for y in [x, *x["top_logprobs"]]}
                for x in entries
            ],
        }

    def _entry(self, token_id: int, logp: float | None, before: int | None) -> dict:
        text, spelled = self.texts.spell(token_id, before)
        return {"token": text, "logprob": None if logp is None else max(logp, FLOOR), "bytes": list(spelled)}


def server_sent(data: dict) -> str:
    """An event of a stream."""
    return f"data: {json.dumps(data)}\n\n"
