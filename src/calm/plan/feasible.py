"""Hard constraints come before any score: a model that may not serve a request must never win it.

Two filters, both pure. `feasible` needs no prediction: it reads the request, the cards and the snapshot.
`within_limits` reads the predictions and enforces the caller's deadline, joules and dollars.

The tree of `feasible`, the same numbers in the body:

    1  pinned       the caller named another model
    2  allowed      the caller's `allowed_models` leaves it out
    3  privacy      `privacy: local`, and the model answers from elsewhere
    4  capability   chat, completion, embeddings, tools or json is asked for and missing, or n > slots
    5  context      the prompt alone is longer than the context, even if the estimate is 2 sd too high
    6  memory       it is larger than the budget that is not pinned: it can never be loaded
    7  health       it failed and its pause is not over             given up when nothing healthy is left
    8  room         prompt (+1 sd) and answer probably do not fit   given up first when nothing is left

1 to 6 are never given up. A model that was refused by 7, 8 or the deadline and serves all the same, because
nothing better is left, is marked with a `Refusal` whose constraint is BEST_EFFORT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import NamedTuple

from calm.errors import DeadlineExceeded, NoCandidate, UnknownModel
from calm.plan.columns import Figures, figures, only
from calm.plan.engines import engines
from calm.records import Ask, Capability, Estimate, Features, ModelCard, ModelState, Refusal, Snapshot

BEST_EFFORT = "best_effort"
"""Constraint name of a mark, not of a refusal: the model is ranked although a soft limit is broken."""

PROMPT_RELATIVE_SD = 0.2
"""Spread of the prompt's token count over tokenizers, relative to the model-independent estimate."""

ANSWER_RESERVE_TOKENS = 32
"""Room kept for an answer when the caller set no max_tokens; less where the card allows less."""

LISTED_REFUSALS = 12
"""How many models an error message names before it only counts."""


class _Facts(NamedTuple):
    """What every check needs, computed once per request."""

    ask: Ask
    needs: frozenset[Capability]
    allowed: frozenset[str] | None
    surely_tokens: float
    """Of the prompt."""
    probably_tokens: float
    """Of the prompt."""
    answer_tokens: int
    """Of the answer, whoever gives it."""
    snapshot: Snapshot
    pinned_bytes: int


_Check = Callable[[_Facts, ModelCard, ModelState | None], str | None]


def feasible(
    ask: Ask, features: Features, snapshot: Snapshot, cards: Mapping[str, ModelCard]
) -> tuple[dict[str, ModelCard], tuple[Refusal, ...]]:
    """The cards that may serve `ask`, in the order given, and why each other one may not.

    Raises UnknownModel when the pinned model is not in the fleet, NoCandidate when no card is left.
    """
    if ask.model is not None and ask.model not in cards:
        raise UnknownModel(_unknown(ask.model, cards), field="model")
    facts = _facts(ask, features, snapshot)
    checks, states = _asked_for(facts), snapshot.models
    kept, refused = dict(cards), []
    for name in _doubtful(facts, cards):
        refusal = _refuse(facts, checks, cards[name], states.get(name))
        if refusal is not None:
            refused.append(refusal)
            del kept[name]
    if not kept:
        revived, refused = _relax(refused)
        kept = {name: cards[name] for name in revived}
    if not kept:
        raise NoCandidate(_nobody(refused))
    return kept, tuple(refused)


