"""What a route is and what a handler may read of a request; shared by the OpenAI and the admin tables."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Literal, NamedTuple

import msgspec
from aiohttp import web

from calm.errors import BadInput, TooLarge
from calm.gateway.auth import Identity
from calm.gateway.faults import BodyTimeout
from calm.gateway.limits import Limits

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Access = Literal["open", "user", "admin"]


class Route(NamedTuple):
    """One line of the table. `access` is the least a caller needs; `open` skips every check."""

    method: str
    path: str
    handler: Handler
    access: Access = "user"


REQUEST_ID_KEY = web.RequestKey("calm_request_id", str)
IDENTITY_KEY = web.RequestKey("calm_identity", Identity)


def new_request_id() -> str:
    """Sortable by time (milliseconds, hex), unguessable by its other 64 bits."""
    return f"{time.time_ns() // 1_000_000:011x}{secrets.token_hex(8)}"


def json_response(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


async def read_body(request: web.Request, limits: Limits) -> bytes:
    """The whole body. Raises TooLarge (before reading, where a length is declared), BodyTimeout, BadInput."""
    if (request.content_length or 0) > limits.max_body_bytes:
        raise too_large(limits)
    try:
        if request.content.is_eof():
            return await request.read()
        async with asyncio.timeout(limits.body_timeout_s):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large(limits) from None
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {limits.body_timeout_s:g} s") from None
    except web.RequestPayloadError as error:
        raise BadInput(f"the body could not be read: {error}") from None


def too_large(limits: Limits) -> TooLarge:
    return TooLarge(f"the body is larger than {limits.max_body_bytes} bytes (server.max_body_bytes)")
