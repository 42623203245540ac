"""How much an engine will take before it was ever run: bytes and threads; and what forces a restart.

Guesses that a measurement replaces: they only have to be good enough for the first load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from calm.execute.events import Fleet
from calm.execute.hosting import adapter_bytes, crews
from calm.records import ModelCard

MIB = 1024 * 1024
OVERHEAD_BYTES = 64 * MIB
"""What an engine needs besides the weights: code, buffers, a small KV cache."""
WEIGHTS_FACTOR = 1.2
RUNTIME_NEUTRAL = frozenset(
    {"description", "domains", "placement", "memory_hint_bytes", "priors", "fields", "price", "max_in_flight"}
)
"""Card fields a running engine does not depend on."""


def bytes_for_weights(weights_bytes: int) -> int:
    """Resident bytes expected of an engine over weights of this size."""
    return int(weights_bytes * WEIGHTS_FACTOR) + OVERHEAD_BYTES


def estimate_bytes(card: ModelCard) -> int:
    """The card's hint, else from the size of its weights, else the bare overhead (then measured)."""
    if card.remote:
        return 0
    if card.memory_hint_bytes is not None:
        return card.memory_hint_bytes
    weights = card.source.bytes if card.source is not None else None
    return OVERHEAD_BYTES if weights is None else bytes_for_weights(weights)


def threads_for(card: ModelCard, cores: int, local_models: int) -> int:
    """The card's threads, else an even share of the cores among the models that can be active at once.

    Two engines with two threads each on two cores run several times slower than with one each.
    """
    if card.remote:
        return 0
    share = cores // min(cores, max(local_models, 1))
    return max(1, min(card.engine.threads or share, cores))


def host_bytes(card: ModelCard, crew: Iterable[ModelCard]) -> int:
    """The same of an engine with the adapters it carries."""
    return 0 if card.remote else estimate_bytes(card) + sum(map(adapter_bytes, crew))


def size_fleet(cards: Mapping[str, ModelCard], cores: int) -> Fleet:
    """Bytes and threads of every engine there would be: one for each host."""
    crews_of = crews(cards)
    local = sum(not cards[host].remote for host in crews_of)
    return Fleet(
        cards=dict(cards),
        bytes={host: host_bytes(cards[host], crew) for host, crew in crews_of.items()},
        threads={host: threads_for(cards[host], cores, local) for host in crews_of},
    )


def needs_restart(old: ModelCard, new: ModelCard) -> bool:
    """True when an engine started from `old` cannot serve `new`."""
    fields = (f for f in old.__struct_fields__ if f not in RUNTIME_NEUTRAL)
    return any(getattr(old, f) != getattr(new, f) for f in fields)


def needs_measuring_anew(old: ModelCard, new: ModelCard) -> bool:
    """True when a footprint measured under `old` says nothing about `new`."""
    return (old.source, old.engine, old.context) != (new.source, new.engine, new.context)