def within_limits(
    estimates: Mapping[str, Estimate],
    cards: Mapping[str, ModelCard],
    ask: Ask,
    now_s: float,
    refused: Sequence[Refusal] = (),
) -> tuple[Mapping[str, Estimate], tuple[Refusal, ...]]:
    """The estimates that respect the caller's joules, dollars and deadline, and the models that do not.

    `refused` are earlier refusals, carried into the result and into NoCandidate's message. When the deadline
    alone leaves nobody, the fastest model is kept and marked BEST_EFFORT; joules and dollars are never
    exceeded. Raises NoCandidate, or DeadlineExceeded when the deadline has already passed.
    """
    left_s, wishes = _time_left_s(ask, now_s), ask.wishes
    if left_s is None and wishes.max_energy_j is None and wishes.max_cost_usd is None and estimates:
        return estimates, tuple(refused)
    found = list(figures(estimates))
    over = [r for one in found if (r := _over_budget(ask, one, cards.get(one.model))) is not None]
    broke = {refusal.model for refusal in over}
    affordable = [one for one in found if one.model not in broke]
    if not affordable:
        raise NoCandidate(_nobody([*refused, *over]))
    kept, late = _in_time(affordable, left_s)
    within = estimates if len(kept) == len(found) else only(estimates, kept)
    return within, (*refused, *over, *late)


# --- the checks of feasible ----------------------------------------------------------------------


def _doubtful(facts: _Facts, cards: Mapping[str, ModelCard]) -> list[str]:
    """The models that a check may speak against, and maybe some more.

    Most models are no special case, and a glance tells: one that is as wide, as able and as small as this asks
    for passes every check below. So a thousand cost a pass, and only what stands out is looked into.
    """
    ask, needs, get = facts.ask, facts.needs, facts.snapshot.models.get
    if ask.model is not None or facts.allowed is not None or "n" in ask.body:
        return list(cards)
    anywhere, room = ask.wishes.privacy != "local", facts.snapshot.budget_bytes - facts.pinned_bytes
    tokens = facts.probably_tokens + facts.answer_tokens
    return [
        name
        for name, card in cards.items()
        if not card.context > tokens
        or not _able(needs, card.capabilities)
        or (state := get(name)) is None
        or state.footprint_bytes > room
        or state.residency == "failed"
        or state.retry_at_s is not None
        or not (anywhere or card.placement == "local")
    ]


@lru_cache(maxsize=4096)
def _able(needs: frozenset[Capability], capabilities: tuple[Capability, ...]) -> bool:
    """Remembered, since a fleet has few sets of capabilities and requests have few needs."""
    return needs.issubset(capabilities)


def _pinned(facts: _Facts, card: ModelCard, state: ModelState | None) -> str | None:  # 1
    wanted = facts.ask.model
    return f"the request names {wanted}" if wanted is not None and wanted != card.name else None


def _allowed(facts: _Facts, card: ModelCard, state: ModelState | None) -> str | None:  # 2
    out = facts.allowed is not None and card.name not in facts.allowed
    return "not in the request's allowed_models" if out else None


def _private(facts: _Facts, card: ModelCard, state: ModelState | None) -> str | None:  # 3
    out = facts.ask.wishes.privacy == "local" and card.placement == "remote"
    return "the request must stay on local models and this one is remote" if out else None


def _capable(facts: _Facts, card: ModelCard, state: ModelState | None) -> str | None:  # 4
    if facts.needs.issubset(card.capabilities):
        return _too_many(facts, card)
    return f"does not do {', '.join(sorted(facts.needs.difference(card.capabilities)))}"


def _too_many(facts: _Facts, card: ModelCard) -> str | None:
    """llama.cpp answers at most as many times at once as it has slots, the ONNX engine once."""
    samples, kind = facts.ask.body.get("n"), card.engine.kind
    slots = 1 if kind == "onnx" else card.engine.slots
    if kind not in ("llamacpp", "onnx") or not isinstance(samples, int) or samples <= slots:
        return None
    why = "" if kind == "onnx" else " (engine.slots)"
    return f"gives at most {slots} answers at once{why}, n is {samples}"


def _readable(facts: _Facts, card: ModelCard, state: ModelState | None) -> str | None:  # 5
    if facts.surely_tokens < card.context:
        return None
    return f"the prompt has at least {facts.surely_tokens:,.0f} tokens, its context {card.context:,}"


