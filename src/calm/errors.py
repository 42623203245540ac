"""Every failure CALM names, as one small tree.

    CalmError                   the root: message, HTTP status, OpenAI error type and code
    ├── BadInput                something from outside is wrong; `field` says what          400
    │   └── TooLarge            the body exceeds the operator's limit                       413
    ├── Unauthorised            no key, or a wrong one                                      401
    ├── Forbidden               a good key that may not do this                             403
    ├── UnknownModel            a name that no card in the fleet carries                    404
    ├── UnknownRequest          no stored decision under this request id                    404
    ├── NoCandidate             every card was refused by a hard constraint                 422
    ├── QueueFull               backpressure: come back after `retry_after_s`               429
    ├── DeadlineExceeded        the caller's deadline passed first                          504
    ├── Unavailable             a model cannot serve right now                              503
    │   ├── NeverFits           the model is larger than the whole budget
    │   ├── LoadFailed          the engine did not come up
    │   ├── EngineLost          the engine died or broke the connection
    │   │   └── NotReached      nobody took the request: it may safely be sent again
    │   └── ShuttingDown        the server is closing
    ├── UpstreamRejected        the engine answered with an error of its own                (its status)
    └── SourceError             weights could not be fetched or do not match their checksum

The gateway turns each into OpenAI's error body; nothing else in CALM knows about HTTP.
"""

from __future__ import annotations


class CalmError(Exception):
    """Root of the tree. `status`, `type` and `code` are what an OpenAI client sees."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class BadInput(CalmError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class TooLarge(BadInput):
    status = 413
    code = "request_too_large"


class Unauthorised(CalmError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(CalmError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class UnknownModel(CalmError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class UnknownRequest(CalmError):
    status = 404
    type = "invalid_request_error"
    code = "request_not_found"


class NoCandidate(CalmError):
    status = 422
    type = "invalid_request_error"
    code = "no_eligible_model"


class QueueFull(CalmError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(CalmError):
    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class Unavailable(CalmError):
    """`retry_after_s`: when it is worth trying again, where that is known."""

    status = 503
    type = "server_error"
    code = "model_unavailable"
    retry_after_s: float | None = None


class NeverFits(Unavailable):
    code = "model_exceeds_budget"


class LoadFailed(Unavailable):
    code = "model_load_failed"


class EngineLost(Unavailable):
    code = "engine_lost"


class NotReached(EngineLost):
    pass


class ShuttingDown(Unavailable):
    code = "shutting_down"


class UpstreamRejected(CalmError):
    """The engine's own refusal, passed on with its status and, where it is JSON, its error object."""

    type = "upstream_error"
    code = "upstream_rejected"

    def __init__(self, message: str, *, status: int, body: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.body = body


class SourceError(CalmError):
    status = 503
    code = "weights_unavailable"
