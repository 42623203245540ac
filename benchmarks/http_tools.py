"""A mock upstream and a load generator that cost as little CPU as Python allows.

Both are raw asyncio protocols: on a two-core machine an ordinary client or server would take the very cores
that the gateway under test needs, and the figure would be theirs.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from dataclasses import dataclass
from typing import cast

ANSWER = {
    "id": "chatcmpl-mock",
    "object": "chat.completion",
    "created": 1,
    "model": "mock",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Four."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15},
}


class MockUpstream(asyncio.Protocol):
    """Answers every POST with the same chat completion, every GET with 200, at once."""

    _body = json.dumps(ANSWER).encode()
    _reply = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
        + str(len(_body)).encode()
        + b"\r\n\r\n"
        + _body
    )

    def __init__(self) -> None:
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            length = (
                int(head.split(b"content-length:")[1].split(b"\r\n")[0]) if b"content-length:" in head else 0
            )
            if len(self._buffer) < end + 4 + length:
                return
            self._buffer = self._buffer[end + 4 + length :]
            if self._transport:
                self._transport.write(self._reply)


@dataclass(frozen=True)
class Figures:
    """One round: latencies in milliseconds, throughput in requests per second."""

    p50_ms: float
    p99_ms: float
    rps: float
    failures: int


class _Caller(asyncio.Protocol):
    """One keep-alive connection that sends the next request as soon as the answer is complete."""

    def __init__(self, request: bytes, deadline_s: float, done: asyncio.Future[None]) -> None:
        self.request = request
        self.latencies_ms: list[float] = []
        self.failures = 0
        self._deadline_s = deadline_s
        self._done = done
        self._buffer = b""
        self._need: int | None = None
        self._sent_s = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._send()

    def _send(self) -> None:
        assert self._transport
        self._sent_s = time.perf_counter()
        self._transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._need is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._buffer[:end].lower()
            if b"content-length:" in head:
                self._need = end + 4 + int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            else:
                self._need = -1  # chunked
        complete = (
            self._buffer.endswith(b"0\r\n\r\n") if self._need == -1 else len(self._buffer) >= self._need
        )
        if complete:
            self._finish()

    def _finish(self) -> None:
        now = time.perf_counter()
        self.latencies_ms.append((now - self._sent_s) * 1000)
        self.failures += not self._buffer.startswith(b"HTTP/1.1 200")
        self._buffer, self._need = b"", None
        if now < self._deadline_s:
            self._send()
        else:
            self._end()

    def _end(self) -> None:
        if self._transport:
            self._transport.close()
        if not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self.failures += 1
            self._done.set_result(None)


def request_bytes(port: int, body: bytes, path: str = "/v1/chat/completions", key: str = "sk-bench") -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def load(port: int, bodies: list[bytes], *, concurrency: int, seconds: float) -> Figures:
    """Closed loop of `concurrency` connections for `seconds`; connection i sends bodies[i % n]."""
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    callers: list[_Caller] = []
    futures = []
    for index in range(concurrency):
        done: asyncio.Future[None] = loop.create_future()
        caller = _Caller(request_bytes(port, bodies[index % len(bodies)]), started + seconds, done)
        await loop.create_connection(lambda caller=caller: caller, "127.0.0.1", port)  # type: ignore[misc]
        callers.append(caller)
        futures.append(done)
    await asyncio.gather(*futures)
    elapsed = time.perf_counter() - started
    latencies = sorted(ms for caller in callers for ms in caller.latencies_ms)
    return Figures(
        p50_ms=statistics.median(latencies) if latencies else float("nan"),
        p99_ms=latencies[int(len(latencies) * 0.99)] if latencies else float("nan"),
        rps=len(latencies) / elapsed,
        failures=sum(caller.failures for caller in callers),
    )