def _fits(facts: _Facts, card: ModelCard, state: ModelState | None) -> str | None:  # 6
    if (state is not None and state.residency == "ready") or card.remote:
        return None
    size = state.footprint_bytes if state else card.memory_hint_bytes
    own = size if state and size and state.pinned and _holds_memory(state) else 0
    room = facts.snapshot.budget_bytes - facts.pinned_bytes + (own or 0)
    if size is None or size <= room:
        return None
    return f"needs {_mib(size)} of memory, at most {_mib(room)} of the budget can be freed for it"


def _healthy(facts: _Facts, card: ModelCard, state: ModelState | None) -> str | None:  # 7
    if state is None:
        return None
    if state.retry_at_s is None and state.residency != "failed":
        return None
    waits = state.retry_at_s is not None and state.retry_at_s > facts.snapshot.at_s
    if not waits and not (state.residency == "failed" and state.retry_at_s is None):
        return None
    why = state.reason or "its engine failed"
    pause_s = (state.retry_at_s or 0.0) - facts.snapshot.at_s
    return f"{why}; tried again in {pause_s:.1f} s" if waits else why


def _roomy(facts: _Facts, card: ModelCard, state: ModelState | None) -> str | None:  # 8
    answer = min(facts.answer_tokens, card.chat.answer_tokens or facts.answer_tokens)
    tokens = facts.probably_tokens + answer
    if tokens <= card.context:
        return None
    return f"prompt and answer take up to {tokens:,.0f} tokens, its context {card.context:,}"


_CHECKS: tuple[tuple[str, _Check], ...] = (
    ("pinned", _pinned),
    ("allowed", _allowed),
    ("privacy", _private),
    ("capability", _capable),
    ("context", _readable),
    ("memory", _fits),
    ("health", _healthy),
    ("room", _roomy),
)
_SILENT: tuple[tuple[str, Callable[[_Facts], bool]], ...] = (
    ("pinned", lambda facts: facts.ask.model is None),
    ("allowed", lambda facts: facts.allowed is None),
    ("privacy", lambda facts: facts.ask.wishes.privacy != "local"),
)
"""Constraints a request says nothing about, so that no card need be held against them."""
_SOFT = ("room", "health")
"""Given up in this order: a cut answer is better than an engine that just failed."""


def _asked_for(facts: _Facts) -> list[tuple[str, _Check]]:
    """The checks that this request can fail."""
    silent = [constraint for constraint, holds in _SILENT if holds(facts)]
    return [check for check in _CHECKS if check[0] not in silent]


def _refuse(
    facts: _Facts, checks: Sequence[tuple[str, _Check]], card: ModelCard, state: ModelState | None
) -> Refusal | None:
    """The first check that speaks against the card; soft ones come last, so they hide no hard one."""
    for constraint, check in checks:
        reason = check(facts, card, state)
        if reason is not None:
            return Refusal(model=card.name, constraint=constraint, reason=reason)
    return None


def _relax(refused: Sequence[Refusal]) -> tuple[list[str], list[Refusal]]:
    """The models to keep after all, and the refusals with theirs turned into marks."""
    for soft in _SOFT:
        revived = [refusal.model for refusal in refused if refusal.constraint == soft]
        if revived:
            return revived, [_marked(r) if r.constraint == soft else r for r in refused]
    return [], list(refused)


def _marked(refusal: Refusal) -> Refusal:
    return Refusal(
        model=refusal.model,
        constraint=BEST_EFFORT,
        reason=f"kept, nothing better is left: {refusal.reason}",
    )


def _facts(ask: Ask, features: Features, snapshot: Snapshot) -> _Facts:
    allowed = ask.wishes.allowed_models
    prompt = features.prompt_tokens
    answer = 0 if ask.kind == "embeddings" else ask.max_tokens or ANSWER_RESERVE_TOKENS
    pinned = [s.footprint_bytes for s in engines(snapshot) if s.pinned and _holds_memory(s)]
    return _Facts(
        ask=ask,
        needs=_needs(ask),
        allowed=None if allowed is None else frozenset(allowed),
        surely_tokens=prompt * (1.0 - 2.0 * PROMPT_RELATIVE_SD),
        probably_tokens=prompt * (1.0 + PROMPT_RELATIVE_SD),
        answer_tokens=answer,
        snapshot=snapshot,
        pinned_bytes=sum(pinned),
    )


