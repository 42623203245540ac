"""Prometheus figures: what counts, bounded labels, residency as a view."""

from __future__ import annotations

import math

import msgspec
import pytest

from calm.gateway.fake import ScriptedService, decision_for
from calm.gateway.limits import Limits
from calm.gateway.metrics import Metrics, error_ratio
from calm.gateway.wire import parse_chat
from calm.records import Belief, Decision, Estimate, Outcome, Reading


def metrics() -> Metrics:
    return Metrics(lambda name: name in ("small", "large"))


def value(figures: Metrics, name: str, **labels: str) -> float | None:
    return figures.registry.get_sample_value(name, labels)


def outcome(model: str | None = "small", **fields: object) -> Outcome:
    given = {"status": "ok", "ttft_s": 0.2, "total_s": 2.0, "completion_tokens": 7, **fields}
    return Outcome(request_id="r", model=model, wall_s=0.0, **given)  # type: ignore[arg-type]


def decision(**estimates: Estimate) -> Decision:
    ask = parse_chat(
        b'{"messages":[{"role":"user","content":"x"}]}', {}, limits=Limits(), request_id="r", now_s=0.0
    )
    plain = decision_for(ask)
    return Decision(**{**{f: getattr(plain, f) for f in plain.__struct_fields__}, "estimates": estimates})


def estimate(total_s: float, energy_j: float | None) -> Estimate:
    def exactly(mean: float) -> Belief:
        return Belief(mean=mean, sd=0.0)

    return Estimate(
        model="small",
        prompt_tokens=1,
        cached_tokens=0,
        output_tokens=exactly(1),
        queue_s=exactly(0),
        load_s=exactly(0),
        prefill_s=exactly(0),
        decode_s=exactly(0),
        ttft_s=exactly(0.2),
        total_s=exactly(total_s),
        energy_j=None if energy_j is None else exactly(energy_j),
        quality=exactly(0.5),
    )


def test_a_request_is_counted() -> None:
    figures = metrics()
    energy = Reading(joules=3.0, meter="rapl", kind="attributed")
    figures.observe(outcome(prompt_tokens=11, energy=energy, queue_s=0.3), decision())
    assert value(figures, "calm_requests_total", model="small", status="ok") == 1
    assert value(figures, "calm_ttft_seconds_sum", model="small") == 0.2
    assert value(figures, "calm_request_seconds_sum", model="small") == 2.0
    assert value(figures, "calm_queue_seconds_sum", model="small") == 0.3
    assert value(figures, "calm_tokens_total", model="small", kind="completion") == 7
    assert value(figures, "calm_tokens_total", model="small", kind="prompt") == 11
    assert value(figures, "calm_energy_joules_total", model="small", meter="rapl", kind="attributed") == 3
    assert value(figures, "calm_decision_seconds_count") == 1


def test_what_is_unknown_is_not_zero() -> None:
    figures = metrics()
    figures.observe(outcome(status="cancelled", ttft_s=None, completion_tokens=None, energy=None))
    assert value(figures, "calm_ttft_seconds_count", model="small") == 0
    assert value(figures, "calm_request_seconds_count", model="small") == 0
    assert "calm_energy_joules_total{" not in figures.render()[0].decode()


def test_labels_are_bounded_by_the_fleet() -> None:
    figures = metrics()
    for number in range(50):
        figures.observe(outcome(f"made-up-{number}"))
        figures.evicted(f"made-up-{number}")
    figures.observe(outcome(None, status="rejected"))
    text = figures.render()[0].decode()
    assert "made-up" not in text
    assert value(figures, "calm_requests_total", model="other", status="ok") == 50
    assert value(figures, "calm_requests_total", model="none", status="rejected") == 1


def test_predictions_are_held_against_what_happened() -> None:
    figures = metrics()
    energy = Reading(joules=2.0, meter="rapl", kind="attributed")
    figures.observe(outcome(energy=energy), decision(small=estimate(total_s=3.0, energy_j=1.0)))
    assert value(figures, "calm_prediction_error_ratio_sum", model="small", quantity="latency") == 0.5
    assert value(figures, "calm_prediction_error_ratio_sum", model="small", quantity="energy") == 0.5
    assert value(figures, "calm_prediction_error_ratio_sum", model="small", quantity="ttft") == 0


@pytest.mark.parametrize(
    ("mean", "seen", "ratio"),
    [(3, 2, 0.5), (0, 2, 1.0), (1, 0, None), (1, None, None), (math.inf, 1, None)],
)
def test_error_ratio(mean: float, seen: float | None, ratio: float | None) -> None:
    assert error_ratio(Belief(mean=mean, sd=0), seen) == ratio
    assert error_ratio(None, seen) is None


def test_loads_evictions_drops() -> None:
    figures = metrics()
    figures.loaded("small", 0.4)
    figures.loaded("small", None)
    figures.evicted("small")
    figures.drop(3)
    assert value(figures, "calm_model_loads_total", model="small", result="ok") == 1
    assert value(figures, "calm_model_loads_total", model="small", result="failed") == 1
    assert value(figures, "calm_model_load_seconds_sum", model="small") == 0.4
    assert value(figures, "calm_model_evictions_total", model="small") == 1
    assert value(figures, "calm_records_dropped_total") == 3


def test_residency_shows_the_newest_snapshot_only() -> None:
    figures, service = metrics(), ScriptedService()
    assert "calm_model_state" not in figures.render()[0].decode()
    service.state["large"] = "cold"
    figures.residency(service.snapshot())
    assert value(figures, "calm_model_state", model="small", state="ready") == 1
    assert value(figures, "calm_model_state", model="large", state="ready") == 0
    assert value(figures, "calm_model_bytes", model="small") == 100
    assert value(figures, "calm_model_bytes", model="large") == 0
    assert value(figures, "calm_memory_budget_bytes") == 1000
    del service.fleet["large"]
    figures.residency(service.snapshot())
    assert value(figures, "calm_model_state", model="large", state="cold") is None


def test_the_scraper_chooses_the_format() -> None:
    figures = metrics()
    assert figures.render()[1].startswith("text/plain")
    body, kind = figures.render("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_two_servers_in_one_process_do_not_collide() -> None:
    one, two = metrics(), metrics()
    one.response("/x", 200)
    assert value(one, "calm_http_responses_total", route="/x", code="200") == 1
    assert value(two, "calm_http_responses_total", route="/x", code="200") is None


def test_adapters_add_nothing_to_sums_over_models() -> None:
    service = ScriptedService()
    figures = metrics()
    snapshot = service.snapshot()
    base = snapshot.models["small"]
    shared = {**snapshot.models, "finance": base}
    figures.residency(msgspec.structs.replace(snapshot, models=shared))
    assert value(figures, "calm_model_state", model="finance", state=base.residency) == 1.0
    for name in ("calm_model_bytes", "calm_model_in_flight", "calm_model_waiting", "calm_model_pinned"):
        assert value(figures, name, model="small") is not None
        assert value(figures, name, model="finance") is None
