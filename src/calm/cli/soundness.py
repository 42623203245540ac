"""What the types of the settings do not say: values that only another room can judge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calm.errors import BadInput

if TYPE_CHECKING:
    from calm.settings import Settings


def check_values(settings: Settings) -> None:
    """Raises BadInput naming the first setting that `calm serve` would stumble over."""
    from calm.execute.eviction import parse_eviction
    from calm.settings import budget_bytes

    budget_bytes(settings)
    parse_eviction(settings.memory.eviction)
    check_policy(settings)
    check_goals(settings)


def check_policy(settings: Settings) -> None:
    from calm.plan.paper import parse_paper
    from calm.plan.policies import make_policy

    name, _, argument = settings.policy.name.partition(":")
    if name == "paper":
        parse_paper(argument)  # building it would need the embedder's weights
    else:
        make_policy(settings.policy.name, seed=settings.policy.seed)


def check_goals(settings: Settings) -> None:
    from calm.plan.floor import checked_floor
    from calm.plan.goals import GOALS, checked

    if settings.policy.quality_floor is not None:
        checked_floor(settings.policy.quality_floor, field="policy.quality_floor")
    for name, weights in settings.goals.items():
        checked(weights, field=f"goals.{name}")
    if settings.policy.weights is not None:
        checked(settings.policy.weights, field="policy.weights")
    known = {**GOALS, **settings.goals}
    if settings.policy.goal not in known:
        reason = f"no goal `{settings.policy.goal}`; there are {', '.join(known)}"
        raise BadInput(f"policy.goal: {reason}", field="policy.goal")
