"""Arrivals x queries, for one seed: the load that every candidate of a study faces alike.

Equal seeds give equal workloads, on any machine. The queries are drawn evenly over the datasets (or a table's
tasks) they come from, as in the paper's three domains, whatever the sizes of the sets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from random import Random

import numpy as np

from calm.errors import BadInput
from calm.workloads.arrivals import make_arrivals
from calm.workloads.queries import Selection, load_queries
from calm.workloads.records import Query, Workload, WorkloadSpec

_QUERIES_STREAM = 2
"""Queries and arrivals of one seed are drawn from streams of their own: a change of one leaves the other."""

WARM_SEED = 1_000_003
"""Added to a trial's seed for the requests before it that are not counted."""
WARM_ROUNDS = 50


class Source:
    """A spec with its files read and checked: makes the workload of any seed."""

    def __init__(self, spec: WorkloadSpec, selection: Selection) -> None:
        self.spec = spec
        self.queries = selection.queries
        """All that may be asked."""
        self.notes = selection.notes
        """What a reader of the figures must know: queries left out, and why."""

    @property
    def name(self) -> str:
        """`ARRIVALS x QUERIES`, of a file only its last part: results say nothing about the machine's paths."""
        return re.sub(r"[^:,]*/", "", self.spec.arrivals) + " x " + re.sub(r"[^:,]*/", "", self.spec.queries)

    def workload(self, seed: int) -> Workload:
        """Equal seeds give equal workloads. Raises BadInput as `make_arrivals` does."""
        arrivals_s = make_arrivals(self.spec, seed)
        queries = draw(self.queries, len(arrivals_s), np.random.default_rng((seed, _QUERIES_STREAM)))
        return Workload(name=self.name, seed=seed, arrivals_s=arrivals_s, queries=queries)


def open_source(spec: WorkloadSpec, models: Collection[str]) -> Source:
    """Reads everything `spec` names, once, for a fleet of `models`.

    Raises BadInput (field `arrivals`, `queries`, `answers` or `data`) with one line that says what is wrong.
    """
    source = Source(spec, load_queries(spec, models))
    make_arrivals(spec, 0)
    return source


def rated(seed: int, count: int, share: float) -> tuple[bool, ...]:
    """Which requests of a workload are rated, if they are answered: the same ones whoever answers them."""
    draws = Random(f"feedback {seed}")
    return tuple(draws.random() < share for _ in range(count))


def warm_up(workload_of: Callable[[int], Workload], counted: Workload, count: int) -> Workload:
    """`count` requests of other seeds, none of them a query of the counted workload.

    Raises BadInput (field `warm_start`) when the query set is too small for that.
    """
    taken = {query.id for query in counted.queries}
    arrivals_s: list[float] = []
    queries: list[Query] = []
    start_s = 0.0
    for number in range(1, WARM_ROUNDS + 1):
        extra = workload_of(counted.seed + number * WARM_SEED)
        for at_s, query in zip(extra.arrivals_s, extra.queries, strict=True):
            if query.id not in taken and len(queries) < count:
                queries.append(query)
                arrivals_s.append(start_s + at_s)
        start_s += extra.duration_s
        if len(queries) == count:
            return Workload(
                name=extra.name, seed=extra.seed, arrivals_s=tuple(arrivals_s), queries=tuple(queries)
            )
    raise BadInput(
        f"--warm-start {count}: the sets have too few queries beside those of a trial; take fewer, or more sets",
        field="warm_start",
    )


def draw(queries: Sequence[Query], count: int, rng: np.random.Generator) -> tuple[Query, ...]:
    """`count` queries, as evenly over their datasets as possible, in random order.

    A dataset is dealt like a shuffled pack of cards: nothing twice until all of it was drawn.
    """
    packs = _by_dataset(queries)
    share, rest = divmod(count, len(packs))
    extra = set(rng.permutation(len(packs))[:rest].tolist())
    drawn = [q for i, pack in enumerate(packs) for q in _deal(pack, share + (i in extra), rng)]
    return tuple(drawn[i] for i in rng.permutation(count).tolist())


def _by_dataset(queries: Sequence[Query]) -> list[list[Query]]:
    packs: dict[str, list[Query]] = {}
    for query in queries:
        packs.setdefault(query.dataset, []).append(query)
    return list(packs.values())


def _deal(pack: Sequence[Query], count: int, rng: np.random.Generator) -> list[Query]:
    rounds = -(-count // len(pack))
    order = [i for _ in range(rounds) for i in rng.permutation(len(pack)).tolist()]
    return [pack[i] for i in order[:count]]
