"""Eviction policies rank; victims are enough and no more than needed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.errors import BadInput
from calm.execute.eviction import Standing, choose_victims, parse_eviction


def standing(model: str, size: int = 10, **changes: object) -> Standing:
    given = {"loaded_at_s": 0.0, "last_used_s": 0.0, "uses": 1, "load_s": 1.0, "value": None} | changes
    return Standing(model=model, footprint_bytes=size, **given)


def victims(spec: str, *standings: Standing, short: int = 10, at_s: float = 100.0, **more: object):
    return choose_victims(parse_eviction(spec), standings, at_s, short_bytes=short, **more)


def test_each_policy_has_its_own_victim() -> None:
    fleet = (
        standing("oldest", loaded_at_s=1.0, last_used_s=90.0, uses=50),
        standing("unused", loaded_at_s=50.0, last_used_s=60.0, uses=9),
        standing("rare", loaded_at_s=60.0, last_used_s=80.0, uses=2),
        standing("dear", loaded_at_s=55.0, last_used_s=61.0, uses=10, load_s=60.0),
    )
    assert victims("fifo", *fleet) == ("oldest",)
    assert victims("lru", *fleet) == ("unused",)
    assert victims("lfu", *fleet) == ("rare",)
    assert victims("calm", *fleet) == ("unused",)


def test_calm_keeps_what_is_slow_to_load_and_small() -> None:
    slow, quick = (
        standing("slow", load_s=20.0, last_used_s=50.0),
        standing("quick", load_s=0.2, last_used_s=60.0),
    )
    assert victims("calm", slow, quick) == ("quick",)
    assert victims("lru", slow, quick) == ("slow",)
    assert victims("calm", standing("big", size=1000), standing("small", size=10)) == ("big",)


def test_calm_follows_the_plan_and_falls_back_to_recency() -> None:
    planned = (standing("hot", value=5.0, last_used_s=1.0), standing("stale", value=0.0, last_used_s=99.0))
    assert victims("calm", *planned) == ("stale",)
    unplanned = (standing("hot", last_used_s=1.0), standing("stale", last_used_s=99.0))
    assert victims("calm", *unplanned) == ("hot",)
    equal = (standing("x", value=0.0, last_used_s=2.0), standing("y", value=0.0, last_used_s=1.0))
    assert victims("calm", *equal) == ("y",)


def test_victims_fit_the_need() -> None:
    tiny, large = standing("tiny", size=5, last_used_s=1.0), standing("large", size=80, last_used_s=2.0)
    assert victims("lru", tiny, large, short=60) == ("large",), "the tiny one would have gone for nothing"
    assert victims("lru", tiny, large, short=85) == ("tiny", "large")
    assert victims("lru", tiny, large, short=86) is None
    assert victims("lru", tiny, large, short=0) == ()


def test_places_count_beside_bytes() -> None:
    fleet = (standing("a", last_used_s=1.0), standing("b", last_used_s=2.0))
    assert victims("lru:1", *fleet, short=0, short_count=1) == ("a",)
    assert victims("lru:1", *fleet, short=0, short_count=2) == ("a", "b")
    assert victims("lru:1", *fleet, short=0, short_count=3) is None


def test_models_that_already_drain_go_first() -> None:
    fleet = (standing("cold", last_used_s=1.0), standing("draining", last_used_s=50.0))
    assert victims("lru", *fleet, first=frozenset({"draining"})) == ("draining",)


def test_specs_parse() -> None:
    assert parse_eviction("calm").max_resident is None
    assert parse_eviction(" LRU:3 ").max_resident == 3
    assert parse_eviction("LRU:3").name == "lru:3"
    assert parse_eviction("fifo").name == "fifo"


@pytest.mark.parametrize("spec", ["", "mru", "lru:", "lru:0", "lru:-1", "lru:two", "lru:1.5", ":3", "lru:²"])
def test_wrong_specs_say_what_is_right(spec: str) -> None:
    with pytest.raises(BadInput, match=r"one of calm, lru, lfu, fifo|1 or more") as error:
        parse_eviction(spec)
    assert error.value.field == "eviction"


@given(
    st.sampled_from(("calm", "lru", "lfu", "fifo")),
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 99), st.integers(0, 9)), max_size=8),
    st.integers(0, 200),
    st.integers(0, 4),
)
def test_no_smaller_set_would_do(
    spec: str, models: list[tuple[int, float, int]], short: int, count: int
) -> None:
    fleet = {
        f"m{i}": standing(f"m{i}", size=size, last_used_s=used, uses=uses)
        for i, (size, used, uses) in enumerate(models)
    }
    chosen = victims(spec, *fleet.values(), short=short, short_count=count)
    if chosen is None:
        assert sum(s.footprint_bytes for s in fleet.values()) < short or len(fleet) < count
        return
    sizes = [fleet[name].footprint_bytes for name in chosen]
    assert sum(sizes) >= short
    assert len(chosen) >= count
    assert all(sum(sizes) - size < short or len(chosen) - 1 < count for size in sizes)
