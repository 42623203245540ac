"""What each model would answer to each query, fixed before any policy chooses.

Length, quality and speed of model m's answer to query q depend on (seed, q, m) alone: recorded where somebody
asked for real, else drawn from the profile. So all policies of a seed face the same potential outcomes (common
random numbers), and an oracle can look at them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from random import Random

from calm.profile import ModelProfile, Profile
from calm.records import Record
from calm.workloads.records import Query

UNSTATED_QUALITY = 0.5


class Answer(Record, frozen=True, kw_only=True, gc=False):
    """One model's answer to one query."""

    prompt_tokens: int
    output_tokens: int
    quality: float
    """0..1."""
    stretch: float
    """Its times are so many times what the profile's rates give; median 1."""


class Outcomes:
    """All potential outcomes of one trial."""

    def __init__(self, profile: Profile, seed: int, longest: Mapping[str, int | None]) -> None:
        """`longest`: most tokens of an answer by model, None where nobody limits it."""
        self._models = profile.models
        self._seed = seed
        self._longest = {name: most or 1 << 30 for name, most in longest.items()}
        self.of = lru_cache(maxsize=1 << 16)(self._of)
        self._queries: dict[str, Query] = {}

    def know(self, queries: Mapping[str, Query]) -> None:
        """The queries, by the id of the request that asks them."""
        self._queries.update(queries)

    def profile(self, model: str) -> ModelProfile:
        return self._models[model]

    def query(self, request_id: str) -> Query:
        return self._queries[request_id]

    def _of(self, request_id: str, model: str) -> Answer:
        """The answer `model` would give to a request's query."""
        query, profile = self._queries[request_id], self._models[model]
        random = Random(f"{self._seed}|{query.id}|{model}")
        draws = random.gauss(0, 1), random.random(), random.gauss(0, 1)
        known = query.known.get(model)
        length = profile.length(query.domain)
        prompt = profile.template_tokens + profile.tokens_per_char * len(query.prompt)
        tokens: float = lognormal(length.mean, length.sd, draws[0])
        quality = None
        if known is not None:
            prompt = known.prompt_tokens if known.prompt_tokens is not None else prompt
            tokens = known.output_tokens if known.output_tokens is not None else tokens
            quality = known.quality
        if quality is None:
            mean = profile.quality_in(query.domain)
            quality = drawn(UNSTATED_QUALITY if mean is None else mean, profile.quality_sd, draws[1], random)
        return Answer(
            prompt_tokens=max(1, round(prompt)),
            output_tokens=min(self._longest[model], max(1, round(tokens))),
            quality=quality,
            stretch=math.exp(profile.jitter * draws[2]),
        )


def lognormal(mean: float, sd: float, z: float) -> float:
    """The value at z standard normal deviations of a lognormal with this mean and sd."""
    if sd <= 0 or mean <= 0:
        return mean
    variance = math.log1p((sd / mean) ** 2)
    return math.exp(math.log(mean) - variance / 2 + math.sqrt(variance) * z)


def drawn(mean: float, sd: float | None, u: float, random: Random) -> float:
    """Right or wrong with probability `mean`; or, with an sd, Beta around it (as far as a Beta can spread)."""
    if sd is None:
        return 1.0 if u < mean else 0.0
    most = mean * (1 - mean)
    if sd <= 0 or most <= 0:
        return mean
    weight = max(most / min(sd * sd, 0.99 * most) - 1, 1e-6)
    return random.betavariate(mean * weight, (1 - mean) * weight)