def _needs(ask: Ask) -> frozenset[Capability]:
    """Who calls tools for a living need not chat: a question that offers tools asks for `tools` alone."""
    return ask.requires if "tools" in ask.requires else ask.requires | {ask.kind}


def _holds_memory(state: ModelState) -> bool:
    return state.residency in ("ready", "loading", "draining", "unloading")


# --- the checks of within_limits -----------------------------------------------------------------


def _over_budget(ask: Ask, found: Figures, card: ModelCard | None) -> Refusal | None:
    for constraint, reason in (
        ("energy", _energy(ask.wishes.max_energy_j, found)),
        ("cost", _cost(ask.wishes.max_cost_usd, found, card)),
    ):
        if reason is not None:
            return Refusal(model=found.model, constraint=constraint, reason=reason)
    return None


def _energy(limit_j: float | None, found: Figures) -> str | None:
    if limit_j is None:
        return None
    if found.energy_j is None:
        return f"its energy is unknown and the request allows at most {limit_j:g} J"
    over = found.energy_j > limit_j
    return f"predicted {found.energy_j:.3g} J, allowed {limit_j:g} J" if over else None


def _cost(limit_usd: float | None, found: Figures, card: ModelCard | None) -> str | None:
    if limit_usd is None:
        return None
    cost_usd = price_of(found.cost_usd, card)
    if cost_usd is None:
        return f"its price is unknown and the request allows at most ${limit_usd:g}"
    return f"predicted ${cost_usd:.3g}, allowed ${limit_usd:g}" if cost_usd > limit_usd else None


def price_of(cost_usd: float | None, card: ModelCard | None) -> float | None:
    """Dollars of one request. A local model without a price is free; a remote one's price is unknown."""
    if cost_usd is not None:
        return cost_usd
    return 0.0 if card is not None and card.placement == "local" else None


def _time_left_s(ask: Ask, now_s: float) -> float | None:
    deadline_s = ask.wishes.deadline_s
    if deadline_s is None:
        return None
    left_s = deadline_s - (now_s - ask.arrived_s)
    if left_s <= 0:
        raise DeadlineExceeded(f"the deadline of {deadline_s:g} s passed before a model could be chosen")
    return left_s


def _in_time(found: Sequence[Figures], left_s: float | None) -> tuple[list[str], list[Refusal]]:
    """Names to keep, and refusals."""
    if left_s is None:
        return [one.model for one in found], []
    kept = [one.model for one in found if one.total_s <= left_s]
    late = [_late(one, left_s) for one in found if not one.total_s <= left_s]
    if kept:
        return kept, late
    fastest = min(found, key=lambda one: (one.total_s, one.model)).model
    return [fastest], [_marked(r) if r.model == fastest else r for r in late]


def _late(found: Figures, left_s: float) -> Refusal:
    reason = f"predicted {found.total_s:.3g} s, {left_s:.3g} s are left to the deadline"
    return Refusal(model=found.model, constraint="deadline", reason=reason)


# --- words ---------------------------------------------------------------------------------------


def _nobody(refused: Sequence[Refusal]) -> str:
    if not refused:
        return "no model can serve this request: the fleet is empty; add a metadata file to it"
    telling = [r for r in refused if r.constraint != "pinned"] or refused
    listed = "; ".join(f"{r.model}: {r.reason}" for r in telling[:LISTED_REFUSALS])
    more = len(telling) - LISTED_REFUSALS
    return f"no model can serve this request. {listed}" + (f"; and {more} more" if more > 0 else "")


def _unknown(name: str, cards: Iterable[str]) -> str:
    names = sorted(cards)
    close = get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names[:LISTED_REFUSALS])}"
    return f"no model named {name!r} in the fleet; {hint}; `calm` lets CALM choose"


def _mib(size_bytes: int) -> str:
    return f"{max(size_bytes, 0) / 2**20:,.0f} MiB"
