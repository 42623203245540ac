"""The people of a bench: they ask at their times, read the stream, judge the answer and rate it.

An open loop. Request i is due at `arrivals_s[i]` whatever became of the earlier ones, and its latency counts from
the moment it was due, not from when a busy client got round to sending it; else the slowest moments would be
asked about least (coordinated omission, G. Tene, "How NOT to measure latency", 2013). How late it was sent is
kept beside it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import msgspec

from calm.bench.server import ServerFailed
from calm.records import OutcomeStatus, Record, Snapshot
from calm.workloads.records import Query, Workload

GIVE_UP_AFTER_S = 10.0
"""Beyond the deadline, at which the server itself has to answer 504."""
ADMIN_S = 180.0
"""The longest an order to the server may take: loading a model is one."""
ENDED: Mapping[str, OutcomeStatus] = {"deadline_exceeded": "timeout", "queue_full": "rejected"}
"""The server's error codes that are not simply an error."""
SOURCE = "bench"

Judge = Callable[[Query, str], float | None]


@dataclass
class Answer:
    """What one request came to, as its client saw it. Times count from when it was due."""

    request_id: str | None = None
    status: OutcomeStatus = "error"
    total_s: float = 0.0
    ttft_s: float | None = None
    late_s: float = 0.0
    """When it was really sent."""
    text: str = ""
    quality: float | None = None
    error: str | None = None


class _Error(Record, frozen=True, kw_only=True):
    message: str = ""
    code: str | None = None
    type: str | None = None


class _Delta(Record, frozen=True, kw_only=True):
    content: str | None = None


class _Choice(Record, frozen=True, kw_only=True):
    delta: _Delta | None = None


class _Chunk(Record, frozen=True, kw_only=True):
    choices: tuple[_Choice, ...] = ()
    error: _Error | None = None


class Totals(Record, frozen=True, kw_only=True):
    """What the server's ledger has counted since its start."""

    joules: float | None
    """Over all engines, idling included; None where nothing is metered."""
    meter: str | None


class _EngineJoules(Record, frozen=True, kw_only=True):
    attributed_j: float
    idle_j: float


class _Meter(Record, frozen=True, kw_only=True):
    name: str
    kind: str


class _Knowledge(Record, frozen=True, kw_only=True):
    energy: Mapping[str, _EngineJoules]
    meter: _Meter


_chunk = msgspec.json.Decoder(_Chunk).decode


# --- one server's clients ---------------------------------------------------------------------------


