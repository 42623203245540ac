"""HTTP to engines: one pooled client for unix sockets, loopback ports and remote servers alike.

Nothing here knows what a completion is. The caller owns the deadline, so only connecting has a timeout.
Leaving the `async with` block before the body has ended closes the connection, and that is what makes an
engine stop working. Every broken connection becomes EngineLost, whose text never carries an API key.

A pooled connection may have been closed by the server in the instant we chose it. Such a request is sent
once more, on a new connection, if three things hold: the connection was a reused one, it broke before any
byte of an answer, and it did so within STALE_WITHIN_S of sending. An engine that took the request, worked on
it and crashed fails the third and is not asked twice.
"""

from __future__ import annotations

import asyncio
import io
import ipaddress
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Self
from urllib.parse import urlsplit

import aiohttp
from aiohttp import ClientTimeout

from calm.errors import EngineLost, NotReached
from calm.records import Endpoint

STALE_WITHIN_S = 0.25
# llama.cpp and uvicorn both close an idle connection after 5 s; leaving first avoids the race.
KEEPALIVE_S = 4.0
# aiohttp warns about larger bytes objects; as a file they are sent piecewise.
PIECEWISE_ABOVE_BYTES = 1 << 20
VERSION_SEGMENT = re.compile(r"/v\d+[a-z0-9]*(/|$)")
HEADERS = {
    "Content-Type": "application/json",
    "Accept": "application/json, text/event-stream",
    "Accept-Encoding": "identity",
    "User-Agent": "calm",
}
BROKEN = (aiohttp.ClientError, OSError, TimeoutError)

Secrets = Callable[[str], str | None]


def url_of(base_url: str, path: str) -> str:
    """`path` such as /v1/chat/completions at a base URL given with or without its version segment."""
    base = base_url.rstrip("/")
    if VERSION_SEGMENT.search(urlsplit(base).path) and path.startswith("/v1/"):
        path = path.removeprefix("/v1")
    return base + path


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def no_secrets(name: str) -> str | None:
    return None


