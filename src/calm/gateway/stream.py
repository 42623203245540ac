"""A server-sent event answer that opens as late as it can and tells the truth about its end.

Until the first event (or the first ping of a long wait) no header is out, so a failure still gets its own
status code. After that a failure is an error event without [DONE]: never the look of a success.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress

import msgspec
from aiohttp import web

from calm.errors import CalmError
from calm.gateway.faults import error_object
from calm.gateway.limits import Limits

PING = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}


class EventStream:
    """One SSE response. Written by its handler; between writes a timer pings when it has been silent.

    Each write says whether the client is still there; a client that left is no exception.
    """

    def __init__(self, request: web.Request, headers: Mapping[str, str], limits: Limits) -> None:
        self.response = web.StreamResponse(headers={**_HEADERS, **headers})
        self._request = request
        self._ping_s = limits.ping_s
        self._stall_s = limits.stall_s
        self._loop = asyncio.get_running_loop()
        self._written_s = self._loop.time()
        self._writing = False
        self._ping: asyncio.Task[None] | None = None
        self._tick_s = min(self._ping_s, self._stall_s)
        self._timer = self._loop.call_later(self._tick_s, self._watch)

    @property
    def opened(self) -> bool:
        """Whether headers are out: from then on a failure is an event."""
        return self.response.prepared

    async def open(self, headers: Mapping[str, str]) -> None:
        """Send the headers, unless a ping already did; then these further ones are too late and dropped."""
        await self._settle_ping()
        if not self.opened:
            self.response.headers.update(headers)
            await self.response.prepare(self._request)

    async def send(self, payload: bytes) -> bool:
        """One JSON payload as one event. A newline in it can only be JSON's white space."""
        if b"\n" in payload or b"\r" in payload:
            payload = payload.replace(b"\r", b" ").replace(b"\n", b" ")
        return await self._write(b"data: " + payload + b"\n\n")

    async def finish(self) -> bool:
        """The end of an answer that is whole."""
        return await self._write(DONE)

    async def broken(self, error: CalmError) -> bool:
        """The end of an answer that is not: the error as an event, no [DONE], connection closed."""
        self.response.force_close()
        there = await self.send(msgspec.json.encode(error_object(error)))
        with suppress(ConnectionError):
            await self.response.write_eof()
        return there

    async def close(self) -> None:
        """Stop pinging. Must be called, whatever happened."""
        self._timer.cancel()
        await self._settle_ping()

    async def _write(self, data: bytes) -> bool:
        await self._settle_ping()
        self._writing, self._written_s = True, self._loop.time()
        try:
            await self.response.write(data)
        except ConnectionError:
            return False
        finally:
            self._writing = False
            self._written_s = self._loop.time()
        return True

    def _watch(self) -> None:
        """Ping when nothing was written for `ping_s`; cut off a client that stopped taking in."""
        quiet_s = self._loop.time() - self._written_s
        pinging = self._ping is not None and not self._ping.done()
        if self._writing or pinging:
            if quiet_s >= self._stall_s and self._request.transport is not None:
                self._request.transport.abort()
        elif quiet_s >= self._ping_s:
            self._written_s = self._loop.time()
            self._ping = self._loop.create_task(self._send_ping())
        rest_s = self._tick_s if self._writing or quiet_s >= self._ping_s else self._ping_s - quiet_s
        self._timer = self._loop.call_later(rest_s, self._watch)

    async def _send_ping(self) -> None:
        with suppress(ConnectionError):
            if not self.opened:
                await self.response.prepare(self._request)
            await self.response.write(PING)

    async def _settle_ping(self) -> None:
        """Let a ping under way end before anything else is written."""
        ping, self._ping = self._ping, None
        if ping is not None:
            await ping