class Clients:
    """Asks one server, and looks at it. Close with `async with`."""

    def __init__(self, url: str, *, deadline_s: float, max_tokens: int | None) -> None:
        import aiohttp

        self._url = url
        self._deadline_s = deadline_s
        self._max_tokens = max_tokens
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    # --- asking ---

    async def ask(self, prompt: str, due_s: float) -> Answer:
        """Send now, read to the end. `due_s` is on the clock of time.perf_counter. Every end is a status."""
        import aiohttp

        answer = Answer(late_s=time.perf_counter() - due_s)
        try:
            async with asyncio.timeout(self._deadline_s + GIVE_UP_AFTER_S):
                await self._exchange(prompt, answer, due_s)
        except TimeoutError:
            answer.status, answer.error = "timeout", "no end long after the deadline"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            answer.status, answer.error = "error", repr(error)
        answer.total_s = time.perf_counter() - due_s
        return answer

    async def _exchange(self, prompt: str, answer: Answer, due_s: float) -> None:
        body = chat_body(prompt, self._max_tokens, self._deadline_s)
        async with self._session.post(f"{self._url}/v1/chat/completions", json=body) as response:
            answer.request_id = response.headers.get("x-calm-request-id")
            if response.status != 200:
                fail(answer, _chunk(await response.read()).error)
                return
            async for line in response.content:
                if line.startswith(b"data: ") and take(answer, line[6:].strip(), due_s):
                    return
            answer.error = "the stream just stopped"

    async def rate(self, request_id: str, quality: float) -> None:
        """Feedback as the paper gives it: 1 for quality 0, 5 for quality 1. A rating that is lost is lost."""
        import aiohttp

        body = {"request_id": request_id, "rating": rating(quality), "source": SOURCE}
        with suppress(aiohttp.ClientError, OSError):
            async with self._session.post(f"{self._url}/v1/feedback", json=body) as response:
                await response.read()

    # --- looking ---

    async def snapshot(self) -> Snapshot:
        """Raises ServerFailed, as all of these do, when the server does not say."""
        return msgspec.json.decode(await self._call("GET", "/calm/v1/snapshot"), type=Snapshot)

    async def totals(self) -> Totals:
        known = msgspec.json.decode(await self._call("GET", "/calm/v1/knowledge"), type=_Knowledge)
        engines = known.energy.values()
        joules = sum(engine.attributed_j + engine.idle_j for engine in engines) if engines else None
        return Totals(joules=joules, meter=None if known.meter.name == "absent" else known.meter.name)

    async def pin(self, model: str) -> None:
        """Returns when the model is loaded; nothing evicts it from now on."""
        await self._call("POST", f"/calm/v1/models/{model}/pin")

    async def _call(self, method: str, path: str) -> bytes:
        import aiohttp

        try:
            async with (
                asyncio.timeout(ADMIN_S),
                self._session.request(method, f"{self._url}{path}") as response,
            ):
                raw: bytes = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ServerFailed(f"{method} {path}: {error!r}") from error
        if response.status != 200:
            refusal = _chunk(raw).error
            raise ServerFailed(f"{method} {path}: {refusal.message if refusal else response.status}")
        return raw


def chat_body(prompt: str, max_tokens: int | None, deadline_s: float) -> dict[str, object]:
    """Greedy, streamed, routed."""
    limit = {} if max_tokens is None else {"max_tokens": max_tokens}
    return {
        "model": "calm",
        "stream": True,
        "temperature": 0,
        **limit,
        "messages": [{"role": "user", "content": prompt}],
        "calm": {"deadline_s": deadline_s},
    }


def take(answer: Answer, payload: bytes, due_s: float) -> bool:
    """One event of the stream; True when it was the last."""
    if payload == b"[DONE]":
        answer.status = "ok"
        return True
    chunk = _chunk(payload)
    if chunk.error is not None:
        fail(answer, chunk.error)
        return True
    content = "".join(choice.delta.content or "" for choice in chunk.choices if choice.delta)
    if content and answer.ttft_s is None:
        answer.ttft_s = time.perf_counter() - due_s
    answer.text += content
    return False


def fail(answer: Answer, error: _Error | None) -> None:
    error = error or _Error(message="an error without a body")
    answer.status = ENDED.get(error.code or "", "error")
    answer.error = error.message


def rating(quality: float) -> float:
    """Quality 0..1 as 1..5."""
    return 1.0 + 4.0 * min(1.0, max(0.0, quality))


# --- a whole workload -------------------------------------------------------------------------------


async def offer(
    clients: Clients,
    workload: Workload,
    *,
    origin_s: float,
    rate: Sequence[bool],
    judge: Judge,
    on_end: Callable[[], None] = lambda: None,
) -> tuple[Answer, ...]:
    """Ask every query at its time; returns when all have ended and the ratings are given.

    `origin_s` is the workload's second 0 on the clock of time.perf_counter.
    """

    async def one(arrival_s: float, query: Query, rates: bool) -> Answer:
        due_s = origin_s + arrival_s
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        answer = await clients.ask(query.prompt, due_s)
        if answer.status == "ok":
            answer.quality = await asyncio.to_thread(judge, query, answer.text)
        if rates and answer.quality is not None and answer.request_id is not None:
            await clients.rate(answer.request_id, answer.quality)
        on_end()
        return answer

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(one(*request))
            for request in zip(workload.arrivals_s, workload.queries, rate, strict=True)
        ]
    return tuple(task.result() for task in tasks)
