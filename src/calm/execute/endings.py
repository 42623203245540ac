"""How a request may end: in time, too late, left by its client, refused, or failed."""

from __future__ import annotations

import asyncio
from types import TracebackType

from calm.errors import CalmError, DeadlineExceeded
from calm.records import OutcomeStatus


class Deadline:
    """`asyncio.timeout` that speaks CALM's errors."""

    def __init__(self, left_s: float, whole_s: float) -> None:
        self._timeout = asyncio.timeout(max(0.0, left_s))
        self._whole_s = whole_s

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise DeadlineExceeded(f"the deadline of {self._whole_s:.3g} s passed") from None


def status_of(error: BaseException | None) -> OutcomeStatus:
    """What an ending means for the record: a client that left is no failure of the model."""
    if error is None:
        return "ok"
    if isinstance(error, DeadlineExceeded):
        return "timeout"
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "cancelled"
    if isinstance(error, CalmError) and error.status in (400, 404, 413, 422, 429):
        return "rejected"
    return "error"


def describe(error: BaseException | None) -> str | None:
    if error is None:
        return None
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "the client left"
    return f"{type(error).__name__}: {error}"[:500]
