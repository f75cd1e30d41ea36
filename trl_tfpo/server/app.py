# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The engine behind HTTP."""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from jinja2 import TemplateError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..tokenization import tokenize_prompt
from .engine import Engine, Generation
from .protocol import ChatRequest, TextRequest


class ApiError(Exception):
    """An answer with a status and OpenAI's error body."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error"):
        self.status, self.message, self.kind = status, message, kind


def make_app(engine: Engine, *, model_name: str, api_key: str | None = None) -> FastAPI:
    """
    The HTTP interface of an engine.

    Args:
        engine ([`Engine`]):
            What decodes. It is closed when the server stops.
        model_name (`str`):
            What clients call the patient; no other model is ever loaded.
        api_key (`str`, *optional*):
            Key that clients must send. Without it all may ask.

    Returns:
        `fastapi.FastAPI`: with `/v1/models`, `/v1/chat/completions`, `/v1/completions`, `/health` and `/metrics`.

    Raises:
        `ValueError`: when the name or the key is empty.
    """

    if not model_name or api_key == "":
        raise ValueError(
            f"The model must have a name, and a key characters. Got the name {model_name!r}"
            f"{' and an empty key' if api_key == '' else ''}; leave out `api_key` if all may ask."
        )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="trl-tfpo", lifespan=lifespan, docs_url=None, redoc_url=None)
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
        path = request.url.path
        response = None
        if path != "/health" and api_key is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), api_key.encode()):
                response = _error(
                    401, "A valid key must be sent as `Authorization: Bearer KEY`.", "authentication_error"
                )
        size = request.headers.get("content-length")
        if response is None and request.method == "POST":
            if size is None or not size.isdigit():
                response = _error(411, "A request must say its length. Got none; send `Content-Length`.")
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
        return _error(error.status_code, f"{error.detail}: {request.method} {request.url.path}")

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(400, f"{where or 'The body'}: {first['msg']}")

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(generate_latest(registry))

    @app.get("/v1/models")
    async def models():
        entry = {"id": model_name, "object": "model", "created": 0, "owned_by": "trl-tfpo"}
        return {"object": "list", "data": [entry | {"doctors": engine.default_weights}]}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request):
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        try:
            prompt_ids = tokenize_prompt(messages, engine.processing_class)
        except (TemplateError, ValueError) as error:
            raise ApiError(400, f"The conversation must fit the chat template. Got an error: {error}") from error
        num_top = body.top_logprobs if body.logprobs else 0
        limit = body.max_completion_tokens or body.max_tokens
        return await answer(body, request, prompt_ids, limit, num_top, body.logprobs, "chat.completion")

    @app.post("/v1/completions")
    async def complete(body: TextRequest, request: Request):
        prompt_ids = tokenize_prompt(body.prompt, engine.processing_class)
        wanted = body.logprobs is not None
        limit = body.max_tokens or min(16, engine.limits.max_new_tokens)
        return await answer(body, request, prompt_ids, limit, body.logprobs or 0, wanted, "text_completion")

    async def answer(body, request: Request, prompt_ids, limit, num_top: int, with_logps: bool, kind: str):
        """Hand the choices to the engine; stream their events, or collect them."""
        limits, start = engine.limits, time.monotonic()
        if body.model != model_name:
            raise ApiError(
                404, f"The model must be {model_name!r}. Got {body.model!r}; see `/v1/models`.", "not_found_error"
            )
        if body.n > limits.max_choices:
            raise ApiError(400, f"`n` must be at most {limits.max_choices}. Got {body.n}; ask again for more.")
        if limit is not None and limit > limits.max_new_tokens:
            raise ApiError(400, f"`max_tokens` must be at most {limits.max_new_tokens}. Got {limit}; lower it.")
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def listener(index: int):
            def on_event(event: dict) -> None:
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

            return on_event

        generations = [
            Generation(
                prompt_ids=list(prompt_ids),
                on_event=listener(index),
                alpha=body.alpha,
                weights=body.weights,
                max_new_tokens=limit or limits.max_new_tokens,
                temperature=body.temperature,
                top_p=body.top_p,
                stop=body.stop,
                seed=None if body.seed is None else (body.seed + index) % 2**63,
                num_top=num_top,
            )
            for index in range(body.n)
        ]
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}

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

        def piece(index: int, event: dict, is_chunk: bool) -> dict:
            """A choice in OpenAI's form."""
            text, reason = event.get("text", ""), event.get("finish_reason")
            choice = {"index": index, "finish_reason": reason, "logprobs": None}
            if with_logps and event.get("tokens"):
                choice["logprobs"] = _logprobs(engine.processing_class, event["tokens"], kind)
            if kind == "text_completion":
                return choice | {"text": text}
            message = {"content": text} if is_chunk else {"role": "assistant", "content": text}
            return choice | {"delta" if is_chunk else "message": {} if reason and is_chunk else message}

        if body.stream:

            async def stream() -> AsyncIterator[str]:
                object_name = "chat.completion.chunk" if kind == "chat.completion" else kind
                async for index, event in all_events():
                    if event.get("finish_reason") in ("timeout", "error", "cancelled"):
                        message = f"The completion ended early: {event['finish_reason']}."
                        yield _event(
                            {"error": {"message": message, "type": "server_error", "code": None, "param": None}}
                        )
                        return
                    yield _event(head | {"object": object_name, "choices": [piece(index, event, True)]})
                yield "data: [DONE]\n\n"

            return StreamingResponse(stream(), media_type="text/event-stream", headers={"cache-control": "no-store"})

        whole = [{"text": "", "tokens": []} for _ in generations]
        async for index, event in all_events():
            if event.get("finish_reason") == "timeout":
                raise ApiError(
                    504,
                    f"A completion must end within {limits.max_seconds} seconds; lower `max_tokens`.",
                    "timeout_error",
                )
            if event.get("finish_reason") in ("error", "cancelled"):
                raise ApiError(500, "The completion ended early; try again.", "server_error")
            whole[index]["text"] += event.get("text", "")
            whole[index]["tokens"] += event.get("tokens", [])
            if "finish_reason" in event:
                whole[index] |= {"finish_reason": event["finish_reason"], "num_tokens": event["num_tokens"]}
        num_new = sum(choice.get("num_tokens", 0) for choice in whole)
        usage = {"prompt_tokens": len(prompt_ids), "completion_tokens": num_new}
        usage["total_tokens"] = len(prompt_ids) + num_new
        choices = [piece(index, choice, False) for index, choice in enumerate(whole)]
        return head | {"object": kind, "choices": choices, "usage": usage}

    return app


def _error(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status_code=status)


def _event(data: dict) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _logprobs(processing_class, tokens: list[dict], kind: str) -> dict:
    """Log-probabilities in OpenAI's two forms."""

    def entry(token_id: int, logp: float) -> dict:
        text = processing_class.decode([token_id])
        return {"token": text, "logprob": max(logp, -9999.0), "bytes": list(text.encode())}

    if kind == "chat.completion":
        return {
            "content": [
                entry(x["id"], x["logp"]) | {"top_logprobs": [entry(*best) for best in x["top"]]} for x in tokens
            ]
        }
    entries = [entry(x["id"], x["logp"]) for x in tokens]
    return {
        "tokens": [x["token"] for x in entries],
        "token_logprobs": [x["logprob"] for x in entries],
        "top_logprobs": [{(y := entry(*best))["token"]: y["logprob"] for best in x["top"]} for x in tokens],
    }
