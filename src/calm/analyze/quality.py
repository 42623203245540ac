"""How good each model's answer will be, 0..1: the card's belief by domain, corrected by every rating.

Prior: sum over fields and domains of P(it | question) * the card's quality in it; what a question's fields
(fields.py) leave, its domains share. On top, for each model, a Bayesian
linear regression of the residual (rating - prior) on what the question is about. Strong shrinkage: with few
ratings a router that trusts them loses to the best single model.

Each field has regressions of its own, beside those of what no field claims: that a reader of abstracts did well says
nothing of the queries it would write, and with one regression three good abstracts were enough to have it write them.

What the question is about is 64 numbers: a constant, the zero-shot domain probabilities, and a fixed random
orthonormal projection of the embedding for what no domain names (Johnson and Lindenstrauss 1984). 64 and not
256 because it learns as well and keeps a model's covariance at 32 KB; docs/decisions/0004 has the figures.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from calm.analyze.domains import DESCRIPTORS, GENERAL, DomainSpace, canonical
from calm.analyze.evidence import Prior, RowState
from calm.analyze.fields import FieldSpace
from calm.analyze.maths import Array, Rows, Span
from calm.analyze.wide import WideBank
from calm.ports import Embedder
from calm.records import Belief, ModelCard, Vector

DIMENSIONS = 64
UNSTATED_QUALITY = 0.5
CLAIMED_DOMAIN_BONUS = 0.1
DESCRIPTION_BONUS = 0.1

ELSEWHERE = ""
"""Questions that no field claims."""
_CLAIMED = 0.5
"""Probability from which a question is a field's."""
_DEFAULT = "default"
_NAMED = len(DESCRIPTORS)
_FREE = DIMENSIONS - 1 - _NAMED
_DOMAIN_SCALE = np.float32(
    6.0
)  # the squared probabilities of a typical question then sum to about the constant's
_FREE_SCALE = np.float32(16.0)  # sqrt(256): a projected coordinate then has unit variance
_FORGETTING = 0.998
_PRIOR = Prior(
    mean=(0.0,) * DIMENSIONS,
    strength=(2.0, *(1000.0,) * (DIMENSIONS - 1)),
    noise_sd=0.3,
)
_UNRATED_SD = math.sqrt(_PRIOR.noise_sd**2 / _PRIOR.strength[0])
_FEATURE_VARIANCE = _PRIOR.noise_sd**2 / _PRIOR.strength[1]


class Topic(NamedTuple):
    """What a question is about, worked out once for the whole fleet."""

    claims: NDArray[np.float32]
    """(domains + fields + dimensions): their probabilities, then its embedding."""
    named: NDArray[np.float32]
    free: NDArray[np.float32]
    """The regression's features after the constant, (40,) and (23,)."""
    place: str
    """The field it most likely belongs to, where ratings of it are learned; ELSEWHERE when that is none."""


