"""The ledger: every joule has exactly one payer, whatever the order of things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.clock import ManualClock
from calm.meters.ledger import EnergyLedger
from calm.records import MeterKind, Reading


class ScriptedMeter:
    """Counters that a test moves by hand; notes how often it was read."""

    name = "scripted"
    kind: MeterKind = "attributed"

    def __init__(self, **joules: float) -> None:
        self.joules = dict(joules)
        self.reads = 0
        self.error: Exception | None = None

    def read(self, groups: Mapping[str, Sequence[int]]) -> Mapping[str, float]:
        self.reads += 1
        if self.error is not None:
            raise self.error
        return {name: self.joules[name] for name in groups if name in self.joules}


def make_ledger(meter: ScriptedMeter, coalesce_s: float = 0.0) -> tuple[EnergyLedger, ManualClock]:
    clock = ManualClock()
    return EnergyLedger(meter, clock, coalesce_s=coalesce_s), clock


def joules(reading: Reading | None) -> float:
    return 0.0 if reading is None else reading.joules


def test_one_request_gets_what_its_engine_used() -> None:
    meter = ScriptedMeter(a=100.0)
    ledger, _ = make_ledger(meter)
    ledger.begin("r", "a", (1,))
    meter.joules["a"] += 7.0
    assert ledger.end("r") == Reading(joules=7.0, meter="scripted", kind="attributed")


def test_overlap_is_split_equally_by_interval() -> None:
    meter = ScriptedMeter(a=0.0)
    ledger, _ = make_ledger(meter)
    ledger.begin("first", "a", (1,))
    meter.joules["a"] += 10.0
    ledger.begin("second", "a", (1,))
    meter.joules["a"] += 6.0
    assert joules(ledger.end("first")) == 13.0
    meter.joules["a"] += 4.0
    assert joules(ledger.end("second")) == 7.0


def test_idle_joules_are_nobodys() -> None:
    meter = ScriptedMeter(a=0.0)
    ledger, _ = make_ledger(meter)
    ledger.step({"a": (1,)})
    ledger.step()
    meter.joules["a"] += 5.0
    ledger.begin("r", "a", (1,))
    meter.joules["a"] += 2.0
    assert joules(ledger.end("r")) == 2.0
    totals = ledger.totals()["a"]
    assert (totals.attributed_j, totals.idle_j, totals.in_flight) == (2.0, 5.0, 0)


def test_a_remote_engine_is_unknown_and_never_zero() -> None:
    meter = ScriptedMeter()
    ledger, _ = make_ledger(meter)
    ledger.begin("r", "cloud", ())
    assert ledger.end("r") is None
    assert meter.reads == 0
    assert ledger.totals() == {}


def test_an_engine_the_meter_cannot_see_is_unknown() -> None:
    ledger, _ = make_ledger(ScriptedMeter())
    ledger.begin("r", "a", (1,))
    ledger.step()
    assert ledger.end("r") is None


def test_less_than_the_meter_resolves_is_unknown() -> None:
    ledger, _ = make_ledger(ScriptedMeter(a=5.0))
    ledger.begin("r", "a", (1,))
    assert ledger.end("r") is None


def test_ending_twice_or_unknown_is_none() -> None:
    ledger, _ = make_ledger(ScriptedMeter(a=0.0))
    ledger.begin("r", "a", (1,))
    ledger.end("r")
    assert ledger.end("r") is None
    assert ledger.end("never") is None


def test_failover_keeps_what_the_first_engine_used() -> None:
    meter = ScriptedMeter(a=0.0, b=0.0)
    ledger, _ = make_ledger(meter)
    ledger.begin("r", "a", (1,))
    meter.joules["a"] += 3.0
    ledger.begin("r", "b", (2,))
    meter.joules["a"] += 50.0
    meter.joules["b"] += 4.0
    assert joules(ledger.end("r")) == 7.0


def test_a_restarted_engine_loads_at_nobodys_cost() -> None:
    meter = ScriptedMeter(a=0.0)
    ledger, clock = make_ledger(meter, coalesce_s=10.0)
    ledger.begin("r1", "a", (1,))
    meter.joules["a"] += 3.0
    assert joules(ledger.end("r1")) == 3.0
    meter.joules["a"] += 20.0
    ledger.begin("r2", "a", (2,))
    clock.advance(20.0)
    meter.joules["a"] += 4.0
    assert joules(ledger.end("r2")) == 4.0
    assert ledger.totals()["a"].idle_j == 20.0


def test_a_counter_that_falls_takes_nothing_back() -> None:
    meter = ScriptedMeter(a=100.0)
    ledger, _ = make_ledger(meter)
    ledger.begin("r", "a", (1,))
    meter.joules["a"] = 105.0
    ledger.step()
    meter.joules["a"] = 1.0
    ledger.step()
    meter.joules["a"] = 3.0
    assert joules(ledger.end("r")) == 7.0


def test_a_vanished_process_loses_nothing_earlier() -> None:
    meter = ScriptedMeter(a=0.0)
    ledger, _ = make_ledger(meter)
    ledger.begin("r", "a", (1,))
    meter.joules["a"] = 5.0
    ledger.step()
    del meter.joules["a"]
    assert joules(ledger.end("r")) == 5.0


@pytest.mark.parametrize("error", [OSError("GPU is lost"), ValueError("odd")])
def test_a_failing_meter_costs_figures_not_requests(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    meter = ScriptedMeter(a=0.0)
    ledger, _ = make_ledger(meter)
    meter.error = error
    for name in ("r1", "r2"):
        ledger.begin(name, "a", (1,))
        assert ledger.end(name) is None
    assert caplog.text.count("energy meter scripted failed") == 1
    meter.error = None
    ledger.begin("r3", "a", (1,))
    meter.joules["a"] += 1.0
    assert joules(ledger.end("r3")) == 1.0


def test_nonsense_from_a_meter_is_not_booked() -> None:
    meter = ScriptedMeter(a=0.0)
    ledger, _ = make_ledger(meter)
    ledger.begin("r", "a", (1,))
    for value in (float("nan"), float("inf")):
        meter.joules["a"] = value
        ledger.step()
    meter.joules["a"] = 2.0
    assert joules(ledger.end("r")) == 2.0


def test_reads_are_coalesced_but_no_request_ends_unread() -> None:
    meter = ScriptedMeter(a=0.0)
    ledger, clock = make_ledger(meter, coalesce_s=0.005)
    ledger.begin("long", "a", (1,))
    for index in range(100):
        clock.advance(0.0001)
        meter.joules["a"] += 0.01
        ledger.begin(f"r{index}", "a", (1,))
    clock.advance(0.01)
    for index in range(100):
        ledger.end(f"r{index}")
    ledger.end("long")
    assert meter.reads < 8
    ledger.begin("short", "a", (1,))
    meter.joules["a"] += 0.5
    assert joules(ledger.end("short")) == pytest.approx(0.5)


def test_engines_that_stopped_are_read_no_more() -> None:
    meter = ScriptedMeter(a=0.0, b=0.0)
    ledger, _ = make_ledger(meter)
    ledger.step({"a": (1,), "b": (2,)})
    ledger.step({"a": (1,)})
    meter.joules |= {"a": 1.0, "b": 9.0}
    ledger.step()
    totals = ledger.totals()
    assert (totals["a"].idle_j, totals["b"].idle_j) == (1.0, 0.0)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "end", "step"]),
        st.sampled_from(["a", "b"]),
        st.integers(0, 5),
        st.integers(0, 1000),
        st.integers(0, 20),
    ),
    max_size=60,
)


@given(OPERATIONS, st.sampled_from([0.0, 0.005]))
def test_every_joule_is_booked_exactly_once(
    operations: list[tuple[str, str, int, int, int]], coalesce_s: float
) -> None:
    meter = ScriptedMeter(a=0.0, b=0.0)
    ledger, clock = make_ledger(meter, coalesce_s)
    ledger.step({"a": (1,), "b": (2,)})
    ledger.step()
    paid: dict[str, float] = {}
    for operation, engine, number, milliseconds, amount in operations:
        clock.advance(milliseconds / 1000.0)
        meter.joules[engine] += amount
        name = f"{engine}{number}"
        if operation == "begin":
            ledger.begin(name, engine, (1,) if engine == "a" else (2,))
        elif operation == "end":
            reading = ledger.end(name)
            assert reading is None or reading.joules > 0.0
            paid[engine] = paid.get(engine, 0.0) + joules(reading)
        else:
            ledger.step()
    for engine in ("a", "b"):
        for number in range(6):
            paid[engine] = paid.get(engine, 0.0) + joules(ledger.end(f"{engine}{number}"))
    ledger.step()
    for engine, totals in ledger.totals().items():
        assert totals.in_flight == 0
        assert totals.attributed_j == pytest.approx(paid[engine])
        assert totals.attributed_j + totals.idle_j == pytest.approx(meter.joules[engine])


@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["begin", "end"]), st.integers(0, 9)), max_size=40)
)
def test_without_coalescing_the_split_is_exact(history: list[tuple[int, str, int]]) -> None:
    """Against the definition in exact arithmetic: each delta in equal parts among those in flight."""
    meter = ScriptedMeter(a=0.0)
    ledger, clock = make_ledger(meter)
    owed: dict[str, Fraction] = {}
    for number, operation, amount in history:
        name = f"r{number}"
        clock.advance(0.001)
        meter.joules["a"] += amount if ledger.totals() else 0
        for key in owed:
            owed[key] += Fraction(amount, len(owed))
        if operation == "begin":
            ledger.begin(name, "a", (1,))
            owed.setdefault(name, Fraction(0))
        elif name in owed:
            assert joules(ledger.end(name)) == pytest.approx(float(owed.pop(name)))


@given(st.permutations(["r0", "r1", "r2", "r3"]), st.permutations(["r0", "r1", "r2", "r3"]))
def test_order_within_one_moment_does_not_matter(begins: list[str], ends: list[str]) -> None:
    meter = ScriptedMeter(a=0.0)
    ledger, _ = make_ledger(meter)
    for name in begins:
        ledger.begin(name, "a", (1,))
    meter.joules["a"] += 8.0
    assert [joules(ledger.end(name)) for name in ends] == [2.0, 2.0, 2.0, 2.0]
