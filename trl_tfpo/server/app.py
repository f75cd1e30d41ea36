# SPDX-License-Identifier: Apache-2.0

"""The HTTP interface of an engine."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI

from .endpoints import Endpoints
from .engine import Engine
from .errors import handle_errors
from .generation import Generation
from .metrics import Metrics
from .middleware import RequestGuard


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
            Name of the patient in requests.
        api_key (`str`, *optional*):
            Key that clients must send. By default they need no key.
        aliases (`Mapping[str, Mapping[str, float]]`, *optional*):
            Further model names, with exponents of doctors for requests with that name. `weights` of the request take
            precedence.

    Returns:
        `fastapi.FastAPI`: app with `/v1/models`, `/v1/chat/completions`, `/v1/completions`, `/health` and `/metrics`.

    Raises:
        `ValueError`: when a name or the key is empty, an alias is the name of the patient, or [`Engine.exponents`]
            refuses the exponents of an alias.
    """
    aliases = aliases or {}
    names = [model_name, *aliases]
    if not all(names) or api_key == "":
        raise ValueError(
            f"Models must have names, and a key must not be empty. Got the names {names}"
            f"{' and an empty key' if api_key == '' else ''}; leave out `api_key` if no key is needed, and name all "
            "models."
        )
    if model_name in aliases:
        raise ValueError(f"An alias must differ from the name of the patient. Got {model_name!r}; choose another.")
    models = {model_name: engine.default_weights}
    models |= {name: _all_weights(engine, name, weights) for name, weights in aliases.items()}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    # Redirects would contain the client's Host header, and `http` behind an HTTPS proxy
    app = FastAPI(title="trl-tfpo", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = Metrics(engine)
    app.middleware("http")(RequestGuard(engine.limits, api_key, metrics.requests))
    handle_errors(app)
    endpoints = Endpoints(engine, models, metrics)
    for method, path, endpoint in (
        ("GET", "/health", endpoints.health),
        ("GET", "/metrics", endpoints.metrics),
        ("GET", "/v1/models", endpoints.list_models),
        ("GET", "/v1/models/{name:path}", endpoints.get_model),
        ("POST", "/v1/chat/completions", endpoints.chat),
        ("POST", "/v1/completions", endpoints.complete),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    return app


def _all_weights(engine: Engine, alias: str, weights: Mapping[str, float]) -> dict[str, float]:
    """Return the exponents of all doctors for an alias, or raise `ValueError` if the engine refuses them."""
    try:
        engine.exponents(Generation([], on_event=lambda event: None, weights=weights))
    except ValueError as error:
        raise ValueError(f"Alias {alias!r}: {error}") from error
    return engine.default_weights | dict(weights)
