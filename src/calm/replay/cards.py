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
    """The cards as the profile's engines run them. Raises BadInput for a model the profile lacks, and for an
    adapter without its base."""
    homeless = sorted(name for name, card in fleet.items() if card.host not in fleet)
    if homeless:
        raise BadInput(
            f"{homeless[0]} runs on {fleet[homeless[0]].host}, which is left out of the fleet: keep both or none",
            field="fleet",
        )
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
    """How many at once is the engine's to say, for an adapter its base's."""
    model = profile.models[card.name]
    engine = profile.models[card.host]
    slots = 1 if engine.batching == "serial" else card.engine.slots
    kind = "openai" if card.remote else "llamacpp"
    return replace(
        card,
        engine=replace(card.engine, kind=kind, slots=slots),
        max_in_flight=None if engine.batching == "serial" else card.max_in_flight,
        memory_hint_bytes=card.memory_hint_bytes or model.memory_bytes,
    )
