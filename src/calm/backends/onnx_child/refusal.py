"""Why a request gets no answer: it is refused with an OpenAI error body, or nobody waits any more."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

Json = Mapping[str, object]


class Refused(Exception):
    """Answered as an OpenAI error body; `param` is the field at fault."""

    def __init__(
        self, message: str, *, param: str | None = None, status: HTTPStatus = HTTPStatus.BAD_REQUEST
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status

    def body(self) -> Json:
        kind = "invalid_request_error" if self.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


class Left(Exception):
    """The client is gone; nobody waits for the answer."""
