"""Errors as OpenAI's clients expect them: a status and an error object."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from knnlm.apps.engine.jobs import Failed
from knnlm.apps.server.schema import UNSUPPORTED, ErrorInfo, ErrorResponse

CLIENT_LEFT = 499
"""The status, seen only by the metrics, of a request whose client left before the response."""
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request is refused."},
    "5XX": {"model": ErrorResponse, "description": "The server failed, or is stopping."},
}
"""The errors of every route, for the API's description."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class HTTPError(Exception):
    """A response other than 200: its HTTP status, and the fields of OpenAI's error object."""

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
        """Return the whole response."""
        return Response(
            self.body(), self.status, headers=self.headers, media_type="application/json"
        )


def job_error(failed: Failed) -> HTTPError:
    """Return the error for a request whose job has failed."""
    return HTTPError(400 if failed.invalid else 503 if failed.unavailable else 500, failed.message)


def add_to(app: FastAPI) -> None:
    """Turn every error in an app into OpenAI's form."""

    @app.exception_handler(HTTPError)
    async def respond(request: Request, error: HTTPError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def respond_to_router(request: Request, error: HTTPException) -> Response:
        detail = str(error.detail)
        if error.status_code == 404:
            detail = f"there is no {request.url.path} here"
        elif error.status_code == 405:
            detail = f"{request.url.path} does not take {request.method}"
        return HTTPError(error.status_code, detail, headers=error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def respond_to_invalid_body(request: Request, error: RequestValidationError) -> Response:
        return _explain_validation(error.errors()).response()

    @app.exception_handler(Exception)
    async def respond_to_failure(request: Request, error: Exception) -> Response:
        return HTTPError(500, "the server failed at this request; its log says more").response()


def _explain_validation(errors: Sequence[Mapping[str, Any]]) -> HTTPError:
    """Return an error whose message is one line, about the first field that is wrong."""
    # what the protocol has and this server does not says more than what follows from it
    first = next((error for error in errors if error["type"] == UNSUPPORTED), errors[0])
    location = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return HTTPError(400, f"the request's body must be JSON: {first['ctx']['error']}")
    if not location:
        return HTTPError(400, f"the request's body: {_clean(first['msg'])}")
    field, place = str(location[0]), _place(location)
    if first["type"] == "extra_forbidden":
        return HTTPError(400, f"{place} is not a field of this request; leave it out", param=field)
    if first["type"] == UNSUPPORTED:
        return HTTPError(400, f"{place}: {first['msg']}", param=field, code=UNSUPPORTED)
    about_place = [error for error in errors if _place(error["loc"][1:]) == place]
    # one error for each type of value that the field may have
    reasons = list(dict.fromkeys(_clean(error["msg"]) for error in about_place))
    message = f"{place}: {'; or: '.join(reasons[:4])}{_shown(first.get('input'))}"
    return HTTPError(400, message, param=field)


def _place(location: Sequence[int | str]) -> str:
    """Return the place of an error: messages[0].content. Types that a value may have follow it."""
    place = str(location[0]) if location else ""
    for number, name in zip(location[1::2], location[2::2], strict=False):
        if not isinstance(number, int) or not isinstance(name, str):
            break
        place += f"[{number}].{name}"
    return place


def _clean(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        return ""
    return f" (got {text})" if len(text) <= 60 else ""
