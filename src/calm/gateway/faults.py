"""Failures in the shape OpenAI's clients parse: {"error": {"message", "type", "param", "code"}}.

The one place that knows which HTTP status and headers a failure gets. What CALM did not foresee becomes a
500 that names the request id and nothing else; the traceback goes to the log.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
from aiohttp import web

from calm.errors import BadInput, CalmError, QueueFull, TooLarge, Unauthorised, Unavailable, UpstreamRejected

REQUEST_ID = "x-calm-request-id"


class UnknownUrl(CalmError):
    status = 404
    type = "invalid_request_error"
    code = "unknown_url"


class WrongMethod(CalmError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class BodyTimeout(BadInput):
    status = 408
    type = "timeout_error"
    code = "body_timeout"


class _EngineError(msgspec.Struct):
    message: str
    type: str | None = None
    param: str | None = None
    code: str | int | None = None


class _EngineAnswer(msgspec.Struct):
    error: _EngineError


def error_object(error: CalmError) -> Mapping[str, object]:
    """The body of an error answer, or the payload of a stream's error event."""
    if isinstance(error, UpstreamRejected):
        said = _engine_error(error.body)
        if said is not None:
            code = error.code if said.code is None else said.code
            return _object(said.message, said.type or error.type, said.param, code)
    return _object(error.message, error.type, error.field, error.code)


def internal(request_id: str) -> CalmError:
    """What a caller learns of a failure nobody foresaw."""
    return CalmError(f"internal error; the server's log has it under request id {request_id}")


def fault(error: CalmError, request_id: str) -> web.Response:
    """The HTTP answer to a failure."""
    headers = {REQUEST_ID: request_id}
    if isinstance(error, QueueFull | Unavailable) and error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(min(error.retry_after_s, 3600.0))))
    if isinstance(error, Unauthorised):
        headers["WWW-Authenticate"] = 'Bearer realm="calm"'
    response = web.Response(
        body=msgspec.json.encode(error_object(error)),
        status=status_of(error),
        content_type="application/json",
        headers=headers,
    )
    if isinstance(error, TooLarge | BodyTimeout):
        response.force_close()  # the rest of the body is not read
    return response


def status_of(error: CalmError) -> int:
    """An engine that refuses CALM's own credentials is CALM's problem, not the caller's: 502."""
    if not isinstance(error, UpstreamRejected):
        return error.status
    passes = 400 <= error.status < 600 and error.status not in (401, 403, 407)
    return error.status if passes else 502


def from_http(error: web.HTTPException, method: str, path: str) -> CalmError:
    """aiohttp's own refusals, as CALM's."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return WrongMethod(f"{method} is not for {path[:200]}; it takes {allowed}")
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return TooLarge("the body is larger than this server accepts")
    if error.status == 404:
        return UnknownUrl(f"unknown URL {method} {path[:200]}; GET / lists the endpoints")
    known = BadInput(error.reason)
    known.status = error.status
    return known


def _object(message: str, kind: str, field: str | None, code: str | int) -> Mapping[str, object]:
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def _engine_error(body: bytes) -> _EngineError | None:
    try:
        return msgspec.json.decode(body, type=_EngineAnswer).error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
