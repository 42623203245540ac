"""How much engines slow each other down when several work at once: the machine's `contention`.

Each engine's request is timed alone and among the others, turn by turn, so that whatever else the machine does
falls on both alike. The others never pause meanwhile. Every engine keeps the threads the executor gives it, so
what remains is the shared part: memory bandwidth, caches, a core that is one half of a physical one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count

from calm.bench.fitting import slowdown
from calm.bench.measure_engine import Laboratory, endpoint_of, running
from calm.bench.measure_plan import request_s
from calm.bench.measure_probe import send
from calm.bench.measure_texts import words
from calm.errors import CalmError
from calm.ports import RunningEngine
from calm.records import ModelCard

Member = tuple[ModelCard, RunningEngine]
_numbers = count(1_000_000)
"""Of prompts: none is ever asked twice, for the prefix cache would know it."""


async def ratios_of(lab: Laboratory, cards: Sequence[ModelCard]) -> list[float]:
    """Time among the others / time alone, per engine and round. Raises CalmError when an engine fails."""
    found = []
    async with AsyncExitStack() as stack:
        members = [(card, await stack.enter_async_context(running(lab, card))) for card in cards]
        for _ in range(lab.effort.contention_rounds):
            for member in members:
                found.append(await ratio(lab, member, [other for other in members if other is not member]))
                lab.watch.advance(2 * _expected_s(lab, member[0]))
    return found


async def ratio(lab: Laboratory, member: Member, others: Sequence[Member]) -> float:
    alone_s = await one(lab, member)
    async with busy(lab, others):
        return await one(lab, member) / alone_s


async def one(lab: Laboratory, member: Member) -> float:
    """Seconds of one request of the usual shape."""
    card, engine = member
    prompt = words(lab.effort.contention_words, next(_numbers))
    answer = await send(
        lab.upstream, endpoint_of(engine, card), card, prompt, lab.effort.contention_tokens, endless=True
    )
    return answer.total_s


@asynccontextmanager
async def busy(lab: Laboratory, others: Sequence[Member]) -> AsyncIterator[None]:
    """The others serve one request after the other. Raises what failed among them."""
    tasks = [asyncio.create_task(_serve_on(lab, other)) for other in others]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        if isinstance(end, CalmError):
            raise end


async def _serve_on(lab: Laboratory, member: Member) -> None:
    while True:
        await one(lab, member)


def factors(ratios: Mapping[int, Sequence[float]]) -> tuple[float, ...]:
    """Contention for 1, 2, ... engines from the ratios by their number. A number that was not tried ends it."""
    found = [1.0]
    while len(found) + 1 in ratios:
        found.append(max(found[-1], slowdown(ratios[len(found) + 1])))
    return tuple(found)


def _expected_s(lab: Laboratory, card: ModelCard) -> float:
    return request_s(card, lab.effort.contention_words, lab.effort.contention_tokens)
