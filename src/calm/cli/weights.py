"""Fetches the weights of several models at once, each with its own bar; one that fails stops no other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from calm.errors import CalmError

if TYPE_CHECKING:
    from calm.records import ModelCard
    from calm.settings import Settings
    from calm.sources.progress import ProgressBoard

AT_ONCE = 3
"""Fetches at once: enough to hide a slow index, few enough to read their bars."""
MINILM = "MiniLM embedder"


@dataclass(frozen=True, slots=True)
class Fetched:
    """What became of one model's weights."""

    name: str
    path: Path | None = None
    error: str | None = None


def missing(cards: Iterable[ModelCard], directory: Path, cache: Path) -> list[ModelCard]:
    """Those whose weights have to be fetched. Reads the cache only."""
    from calm.sources.fetch import cached_path

    return [c for c in cards if c.source is not None and cached_path(c.source, cache, directory) is None]


def needs_minilm(settings: Settings) -> bool:
    """The paper's policy compares with MiniLM, and so does whoever set it as the embedder."""
    return settings.policy.embedder == "minilm" or settings.policy.name.partition(":")[0] == "paper"


def fetch(
    cards: Iterable[ModelCard],
    directory: Path,
    cache: Path,
    *,
    assets: bool = False,
    verify: bool = False,
    stream: TextIO | None = None,
) -> list[Fetched]:
    """Every card's weights (those that have any), in order, and with `assets` the MiniLM embedder."""
    import asyncio

    return asyncio.run(_fetch_all(list(cards), directory, cache, assets, verify, stream))


async def _fetch_all(
    cards: list[ModelCard], directory: Path, cache: Path, assets: bool, verify: bool, stream: TextIO | None
) -> list[Fetched]:
    import asyncio

    from calm.sources.assets import fetch_minilm
    from calm.sources.fetch import fetch_weights
    from calm.sources.progress import ProgressBoard

    room = asyncio.Semaphore(AT_ONCE)

    async def model(card: ModelCard, board: ProgressBoard) -> Fetched:
        assert card.source is not None
        async with room:
            try:
                path = await fetch_weights(
                    card.source, cache, board.line(), name=card.name, base=directory, verify=verify
                )
            except CalmError as error:
                return Fetched(card.name, error=error.message)
        return Fetched(card.name, path)

    async def minilm(board: ProgressBoard) -> Fetched:
        async with room:
            try:
                path, _ = await fetch_minilm(cache, board.line())
            except CalmError as error:
                return Fetched(MINILM, error=error.message)
        return Fetched(MINILM, path)

    with ProgressBoard(stream) as board:
        jobs = [model(card, board) for card in cards if card.source is not None]
        return await asyncio.gather(*jobs, *([minilm(board)] if assets else []))
