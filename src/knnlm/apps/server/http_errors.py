"""Every refusal and failure, as OpenAI's clients expect to see it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from knnlm.apps.server.schema import ErrorInfo, ErrorResponse

CLIENT_LEFT = 499
"""The status, seen by the metrics only, of a request whose client did not wait for the answer."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class RefusalError(Exception):
    """An answer other than 200: its HTTP status and what OpenAI's error object holds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> str:
        """Return the error object as JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        info = ErrorInfo(message=str(self), type=kind, param=self.param, code=self.code)
        return ErrorResponse(error=info).model_dump_json()

    def response(self) -> Response:
        """Return the whole answer."""
        return Response(
            self.body(), self.status, headers=self.headers, media_type="application/json"
        )


def install(app: FastAPI) -> None:
    """Answer whatever goes wrong in an app in OpenAI's way."""

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusalError)
        return error.response()

    async def refuse_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = str(error.detail)
        if error.status_code == 404:
            detail = f"there is no {request.url.path} here"
        elif error.status_code == 405:
            detail = f"{request.url.path} does not take {request.method}"
        return RefusalError(error.status_code, detail, headers=error.headers).response()

    async def refuse_body(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        message, param = _explain_validation(error.errors())
        return RefusalError(400, message, param=param).response()

    async def fail(request: Request, error: Exception) -> Response:
        return RefusalError(500, "the server failed at this request; its log says more").response()

    app.add_exception_handler(RefusalError, refuse)
    app.add_exception_handler(HTTPException, refuse_http)
    app.add_exception_handler(RequestValidationError, refuse_body)
    app.add_exception_handler(Exception, fail)


def _explain_validation(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Return one line and the field that it is about."""
    first = errors[0]
    location = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return f"the request's body must be JSON: {first['ctx']['error']}", None
    if not location:
        return f"the request's body: {_clean(first['msg'])}", None
    field = location[0]
    if first["type"] == "extra_forbidden":
        return f"{field} is not a field of this request; leave it out", field
    about_field = [error for error in errors if str(error["loc"][1]) == field]
    # one for each kind of value that the field may have
    reasons = list(dict.fromkeys(_clean(error["msg"]) for error in about_field))
    return f"{field}: {'; or: '.join(reasons[:4])}{_shown(first.get('input'))}", field


def _clean(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        return ""
    return f" (got {text})" if len(text) <= 60 else ""
