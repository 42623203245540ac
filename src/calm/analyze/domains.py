"""Which domain a question belongs to, without a single training example.

Each domain is a handful of words; a question's domain is the one whose words its embedding is nearest to
(zero-shot classification by embedding similarity, as in Yin et al. 2019, arXiv 1909.00161). A domain that
an operator invents works by its own name: `veterinary` needs no entry here, an entry only sharpens it.

`python benchmarks/prediction.py` measures the accuracy on labelled questions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from calm.ports import Embedder
from calm.records import Vector

GENERAL = "general"

DESCRIPTORS: dict[str, tuple[str, ...]] = {
    GENERAL: (
        "tell me about",
        "what do you think about",
        "hello, how are you",
        "who is and when did it happen",
    ),
    "math": (
        "math word problem: how many are left, how much does each cost in total",
        "calculate the sum, product, percentage, ratio, average",
        "solve the equation for x, algebra, geometry, probability, theorem proof",
    ),
    "code": (
        "write a python function that returns a list, def, class, import",
        "programming, debug this error, javascript, compile, algorithm, unit test",
    ),
    "sql": ("sql query, select from table where, database, join, schema",),
    "medical": (
        "patient with symptoms, diagnosis, treatment, drug dose, physical examination",
        "disease, clinical trial, surgery, therapy outcomes, cells, medicine",
    ),
    "fitness": ("workout exercise plan, muscle, gym, running, strength training",),
    "nutrition": ("diet, calories, protein, vitamins, healthy meals",),
    "mental_health": ("I feel anxious, depressed, lonely, stress, therapy and coping with emotions",),
    "legal": ("law, contract clause, court, liability, statute, plaintiff, attorney",),
    "finance": (
        "stocks, investment, market price, gold futures rise and fall, interest rate, bonds",
        "earnings, revenue, tax, portfolio, loan, economy",
    ),
    "banking": (
        "my card payment was declined, transfer pending, top up, account balance",
        "exchange rate charged, cash withdrawal fee, refund, verify my identity",
    ),
    "assistant": (
        "set an alarm, remind me, play music, what is the weather, turn on the lights",
        "book a flight, restaurant reservation, directions, schedule a meeting",
    ),
    "customer_support": ("where is my order, cancel my subscription, return a product, complaint",),
    "science": (
        "physics, energy, force, temperature, experiment, planet, rock, earth",
        "organisms, plants, species, cell, photosynthesis, ecosystem",
    ),
    "chemistry": ("chemical reaction, molecule, acid, compound, moles, oxidation",),
    "biology": ("genetics, protein, evolution, organism, enzyme, cell biology",),
    "history": ("history, war, empire, king, century, revolution, treaty",),
    "geography": ("country, capital, river, mountain, population, continent",),
    "politics": ("government, election, president, parliament, policy",),
    "philosophy": ("ethics, morality, existence, argument, philosopher, meaning of life",),
    "religion": ("bible, god, church, prayer, islam, buddhism",),
    "education": ("explain to a student, homework, lesson plan, exam, school",),
    "commonsense": (
        "where would you put it, what would a person do if, why do people",
        "someone would likely find it where, what might happen next",
    ),
    "creative_writing": ("write a story, poem, song lyrics, character, novel scene",),
    "summarization": ("summarize the following text, key points, tl;dr, shorten",),
    "translation": ("translate into French, Spanish, German, how do you say",),
    "email": ("write a formal email, dear sir, letter, cover letter, reply to my boss",),
    "marketing": ("advertising slogan, product description, brand, social media post",),
    "extraction": ("extract the names, dates and fields as json, classify the text, entities",),
    "tools": ("call a function, tool use, api request with arguments",),
    "roleplay": ("pretend you are, act as a character, role play dialogue",),
    "sports": ("football, basketball, match, league, player, score, championship",),
    "entertainment": ("movie, music, actor, tv series, celebrity, album, video game",),
    "travel": ("travel itinerary, hotel, tourist sights, visit, vacation",),
    "cooking": ("recipe, ingredients, bake, cook, oven, sauce",),
    "security": ("cybersecurity, encryption, vulnerability, malware, password",),
    "hardware": ("computer network, cpu, linux command, install driver, server",),
    "engineering": ("mechanical, electrical circuit, voltage, engine design, material",),
    "agriculture": ("crops, soil, irrigation, livestock, farmer, harvest",),
    "business": ("startup strategy, management, customers, project plan, employees",),
}
"""Generic descriptions of common domains. Keys are what cards may use in `domains` and `priors.quality`."""

ALIASES: dict[str, str] = {
    "mathematics": "math", "maths": "math", "arithmetic": "math", "coding": "code", "programming": "code",
    "python": "code", "health": "medical", "medicine": "medical", "biomedical": "medical", "law": "legal",
    "chat": GENERAL, "conversation": GENERAL, "reasoning": "commonsense", "writing": "creative_writing",
    "support": "customer_support", "summarisation": "summarization", "function_calling": "tools",
    "psychology": "mental_health", "database": "sql", "economics": "finance",
}  # fmt: skip

_TEMPERATURE = 0.04
_FAVOUR = 0.08  # in cosine: 78 % of in-domain questions right for 20 % of the others captured
_FAVOURED_ODDS = math.exp(_FAVOUR / _TEMPERATURE)


def canonical(domain: str) -> str:
    """One spelling for one domain: lower case, underscores, aliases resolved."""
    name = "_".join(domain.strip().lower().replace("-", " ").split())
    return ALIASES.get(name, name)


class DomainSpace:
    """Embedded descriptors of all known domains; grows by any name a card uses.

    The names of `DESCRIPTORS` come first and never move. Domains the fleet serves are favoured over the
    table's others, which stand by to catch questions that none of the fleet's domains is about.
    """

    def __init__(self, embedder: Embedder, fleet: Iterable[str] = ()) -> None:
        self._embedder = embedder
        self.names: tuple[str, ...] = ()
        # Cosines over the temperature: at most 25, so their exponentials need no shift to stay in range.
        self._rows: NDArray[np.float32] = np.zeros((0, embedder.dimensions), np.float32)
        self._starts: NDArray[np.intp] = np.zeros(0, np.intp)
        self._odds: NDArray[np.float32] = np.zeros(0, np.float32)
        self._extend(DESCRIPTORS)
        self.favour(fleet)

    def favour(self, domains: Iterable[str]) -> None:
        """Domains that the fleet serves; unknown ones are added under their canonical spelling."""
        names = [canonical(domain) for domain in domains]
        self._extend(names)
        for name in names:
            if name and name != GENERAL:
                self._odds[self.names.index(name)] = _FAVOURED_ODDS

    def _extend(self, domains: Iterable[str]) -> None:
        new = [name for name in dict.fromkeys(domains) if name and name not in self.names]
        if not new:
            return
        texts = [DESCRIPTORS.get(name, (name.replace("_", " "),)) for name in new]
        starts = np.cumsum([len(self._rows), *map(len, texts)])[:-1]
        vectors = [self._embedder.embed(text) for group in texts for text in group]
        self._rows = np.concatenate([self._rows, np.asarray(vectors, np.float32) / np.float32(_TEMPERATURE)])
        self._starts = np.concatenate([self._starts, starts])
        self._odds = np.concatenate([self._odds, np.ones(len(new), np.float32)])
        self.names += tuple(new)

    def read(self, query: Vector) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(posterior, coordinates) of a question, each summing to 1.

        The posterior is over all `names`, favours included. The coordinates are over the table's domains
        alone, without favours: the same whatever the fleet is.
        """
        weights = np.exp(np.maximum.reduceat(self._rows.dot(query), self._starts))
        table = weights[: len(DESCRIPTORS)]
        return weights * (self._odds / weights.dot(self._odds)), table / np.add.reduce(table)

    def posterior(self, query: Vector) -> NDArray[np.float32]:
        """Probability of each domain, in the order of `names`."""
        return self.read(query)[0]


class Verbosity:
    """Whether a question looks like one with a long answer, about -1 .. 1, from its embedding alone.

    On 805 AlpacaEval prompts it correlates 0.30 with the mean log length over 227 models; prompt length: 0.
    """

    _LONG = (
        "write a long detailed essay, article, story or report",
        "explain step by step in detail, give a comprehensive guide with examples",
    )
    _SHORT = (
        "answer yes or no, one word",
        "what is the name of, who, when, how many",
        "which of the following, A, B, C or D",
    )
    _CENTRE = 0.03
    _SCALE = 5.0

    def __init__(self, embedder: Embedder) -> None:
        self._rows = np.asarray([embedder.embed(text) for text in (*self._LONG, *self._SHORT)])

    def __call__(self, query: Vector) -> float:
        nearest, split = self._rows.dot(query).tolist(), len(self._LONG)
        lead = max(nearest[:split]) - max(nearest[split:])
        return float(min(1.0, max(-1.0, self._SCALE * (lead - self._CENTRE))))
