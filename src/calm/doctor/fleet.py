"""The cards: good ones, bad ones, and models that can never fit the budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from calm.doctor.check import Check, failed, fine, megabytes, poor
from calm.execute.sizing import estimate_bytes
from calm.registry import CardProblem, FleetLoad


def check_fleet(directory: Path, load: FleetLoad, budget: int | None) -> Iterator[Check]:
    if load.fleet:
        names = ", ".join(load.fleet)
        yield fine("fleet", f"{len(load.fleet)} good in {directory}: {names}")
    else:
        yield failed("fleet", f"no good card in {directory}", "add one: calm models add FILE")
    yield from map(bad_card, load.problems)
    for card in load.fleet.values():
        needed = estimate_bytes(card)
        if budget is not None and needed > budget:
            found = (
                f"needs about {megabytes(needed)}, the budget is {megabytes(budget)}: it can never be loaded"
            )
            yield poor(f"model {card.name}", found, "raise memory.budget, or take a smaller quantisation")


def bad_card(problem: CardProblem) -> Check:
    """A bad card is refused while the rest of the fleet serves, hence no failure."""
    where = f"{problem.field}: " if problem.field else ""
    return poor(
        f"card {Path(problem.file).name}", where + problem.reason, problem.hint or f"edit {problem.file}"
    )
