"""The Analyze of the loop: for one request, what every model would do with it; and learning what it did.

One facade over the estimators of this room. It owns which row of each belongs to which model. A few models are
predicted one by one in plain floats, a large fleet in one pass over columns, by the same formulas (`maths`):
three cost tens of microseconds, a thousand about one millisecond, because a large fleet's predictions stay columns
until somebody looks a model up. No I/O, no clock, no event loop; one owner calls it, from one thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import numpy as np

from calm.analyze import checkpoint, lessons
from calm.analyze import lengths as length_module
from calm.analyze import tokens as token_module
from calm.analyze.calibration import Accuracy, Calibration
from calm.analyze.conversations import Conversations
from calm.analyze.domains import Verbosity
from calm.analyze.estimators import Estimators
from calm.analyze.fields import sense_of
from calm.analyze.maths import MANY, ONE, span
from calm.analyze.prediction import Forecasts, Question, as_estimate, forecast
from calm.analyze.quality import Quality
from calm.analyze.queueing import Outlook, Stances
from calm.ports import Embedder
from calm.records import Ask, Belief, Estimate, Features, ModelCard, Outcome, Snapshot, SourceSpec, Vector

FEW = 16
"""Up to so many models floats beat columns; `benchmarks/prediction.py` shows both sides of it."""

_SERVICE_RATE = 0.1
_FORGOTTEN_MODELS = 200
_OF_THE_ENGINE = ("prompt_tokens", "load_s", "prefill_s", "tpot_s", "energy_j")
"""Estimators of what an adapter has in common with its base; how long it talks and how well is its own."""


class Analyzer:
    """Predicts and learns for the models given with `add`."""

    def __init__(self, embedder: Embedder | None = None) -> None:
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        self._cards: dict[str, ModelCard] = {}
        self._quality = Quality(embedder)
        self._parts = Estimators(self._quality)
        self._verbosity = None if embedder is None else Verbosity(embedder)
        self._conversations = Conversations()
        self._calibration = Calibration()
        self._service_s: dict[str, float] = {}
        self._stances = Stances()
        self._parked: dict[str, checkpoint.ModelMemory] = {}

    # --- the fleet ---

    def add(self, card: ModelCard) -> None:
        """A model joins, or its card changed.

        What was learned stays when the card still names the same weights and engine (`identity`), as when a
        description is reworded; a model that left and comes back is remembered, too.
        """
        memory = self._memory(card.name) if card.name in self._rows else self._parked.pop(card.name, None)
        row = self._rows.get(card.name)
        if row is None:
            row = self._free.pop() if self._free else len(self._rows)
            self._rows[card.name] = row
        self._cards[card.name] = card
        self._stances.forget(row)
        self._parts.prime(row, self._sized(card))
        if memory is not None and memory.identity == identity(card):
            self._recall(card.name, memory)
        else:
            self._calibration.forget(card.name)
            self._conversations.forget(card.name)
            self._service_s.pop(card.name, None)
            self._inherit(row, card)

    changed = add

    def _sized(self, card: ModelCard) -> ModelCard:
        """An adapter's card with its base's weights: speed and load are guessed from what an engine reads."""
        base = self._cards.get(card.host, card)
        if base is card:
            return card
        return msgspec.structs.replace(card, source=base.source, memory_hint_bytes=base.memory_hint_bytes)

    def _inherit(self, row: int, card: ModelCard) -> None:
        """An adapter nobody asked yet begins with what its base has shown: it has the same tokens, engine and
        nearly the same speed. Where its own speed was measured and stands in its card, that counts instead."""
        base = self._cards.get(card.host)
        if base is None or base is card:
            return
        states = self._parts.states(self._rows[base.name])
        mine, its = card.priors, base.priors
        own = {
            "load_s": mine.load_s != its.load_s,
            "prefill_s": mine.prefill_tps != its.prefill_tps,
            "tpot_s": mine.decode_tps != its.decode_tps,
            "energy_j": mine.energy_j_per_token != its.energy_j_per_token,
        }
        shared = [name for name in _OF_THE_ENGINE if name in states and not own.get(name)]
        self._parts.restore(row, {name: states[name] for name in shared})

    def remove(self, name: str, *, forget: bool = False) -> None:
        """A model leaves. Unknown names are ignored; what it taught is kept unless `forget`."""
        if name not in self._rows:
            return
        memory = self._memory(name)
        row = self._rows.pop(name)
        self._quality.forget(row)
        self._free.append(row)
        del self._cards[name]
        self._service_s.pop(name, None)
        self._conversations.forget(name)
        self._calibration.forget(name)
        if not forget:
            self._park(name, memory)

    def sync(self, cards: Mapping[str, ModelCard]) -> None:
        """Makes the known models those of `cards`: adds, removes and updates what differs."""
        for name in [name for name in self._cards if name not in cards]:
            self.remove(name)
        changed = [card for name, card in cards.items() if self._cards.get(name) != card]
        for card in sorted(changed, key=lambda card: card.host != card.name):
            self.add(card)  # bases first: their adapters begin with what they have shown

    # --- predicting ---

    def estimate_all(
        self, ask: Ask, features: Features, snapshot: Snapshot, cards: Mapping[str, ModelCard]
    ) -> Mapping[str, Estimate]:
        """An Estimate for every card, in the order of `cards`. A card never added is added first.

        Of more than FEW the records are made when they are looked up, see `Forecasts`.
        """
        if not cards:
            return {}
        predict = self._one_by_one if len(cards) <= FEW else self._at_once
        return predict(ask, features, snapshot, cards, self._rows_of(cards))

    def _rows_of(self, cards: Mapping[str, ModelCard]) -> list[int]:
        try:
            return list(map(self._rows.__getitem__, cards))
        except KeyError:
            for card in [card for name, card in cards.items() if name not in self._rows]:
                self.add(card)
        return [self._rows[name] for name in cards]

    def _one_by_one(
        self,
        ask: Ask,
        features: Features,
        snapshot: Snapshot,
        cards: Mapping[str, ModelCard],
        rows: list[int],
    ) -> Mapping[str, Estimate]:
        outlook, extra = Outlook(snapshot, self._service_s), max(1, ask.samples) - 1
        question, held = self._question(ask, features), self._held(features, snapshot)
        means, sds = self._quality.predict(np.asarray(rows, np.intp), _sense(features))
        states, parts, found = snapshot.models, self._parts, {}
        each = zip(cards.items(), rows, means.tolist(), sds.tolist(), strict=True)
        for (name, card), row, quality, sd in each:
            wait = outlook.of(states.get(name), card, extra)
            numbers = forecast(ONE, question, parts.of(row), wait, held.get(name))
            found[name] = as_estimate(name, numbers, parts.energy.known(row), quality, sd)
        return found

    def _at_once(
        self,
        ask: Ask,
        features: Features,
        snapshot: Snapshot,
        cards: Mapping[str, ModelCard],
        rows: list[int],
    ) -> Mapping[str, Estimate]:
        held = self._held(features, snapshot)
        tokens = np.asarray([held.get(name, 0.0) for name in cards]) if held else None
        stances = self._stances.over(rows, cards, snapshot.models)
        wait = Outlook(snapshot, self._service_s).over(stances, cards, max(1, ask.samples) - 1)
        fleet = span(rows)
        known, metered = self._parts.over(fleet), self._parts.energy.known_of(fleet)
        numbers = forecast(MANY, self._question(ask, features), known, wait, tokens)
        return Forecasts(cards, numbers, metered, *self._quality.predict(fleet, _sense(features)))

    def _held(self, features: Features, snapshot: Snapshot) -> Mapping[str, float]:
        """Tokens of this conversation that models are expected to hold in their caches."""
        return self._conversations.cached(features.conversation, snapshot.models)

    def _question(self, ask: Ask, features: Features) -> Question:
        return Question(
            token_module.case(features),
            self._length_case(features),
            max(1, ask.samples),
            ask.max_tokens,
            ask.kind != "embeddings",
        )

    def _length_case(self, features: Features) -> length_module.Case:
        meaning = features.embedding
        if meaning is None or self._verbosity is None:
            return length_module.case(features)
        return length_module.case(features, self._verbosity(meaning))

    # --- learning ---

    def learn(
        self,
        ask: Ask,
        features: Features,
        estimate: Estimate | None,
        outcome: Outcome,
        threads: int = 1,
    ) -> None:
        """One finished request. `estimate`: what was predicted for the model that served it, None if nothing
        was; `threads`: of the engine. Takes what the outcome truly shows (`lessons`), ignores the rest."""
        row = self._rows.get(outcome.model) if outcome.model is not None else None
        if row is None or outcome.model is None or not lessons.served(outcome):
            return
        if estimate is not None and estimate.model == outcome.model:
            self._judge(ask, estimate, outcome)
        self._learn_tokens(row, features, outcome)
        self._learn_speed(row, ask, features, outcome, max(1, threads))
        self._learn_energy(row, outcome)
        self._learn_conversation(features, estimate, outcome)
        self._parts.learned(row)

    def _learn_tokens(self, row: int, features: Features, outcome: Outcome) -> None:
        if outcome.prompt_tokens is not None:
            self._parts.tokens.learn_one(row, token_module.case(features), outcome.prompt_tokens)

    def _learn_speed(self, row: int, ask: Ask, features: Features, outcome: Outcome, threads: int) -> None:
        uncached, prefill = lessons.uncached_tokens(outcome), lessons.prefill_s(outcome)
        case = (uncached or 0.0, float(max(1, outcome.concurrency)), threads)
        guessed = uncached is not None and not lessons.streamed(outcome)
        expected = self._parts.prefill.predict_one(row, case).mean if guessed else None
        if uncached is not None and prefill is not None:
            self._parts.prefill.learn_one(row, case, prefill)
        tpot = lessons.tpot_s(outcome, ask.samples, expected)
        if tpot is not None:
            self._parts.decode.learn_one(
                row, (max(1, outcome.concurrency) + max(1, ask.samples) - 1, threads), tpot
            )
        length = lessons.length(outcome, ask.samples)
        if length is not None and ask.kind != "embeddings":
            self._parts.lengths.learn_one(row, self._length_case(features), *length)
        service = lessons.service_s(outcome)
        if service is not None and outcome.model is not None:
            engine = self._cards[outcome.model].host  # whose queue it is, adapters included
            last = self._service_s.get(engine, service)
            self._service_s[engine] = (1 - _SERVICE_RATE) * last + _SERVICE_RATE * service

    def _learn_energy(self, row: int, outcome: Outcome) -> None:
        observed = lessons.joules(outcome)
        if observed is not None:
            joules, uncached, output = observed
            self._parts.energy.learn_one(row, (uncached, output), joules)

    def _learn_conversation(self, features: Features, estimate: Estimate | None, outcome: Outcome) -> None:
        if outcome.model is None:
            return
        if estimate is not None and estimate.model == outcome.model:
            self._conversations.came_true(outcome.model, estimate.cached_tokens, outcome.cached_tokens)
        tokens = (outcome.prompt_tokens or features.prompt_tokens) + (outcome.completion_tokens or 0)
        self._conversations.served(features.conversation, outcome.model, tokens)

    def _judge(self, ask: Ask, estimate: Estimate, outcome: Outcome) -> None:
        """Prediction beside observation, for the calibration report."""
        name, finished = estimate.model, outcome.status == "ok"
        saw = self._calibration.saw
        tokens = outcome.prompt_tokens
        saw(name, "ttft_s", estimate.ttft_s, outcome.ttft_s)
        saw(name, "prefill_s", estimate.prefill_s, lessons.prefill_s(outcome))
        saw(
            name,
            "prompt_tokens",
            Belief(mean=estimate.prompt_tokens, sd=0.15 * estimate.prompt_tokens),
            tokens,
        )
        if finished:
            saw(name, "total_s", estimate.total_s, outcome.total_s)
            saw(name, "energy_j", estimate.energy_j, outcome.energy.joules if outcome.energy else None)
        if finished and ask.kind != "embeddings":
            saw(name, "output_tokens", estimate.output_tokens, outcome.completion_tokens)

    def loaded(self, model: str, load_s: float) -> None:
        """A load ended. Its KV cache is empty, and its duration is learned: for the adapters that came with it,
        too, since their load is their base's."""
        for name in [name for name, card in self._cards.items() if card.host == model]:
            row = self._rows[name]
            expected = self._parts.load.predict_one(row)
            if self._parts.load.learn_one(row, (1.0,), load_s):
                self._parts.learned(row)
                self._calibration.saw(name, "load_s", expected, load_s)
            self._conversations.loaded(name)

    def rate(self, features: Features, model: str, rating: float) -> bool:
        """A rating of an answer, 1..5. False when the model is unknown or the rating out of range."""
        row = self._rows.get(model)
        if row is None or not 1.0 <= rating <= 5.0:
            return False
        quality = (rating - 1.0) / 4.0
        sense = _sense(features)
        expected = self._quality.predict_one(row, sense)
        sd = math.hypot(expected.sd, self._quality.noise_sd(row, sense))
        self._calibration.saw(model, "quality", Belief(mean=expected.mean, sd=sd), quality)
        return self._quality.learn_one(row, sense, quality)

    # --- reporting and remembering ---

    def calibration(self) -> dict[str, dict[str, Accuracy]]:
        """By model and quantity: error and coverage of the last 200 predictions."""
        return self._calibration.report()

    def domains_of(self, features: Features) -> list[tuple[str, float]]:
        """The likeliest domains of a question with their probabilities; empty without an embedding."""
        sense = _sense(features)
        return [] if sense is None else self._quality.domains_of(sense)

    def dump(self) -> bytes:
        """Everything learned, versioned and checksummed."""
        models = {name: self._memory(name) for name in self._rows}
        return checkpoint.encode(checkpoint.Memory(self._quality.fingerprint, {**self._parked, **models}))

    def load(self, data: bytes) -> bool:
        """Takes up what `dump` wrote, for models of the fleet now and for those added later.

        False, with everything as it was, when the bytes are damaged or of another version.
        """
        memory = checkpoint.decode(data)
        if memory is None:
            return False
        same_basis = memory.quality_basis == self._quality.fingerprint
        for name, remembered in memory.models.items():
            if not same_basis:
                states = {
                    key: state
                    for key, state in remembered.states.items()
                    if key.partition("/")[0] != self._quality.name
                }
                remembered = msgspec.structs.replace(remembered, states=states)
            card = self._cards.get(name)
            if card is None:
                self._park(name, remembered)
            elif remembered.identity == identity(card):
                self._recall(name, remembered)
        return True

    def _memory(self, name: str) -> checkpoint.ModelMemory:
        states = self._parts.states(self._rows[name])
        return checkpoint.ModelMemory(identity(self._cards[name]), states, self._service_s.get(name))

    def _recall(self, name: str, memory: checkpoint.ModelMemory) -> None:
        self._parts.restore(self._rows[name], memory.states)
        if memory.service_s is not None and 0.0 < memory.service_s < math.inf:
            self._service_s[name] = memory.service_s

    def _park(self, name: str, memory: checkpoint.ModelMemory) -> None:
        self._parked[name] = memory
        while len(self._parked) > _FORGOTTEN_MODELS:
            self._parked.pop(next(iter(self._parked)))


def _served(source: SourceSpec) -> str:
    """The digest of the file that the engine gets."""
    return source.convert.sha256 if source.convert is not None else source.sha256


def identity(card: ModelCard) -> str:
    """Changes exactly when what was learned about a model no longer holds for it."""
    weights = _served(card.source) if card.source is not None else ""
    engine = card.engine
    options = sorted(engine.options.items())
    found = (weights, engine.kind, engine.cmd, engine.url, engine.upstream_model, options)
    return repr(found if card.adapter_of is None else (*found, card.adapter_of))


def _sense(features: Features) -> Vector | None:
    return None if features.embedding is None else sense_of(features.embedding, features.form)
