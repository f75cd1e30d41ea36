# SPDX-License-Identifier: Apache-2.0

"""Errors in the format of OpenAI's API."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .protocol import NOT_SUPPORTED


class ApiError(Exception):
    """An error for the client: an HTTP status, a message, and OpenAI's type and code of the error."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.kind, self.code = status, message, kind, code

    @property
    def body(self) -> dict[str, object]:
        """The body of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": None, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body, status_code=self.status)


def handle_errors(app: FastAPI) -> None:
    """Register handlers that return errors of an app in the format of OpenAI's API."""

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> JSONResponse:
        return error.response

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, f"{error.detail}: {request.method} {request.scope['path']}").response

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        location = [str(part) for part in first["loc"] if part != "body"]
        message = f"{'.'.join(location) or 'The body'}: {first['msg'].removeprefix('Value error, ')}"
        remedy = "; other values are not supported, so leave it out" if NOT_SUPPORTED & set(location) else ""
        return ApiError(400, message + remedy).response
