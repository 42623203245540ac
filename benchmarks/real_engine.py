"""What the benchmarks on real engines share: the fleet, adapters given by hand, and one question at a time.

Engines are started by CALM's own backends and asked without a server between, as `calm profile` does it: latency is
then the engine's, joules are those of the engine's process alone, and no second process takes time of a machine of
two cores. What the server adds was measured for itself (docs/benchmarks.md, "What the gateway costs": 1 ms).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from calm.bench.measure import laboratory, weights_of
from calm.bench.measure_engine import Laboratory, Watch
from calm.bench.measure_plan import Effort
from calm.bench.measure_probe import Answered, send
from calm.errors import BadInput, LoadFailed
from calm.ports import RunningEngine, Upstream, UpstreamReply
from calm.records import AdapterFile, Endpoint, ModelCard, SourceSpec
from calm.registry import load_fleet
from calm.registry.adapters import join
from calm.settings import fleet_dir, load_settings

UNCACHED: Mapping[str, object] = {"cache_prompt": False}
"""Every prompt is read whole, whatever was asked before: rows of one schema or paragraph must not pay for others."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every one of these benchmarks has."""
    parser.add_argument("--fleet", metavar="DIR", help="model cards (default: the fleet in force)")
    parser.add_argument(
        "--adapter", "--adapters", dest="adapters", action="extend", nargs="+", default=[],
        metavar="NAME@BASE=FILE", help="a LoRA adapter without a card, e.g. finance@smollm2-135m=finance.gguf",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


# --- cards ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stock:
    """The models at hand, adapters completed from their bases, and where their weights lie."""

    cards: Mapping[str, ModelCard]
    directory: Path
    given: Mapping[str, Path]
    """Files named on the command line, by model."""

    def weights(self, card: ModelCard) -> Path | None:
        """None where they are not here."""
        return self.given.get(card.name) or weights_of(card, self.directory)

    def digest(self, card: ModelCard) -> str:
        """Of what answers, weights of base and adapter, and template: figures of a retrained adapter are others."""
        own = _digest_of(card.source, self.given.get(card.name))
        if card.adapter_of is not None:
            return f"{own}+{self.digest(self.cards[card.host])}"
        said = msgspec.json.encode((card.chat, card.context, card.engine.options))
        return f"{own}/{hashlib.sha256(said).hexdigest()[:6]}"

    def chosen(self, names: Sequence[str]) -> dict[str, ModelCard]:
        """Those named, for none all that run on llama.cpp; with weights that are here. Raises BadInput."""
        if unknown := [name for name in names if name not in self.cards]:
            known = ", ".join(self.cards) or "none"
            raise BadInput(f"no model {unknown[0]!r} in {self.directory}; there are: {known}", field="models")
        ours = [name for name, card in self.cards.items() if card.engine.kind == "llamacpp"]
        found = {name: self.cards[name] for name in names or ours}
        for name in found:
            if self.weights(self.cards[name]) is None or self.weights(self.cards[found[name].host]) is None:
                raise BadInput(f"{name}: its weights are not here; run `calm models pull {name}`")
        return found


def stock(fleet: str | None, adapters: Sequence[str]) -> Stock:
    """Raises BadInput: a fleet that cannot be read, a card or an adapter that cannot serve."""
    directory = fleet_dir(load_settings(overrides={"fleet": {"dir": fleet}}))
    load = load_fleet(directory)
    by_hand = [adapter_card(word) for word in adapters]
    cards, refused = join([*load.fleet.values(), *(card for card, _ in by_hand)])
    if wrong := [*map(str, load.problems), *(f"{name}: {why.reason}" for name, why in refused.items())]:
        raise BadInput("; ".join(wrong), field="fleet")
    return Stock({card.name: card for card in cards}, directory, {c.name: path for c, path in by_hand})


def adapter_card(word: str) -> tuple[ModelCard, Path]:
    """`NAME@BASE=FILE` as a card and its file. Raises BadInput."""
    names, _, file = word.partition("=")
    name, _, base = names.partition("@")
    path = Path(file)
    if not (name and base and file):
        raise BadInput(f"{word!r}: an adapter is given as NAME@BASE=FILE", field="adapters")
    if not path.is_file():
        raise BadInput(f"{file}: no such file", field="adapters")
    source = SourceSpec(parts=(f"file:{path.absolute()}",), sha256=_file_digest(path))
    return ModelCard(name=name, description=f"{name}, given by hand", adapter_of=base, source=source), path


def _digest_of(source: SourceSpec | None, given: Path | None) -> str:
    if source is None:
        return _file_digest(given)[:12] if given is not None else "none"
    return (source.convert.sha256 if source.convert else source.sha256)[:12]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- engines ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resident:
    """One model, ready to be asked."""

    card: ModelCard
    endpoint: Endpoint
    engine: RunningEngine


@dataclass(frozen=True)
class Reply:
    answered: Answered
    energy_j: float | None
    """Of the engine's process while it answered; None where nothing is metered."""


class Adding:
    """An Upstream that puts fields into every body that does not state them: what a bench has to say and the product
    does not."""

    def __init__(self, upstream: Upstream, fields: Mapping[str, object]) -> None:
        self._upstream = upstream
        self._fields = fields

    def post(self, endpoint: Endpoint, path: str, body: bytes) -> AbstractAsyncContextManager[UpstreamReply]:
        whole = {**self._fields, **msgspec.json.decode(body)}
        return self._upstream.post(endpoint, path, msgspec.json.encode(whole))


@asynccontextmanager
async def opened(
    at_hand: Stock, watch: Watch, *, fields: Mapping[str, object] = UNCACHED, threads: int | None = None
) -> AsyncIterator[Laboratory]:
    """A laboratory for these cards, `fields` in every request. Threads: as the executor would give each engine
    of this fleet, unless said."""
    settings = load_settings(overrides={"fleet": {"dir": str(at_hand.directory)}})
    hosts = {name: card for name, card in at_hand.cards.items() if card.adapter_of is None}
    async with laboratory(settings, hosts, at_hand.directory, Effort(), watch) as lab:
        counts = {name: threads or lab.threads[card.host] for name, card in at_hand.cards.items()}
        yield dataclasses.replace(
            lab, upstream=Adding(lab.upstream, fields), threads=counts, weights=at_hand.weights
        )


async def start(lab: Laboratory, card: ModelCard, adapters: Sequence[ModelCard] = ()) -> RunningEngine:
    """An engine with these adapters. Raises LoadFailed, also when it refuses one of them."""
    files = [AdapterFile(card=adapter, weights=lab.weights(adapter)) for adapter in adapters]
    backend = lab.backends.get(card.engine.kind)
    if backend is None:
        raise LoadFailed(f"{card.name}: no backend runs engines of kind {card.engine.kind}")
    if not files:
        return await backend.start(card, lab.weights(card), lab.threads[card.name])
    engine = await backend.start(card, lab.weights(card), lab.threads[card.name], files)
    if engine.refused():
        await engine.stop()
        raise LoadFailed("; ".join(f"{name}: {why}" for name, why in engine.refused().items()))
    return engine


@asynccontextmanager
async def resident(
    lab: Laboratory, cards: Mapping[str, ModelCard], hosts: Mapping[str, ModelCard]
) -> AsyncIterator[dict[str, Resident]]:
    """Every model of `cards` on one engine per base (`hosts`), each having answered once. Raises CalmError."""
    found: dict[str, Resident] = {}
    async with AsyncExitStack() as stack:
        for host in dict.fromkeys(card.host for card in cards.values()):
            lab.watch.stage(host, "load")
            own = [card for card in cards.values() if card.adapter_of == host]
            engine = await start(lab, hosts[host], own)
            stack.push_async_callback(engine.stop)
            if host in cards:
                found[host] = Resident(cards[host], engine.endpoint, engine)
            found |= {card.name: Resident(card, engine.adapters()[card.name], engine) for card in own}
        for model in found.values():
            await ask(lab, model, "Hello", 2)
        yield {name: found[name] for name in cards}


async def ask(
    lab: Laboratory, model: Resident, prompt: str, max_tokens: int, *, endless: bool = False
) -> Reply:
    """Greedy, streamed, alone on the engine. Raises EngineLost, UpstreamRejected."""
    before_j = _joules(lab, model)
    answered = await send(lab.upstream, model.endpoint, model.card, prompt, max_tokens, endless=endless)
    after_j = _joules(lab, model)
    spent_j = None if before_j is None or after_j is None else after_j - before_j
    return Reply(answered, spent_j)


def _joules(lab: Laboratory, model: Resident) -> float | None:
    group = model.card.host
    return lab.meter.read({group: model.engine.pids()}).get(group)