class Quality:
    """Prior by domain plus learned residual, for all models of the fleet at once."""

    name = "quality"

    def __init__(self, embedder: Embedder | None) -> None:
        self._embedder = embedder
        self._bank = WideBank(_PRIOR, _FORGETTING)
        self._rated: dict[tuple[str, int], int] = {}
        """Slot of the bank by place and row."""
        self._slot_of: dict[str, Rows] = {}  # the same as arrays over rows, -1 where nobody rated
        self._slots: list[int] = []
        self._domains = None if embedder is None else DomainSpace(embedder)
        self._fields = None if embedder is None else FieldSpace(embedder.name, embedder.dimensions)
        self._cards: dict[int, ModelCard] = {}
        width = 0 if self._domains is None else len(self._domains.names)
        self._table: Array = np.zeros((0, width))
        self._default: Array = np.zeros(0)
        dimensions = 0 if embedder is None else embedder.dimensions
        self._described: NDArray[np.float32] = np.zeros((0, dimensions), np.float32)
        self._beliefs: NDArray[np.float32] = np.zeros((0, width + dimensions), np.float32)
        self._stale = True
        self._basis = np.ascontiguousarray(_FREE_SCALE * _projection(dimensions).T)

    @property
    def fingerprint(self) -> str:
        """Of everything the learned numbers depend on: states of another one are not restored."""
        name = "none" if self._embedder is None else f"{self._embedder.name}/{self._embedder.dimensions}"
        digest = hashlib.blake2b(
            repr((name, DIMENSIONS, sorted(DESCRIPTORS.items()))).encode(), digest_size=8
        )
        return digest.hexdigest()

    def add(self, row: int, card: ModelCard) -> None:
        """Sets the row's prior; forgets its ratings."""
        self.forget(row)
        self._make_room(row + 1)
        self._default[row] = card.priors.quality.get(_DEFAULT, UNSTATED_QUALITY)
        if self._domains is None or self._embedder is None or self._fields is None:
            return
        at_home = any(map(self._fields.reads, card.fields.values()))
        stated, claimed = by_domain(card, at_home=at_home)
        self._learn_names([*stated, *claimed])
        self._described[row] = self._embedder.embed(card.description)
        self._cards[row] = card
        self._table[row] = prior_row(self._domains.names, self._default[row], stated, claimed)

    def forget(self, row: int) -> None:
        """The row's model has left, or its ratings no longer hold."""
        self._cards.pop(row, None)
        self._stale = True
        for place in self._places_of(row):
            slot = self._rated.pop((place, row))
            self._slot_of[place][row] = -1
            self._bank.reset(slot)
            self._slots.append(slot)

    def topic(self, sense: Vector | None) -> Topic | None:
        """None without a sense (fields.sense_of): then only the models' means tell them apart."""
        if sense is None or self._domains is None or self._fields is None:
            return None
        if self._stale:
            self._believe(self._fields)
        embedding = sense[: self._basis.shape[1]]
        posterior, coordinates = self._domains.read(embedding)
        shares = self._fields.shares(sense)
        left = posterior * (1.0 - shares.sum())
        free = self._basis.dot(embedding)
        claims = np.concatenate([left, shares, embedding])
        return Topic(claims, _DOMAIN_SCALE * coordinates, free, place_of(self._fields.names, shares))

    def prior(self, rows: Span, topic: Topic | None) -> Array:
        """The cards' belief about a question, (m,)."""
        if topic is None:
            return self._default[rows].copy()
        return np.asarray(self._beliefs[rows].dot(topic.claims), np.float64)

    def predict(self, rows: Span, sense: Vector | None) -> tuple[Array, Array]:
        """Mean and sd, (m,). The sd is of the mean alone, not of single ratings: it shrinks with every
        rating near this question, which is what exploration needs."""
        topic = self.topic(sense)
        mean = self.prior(rows, topic)
        sd = np.full(len(mean), unrated_sd(topic))
        slots = self._slot_of.get(_place(topic))
        if slots is not None:
            self._correct(slots[rows], topic, mean, sd)
        return np.minimum(np.maximum(mean, 0.0), 1.0), sd

    def _correct(self, slots: Rows, topic: Topic | None, mean: Array, sd: Array) -> None:
        """What ratings taught, into `mean` and `sd`."""
        where = np.flatnonzero(slots >= 0)
        if len(where):
            learned, variance = self._bank.predict_same(slots[where], features_of(topic))
            mean[where] += learned
            sd[where] = np.sqrt(variance)

    def predict_one(self, row: int, sense: Vector | None) -> Belief:
        mean, sd = self.predict(np.asarray([row]), sense)
        return Belief(mean=float(mean[0]), sd=float(sd[0]))

    def noise_sd(self, row: int, sense: Vector | None) -> float:
        """Spread of single ratings around the mean."""
        slot = self._rated.get((_place(self.topic(sense)), row))
        return _PRIOR.noise_sd if slot is None else self._bank.noise_sd(slot)

    def learn_one(self, row: int, sense: Vector | None, quality: float) -> bool:
        """One rating, 0..1. False when out of range."""
        if not 0.0 <= quality <= 1.0:
            return False
        topic = self.topic(sense)
        prior = float(self.prior(np.asarray([row]), topic)[0])
        return self._bank.learn_one(self._slot(_place(topic), row), features_of(topic), quality - prior)

    def states(self, row: int) -> dict[str, RowState]:
        """By `quality` for what no field claims, and by `quality/FIELD`; those nobody rated are left out."""
        found = {_key(place): self._bank.state(self._rated[place, row]) for place in self._places_of(row)}
        return {key: state for key, state in found.items() if state is not None}

    def restore(self, row: int, states: Mapping[str, RowState]) -> bool:
        """Its own among them. What does not fit is left as it is, and False."""
        mine = [key for key in states if key == self.name or key.startswith(f"{self.name}/")]
        fitted = [self._bank.restore(self._slot(key.partition("/")[2], row), states[key]) for key in mine]
        return all(fitted)

    def domains_of(self, sense: Vector, most: int = 3) -> list[tuple[str, float]]:
        """The likeliest fields and domains of a question, for explaining a decision."""
        topic = self.topic(sense)
        if topic is None or self._domains is None or self._fields is None:
            return []
        names = (*self._domains.names, *self._fields.names)
        likely = topic.claims[: len(names)].argsort()[::-1][:most]
        return [(names[i], float(topic.claims[i])) for i in likely]

    def _believe(self, fields: FieldSpace) -> None:
        """Cards as rows to multiply a topic's claims with. Fitting the question better than the mean
        description of the fleet does is what earns the bonus."""
        present = sorted(self._cards)
        fields.learn(self._cards[row].fields for row in present)
        at_home = np.repeat(self._default[:, None], len(fields.names), axis=1)
        for row in present:
            at_home[row] = field_row(fields, self._default[row], self._cards[row])
        fit = self._described - (self._described[present].mean(axis=0) if present else 0.0)
        self._beliefs = np.concatenate(
            [self._table, at_home, DESCRIPTION_BONUS * fit], axis=1, dtype=np.float32
        )
        self._stale = False

    def _places_of(self, row: int) -> list[str]:
        return [place for place in self._slot_of if (place, row) in self._rated]

    def _slot(self, place: str, row: int) -> int:
        """Covariances are held only where somebody rated: a row gets one with its first rating in a place."""
        if (place, row) not in self._rated:
            slot = self._slots.pop() if self._slots else len(self._rated)
            self._bank.grow(slot + 1)
            slots = self._slot_of.setdefault(place, np.full(len(self._default), -1, np.intp))
            self._rated[place, row] = slots[row] = slot
        return self._rated[place, row]

    def _make_room(self, rows: int) -> None:
        extra = rows - len(self._default)
        if extra > 0:
            extra += rows // 2
            self._default = np.concatenate([self._default, np.full(extra, UNSTATED_QUALITY)])
            unrated = np.full(extra, -1, np.intp)
            self._slot_of = {place: np.concatenate([old, unrated]) for place, old in self._slot_of.items()}
            blank = np.full((extra, self._table.shape[1]), UNSTATED_QUALITY)
            self._table = np.concatenate([self._table, blank])
            described = np.zeros((extra, self._described.shape[1]), self._described.dtype)
            self._described = np.concatenate([self._described, described])

    def _learn_names(self, names: list[str]) -> None:
        if self._domains is None:
            return
        self._domains.favour(names)
        extra = len(self._domains.names) - self._table.shape[1]
        if extra:
            blank = np.repeat(self._default[:, None], extra, axis=1)
            self._table = np.concatenate([self._table, blank], axis=1)


