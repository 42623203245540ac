"""What a model would answer is fixed by seed, query and model, and has the profile's moments."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from statistics import fmean, stdev
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.replay_setting import model

from calm.profile import Length, MachineProfile, ModelProfile, Profile
from calm.replay.outcomes import UNSTATED_QUALITY, Outcomes, drawn, lognormal
from calm.workloads.records import Query, Recorded

SPREAD: dict[str, Any] = {
    "output_tokens": {"default": Length(mean=50, sd=20), "math": Length(mean=100, sd=40)},
    "jitter": 0.2,
}


def query(query_id: str = "q", **fields: Any) -> Query:
    base: dict[str, Any] = {"id": query_id, "dataset": "d", "domain": "math", "prompt": "x" * 40}
    return Query(**{**base, **fields})


def outcomes(
    *queries: Query,
    seed: int = 0,
    max_tokens: int | None = None,
    models: Mapping[str, ModelProfile] | None = None,
) -> Outcomes:
    """Request `rI` asks query I."""
    profile = Profile(machine=MachineProfile(name="m", cores=1), models=models or {"a": model(**SPREAD)})
    found = Outcomes(profile, seed, dict.fromkeys(profile.models, max_tokens))
    found.know({f"r{i}": q for i, q in enumerate(queries)})
    return found


@given(st.integers(0, 5), st.permutations(["a", "b", "c"]), st.integers(0, 3))
def test_an_answer_does_not_depend_on_who_asked_before(seed: int, order: list[str], place: int) -> None:
    models = {name: model(**SPREAD) for name in "abc"}
    queries = [query(f"q{i}") for i in range(4)]
    alone = outcomes(*queries, seed=seed, models=models)
    after = outcomes(*queries, seed=seed, models=models)
    others = [after.of(f"r{i}", name) for i in range(4) for name in order]
    assert len(others) == 12
    assert after.of(f"r{place}", order[0]) == alone.of(f"r{place}", order[0])


def test_the_same_query_asked_twice_has_one_answer() -> None:
    found = outcomes(query(), query(), query("other"))
    assert found.of("r0", "a") == found.of("r1", "a")
    assert found.of("r0", "a") != found.of("r2", "a")


def test_seeds_and_models_differ() -> None:
    models = {name: model(**SPREAD) for name in "ab"}
    answers = {
        outcomes(query(), seed=seed, models=models).of("r0", name) for seed in range(3) for name in "ab"
    }
    assert len(answers) == 6


def test_what_was_recorded_wins_and_the_rest_is_drawn() -> None:
    full = Recorded(query_id="q", model="a", quality=0.25, prompt_tokens=7, output_tokens=9)
    part = Recorded(query_id="p", model="a", quality=0.75)
    found = outcomes(query(known={"a": full}), query("p", known={"a": part}), query("p"))
    answer = found.of("r0", "a")
    assert (answer.prompt_tokens, answer.output_tokens, answer.quality) == (7, 9, 0.25)
    assert found.of("r1", "a").quality == 0.75
    assert found.of("r1", "a").output_tokens == found.of("r2", "a").output_tokens


def test_the_longest_answer_is_the_request_s() -> None:
    found = outcomes(*(query(f"q{i}") for i in range(50)), max_tokens=64)
    lengths = {found.of(f"r{i}", "a").output_tokens for i in range(50)}
    assert max(lengths) == 64
    assert min(lengths) < 64


def test_the_prompt_has_its_characters_and_the_template_s_tokens() -> None:
    found = outcomes(query(), models={"a": model(template_tokens=12.0, tokens_per_char=0.25)})
    assert found.of("r0", "a").prompt_tokens == 12 + 10


def test_lengths_and_times_have_the_profile_s_moments() -> None:
    count = 4000
    found = outcomes(*(query(f"q{i}") for i in range(count)))
    answers = [found.of(f"r{i}", "a") for i in range(count)]
    lengths = [answer.output_tokens for answer in answers]
    assert fmean(lengths) == pytest.approx(100, rel=0.03)
    assert stdev(lengths) == pytest.approx(40, rel=0.1)
    assert sorted(answer.stretch for answer in answers)[count // 2] == pytest.approx(1.0, abs=0.02)


def test_quality_is_right_or_wrong_where_no_spread_is_stated() -> None:
    found = outcomes(
        *(query(f"q{i}") for i in range(2000)), models={"a": model(quality={"math": 0.3}, quality_sd=None)}
    )
    values = [found.of(f"r{i}", "a").quality for i in range(2000)]
    assert set(values) == {0.0, 1.0}
    assert fmean(values) == pytest.approx(0.3, abs=0.04)


def test_unstated_quality_is_a_coin() -> None:
    found = outcomes(*(query(f"q{i}") for i in range(2000)), models={"a": model(quality={}, quality_sd=None)})
    assert fmean(found.of(f"r{i}", "a").quality for i in range(2000)) == pytest.approx(
        UNSTATED_QUALITY, abs=0.05
    )


@settings(max_examples=12)
@given(st.floats(0.05, 0.95), st.floats(0.02, 0.3))
def test_graded_quality_has_its_mean_and_stays_within_its_range(mean: float, sd: float) -> None:
    random = Random(0)
    values = [drawn(mean, sd, 0.0, random) for _ in range(1500)]
    assert all(0.0 <= value <= 1.0 for value in values)
    assert fmean(values) == pytest.approx(mean, abs=0.05)


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_certain_quality_has_no_spread(mean: float) -> None:
    assert drawn(mean, 0.2, 0.5, Random(0)) == mean


@settings(max_examples=12)
@given(st.floats(1.0, 1e4), st.floats(0.0, 1.0))
def test_the_lognormal_has_the_mean_asked_for(mean: float, relative_sd: float) -> None:
    random = Random(0)
    values = [lognormal(mean, relative_sd * mean, random.gauss(0, 1)) for _ in range(1500)]
    assert fmean(values) == pytest.approx(mean, rel=0.12)


def test_without_spread_the_lognormal_is_its_mean() -> None:
    assert lognormal(5.0, 0.0, 3.0) == 5.0
