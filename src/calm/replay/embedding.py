"""Embedders that remember: the trials of a study ask the same questions many times."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from calm.monitor.embed import StaticEmbedder
from calm.ports import Embedder
from calm.records import Vector


class RememberingEmbedder:
    """Embeds each text once."""

    def __init__(self, inner: Embedder) -> None:
        self.name, self.dimensions = inner.name, inner.dimensions
        self.embed: Callable[[str], Vector] = lru_cache(maxsize=1 << 15)(inner.embed)


def remembering(make: Callable[[], Embedder] | None) -> Callable[[], Embedder] | None:
    """The same embedder made once and asked each text once."""
    return None if make is None else lru_cache(maxsize=1)(lambda: RememberingEmbedder(make()))


@lru_cache(maxsize=1)
def static_embedder() -> Embedder:
    """One for all trials of a process: it never changes."""
    return RememberingEmbedder(StaticEmbedder())
