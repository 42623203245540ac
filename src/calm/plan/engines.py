"""A snapshot by engine instead of by model: what adapters share with their base is there once.

The executor gives an adapter the state of its base, which bears the base's name. Whoever sums bytes, pins or
waiting work over a snapshot has to go by engines, or a base would count once for each of its specialists.
"""

from __future__ import annotations

from collections.abc import Mapping

from calm.records import ModelCard, ModelState, Snapshot


def engines(snapshot: Snapshot) -> list[ModelState]:
    """Each engine's state once."""
    return [state for name, state in snapshot.models.items() if state.model == name]


def families(cards: Mapping[str, ModelCard]) -> dict[str, tuple[ModelCard, ...]]:
    """By the name of each model with an engine of its own: its card, then those of its adapters."""
    found = {name: [card] for name, card in cards.items() if card.host == name}
    for name, card in cards.items():
        if card.host != name and card.host in found:
            found[card.host].append(card)
    return {host: tuple(members) for host, members in found.items()}
