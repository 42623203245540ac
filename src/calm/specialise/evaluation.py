"""Base against specialist on the held-out rows, on the engine that will serve them, judged like any benchmark."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean

from calm.records import Record
from calm.specialise.engine import Engine
from calm.specialise.examples import Example
from calm.workloads.judge import judge

Advance = Callable[[], None]


class Graded(Record, frozen=True, kw_only=True):
    """One row answered by base and specialist."""

    dataset: str
    domain: str
    base: float
    specialist: float
    base_s: float
    specialist_s: float


class Scores(Record, frozen=True, kw_only=True):
    """Means over the rows of one data set: quality 0..1, seconds from request to whole answer."""

    dataset: str
    domain: str
    rows: int
    base: float
    specialist: float
    base_s: float
    specialist_s: float


async def evaluate(
    engine: Engine, rows: Sequence[Example], name: str, max_tokens: int, advance: Advance
) -> tuple[Scores, ...]:
    """Rows one after the other, base and specialist in turn, so that both meet the same machine."""
    graded = []
    for row in rows:
        base, base_s = await _graded(engine, row, max_tokens, None)
        own, own_s = await _graded(engine, row, max_tokens, name)
        advance()
        if base is not None and own is not None:
            query = row.query
            graded.append(
                Graded(
                    dataset=query.dataset, domain=query.domain, base=base, specialist=own, base_s=base_s,
                    specialist_s=own_s,
                )
            )  # fmt: skip
    return tuple(_scores([g for g in graded if g.dataset == name]) for name in {g.dataset: 0 for g in graded})


async def _graded(
    engine: Engine, row: Example, max_tokens: int, specialist: str | None
) -> tuple[float | None, float]:
    began = time.perf_counter()
    said = await engine.reply(row, max_tokens, specialist=specialist)
    return judge(row.query, said), time.perf_counter() - began


def _scores(graded: Sequence[Graded]) -> Scores:
    return Scores(
        dataset=graded[0].dataset,
        domain=graded[0].domain,
        rows=len(graded),
        base=fmean(g.base for g in graded),
        specialist=fmean(g.specialist for g in graded),
        base_s=fmean(g.base_s for g in graded),
        specialist_s=fmean(g.specialist_s for g in graded),
    )
