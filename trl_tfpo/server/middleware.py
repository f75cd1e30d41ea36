# SPDX-License-Identifier: Apache-2.0

"""Middleware that checks the key, size and arrival time of requests, and counts responses."""

import asyncio
import hmac

from fastapi import Request, Response
from prometheus_client import Counter
from starlette.middleware.base import RequestResponseEndpoint
from starlette.requests import ClientDisconnect

from .engine import Limits
from .errors import ApiError


class RequestGuard:
    """HTTP middleware of all endpoints. If there is an `api_key`, all requests except `GET /health` need it."""

    def __init__(self, limits: Limits, api_key: str | None, num_requests: Counter):
        self.limits, self.api_key, self.num_requests = limits, api_key, num_requests

    async def __call__(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Pass a request to its endpoint, or refuse it."""
        try:
            self._check_key(request)
            if request.method == "POST":
                self._check_size(request)
                await self._receive_body(request)
            response = await call_next(request)
        except ApiError as error:
            response = error.response
        path = getattr(request.scope.get("route"), "path", "other")
        self.num_requests.labels(path=path, status=response.status_code).inc()
        return response

    def _check_key(self, request: Request) -> None:
        # The path of the scope is the routed one. `request.url` depends on the Host header
        is_health = request.scope["method"] == "GET" and request.scope["path"] == "/health"
        if self.api_key is None or is_health:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        key = given.strip().encode("latin-1")  # undoes the decoding of headers
        if scheme.lower() != "bearer" or not hmac.compare_digest(key, self.api_key.encode()):
            raise ApiError(401, "A valid key must be sent as `Authorization: Bearer KEY`.", "authentication_error")

    def _check_size(self, request: Request) -> None:
        size = request.headers.get("content-length", "")
        if not size.isdecimal() or "transfer-encoding" in request.headers:
            raise ApiError(411, "A request must state its length. Send `Content-Length`, and no `Transfer-Encoding`.")
        if int(size) > self.limits.max_bytes:
            raise ApiError(413, f"A request must have at most {self.limits.max_bytes} bytes. Got {size}; shorten it.")

    async def _receive_body(self, request: Request) -> None:
        limit = self.limits.max_body_seconds
        try:
            await asyncio.wait_for(request.body(), timeout=limit)
        except (TimeoutError, ClientDisconnect) as error:
            raise ApiError(408, f"A request must arrive within {limit} seconds; send it at once.") from error
