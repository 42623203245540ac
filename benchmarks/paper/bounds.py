"""What no policy can beat with these models: the least mean service time at a given mean quality, as a linear program.

A policy that knows every model's mean time and mean rating in every domain, pays no load and never errs, chooses
shares x[d, m] of the domains' requests:

    minimise    sum w[d] x[d, m] s[m]     s seconds of service, w the domains' shares of the requests
    subject to  sum w[d] x[d, m] q[d, m] >= Q,    sum over m of x[d, m] = 1,    x >= 0
                and x = 0 for models outside a set of k, the best of all such sets

Its mean latency on a serial engine, with that mean service time for every request, is then the waiting of the very
arrivals of the trial (Lindley's recursion). It is a bound for policies that serve in the order of arrival with a
mix that does not change over time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog

from calm.profile import ModelProfile, Profile


class Bound(NamedTuple):
    """The best mix."""

    service_s: float
    models: tuple[str, ...]
    energy_j: float


def service_s(model: ModelProfile, prompt_chars: float, max_tokens: int) -> float:
    tokens = min(model.output_tokens["default"].mean, max_tokens)
    prompt = model.template_tokens + model.tokens_per_char * prompt_chars
    return model.overhead_s + prompt / model.prefill_tps + (tokens - 1) / model.decode_tps["1"]


def least_service(
    profile: Profile,
    shares: Mapping[str, float],
    quality: float,
    most: int,
    prompt_chars: float,
    max_tokens: int,
) -> Bound | None:
    """Over all sets of at most `most` models; None where no mix reaches `quality`."""
    names = list(profile.models)
    found = [
        bound
        for chosen in combinations(names, min(most, len(names)))
        if (bound := _solve(profile, chosen, shares, quality, prompt_chars, max_tokens)) is not None
    ]
    return min(found, default=None)


def _solve(
    profile: Profile,
    chosen: Sequence[str],
    shares: Mapping[str, float],
    quality: float,
    prompt_chars: float,
    max_tokens: int,
) -> Bound | None:
    models = [profile.models[name] for name in chosen]
    seconds = np.array([service_s(model, prompt_chars, max_tokens) for model in models])
    weights = np.array(list(shares.values()))
    graded = np.array([[model.quality_in(domain) or 0.0 for model in models] for domain in shares])
    cost = np.outer(weights, seconds).ravel()
    each = np.kron(np.eye(len(shares)), np.ones(len(models)))
    solved = linprog(
        cost,
        A_ub=[-(weights[:, None] * graded).ravel()],
        b_ub=[-quality],
        A_eq=each,
        b_eq=np.ones(len(shares)),
        bounds=(0, 1),
    )
    if not solved.success:
        return None
    joules = np.outer(weights, seconds * np.array([model.active_w for model in models])).ravel()
    return Bound(float(solved.fun), tuple(chosen), float(joules @ solved.x))


def latency_s(arrivals_s: Sequence[float], each_s: float) -> list[float]:
    """Of every request on a serial engine that takes `each_s` for each (Lindley 1952)."""
    free_s, latencies = 0.0, []
    for at_s in arrivals_s:
        free_s = max(free_s, at_s) + each_s
        latencies.append(free_s - at_s)
    return latencies
