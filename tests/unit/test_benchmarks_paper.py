"""The bound that experiment 3 is held against, and the files of the paper's Set 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from calm.profile import Length, MachineProfile, ModelProfile, Profile, read_profile
from calm.registry import load_fleet

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.paper.bounds import latency_s, least_service, service_s  # noqa: E402

HERE = ROOT / "benchmarks" / "paper"


def model(seconds: float, quality: float) -> ModelProfile:
    """Takes so long for 101 tokens: no prompt time, the first token is free."""
    return ModelProfile(
        memory_bytes=1,
        load_s=0.0,
        prefill_tps=1e12,
        tokens_per_char=0.25,
        decode_tps={"1": 100 / seconds},
        active_w=100.0,
        output_tokens={"default": Length(mean=101)},
        quality={"default": quality},
    )


def two() -> Profile:
    machine = MachineProfile(name="made up", cores=1)
    return Profile(machine=machine, models={"quick": model(2.0, 0.5), "good": model(6.0, 0.9)})


def test_the_bound_mixes_as_much_of_the_good_model_as_the_promise_needs() -> None:
    found = least_service(two(), {"all": 1.0}, 0.7, 2, 100, 101)
    assert found is not None
    assert found.service_s == pytest.approx(4.0)  # half and half
    assert found.energy_j == pytest.approx(400.0)


def test_one_model_at_a_time_may_not_reach_the_promise() -> None:
    only = least_service(two(), {"all": 1.0}, 0.7, 1, 100, 101)
    assert only is not None
    assert only.models == ("good",)
    assert least_service(two(), {"all": 1.0}, 0.95, 2, 100, 101) is None


def test_requests_on_a_serial_engine_wait_for_those_before_them() -> None:
    assert latency_s([0.0, 1.0, 10.0], 3.0) == [3.0, 5.0, 3.0]


def test_set_2_takes_the_published_times_and_every_card_has_a_profile() -> None:
    profile = read_profile(HERE / "set2.profile.toml")
    load = load_fleet(HERE / "set2")
    assert not load.problems
    assert load.fleet.keys() == profile.models.keys()
    published = {
        "gemma-2-2b": 8.5,
        "llama-3.2-1b": 3.5,
        "llama-3.2-3b": 5.7,
        "phi-3-mini": 7.0,
        "qwen2.5-3b": 5.8,
    }
    for name, seconds in published.items():
        assert service_s(profile.models[name], 100, 256) == pytest.approx(seconds, abs=0.05)
