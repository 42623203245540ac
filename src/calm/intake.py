"""From metadata file to servable model: follow the fleet directory, fetch weights, offer what can serve.

A card that is dropped into the directory of a running server is validated, its weights are fetched in the
background, and only then is the model offered to the loop; until then a request that pins it is told so. A
card that turned bad leaves the last good one serving. `Intake` owns which cards are known and which serve.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from calm.errors import CalmError
from calm.records import ModelCard
from calm.registry import CardProblem, Fleet, FleetLoad, load_fleet
from calm.sources.fetch import at_hand, cached_path, fetch_weights
from calm.sources.progress import Progress, Silent
from calm.sources.store import in_place_path
from calm.sources.watch import watch_fleet

log = logging.getLogger(__name__)


class Intake:
    """`on_fleet(servable, unavailable)` is called at start and at every change; `unavailable` says why."""

    def __init__(
        self,
        directory: Path,
        cache: Path,
        *,
        fetch: bool,
        on_fleet: Callable[[Fleet, Mapping[str, str]], None],
        progress: Progress | None = None,
    ) -> None:
        self.directory = directory
        self._cache = cache
        self._fetch = fetch
        self._on_fleet = on_fleet
        self._progress = progress or Silent()
        self._load = FleetLoad(Fleet())
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, str] = {}
        self._verified: set[str] = set()
        self._told: dict[str, str] = {}
        self._offered: frozenset[str] = frozenset()

    @property
    def problems(self) -> tuple[CardProblem, ...]:
        return self._load.problems

    @property
    def cards(self) -> Fleet:
        """Every valid card, also those whose weights are not here yet."""
        return self._load.fleet

    async def weights(self, card: ModelCard) -> Path | None:
        """The verified file of a card, for the engine; None for a card without a source."""
        if card.source is None:
            return None
        path = await fetch_weights(
            card.source, self._cache, self._progress, name=card.name, base=self.directory
        )
        self._verified.add(card.source.sha256)
        return path

    async def start(self) -> None:
        """Read the directory once and offer what can serve. Raises BadInput when it cannot be read."""
        self._take(await asyncio.to_thread(load_fleet, self.directory))

    async def follow(self) -> None:
        """Take in every change of the directory until cancelled."""
        try:
            async for load in watch_fleet(self.directory, self._load):
                self._take(load)
        finally:
            for task in self._fetching.values():
                task.cancel()

    def _take(self, load: FleetLoad) -> None:
        for problem in load.problems:
            if problem not in self._load.problems:
                log.warning("refused %s", problem)
        self._load = load
        self._failures = {name: why for name, why in self._failures.items() if self._missing(name)}
        for name in load.fleet:
            if self._missing(name) and (self._fetch or self._here(name)):
                self._start_fetching(name)
        self._offer()

    def _start_fetching(self, name: str) -> None:
        running = self._fetching.get(name)
        if running is None or running.done():
            self._failures.pop(name, None)
            self._fetching[name] = asyncio.create_task(self._fetch_one(name), name=f"fetch {name}")

    async def _fetch_one(self, name: str) -> None:
        try:
            await self.weights(self._load.fleet[name])
            log.info("fetched the weights of %s", name)
        except CalmError as error:
            self._failures[name] = error.message
            log.error("cannot fetch %s: %s", name, error.message)
        finally:
            self._fetching.pop(name, None)
        if name not in self._failures and self._missing(name):  # the card changed meanwhile
            self._start_fetching(name)
        self._offer()

    def _missing(self, name: str) -> bool:
        """True while a card's weights are absent, or lie outside the cache and were not verified yet."""
        card = self._load.fleet.get(name)
        if card is None or card.source is None:
            return False
        if in_place_path(card.source, self.directory) is not None:
            return card.source.sha256 not in self._verified
        return cached_path(card.source, self._cache, self.directory) is None

    def _here(self, name: str) -> bool:
        """True when taking the weights in needs no network."""
        source = self._load.fleet[name].source
        return source is not None and at_hand(source, self._cache, self.directory)

    def _offer(self) -> None:
        fleet = self._load.fleet
        missing = {name: self._why(name) for name in fleet if self._missing(name)}
        missing |= {
            name: why for name in fleet if name not in missing and (why := self._waits(name, missing))
        }
        for name, why in missing.items():
            if self._told.get(name) != why:
                log.warning("%s is not served: %s", name, why)
        self._told = missing
        servable = Fleet(card for name, card in fleet.items() if name not in missing)
        self._offered = frozenset(servable)
        self._on_fleet(servable, missing)

    def _waits(self, name: str, missing: Collection[str]) -> str | None:
        """Why an adapter whose weights are here is not offered yet; None for whatever is.

        A base that gets another adapter is loaded anew. So those that come at the same time join together, when
        the last of them is here or has failed.
        """
        base = self._load.fleet[name].host
        if base in missing:
            return f"its base {base} is not served: {self._why(base)}"
        under_way = [n for n in self._fetching if n != name and n in self._load.fleet]
        siblings = [n for n in under_way if n != base and self._load.fleet[n].host == base]
        if base == name or name in self._offered or not siblings:
            return None
        return f"it joins {base} together with {', '.join(sorted(siblings))}, being fetched now"

    def _why(self, name: str) -> str:
        if name in self._failures:
            return f"its weights could not be had: {self._failures[name]}"
        if name in self._fetching:
            return "its weights are being fetched; try again shortly"
        return f"its weights are not here; run `calm models pull {name}`"
