"""The line of words that says why a model was chosen."""

from __future__ import annotations

import pytest

from calm.cli.documents import CandidateView, DecisionView, OutcomeView, RefusalView, TermView
from calm.cli.output import joules, printable, seconds, size
from calm.cli.why import why


def candidate(model: str, **terms: tuple[float | None, float, float]) -> CandidateView:
    views = tuple(TermView(name=n, value=v, regret=r, weight=w) for n, (v, r, w) in terms.items())
    return CandidateView(model=model, score=sum(t.contribution or 0 for t in views), terms=views)


def decision(
    *ranked: CandidateView, policy: str = "calm", refused: tuple[RefusalView, ...] = ()
) -> DecisionView:
    return DecisionView(request_id="r", policy=policy, ranked=ranked, refused=refused)


def test_the_term_that_moved_the_scores_most_comes_first() -> None:
    first = candidate("a", latency=(1.0, 0.01, 0.3), quality=(0.9, 0.0, 0.5), energy=(4.0, 0.2, 0.2))
    other = candidate("b", latency=(0.97, 0.0, 0.3), quality=(0.3, 0.6, 0.5), energy=(1.0, 0.0, 0.2))
    assert why(decision(first, other)) == (
        "quality 0.90 vs 0.30, 4.00 J predicted, 4.0x more than b, 1.00 s predicted, like b"
    ).replace("4.00 J", "4 J")


def test_unknown_values_are_said_and_never_counted_as_zero() -> None:
    first = candidate("a", energy=(2.0, 0.0, 0.2), quality=(None, 0.1, 0.5))
    other = candidate("b", energy=(None, 0.5, 0.2), quality=(0.5, 0.0, 0.5))
    assert why(decision(first, other)) == "2 J predicted, quality unknown vs 0.50"


def test_equal_scores_are_level() -> None:
    same = {"latency": (1.0, 0.0, 0.3)}
    assert why(decision(candidate("a", **same), candidate("b", **same))) == "level with b"


def test_room_made_and_price() -> None:
    first = candidate("a", others=(0.0, 0.0, 0.3), cost=(0.0001, 0.0, 0.4))
    other = candidate("b", others=(1.5, 0.4, 0.3), cost=(0.002, 0.9, 0.4))
    assert why(decision(first, other)) == "cost $0.0001 vs $0.002, costs other requests 0 s vs 1.50 s"


def test_failover_is_said() -> None:
    ranked = candidate("a"), candidate("b")
    assert why(decision(*ranked), OutcomeView(model="b")) == "choice 2 of 2: a could not take it"


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ((), "the only candidate"),
        (
            (RefusalView(model="b", constraint="privacy", reason="-"),),
            "the only candidate, 1 refused (privacy)",
        ),
        ((RefusalView(model="a", constraint="best_effort", reason="-"),), "the only candidate"),
    ],
)
def test_a_single_candidate(refused: tuple[RefusalView, ...], words: str) -> None:
    assert why(decision(candidate("a"), refused=refused)) == words


def test_policies_that_do_not_weigh() -> None:
    assert why(decision(candidate("a"), candidate("b"), policy="random:3")) == "policy random:3"
    assert why(decision()) == "no model could serve it"


def test_figures() -> None:
    assert [seconds(s) for s in (None, 0, 0.0019, 0.42, 12.34, 200)] == [
        "-", "0 s", "1.9 ms", "0.42 s", "12.3 s", "3 min 20 s",
    ]  # fmt: skip
    assert [size(s) for s in (None, 12, 98_362_432, 3_000_000_000)] == ["-", "12 B", "98.4 MB", "3.0 GB"]
    assert [joules(j) for j in (None, 0.9564, 12345.0)] == ["-", "0.956 J", "12,345 J"]
    assert printable("a\x1b[2J\x9b1mb\tc\nd") == "a[2J1mb\tc\nd"