class HttpReply:
    """An UpstreamReply over aiohttp."""

    __slots__ = ("_response", "_where")

    def __init__(self, response: aiohttp.ClientResponse, where: str) -> None:
        self._response = response
        self._where = where

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def content_type(self) -> str:
        return self._response.headers.get("Content-Type", "application/octet-stream")

    @property
    def headers(self) -> dict[str, str]:
        """Lower-case names; for Retry-After and the like."""
        return {name.lower(): value for name, value in self._response.headers.items()}

    async def read(self) -> bytes:
        try:
            return await self._response.read()
        except BROKEN as error:
            raise self._lost(error) from None

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except BROKEN as error:
            raise self._lost(error) from None

    def close(self) -> None:
        """Back to the pool when the body was read to its end, else closed: the engine stops working."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()

    def _lost(self, error: BaseException) -> EngineLost:
        return EngineLost(f"{self._where} broke off its answer: {type(error).__name__}")


class HttpUpstream:
    """An Upstream. `secrets` looks up the environment variable named by an endpoint's `api_key_env`.

    Must be made and closed inside the event loop that uses it.
    """

    def __init__(self, secrets: Secrets = no_secrets, *, connect_timeout_s: float = 5.0) -> None:
        self._secrets = secrets
        self._timeout = ClientTimeout(total=None, sock_connect=connect_timeout_s)
        self._sessions: dict[tuple[str, bool], aiohttp.ClientSession] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def post(self, endpoint: Endpoint, path: str, body: bytes) -> Exchange:
        return Exchange(self, "POST", endpoint, path, body)

    def get(self, endpoint: Endpoint, path: str) -> Exchange:
        """For health checks and lists of models."""
        return Exchange(self, "GET", endpoint, path, None)

    async def close(self) -> None:
        sessions, self._sessions = list(self._sessions.values()), {}
        await asyncio.gather(*(session.close() for session in sessions), *self._closing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def key_of(self, endpoint: Endpoint) -> str | None:
        if endpoint.api_key_env is None:
            return endpoint.api_key
        key = self._secrets(endpoint.api_key_env)
        if not key:
            raise EngineLost(
                f"no API key for {endpoint.model}: set the environment variable {endpoint.api_key_env}"
            )
        return key

    async def send(
        self, method: str, endpoint: Endpoint, path: str, body: bytes | None
    ) -> aiohttp.ClientResponse:
        """One attempt, or two when the first met a stale connection."""
        key = self.key_of(endpoint)
        trace = SimpleNamespace(reused=False)
        started = time.monotonic()
        try:
            return await self._attempt(method, endpoint, path, body, key, trace, fresh=False)
        except BROKEN as error:
            quick = time.monotonic() - started < STALE_WITHIN_S
            if not (trace.reused and quick and _hung_up(error)):
                raise _lost(endpoint, error, key, quick=quick) from None
        try:
            return await self._attempt(method, endpoint, path, body, key, trace, fresh=True)
        except BROKEN as error:
            raise _lost(endpoint, error, key, quick=False) from None

    async def _attempt(
        self,
        method: str,
        endpoint: Endpoint,
        path: str,
        body: bytes | None,
        key: str | None,
        trace: SimpleNamespace,
        *,
        fresh: bool,
    ) -> aiohttp.ClientResponse:
        return await self._session(endpoint, fresh=fresh).request(
            method,
            url_of(endpoint.base_url, path),
            data=_payload(body),
            headers={"Authorization": f"Bearer {key}"} if key else None,
            allow_redirects=False,
            trace_request_ctx=trace,
        )

    def _session(self, endpoint: Endpoint, *, fresh: bool) -> aiohttp.ClientSession:
        """The pool for an endpoint, or with `fresh` one that never reuses a connection."""
        local = endpoint.socket is not None or is_loopback(endpoint.base_url)
        name = (endpoint.socket or ("loopback" if local else "remote"), fresh)
        session = self._sessions.get(name)
        if session is None:
            self._forget_dead_sockets()
            session = self._open(endpoint.socket, fresh=fresh, trust_env=not local)
            self._sessions[name] = session
        return session

    def _open(self, socket: str | None, *, fresh: bool, trust_env: bool) -> aiohttp.ClientSession:
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        return aiohttp.ClientSession(
            connector=_connector(socket, fresh=fresh),
            timeout=self._timeout,
            headers=HEADERS,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=trust_env,
            trace_configs=[trace],
        )

    def _forget_dead_sockets(self) -> None:
        """Engines come and go, each with a socket of its own: close the pools whose socket is gone."""
        for name in [name for name in self._sessions if name[0][0] == "/" and not Path(name[0]).exists()]:
            closing = asyncio.create_task(self._sessions.pop(name).close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)


class Exchange:
    """One request as a context manager: entering sends it, leaving closes or returns its connection."""

    __slots__ = ("_reply", "_request", "_upstream")

    def __init__(
        self, upstream: HttpUpstream, method: str, endpoint: Endpoint, path: str, body: bytes | None
    ) -> None:
        self._upstream = upstream
        self._request = (method, endpoint, path, body)
        self._reply: HttpReply | None = None

    async def __aenter__(self) -> HttpReply:
        response = await self._upstream.send(*self._request)
        endpoint = self._request[1]
        if endpoint.socket and response.content_type == "text/event-stream":
            _never_reuse(response)
        self._reply = HttpReply(response, where_of(endpoint))
        return self._reply

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reply:
            self._reply.close()


def where_of(endpoint: Endpoint) -> str:
    """How messages call an endpoint: the model and, for a TCP one, the host; no path, no credentials."""
    if endpoint.socket:
        return f"the engine of {endpoint.model}"
    parts = urlsplit(endpoint.base_url)
    return f"the engine of {endpoint.model} at {parts.hostname}:{parts.port or parts.scheme}"


def _connector(socket: str | None, *, fresh: bool) -> aiohttp.BaseConnector:
    keepalive_s = None if fresh else KEEPALIVE_S
    if socket:
        return aiohttp.UnixConnector(socket, limit=0, force_close=fresh, keepalive_timeout=keepalive_s)
    return aiohttp.TCPConnector(limit=0, force_close=fresh, keepalive_timeout=keepalive_s, ttl_dns_cache=300)


def _payload(body: bytes | None) -> bytes | io.BytesIO | None:
    if body is None or len(body) <= PIECEWISE_ABOVE_BYTES:
        return body
    return io.BytesIO(body)


def _never_reuse(response: aiohttp.ClientResponse) -> None:
    """llama.cpp hangs up after each stream, unannounced; a new connection to a unix socket costs nothing."""
    connection = response.connection
    # Not by truth value: the protocol is also a queue, and an empty one is false.
    if connection is not None and connection.protocol is not None:
        connection.protocol.force_close()


def _hung_up(error: BaseException) -> bool:
    """It was connected and is not any more."""
    lost = aiohttp.ServerDisconnectedError | aiohttp.ClientOSError | ConnectionError
    return isinstance(error, lost) and not isinstance(error, aiohttp.ClientConnectorError)


def _lost(endpoint: Endpoint, error: BaseException, key: str | None, *, quick: bool) -> EngineLost:
    """NotReached when nobody was there, or hung up at once: an engine in the moment after its death."""
    untouched = isinstance(error, aiohttp.ClientConnectorError) or (quick and _hung_up(error))
    return (NotReached if untouched else EngineLost)(_explain(endpoint, error, key))


def _explain(endpoint: Endpoint, error: BaseException, key: str | None) -> str:
    where = where_of(endpoint)
    if isinstance(error, aiohttp.ClientConnectorError | asyncio.TimeoutError):
        reason = "nobody answers there" if isinstance(error, OSError) else "connecting took too long"
    else:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    text = f"{where} is lost: {reason}"
    return text.replace(key, "***") if key else text


async def _note_reuse(
    session: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceConnectionReuseconnParams
) -> None:
    context.trace_request_ctx.reused = True
