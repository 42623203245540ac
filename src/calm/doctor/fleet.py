"""The cards: good ones, bad ones, and models that can never fit the budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from calm.doctor.check import Check, failed, fine, megabytes, poor
from calm.execute.hosting import crews
from calm.execute.sizing import host_bytes
from calm.registry import CardProblem, FleetLoad


def check_fleet(directory: Path, load: FleetLoad, budget: int | None) -> Iterator[Check]:
    if load.fleet:
        yield fine("fleet", f"{len(load.fleet)} good in {directory}: {named(load)}")
    else:
        yield failed("fleet", f"no good card in {directory}", "add one: calm models add FILE")
    yield from map(bad_card, load.problems)
    for host, crew in crews(load.fleet).items():
        needed = host_bytes(load.fleet[host], crew)
        if budget is not None and needed > budget:
            adapters = f" with its {len(crew)} adapters" if crew else ""
            found = f"needs about {megabytes(needed)}{adapters}, the budget is {megabytes(budget)}"
            fix = "raise memory.budget, or take a smaller quantisation"
            yield poor(f"model {host}", f"{found}: it can never be loaded", fix)


def named(load: FleetLoad) -> str:
    """`gemma-3-270m, smollm2-135m (adapters: finance, medical)`."""
    return ", ".join(
        host + (f" (adapters: {', '.join(adapter.name for adapter in crew)})" if crew else "")
        for host, crew in crews(load.fleet).items()
    )


def bad_card(problem: CardProblem) -> Check:
    """A bad card is refused while the rest of the fleet serves, hence no failure."""
    where = f"{problem.field}: " if problem.field else ""
    return poor(
        f"card {Path(problem.file).name}", where + problem.reason, problem.hint or f"edit {problem.file}"
    )
