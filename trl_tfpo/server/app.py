# SPDX-License-Identifier: Apache-2.0

"""The HTTP interface of an engine."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI

from .endpoints import Endpoints
from .engine import Engine
from .errors import handle_errors
from .guard import Guard
from .metrics import Metrics
from .sampling import Generation


def make_app(
    engine: Engine,
    *,
    model_name: str,
    api_key: str | None = None,
    aliases: Mapping[str, Mapping[str, float]] | None = None,
) -> FastAPI:
    """
    Make the HTTP interface of an engine.

    Args:
        engine ([`Engine`]):
            Decodes the completions. The app closes it when the server stops.
        model_name (`str`):
            Name of the patient in requests. No other model is ever loaded.
        api_key (`str`, *optional*):
            Key that clients must send. By default none is needed.
        aliases (`Mapping[str, Mapping[str, float]]`, *optional*):
            Further model names, each with exponents of doctors. A request for such a name has these exponents, except
            those that are in its own `weights`.

    Returns:
        `fastapi.FastAPI`: with `/v1/models`, `/v1/chat/completions`, `/v1/completions`, `/health` and `/metrics`.

    Raises:
        `ValueError`: when a name or the key is empty, an alias is the name of the patient, or the engine refuses the
            exponents of an alias, see [`Engine.exponents`].
    """
    aliases = aliases or {}
    names = [model_name, *aliases]
    if not all(names) or api_key == "":
        raise ValueError(
            f"Models must have names, and a key must not be empty. Got the names {names}"
            f"{' and an empty key' if api_key == '' else ''}; leave out `api_key` if no key is needed."
        )
    if model_name in aliases:
        raise ValueError(f"An alias must have a name of its own. Got {model_name!r}, the patient's; choose another.")
    models = {model_name: engine.default_weights}
    models |= {name: _all_weights(engine, name, weights) for name, weights in aliases.items()}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    # No redirects: they would contain the Host header of the client, and `http` where a proxy speaks HTTPS
    app = FastAPI(title="trl-tfpo", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = Metrics(engine)
    app.middleware("http")(Guard(engine.limits, api_key, metrics.requests))
    handle_errors(app)
    endpoints = Endpoints(engine, models, metrics)
    for method, path, endpoint in (
        ("GET", "/health", endpoints.health),
        ("GET", "/metrics", endpoints.metrics),
        ("GET", "/v1/models", endpoints.list_models),
        ("GET", "/v1/models/{name:path}", endpoints.one_model),
        ("POST", "/v1/chat/completions", endpoints.chat),
        ("POST", "/v1/completions", endpoints.complete),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    return app


def _all_weights(engine: Engine, alias: str, weights: Mapping[str, float]) -> dict[str, float]:
    """Return the exponents of all doctors for an alias, or raise `ValueError` where the engine would refuse them."""
    try:
        engine.exponents(Generation([], on_event=lambda event: None, weights=weights))
    except ValueError as error:
        raise ValueError(f"Alias {alias!r}: {error}") from error
    return engine.default_weights | dict(weights)
