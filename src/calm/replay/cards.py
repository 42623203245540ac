"""The fleet's cards as the profile's engines run them."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from calm.errors import BadInput
from calm.profile import Profile
from calm.records import ModelCard


async def no_weights(card: ModelCard) -> None:
    """Nothing to fetch: the profile says how long a load takes."""


def fleet_for(fleet: Mapping[str, ModelCard], profile: Profile) -> dict[str, ModelCard]:
    """The cards as the profile's engines run them. Raises BadInput for a model the profile lacks."""
    missing = sorted(fleet.keys() - profile.models.keys())
    if missing:
        known = ", ".join(sorted(profile.models))
        raise BadInput(
            f"the profile has no {', '.join(missing)} (it has {known}): measure the fleet with "
            f"`calm profile`, or leave the model out of the fleet",
            field="profile",
        )
    return {name: card_for(card, profile) for name, card in fleet.items()}


def card_for(card: ModelCard, profile: Profile) -> ModelCard:
    model = profile.models[card.name]
    slots = 1 if model.batching == "serial" else card.engine.slots
    kind = "openai" if card.remote else "llamacpp"
    return replace(
        card,
        engine=replace(card.engine, kind=kind, slots=slots),
        max_in_flight=None if model.batching == "serial" else card.max_in_flight,
        memory_hint_bytes=card.memory_hint_bytes or model.memory_bytes,
    )
