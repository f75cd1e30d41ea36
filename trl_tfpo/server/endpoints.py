# SPDX-License-Identifier: Apache-2.0

"""The endpoints of the server."""

import re
from collections.abc import AsyncIterator, Mapping, Sequence

from fastapi import Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..data.rendering import reserved_variables
from ..data.tokenization import tokenize_prompt
from .choices import Choices
from .engine import Engine
from .errors import ApiError
from .metrics import Metrics
from .protocol import ChatRequest, Sampling, TemplateValue, TextRequest
from .responses import Answer, server_sent
from .sampling import Event, Generation
from .text import REPLACEMENT


class Endpoints:
    """One method for each path. `models` are exponents of all doctors, by the name that requests ask for."""

    def __init__(self, engine: Engine, models: Mapping[str, Mapping[str, float]], metrics: Metrics):
        self.engine, self.models, self._metrics = engine, models, metrics

    async def health(self) -> dict[str, str]:
        """Report that the server is running."""
        return {"status": "ok"}

    async def metrics(self) -> PlainTextResponse:
        """Report metrics to Prometheus."""
        return PlainTextResponse(self._metrics.report())

    async def list_models(self) -> dict[str, object]:
        """List the names that requests may ask for."""
        return {"object": "list", "data": [self._describe(name) for name in self.models]}

    async def one_model(self, name: str) -> dict[str, object]:
        """Describe one of the models."""
        self._check_model(name)
        return self._describe(name)

    async def chat(self, body: ChatRequest, request: Request) -> Response | dict[str, object]:
        """Complete a conversation."""
        self._check_model(body.model)
        return await self._answer(
            body,
            request,
            [self._read_conversation(body)],
            max_new_tokens=body.max_completion_tokens or body.max_tokens,
            num_top=body.top_logprobs,
            with_logps=body.logprobs,
        )

    async def complete(self, body: TextRequest, request: Request) -> Response | dict[str, object]:
        """Complete texts."""
        self._check_model(body.model)
        tokenizer = self.engine.processing_class
        prompts = [tokenize_prompt(x, tokenizer) if isinstance(x, str) else x for x in body.prompts]
        echoes = [self._text_of(prompt) for prompt in body.prompts] if body.echo else None
        default = min(16, self.engine.limits.max_new_tokens)  # OpenAI's
        return await self._answer(
            body,
            request,
            prompts,
            max_new_tokens=default if body.max_tokens is None else body.max_tokens,
            num_top=body.logprobs or 0,
            with_logps=body.logprobs is not None,
            with_ids=body.return_token_ids,
            echoes=echoes,
        )

    def _describe(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "trl-tfpo", "doctors": self.models[name]}

    def _check_model(self, name: str) -> None:
        if name not in self.models:
            known = " or ".join(map(repr, self.models))
            raise ApiError(404, f"The model must be {known}. Got {name!r}; see `/v1/models`.", "not_found_error")

    def _text_of(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.engine.texts.decode(prompt).rstrip(REPLACEMENT)

    def _read_conversation(self, body: ChatRequest) -> list[int]:
        """Tokenize a conversation by the chat template."""
        tokenizer = self.engine.processing_class
        try:
            variables = template_variables(body.chat_template_kwargs, tokenizer)
            return tokenize_prompt([message.to_template() for message in body.messages], tokenizer, **variables)
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ApiError(400, f"The conversation must fit the chat template. Got an error: {error}") from error

    async def _answer(
        self,
        body: Sampling,
        request: Request,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int | None,
        num_top: int,
        with_logps: bool,
        with_ids: bool = False,
        echoes: Sequence[str] | None = None,
    ) -> Response | dict[str, object]:
        """Complete prompts, `n` times each: a stream, or the whole answer. `echoes` are prompts to begin with."""
        longest = self.engine.limits.max_new_tokens
        if max_new_tokens is None:
            max_new_tokens = longest
        self._check_limits(len(prompts) * body.n, max_new_tokens)
        choices, is_chat = Choices(self.engine, self._metrics.seconds), isinstance(body, ChatRequest)
        generations = [
            Generation(
                prompt_ids=list(prompt_ids),
                on_event=choices.listener(index * body.n + number),
                alpha=body.alpha,
                weights={**self.models[body.model], **body.weights},
                max_new_tokens=max_new_tokens,
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=max(body.top_k, 0),
                min_p=body.min_p,
                repetition_penalty=body.repetition_penalty,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                logit_bias=body.logit_bias,
                stop=body.stop,
                seed=None if body.seed is None else (body.seed + number) % 2**63,
                num_top=num_top,
                with_prompt=echoes is not None and (with_logps or max_new_tokens == 0),
                continues_prompt=not is_chat,
            )
            for index, prompt_ids in enumerate(prompts)
            for number in range(body.n)
        ]
        choices.submit(generations)
        answer = Answer(
            model=body.model,
            is_chat=is_chat,
            texts=self.engine.texts,
            prompts=[generation.prompt_ids for generation in generations],
            echoes=None if echoes is None else [text for text in echoes for _ in range(body.n)],
            with_logps=with_logps,
            with_ids=with_ids,
            num_prompt_tokens=sum(map(len, prompts)),
        )
        events = choices.events(request)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            chunks = stream(answer, events, with_usage)
            return StreamingResponse(chunks, media_type="text/event-stream", headers={"cache-control": "no-store"})
        return answer.whole(await self._collect(events, len(generations)))

    def _check_limits(self, num_choices: int, max_new_tokens: int) -> None:
        limits = self.engine.limits
        if num_choices > limits.max_choices:
            raise ApiError(
                400,
                f"`n` times the number of prompts must be at most {limits.max_choices}. Got {num_choices}; split the "
                "request.",
            )
        if max_new_tokens > limits.max_new_tokens:
            raise ApiError(
                400, f"`max_tokens` must be at most {limits.max_new_tokens}. Got {max_new_tokens}; lower it."
            )

    async def _collect(self, events: AsyncIterator[tuple[int, Event]], num_choices: int) -> list[list[Event]]:
        """Return the events of each choice, or raise `ApiError` if a completion ended early or the client has gone."""
        collected: list[list[Event]] = [[] for _ in range(num_choices)]
        async for index, event in events:
            reason = event.get("finish_reason")
            if reason == "timeout":
                limit = self.engine.limits.max_seconds
                message = f"A completion must end within {limit} seconds; lower `max_tokens`."
                raise ApiError(504, message, "timeout_error")
            if reason in ("error", "cancelled"):
                raise ApiError(500, "The completion ended early; try again.", "server_error")
            collected[index].append(event)
        if not all(of_choice and "finish_reason" in of_choice[-1] for of_choice in collected):
            raise ApiError(499, "The client is gone.", "server_error")
        return collected


async def stream(answer: Answer, events: AsyncIterator[tuple[int, Event]], with_usage: bool) -> AsyncIterator[str]:
    """Yield an answer as server-sent events, while it is generated."""
    no_usage = {"usage": None} if with_usage else {}
    for chunk in answer.first_chunks():
        yield server_sent(chunk | no_usage)
    async for index, event in events:
        if event.get("finish_reason") in ("timeout", "error", "cancelled"):
            message = f"The completion ended early: {event['finish_reason']}."
            yield server_sent(ApiError(500, message, "server_error").body)
            return
        yield server_sent(answer.chunk(index, event) | no_usage)
    if with_usage:
        yield server_sent(answer.last_chunk())
    yield "data: [DONE]\n\n"


def template_variables(
    given: Mapping[str, TemplateValue], processing_class: PreTrainedTokenizerBase
) -> dict[str, TemplateValue]:
    """
    Return the variables that a chat template knows.

    A false value of an unknown variable is left out: an undefined variable is false.

    Raises:
        `ApiError`: for another value of an unknown variable, and for arguments of `apply_chat_template`.
    """
    reserved = reserved_variables(processing_class)
    template = processing_class.get_chat_template() if given else ""
    known = {}
    for name, value in given.items():
        is_known = name.isidentifier() and re.search(rf"\b{name}\b", template)
        if name in reserved or (value and not is_known):
            raise ApiError(
                400, f"`chat_template_kwargs` must be variables of the chat template. Got {name!r}; leave it out."
            )
        if is_known:
            known[name] = value
    return known
