"""Hard constraints: who is refused, in which words, and what is given up when nobody is left."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.errors import DeadlineExceeded, NoCandidate, UnknownModel
from calm.plan import feasible as module
from calm.plan.feasible import BEST_EFFORT, LISTED_REFUSALS, feasible, within_limits
from calm.records import (
    Ask,
    Belief,
    ChatSpec,
    EngineSpec,
    Estimate,
    Features,
    ModelCard,
    ModelState,
    Snapshot,
    Wishes,
)

MIB = 2**20


def card(name: str, **changes: Any) -> ModelCard:
    return ModelCard(name=name, description=f"answers about {name}", **changes)


def cards(*items: ModelCard) -> dict[str, ModelCard]:
    return {item.name: item for item in items}


def ask(**changes: Any) -> Ask:
    base: dict[str, Any] = {
        "request_id": "r1",
        "kind": "chat",
        "query": "hello",
        "prompt_chars": 40,
        "body": {},
        "requires": frozenset(),
    }
    return Ask(**(base | changes))


def features(prompt_tokens: float = 10.0) -> Features:
    return Features(
        prompt_chars=int(prompt_tokens * 4),
        prompt_tokens=prompt_tokens,
        language="en",
        embedding=None,
        embedder=None,
        turns=1,
        max_tokens=None,
        samples=1,
        conversation=None,
        wants_json=False,
        wants_tools=False,
    )


def state(model: str, **changes: Any) -> ModelState:
    base: dict[str, Any] = {
        "model": model,
        "residency": "cold",
        "pinned": False,
        "in_flight": 0,
        "waiting": 0,
        "slots": 4,
        "threads": 1,
        "footprint_bytes": 100 * MIB,
        "footprint_measured": False,
        "load_s": None,
        "last_used_s": None,
        "failures": 0,
    }
    return ModelState(**(base | changes))


def snapshot(*states: ModelState, budget: int = 1000 * MIB, at_s: float = 50.0) -> Snapshot:
    return Snapshot(
        revision=1,
        at_s=at_s,
        models={s.model: s for s in states},
        budget_bytes=budget,
        used_bytes=0,
        cores=2,
        threads_in_use=0,
        queue_length=0,
        in_flight=0,
    )


def estimate(
    model: str, total_s: float = 1.0, joules: float | None = 5.0, usd: float | None = None
) -> Estimate:
    zero = Belief(mean=0.0, sd=0.0)
    return Estimate(
        model=model,
        prompt_tokens=10,
        cached_tokens=0,
        output_tokens=Belief(mean=50, sd=10),
        queue_s=zero,
        load_s=zero,
        prefill_s=zero,
        decode_s=zero,
        ttft_s=zero,
        total_s=Belief(mean=total_s, sd=total_s / 3),
        energy_j=None if joules is None else Belief(mean=joules, sd=1.0),
        quality=Belief(mean=0.5, sd=0.1),
        cost_usd=usd,
    )


FLEET = cards(
    card("small"),
    card("tool", capabilities=("chat", "tools", "json")),
    card("cloud", placement="remote", context=128_000, engine=EngineSpec(kind="openai", url="http://x")),
    card("vectors", capabilities=("embeddings",)),
)


def refused_by(refused: tuple[Any, ...]) -> dict[str, str]:
    return {r.model: r.constraint for r in refused}


def test_capability_of_the_kind_is_required() -> None:
    kept, refused = feasible(ask(), features(), snapshot(), FLEET)
    assert list(kept) == ["small", "tool", "cloud"]
    assert refused_by(refused) == {"vectors": "capability"}
    assert "embeddings" not in refused[0].reason
    assert "does not do chat" in refused[0].reason
    kept, _ = feasible(ask(kind="embeddings"), features(), snapshot(), FLEET)
    assert list(kept) == ["vectors"]


def test_tools_and_json_are_required_together() -> None:
    kept, refused = feasible(ask(requires=frozenset({"tools", "json"})), features(), snapshot(), FLEET)
    assert list(kept) == ["tool"]
    assert "json, tools" in {r.model: r.reason for r in refused}["small"]


def test_private_requests_stay_local_even_if_only_a_remote_model_is_able() -> None:
    private = ask(wishes=Wishes(privacy="local"))
    kept, refused = feasible(private, features(), snapshot(), FLEET)
    assert "cloud" not in kept
    assert refused_by(refused)["cloud"] == "privacy"
    with pytest.raises(NoCandidate, match="must stay on local models"):
        feasible(private, features(), snapshot(), cards(FLEET["cloud"]))


def test_privacy_asks_where_a_model_is_not_who_started_it() -> None:
    beside = card("beside", engine=EngineSpec(kind="openai", url="http://127.0.0.1:11434"))
    kept, _ = feasible(ask(wishes=Wishes(privacy="local")), features(), snapshot(), cards(beside))
    assert list(kept) == ["beside"]


def test_a_pinned_name_leaves_that_model_alone() -> None:
    kept, refused = feasible(ask(model="tool"), features(), snapshot(), FLEET)
    assert list(kept) == ["tool"]
    assert set(refused_by(refused).values()) == {"pinned"}


def test_an_unknown_pinned_name_is_told_with_the_nearest_one() -> None:
    with pytest.raises(UnknownModel, match="did you mean 'small'") as caught:
        feasible(ask(model="smal"), features(), snapshot(), FLEET)
    assert caught.value.field == "model"
    with pytest.raises(UnknownModel, match="known: cloud, small"):
        feasible(ask(model="zzz"), features(), snapshot(), FLEET)


def test_allowed_models_is_a_closed_list() -> None:
    kept, _ = feasible(ask(wishes=Wishes(allowed_models=("tool", "gone"))), features(), snapshot(), FLEET)
    assert list(kept) == ["tool"]
    with pytest.raises(NoCandidate, match="allowed_models"):
        feasible(ask(wishes=Wishes(allowed_models=())), features(), snapshot(), FLEET)


def test_a_prompt_surely_too_long_is_never_sent() -> None:
    kept, refused = feasible(ask(), features(4000.0), snapshot(), FLEET)
    assert list(kept) == ["cloud"]
    assert refused_by(refused)["small"] == "context"
    with pytest.raises(NoCandidate, match="its context 2,048"):
        feasible(ask(), features(4000.0), snapshot(), cards(FLEET["small"]))


def test_a_prompt_probably_too_long_goes_elsewhere_while_there_is_an_elsewhere() -> None:
    tight = ask(max_tokens=500)
    kept, refused = feasible(tight, features(1500.0), snapshot(), FLEET)
    assert list(kept) == ["cloud"]
    assert refused_by(refused)["small"] == "room"
    kept, refused = feasible(tight, features(1500.0), snapshot(), cards(FLEET["small"]))
    assert list(kept) == ["small"]
    assert refused_by(refused) == {"small": BEST_EFFORT}
    assert "2,300 tokens" in refused[0].reason


def test_no_more_room_is_kept_for_an_answer_than_the_card_lets_it_take() -> None:
    terse = cards(card("small"), card("terse", chat=ChatSpec(answer_tokens=16)))
    for asked, prompt_tokens in ((500, 1500.0), (None, 1690.0)):
        kept, refused = feasible(ask(max_tokens=asked), features(prompt_tokens), snapshot(), terse)
        assert list(kept) == ["terse"]
        assert refused_by(refused) == {"small": "room"}
    kept, _ = feasible(ask(max_tokens=8), features(1696.0), snapshot(), terse)
    assert list(kept) == ["small", "terse"], "the caller wants less than the card allows"


def test_an_estimate_slightly_over_the_context_may_still_fit() -> None:
    kept, refused = feasible(ask(), features(2500.0), snapshot(), cards(FLEET["small"]))
    assert list(kept) == ["small"]
    assert refused_by(refused) == {"small": BEST_EFFORT}


def test_embeddings_keep_no_room_for_an_answer() -> None:
    exact = cards(card("vectors", capabilities=("embeddings",), context=120))
    _, refused = feasible(ask(kind="embeddings", max_tokens=9999), features(100.0), snapshot(), exact)
    assert refused == ()


def test_a_failed_model_is_left_alone_until_its_pause_is_over() -> None:
    broken = state("small", residency="failed", retry_at_s=60.0, reason="engine exited with 1", failures=2)
    kept, refused = feasible(ask(), features(), snapshot(broken), FLEET)
    assert "small" not in kept
    assert refused[0].constraint == "health"
    assert refused[0].reason == "engine exited with 1; tried again in 10.0 s"
    kept, _ = feasible(ask(), features(), snapshot(broken, at_s=60.0), FLEET)
    assert "small" in kept


def test_a_failed_model_is_tried_when_nothing_else_is_left() -> None:
    broken = state("small", residency="failed", reason="bad weights")
    kept, refused = feasible(ask(), features(), snapshot(broken), cards(FLEET["small"]))
    assert list(kept) == ["small"]
    assert refused_by(refused) == {"small": BEST_EFFORT}


def test_a_cut_answer_is_given_up_before_a_failed_engine() -> None:
    broken = state("long", residency="failed", reason="bad weights")
    both = cards(card("long", context=100_000), card("small"))
    kept, refused = feasible(ask(max_tokens=500), features(1500.0), snapshot(broken), both)
    assert list(kept) == ["small"]
    assert refused_by(refused) == {"long": "health", "small": BEST_EFFORT}


def test_an_unhealthy_model_never_comes_back_past_a_hard_constraint() -> None:
    broken = state("cloud", residency="failed", reason="401")
    with pytest.raises(NoCandidate):
        feasible(ask(wishes=Wishes(privacy="local")), features(), snapshot(broken), cards(FLEET["cloud"]))


def test_a_model_larger_than_the_budget_never_fits() -> None:
    huge = state("small", footprint_bytes=2000 * MIB)
    kept, refused = feasible(ask(), features(), snapshot(huge), FLEET)
    assert "small" not in kept
    assert refused[0].constraint == "memory"
    assert "needs 2,000 MiB" in refused[0].reason
    with pytest.raises(NoCandidate, match="2,000 MiB"):
        feasible(ask(model="small"), features(), snapshot(huge), FLEET)


def test_pinned_residents_shrink_the_budget_of_others_not_their_own() -> None:
    pinned = state("tool", residency="ready", pinned=True, footprint_bytes=950 * MIB)
    kept, refused = feasible(ask(), features(), snapshot(pinned, state("small")), FLEET)
    assert list(kept) == ["tool", "cloud"]
    assert "at most 50 MiB" in refused[0].reason
    cold = msgspec.structs.replace(pinned, residency="loading")
    assert "tool" in feasible(ask(), features(), snapshot(cold, state("small")), FLEET)[0]


def test_a_resident_model_that_outgrew_the_budget_still_serves() -> None:
    grown = state("small", residency="ready", footprint_bytes=2000 * MIB)
    assert "small" in feasible(ask(), features(), snapshot(grown), FLEET)[0]


def test_a_new_card_is_judged_by_its_hint() -> None:
    fresh = cards(card("big", memory_hint_bytes=2000 * MIB), card("unknown"))
    kept, _ = feasible(ask(), features(), snapshot(), fresh)
    assert list(kept) == ["unknown"]


def test_the_error_names_every_reason_and_counts_the_rest() -> None:
    many = cards(*(card(f"m{i:02}", capabilities=("embeddings",)) for i in range(LISTED_REFUSALS + 5)))
    with pytest.raises(NoCandidate, match=r"m00: does not do chat.*and 5 more"):
        feasible(ask(), features(), snapshot(), many)
    with pytest.raises(NoCandidate, match="the fleet is empty"):
        feasible(ask(), features(), snapshot(), {})


# --- the glance and the checks --------------------------------------------------------------------


def any_card(draw: random.Random, name: str) -> ModelCard:
    remote = draw.random() < 0.3
    return card(
        name,
        capabilities=draw.choice(
            (("chat",), ("chat", "completion"), ("chat", "tools", "json"), ("embeddings",))
        ),
        placement=draw.choice(("local", "remote")),
        context=draw.choice((60, 100, 132, 4096)),
        memory_hint_bytes=draw.choice((None, 1, 500)),
        engine=EngineSpec(kind="openai", url="http://x") if remote else EngineSpec(slots=draw.choice((1, 4))),
    )


def any_state(draw: random.Random, name: str) -> ModelState:
    return state(
        name,
        residency=draw.choice(("cold", "ready", "failed", "loading", "remote")),
        pinned=draw.random() < 0.2,
        footprint_bytes=draw.choice((1, 100, 400, 900)),
        retry_at_s=draw.choice((None, None, 10.0, 50.0, 90.0)),
    )


def any_ask(draw: random.Random, names: list[str]) -> Ask:
    allowed = draw.choice((None, None, tuple(draw.sample(names, 2))))
    return ask(
        kind=draw.choice(("chat", "chat", "completion", "embeddings")),
        requires=draw.choice((frozenset(), frozenset({"tools"}))),
        model=draw.choice((None, None, names[0])),
        max_tokens=draw.choice((None, 12)),
        body=draw.choice(({}, {}, {"n": 1}, {"n": 3}, {"n": "three"})),
        wishes=Wishes(privacy=draw.choice((None, "local")), allowed_models=allowed),
    )


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_glance_lets_nobody_through_whom_a_check_would_stop(seed: int) -> None:
    draw = random.Random(seed)
    names = [f"m{i}" for i in range(draw.randint(2, 30))]
    many = cards(*(any_card(draw, name) for name in names))
    system = snapshot(*(any_state(draw, name) for name in names if draw.random() < 0.8), budget=500)
    tokens = draw.choice((0.0, 83.0, 100.0, 170.0, float("nan")))
    request, read = any_ask(draw, names), msgspec.structs.replace(features(), prompt_tokens=tokens)

    def outcome() -> object:
        try:
            kept, refused = feasible(request, read, system, many)
        except NoCandidate as error:
            return error.message
        return list(kept.items()), refused

    found = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_doubtful", lambda facts, cards: list(cards))
        assert outcome() == found


# --- within_limits -------------------------------------------------------------------------------


def limits(wishes: Wishes, *estimates: Estimate, now_s: float = 0.0, fleet: Any = FLEET) -> Any:
    return within_limits({e.model: e for e in estimates}, fleet, ask(wishes=wishes), now_s)


def test_without_limits_everything_stays() -> None:
    kept, refused = limits(Wishes(), estimate("small"), estimate("tool", joules=None))
    assert list(kept) == ["small", "tool"]
    assert refused == ()


def test_joules_are_a_hard_limit_and_unknown_is_not_zero() -> None:
    kept, refused = limits(
        Wishes(max_energy_j=10), estimate("small", joules=5), estimate("tool", joules=None)
    )
    assert list(kept) == ["small"]
    assert "unknown" in refused[0].reason
    with pytest.raises(NoCandidate, match="predicted 50 J, allowed 10 J"):
        limits(Wishes(max_energy_j=10), estimate("small", joules=50))


def test_local_models_are_free_and_remote_ones_without_a_price_unknown() -> None:
    kept, refused = limits(Wishes(max_cost_usd=0.001), estimate("small"), estimate("cloud"))
    assert list(kept) == ["small"]
    assert "price is unknown" in refused[0].reason
    kept, refused = limits(Wishes(max_cost_usd=0.001), estimate("cloud", usd=0.0005))
    assert list(kept) == ["cloud"]
    with pytest.raises(NoCandidate, match=r"allowed \$0\.001"):
        limits(Wishes(max_cost_usd=0.001), estimate("cloud", usd=0.01))


def test_the_deadline_counts_from_arrival() -> None:
    deadline = Wishes(deadline_s=10.0)
    kept, refused = limits(deadline, estimate("small", 3.0), estimate("tool", 6.0), now_s=5.0)
    assert list(kept) == ["small"]
    assert refused_by(refused) == {"tool": "deadline"}


def test_when_all_are_late_the_fastest_is_kept_and_marked() -> None:
    kept, refused = limits(Wishes(deadline_s=1.0), estimate("tool", 6.0), estimate("small", 3.0))
    assert list(kept) == ["small"]
    assert refused_by(refused) == {"tool": "deadline", "small": BEST_EFFORT}


def test_best_effort_never_brings_back_what_joules_excluded() -> None:
    kept, refused = limits(
        Wishes(deadline_s=1.0, max_energy_j=10), estimate("small", 3.0, joules=50), estimate("tool", 6.0)
    )
    assert list(kept) == ["tool"]
    assert refused_by(refused) == {"small": "energy", "tool": BEST_EFFORT}


def test_a_prediction_that_is_no_number_is_late() -> None:
    kept, _ = limits(Wishes(deadline_s=5.0), estimate("small", float("nan")), estimate("tool", 2.0))
    assert list(kept) == ["tool"]


def test_a_passed_deadline_is_an_error_of_its_own() -> None:
    with pytest.raises(DeadlineExceeded):
        limits(Wishes(deadline_s=1.0), estimate("small"), now_s=1.0)


def test_earlier_refusals_are_carried_along() -> None:
    _, earlier = feasible(ask(), features(), snapshot(), FLEET)
    wishes = ask(wishes=Wishes(max_energy_j=1.0))
    with pytest.raises(NoCandidate, match=r"vectors: does not do chat.*small: predicted"):
        within_limits({"small": estimate("small")}, FLEET, wishes, 0.0, earlier)
    _, refused = within_limits({"small": estimate("small")}, FLEET, ask(), 0.0, earlier)
    assert refused == earlier


def test_more_answers_than_an_engine_has_slots_go_to_one_that_has_them() -> None:
    few = card("few", engine=EngineSpec(slots=2))
    many = card("many", engine=EngineSpec(slots=4))
    remote = card("remote", engine=EngineSpec(kind="openai", url="http://localhost"))
    kept, refused = feasible(ask(body={"n": 3}), features(), snapshot(), cards(few, many, remote))
    assert sorted(kept) == ["many", "remote"]
    assert [(r.model, r.constraint) for r in refused] == [("few", "capability")]
    assert "at most 2 answers at once" in refused[0].reason
