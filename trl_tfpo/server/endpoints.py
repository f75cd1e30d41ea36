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
from .generation import Event, Generation
from .metrics import Metrics
from .protocol import ChatRequest, Sampling, TemplateValue, TextRequest
from .responses import Answer, server_sent_event
from .token_texts import REPLACEMENT


class Endpoints:
    """One method for each path. `models` contains the exponents of all doctors, by model name."""

    def __init__(self, engine: Engine, models: Mapping[str, Mapping[str, float]], metrics: Metrics):
        self.engine, self.models, self._metrics = engine, models, metrics

    async def health(self) -> dict[str, str]:
        """Return `ok` while the server is running."""
        return {"status": "ok"}

    async def metrics(self) -> PlainTextResponse:
        """Return the metrics in the text format of Prometheus."""
        return PlainTextResponse(self._metrics.report())

    async def list_models(self) -> dict[str, object]:
        """List the models."""
        return {"object": "list", "data": [self._describe(name) for name in self.models]}

    async def get_model(self, name: str) -> dict[str, object]:
        """Describe one model."""
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
        decode = self.engine.texts.decode
        texts = (x if isinstance(x, str) else decode(x).rstrip(REPLACEMENT) for x in body.prompts)
        default = min(16, self.engine.limits.max_new_tokens)  # 16 is OpenAI's default
        return await self._answer(
            body,
            request,
            prompts,
            max_new_tokens=default if body.max_tokens is None else body.max_tokens,
            num_top=body.logprobs or 0,
            with_logps=body.logprobs is not None,
            with_ids=body.return_token_ids,
            echoes=list(texts) if body.echo else None,
        )

    def _describe(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "trl-tfpo", "doctors": self.models[name]}

    def _check_model(self, name: str) -> None:
        if name not in self.models:
            known = " or ".join(map(repr, self.models))
            raise ApiError(404, f"The model must be {known}. Got {name!r}; see `/v1/models`.", "not_found_error")

    def _read_conversation(self, body: ChatRequest) -> list[int]:
        """Tokenize a conversation with the chat template."""
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
        """Complete each prompt `n` times. Choices begin with the texts in `echoes`, one for each prompt."""
        if max_new_tokens is None:
            max_new_tokens = self.engine.limits.max_new_tokens
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
        for name, value, limit in (
            ("`n` times the number of prompts", num_choices, limits.max_choices),
            ("`max_tokens` or `max_completion_tokens`", max_new_tokens, limits.max_new_tokens),
        ):
            if value > limit:
                raise ApiError(400, f"{name} must be at most {limit}. Got {value}; lower it.")

    async def _collect(self, events: AsyncIterator[tuple[int, Event]], num_choices: int) -> list[list[Event]]:
        """Return the events of each choice, or raise `ApiError` if a choice fails or the client disconnects."""
        collected: list[list[Event]] = [[] for _ in range(num_choices)]
        async for index, event in events:
            reason = event.get("finish_reason")
            if reason == "timeout":
                limit = self.engine.limits.max_seconds
                raise ApiError(
                    504, f"A completion must end within {limit} seconds; lower `max_tokens`.", "timeout_error"
                )
            if reason in ("error", "cancelled"):
                raise ApiError(500, "The completion ended early; try again.", "server_error")
            collected[index].append(event)
        if not all(choice and "finish_reason" in choice[-1] for choice in collected):
            raise ApiError(499, "The client has disconnected.", "server_error")
        return collected


async def stream(answer: Answer, events: AsyncIterator[tuple[int, Event]], with_usage: bool) -> AsyncIterator[str]:
    """Yield an answer as server-sent events during generation."""
    no_usage = {"usage": None} if with_usage else {}
    for chunk in answer.first_chunks():
        yield server_sent_event(chunk | no_usage)
    async for index, event in events:
        if event.get("finish_reason") in ("timeout", "error", "cancelled"):
            message = f"The completion ended early: {event['finish_reason']}."
            yield server_sent_event(ApiError(500, message, "server_error").body)
            return
        yield server_sent_event(answer.chunk(index, event) | no_usage)
    if with_usage:
        yield server_sent_event(answer.last_chunk())
    yield "data: [DONE]\n\n"


def template_variables(
    given: Mapping[str, TemplateValue], processing_class: PreTrainedTokenizerBase
) -> dict[str, TemplateValue]:
    """
    Return the variables that the chat template uses. Other variables are dropped if they are false, 0 or empty.

    Raises:
        `ApiError`: on variables that the template does not use and that have another value, and on arguments of
            `apply_chat_template`.
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
