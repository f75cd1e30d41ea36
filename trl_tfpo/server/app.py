# SPDX-License-Identifier: Apache-2.0

"""The engine behind HTTP."""

import asyncio
import hmac
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from jinja2 import TemplateError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..data.rendering import reserved_variables
from ..data.tokenization import tokenize_prompt
from .engine import Engine, Generation
from .protocol import NOT_SUPPORTED, ChatRequest, Sampling, TextRequest
from .responses import Answer, server_sent
from .text import BROKEN


class ApiError(Exception):
    """An answer with a status and OpenAI's error body."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error"):
        self.status, self.message, self.kind = status, message, kind


def make_app(
    engine: Engine,
    *,
    model_name: str,
    api_key: str | None = None,
    aliases: Mapping[str, Mapping[str, float]] | None = None,
) -> FastAPI:
    """
    The HTTP interface of an engine.

    Args:
        engine ([`Engine`]):
            What decodes. It is closed when the server stops.
        model_name (`str`):
            What clients call the patient; no other model is ever loaded.
        api_key (`str`, *optional*):
            Key that clients must send. Without it all may ask.
        aliases (`Mapping[str, Mapping[str, float]]`, *optional*):
            Further names, each with weights of doctors. A request for such a model has these weights, unless it brings its
            own.

    Returns:
        `fastapi.FastAPI`: with `/v1/models`, `/v1/chat/completions`, `/v1/completions`, `/health` and `/metrics`.

    Raises:
        `ValueError`: when a name or the key is empty, a name is given twice, or the weights of an alias make no sense.
    """

    aliases = {name: dict(weights) for name, weights in (aliases or {}).items()}
    if not all([model_name, *aliases]) or api_key == "":
        raise ValueError(
            f"Models must have names, and a key characters. Got the names {[model_name, *aliases]}"
            f"{' and an empty key' if api_key == '' else ''}; leave out `api_key` if all may ask."
        )
    if model_name in aliases:
        raise ValueError(f"An alias must have a name of its own. Got {model_name!r}, the patient's; choose another.")
    models = {}  # weights of all doctors, by the name of the model
    for name, weights in {model_name: {}, **aliases}.items():
        try:
            engine.exponents(Generation([], on_event=lambda event: None, weights=weights))
        except ValueError as error:
            raise ValueError(f"Alias {name!r}: {error}") from error
        models[name] = engine.default_weights | weights

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    # A redirect would name the host that the client named, and by HTTP where a proxy speaks HTTPS
    app = FastAPI(title="trl-tfpo", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    registry = CollectorRegistry()
    requests = Counter("trl_tfpo_requests", "Requests by path and status", ["path", "status"], registry=registry)
    seconds = Histogram("trl_tfpo_request_seconds", "Time until the last token", registry=registry)
    for name, help_text, function in (
        ("trl_tfpo_rows", "Completions being decoded", lambda: engine.num_rows),
        ("trl_tfpo_waiting", "Completions that wait", lambda: engine.num_waiting),
        ("trl_tfpo_generated_tokens", "Tokens generated", lambda: engine.num_tokens),
    ):
        Gauge(name, help_text, registry=registry).set_function(function)

    @app.middleware("http")
    async def guard(request: Request, call_next):
        """Key and size, before anything is read; and a count of what was answered."""
        response = None
        # The path of the scope is the one that is routed. That of `request.url` contains the Host header
        is_health = request.scope["method"] == "GET" and request.scope["path"] == "/health"
        if not is_health and api_key is not None and not _has_key(request, api_key):
            response = _error(401, "A valid key must be sent as `Authorization: Bearer KEY`.", "authentication_error")
        size = request.headers.get("content-length", "")
        if response is None and request.method == "POST":
            if not size.isdecimal() or "transfer-encoding" in request.headers:
                response = _error(
                    411, "A request must say its length. Send `Content-Length`, and no `Transfer-Encoding`."
                )
            elif int(size) > engine.limits.max_bytes:
                response = _error(
                    413, f"A request must have at most {engine.limits.max_bytes} bytes. Got {size}; shorten it."
                )
            else:
                try:
                    await asyncio.wait_for(request.body(), timeout=engine.limits.max_body_seconds)
                except (TimeoutError, ClientDisconnect):
                    response = _error(
                        408, f"A request must arrive within {engine.limits.max_body_seconds} seconds; send it at once."
                    )
        response = response or await call_next(request)
        route = request.scope.get("route")
        requests.labels(path=getattr(route, "path", "other"), status=response.status_code).inc()
        return response

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError):
        return _error(error.status, error.message, error.kind)

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException):
        return _error(error.status_code, f"{error.detail}: {request.method} {request.scope['path']}")

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError):
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        message = f"{'.'.join(where) or 'The body'}: {first['msg'].removeprefix('Value error, ')}"
        remedy = "; this is not supported otherwise, leave it out" if NOT_SUPPORTED & set(where) else ""
        return _error(400, message + remedy)

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(generate_latest(registry))

    def describe(name: str) -> dict:
        return {"id": name, "object": "model", "created": 0, "owned_by": "trl-tfpo", "doctors": models[name]}

    def check_model(name: str) -> None:
        if name not in models:
            must = " or ".join(map(repr, models))
            raise ApiError(404, f"The model must be {must}. Got {name!r}; see `/v1/models`.", "not_found_error")

    @app.get("/v1/models")
    async def list_models():
        return {"object": "list", "data": [describe(name) for name in models]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str):
        check_model(name)
        return describe(name)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request):
        check_model(body.model)
        try:
            template = _check_template_kwargs(body.chat_template_kwargs, engine.processing_class)
            messages = [message.to_template() for message in body.messages]
            prompt_ids = tokenize_prompt(messages, engine.processing_class, **template)
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ApiError(400, f"The conversation must fit the chat template. Got an error: {error}") from error
        limit = body.max_completion_tokens or body.max_tokens
        return await answer(body, request, [prompt_ids], limit, body.top_logprobs, with_logps=body.logprobs)

    @app.post("/v1/completions")
    async def complete(body: TextRequest, request: Request):
        check_model(body.model)
        prompts = [
            tokenize_prompt(prompt, engine.processing_class) if isinstance(prompt, str) else prompt
            for prompt in body.prompts
        ]
        echoes = None
        if body.echo:
            given = zip(body.prompts, prompts, strict=True)
            echoes = [
                text if isinstance(text, str) else engine.texts.decode(ids).rstrip(BROKEN) for text, ids in given
            ]
        limit = min(16, engine.limits.max_new_tokens) if body.max_tokens is None else body.max_tokens
        with_logps = body.logprobs is not None
        return await answer(body, request, prompts, limit, body.logprobs or 0, with_logps=with_logps, echoes=echoes)

    async def answer(
        body: Sampling,
        request: Request,
        prompts: list[list[int]],
        limit: int | None,
        num_top: int,
        *,
        with_logps: bool,
        echoes: list[str] | None = None,
    ):
        """Hand the choices to the engine, `n` for each prompt; stream their events, or collect them."""
        limits, start = engine.limits, time.monotonic()
        if len(prompts) * body.n > limits.max_choices:
            raise ApiError(
                400,
                f"`n` times the number of prompts must be at most {limits.max_choices}. Got {len(prompts) * body.n}; ask "
                "again for more.",
            )
        if limit is not None and limit > limits.max_new_tokens:
            raise ApiError(400, f"`max_tokens` must be at most {limits.max_new_tokens}. Got {limit}; lower it.")
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def listener(index: int):
            def on_event(event: dict) -> None:
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

            return on_event

        is_chat = isinstance(body, ChatRequest)
        generations = [
            Generation(
                prompt_ids=list(prompt_ids),
                on_event=listener(index * body.n + number),
                alpha=body.alpha,
                weights=aliases.get(body.model, {}) | body.weights,
                max_new_tokens=limits.max_new_tokens if limit is None else limit,
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
                with_prompt=echoes is not None and (with_logps or limit == 0),
                continues_prompt=not is_chat,
            )
            for index, prompt_ids in enumerate(prompts)
            for number in range(body.n)
        ]

        def cancel() -> None:
            for generation in generations:
                generation.is_cancelled = True

        try:
            for generation in generations:
                engine.submit(generation)
        except ValueError as error:
            cancel()
            raise ApiError(400, str(error)) from error
        except OverflowError as error:
            cancel()
            raise ApiError(429, str(error), "rate_limit_error") from error

        form = Answer(
            model=body.model,
            is_chat=is_chat,
            texts=engine.texts,
            prompts=[generation.prompt_ids for generation in generations],
            echoes=None if echoes is None else [text for text in echoes for _ in range(body.n)],
            with_logps=with_logps,
            num_prompt_tokens=sum(map(len, prompts)),
        )

        async def all_events() -> AsyncIterator[tuple[int, dict]]:
            """Events of all choices, until each has come to its end."""
            num_open, checked = len(generations), time.monotonic()
            try:
                while num_open:
                    if time.monotonic() - checked > 0.5:  # whether anybody still listens
                        checked = time.monotonic()
                        if await request.is_disconnected():
                            return
                    try:
                        index, event = await asyncio.wait_for(events.get(), timeout=0.5)
                    except TimeoutError:
                        continue
                    num_open -= "finish_reason" in event
                    yield index, event
            finally:
                cancel()
                seconds.observe(time.monotonic() - start)

        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            no_usage = {"usage": None} if with_usage else {}

            async def stream() -> AsyncIterator[str]:
                for chunk in form.first_chunks():
                    yield server_sent(chunk | no_usage)
                async for index, event in all_events():
                    if event.get("finish_reason") in ("timeout", "error", "cancelled"):
                        message = f"The completion ended early: {event['finish_reason']}."
                        yield server_sent(_error_body(message, "server_error"))
                        return
                    yield server_sent(form.chunk(index, event) | no_usage)
                if with_usage:
                    yield server_sent(form.last_chunk())
                yield "data: [DONE]\n\n"

            return StreamingResponse(stream(), media_type="text/event-stream", headers={"cache-control": "no-store"})

        whole = [[] for _ in generations]
        async for index, event in all_events():
            if event.get("finish_reason") == "timeout":
                raise ApiError(
                    504,
                    f"A completion must end within {limits.max_seconds} seconds; lower `max_tokens`.",
                    "timeout_error",
                )
            if event.get("finish_reason") in ("error", "cancelled"):
                raise ApiError(500, "The completion ended early; try again.", "server_error")
            whole[index].append(event)
        if not all(of_choice and "finish_reason" in of_choice[-1] for of_choice in whole):
            raise ApiError(499, "The client is gone.", "server_error")
        return form.whole(whole)

    return app


def _has_key(request: Request, api_key: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Headers are decoded as Latin-1: so come back the bytes that were sent
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), api_key.encode())


def _check_template_kwargs(given: dict, processing_class) -> dict:
    """
    Variables for the chat template.

    Raises:
        `ApiError`: for one that the template does not mention, or that is an argument of `apply_chat_template`. An unknown
            one that is false is left out, as an undefined variable is false.
    """
    reserved = reserved_variables(processing_class)
    template = processing_class.get_chat_template() if given else ""
    used = {}
    for name, value in given.items():
        is_known = name.isidentifier() and re.search(rf"\b{name}\b", template)
        if name in reserved or (value and not is_known):
            raise ApiError(
                400,
                f"`chat_template_kwargs` must be variables of the chat template. Got {name!r}; leave it out.",
            )
        if is_known:
            used[name] = value
    return used


def _error_body(message: str, kind: str) -> dict:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _error(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
    return JSONResponse(_error_body(message, kind), status_code=status)