def place_of(names: Sequence[str], shares: NDArray[np.float32]) -> str:
    """The field that claims a question, or ELSEWHERE."""
    likeliest = int(shares.argmax()) if len(shares) else -1
    return names[likeliest] if likeliest >= 0 and shares[likeliest] >= _CLAIMED else ELSEWHERE


def _place(topic: Topic | None) -> str:
    return ELSEWHERE if topic is None else topic.place


def _key(place: str) -> str:
    return Quality.name if place == ELSEWHERE else f"{Quality.name}/{place}"


def prior_row(
    names: tuple[str, ...], default: float, stated: Mapping[str, float], claimed: list[str]
) -> Array:
    """Quality by domain: as stated; a little over the default where only claimed; else the default."""
    row = np.full(len(names), default)
    for index, name in enumerate(names):
        if name in stated:
            row[index] = stated[name]
        elif name in claimed and name != GENERAL:
            row[index] = default + CLAIMED_DOMAIN_BONUS
    return np.asarray(np.clip(row, 0.0, 1.0))


def by_domain(card: ModelCard, *, at_home: bool) -> tuple[dict[str, float], list[str]]:
    """The card's quality by domain, and the domains it claims without saying how good it is there.

    `at_home`: its fields are in use, so it claims none. Fields of another embedder are not: then their mean quality
    is what the card says of its domains.
    """
    quality = card.priors.quality
    stated = {
        canonical(name): float(value)
        for name, value in quality.items()
        if name != _DEFAULT and name not in card.fields
    }
    domains = [canonical(name) for name in card.domains]
    known = [float(quality[name]) for name in card.fields if name in quality]
    if known and not at_home:
        stated = {**dict.fromkeys(domains, sum(known) / len(known)), **stated}
    return stated, [] if at_home else domains


def field_row(fields: FieldSpace, default: float, card: ModelCard) -> list[float]:
    """Quality by field: as stated; else what the field says of those who have not learned it, of which a specialist
    of another field is not better than its own default."""
    most = default if card.fields else 1.0
    return [
        card.priors.quality.get(name, min(most, fields.untrained.get(name, default))) for name in fields.names
    ]


def _projection(dimensions: int) -> NDArray[np.float32]:
    """(dimensions, 64 - domains - 1), orthonormal, the same in every process."""
    gaussian = np.random.default_rng(2602_03632).standard_normal((dimensions, min(_FREE, dimensions)))
    basis = np.linalg.qr(gaussian)[0] * np.sqrt(dimensions) / _FREE_SCALE
    padded = np.zeros((dimensions, _FREE))
    padded[:, : basis.shape[1]] = basis
    return np.asarray(padded, np.float32)


def features_of(topic: Topic | None) -> Array:
    """(64,): a constant, then the topic's. Without one only the constant: then a model's mean is learned."""
    z = np.zeros(DIMENSIONS)
    z[0] = 1.0
    if topic is not None:
        z[1 : 1 + _NAMED], z[1 + _NAMED :] = topic.named, topic.free
    return z


def unrated_sd(topic: Topic | None) -> float:
    """The prior's standard deviation at a question."""
    if topic is None:
        return _UNRATED_SD
    squares = float(topic.named.dot(topic.named) + topic.free.dot(topic.free))
    return math.sqrt(_UNRATED_SD**2 + _FEATURE_VARIANCE * squares)
