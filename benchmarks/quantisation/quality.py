"""How good one answer is: what the judge says of it, and a forced choice read off its first token's probabilities.

Apart from the measuring because what may be said first, and what a token speaks for, is arithmetic without an engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from string import ascii_uppercase

import msgspec

from benchmarks.real_engine import Resident, ask
from benchmarks.specialists import limit_of
from calm.bench.measure_engine import Laboratory
from calm.errors import UpstreamRejected
from calm.records import Record
from calm.workloads.judge import judge
from calm.workloads.prompts import MAX_LISTED_LABELS
from calm.workloads.records import Query

CHAT = "/v1/chat/completions"
TOP = 100
ABSENT = 1e-6
"""Probability of an option that is not among the first TOP tokens."""


async def score(lab: Laboratory, model: Resident, query: Query) -> tuple[float, float | None, float | None]:
    """(quality of the answer, forced choice right, its log loss). A refused prompt is worth 0. Raises EngineLost."""
    try:
        said = (await ask(lab, model, query.prompt, limit_of(query.dataset))).answered
        first = await first_token(lab, model, query) if options_of(query) else None
    except UpstreamRejected:
        return 0.0, None, None
    quality = judge(query, said.text) or 0.0
    return (quality, None, None) if first is None else (quality, *forced_choice(query, first))


def options_of(query: Query) -> tuple[str, ...]:
    """What may be said first; none where there are too many, or they are not told apart by their first word."""
    if query.answer_type == "choice":
        return tuple(ascii_uppercase[: len(query.choices)])
    if query.answer_type == "yes/no/maybe":
        return ("yes", "no", "maybe")
    few = query.answer_type == "label" and len(query.choices) <= MAX_LISTED_LABELS
    return query.choices if few else ()


class _Token(Record, frozen=True, kw_only=True):
    token: str
    logprob: float


class _Content(Record, frozen=True, kw_only=True):
    top_logprobs: tuple[_Token, ...] = ()


class _Logprobs(Record, frozen=True, kw_only=True):
    content: tuple[_Content, ...] = ()


class _Choice(Record, frozen=True, kw_only=True):
    logprobs: _Logprobs | None = None


class _Reply(Record, frozen=True, kw_only=True):
    choices: tuple[_Choice, ...]


async def first_token(lab: Laboratory, model: Resident, query: Query) -> Mapping[str, float]:
    """Probability of what may come first, by the token's text. Raises EngineLost."""
    adapter = model.endpoint.adapter
    body = {
        "model": model.endpoint.model,
        "messages": [{"role": "user", "content": query.prompt}],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": TOP,
        "cache_prompt": True,
        **({} if adapter is None else {"lora": [{"id": adapter, "scale": 1.0}]}),
    }
    async with lab.upstream.post(model.endpoint, CHAT, msgspec.json.encode(body)) as reply:
        told = msgspec.json.decode(await reply.read(), type=_Reply)
    shown_first = told.choices[0].logprobs
    tokens = shown_first.content[0].top_logprobs if shown_first and shown_first.content else ()
    return {token.token: math.exp(token.logprob) for token in tokens}


def forced_choice(query: Query, first: Mapping[str, float]) -> tuple[float, float]:
    """(1 when the right option is the most probable, -ln of its share among the options).

    A token speaks for the only option it begins: ` neut` for neutral, nothing for `n` of neutral and none.
    """
    options = options_of(query)
    mass = dict.fromkeys(options, ABSENT)
    for token, probability in first.items():
        begun = token.strip().casefold()
        meant = [option for option in options if begun and option.casefold().startswith(begun)]
        if len(meant) == 1:
            mass[meant[0]] += probability
    right = next(option for option in options if option.casefold() == (query.answer or "").casefold())
    best = max(mass, key=lambda option: mass[option])
    return float(best == right), -math.log(mass[right] / sum(mass.values()))
