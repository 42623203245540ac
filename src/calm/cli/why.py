"""Why a model was chosen, in a line of words: the terms that decided, against the runner-up.

Pure: a stored decision in, text out. A term counts as decisive by how much it moved the two scores apart, so
the line names what would have to change for the other model to win.
"""

from __future__ import annotations

from calm.cli.documents import CandidateView, DecisionView, OutcomeView, TermView
from calm.cli.output import joules, number, seconds

MOST_TERMS = 3
EQUAL_RATIO = 1.05
"""Below this two figures are called the same."""
CONTENT_BLIND = frozenset({"random", "round-robin", "fixed", "least-loaded"})


def why(decision: DecisionView, outcome: OutcomeView | None = None) -> str:
    """One line, without the model's name.

    1. it failed over; 2. nobody else was possible; 3. the policy does not weigh; 4. the decisive terms.
    """
    if not decision.ranked:
        return "no model could serve it"
    served = served_by(decision, outcome)
    winner = decision.ranked[0]
    if served is not None and served.model != winner.model:
        place = decision.ranked.index(served) + 1
        return f"choice {place} of {len(decision.ranked)}: {winner.model} could not take it"
    if len(decision.ranked) == 1:
        return only_candidate(decision)
    policy = decision.policy.partition(":")[0]
    if policy in CONTENT_BLIND:
        return f"policy {decision.policy}"
    return against(winner, decision.ranked[1])


def served_by(decision: DecisionView, outcome: OutcomeView | None) -> CandidateView | None:
    """The candidate that answered; the first while nobody has."""
    name = outcome.model if outcome else None
    if name is None:
        return decision.ranked[0] if decision.ranked else None
    return next((candidate for candidate in decision.ranked if candidate.model == name), None)


def only_candidate(decision: DecisionView) -> str:
    others = [refusal for refusal in decision.refused if refusal.model != decision.ranked[0].model]
    if not others:
        return "the only candidate"
    kinds = ", ".join(dict.fromkeys(refusal.constraint for refusal in others))
    return f"the only candidate, {len(others)} refused ({kinds})"


def against(winner: CandidateView, other: CandidateView) -> str:
    """The winner's decisive terms beside the runner-up's, strongest first."""
    terms = decisive(winner, other)
    words = [
        text for term in terms[:MOST_TERMS] if (text := in_words(term, other.term(term.name), other.model))
    ]
    return ", ".join(words) or f"level with {other.model}"


def decisive(winner: CandidateView, other: CandidateView) -> list[TermView]:
    """The winner's terms that moved the two scores apart, strongest first."""
    moved = [(abs(gap(term, other.term(term.name))), term) for term in winner.terms]
    return [term for size, term in sorted(moved, key=lambda pair: -pair[0]) if size > 1e-6]


def gap(mine: TermView, other: TermView | None) -> float:
    return ((other.contribution if other else None) or 0.0) - (mine.contribution or 0.0)


def in_words(mine: TermView, other: TermView | None, name: str) -> str | None:
    """`0.42 s predicted, 1.8x faster than NAME`; None for a term without figures."""
    theirs = other.value if other else None
    if mine.value is None and theirs is None:
        return None
    match mine.name:
        case "latency":
            return f"{seconds(mine.value)} predicted{ratio(mine.value, theirs, 'faster', 'slower', name)}"
        case "energy":
            return f"{joules(mine.value)} predicted{ratio(mine.value, theirs, 'less', 'more', name)}"
        case "others":
            return f"costs other requests {seconds(mine.value)} vs {seconds(theirs)}"
        case "cost":
            return f"cost ${number(mine.value)} vs ${number(theirs)}"
        case _:
            return f"{mine.name} {figure(mine.value)} vs {figure(theirs)}"


def figure(value: float | None) -> str:
    """Two digits after the point, as for the shares that most such terms are."""
    return "unknown" if value is None else f"{value:.2f}" if abs(value) < 100 else number(value)


def ratio(mine: float | None, theirs: float | None, less: str, more: str, name: str) -> str:
    """`, 1.8x faster than NAME`; empty where one is unknown or the two are about the same."""
    if mine is None or theirs is None or mine <= 0 or theirs <= 0:
        return ""
    factor = max(mine, theirs) / min(mine, theirs)
    if factor < EQUAL_RATIO:
        return f", like {name}"
    shown = f"{factor:.1f}x" if factor < 10 else f"{factor:.0f}x"
    return f", {shown} {less if mine < theirs else more} than {name}"
