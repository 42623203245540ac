"""Who runs on whose engine: an adapter is a model to everyone but the residency machine, which owns engines.

A host is a model with an engine of its own, a base with its adapters or any model without. Its crew are the
adapters that its engine carries. Memory, cores, places in the queue and loads belong to hosts, each counted once.
"""

from __future__ import annotations

from collections.abc import Mapping

from calm.plan.engines import families
from calm.records import ModelCard

Crew = tuple[ModelCard, ...]
"""The adapters of one host, in the order in which its engine is given them."""


def crews(cards: Mapping[str, ModelCard]) -> dict[str, Crew]:
    """Every host and its adapters. An adapter whose base is not among the cards is in no crew."""
    return {host: family[1:] for host, family in families(cards).items()}


def hosts(crews_of: Mapping[str, Crew]) -> dict[str, str]:
    """The host of every adapter that has one."""
    return {adapter.name: host for host, crew in crews_of.items() for adapter in crew}


def same_crew(old: Crew, new: Crew) -> bool:
    """True when an engine that was given `old` has all it needs to serve `new`."""
    return [_given(adapter) for adapter in old] == [_given(adapter) for adapter in new]


def _given(adapter: ModelCard) -> tuple[object, ...]:
    """What an engine is told of an adapter: its description and its priors may change while it runs."""
    return adapter.name, adapter.source, adapter.engine.upstream_model


def adapter_bytes(adapter: ModelCard) -> int:
    """What an adapter is expected to add to its engine: its hint, else the size of its file, else nothing."""
    if adapter.memory_hint_bytes is not None:
        return adapter.memory_hint_bytes
    return (adapter.source.bytes if adapter.source is not None else None) or 0
