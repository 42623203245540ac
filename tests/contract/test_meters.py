"""What every meter promises, whichever the machine gets (ports.Meter)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping

import pytest

from calm.clock import ManualClock, SystemClock
from calm.meters.absent import AbsentMeter
from calm.meters.composite import CompositeMeter
from calm.meters.cpu_time import CpuTimeMeter
from calm.meters.ledger import EnergyLedger
from calm.meters.nvml import NvmlMeter
from calm.meters.processes import choose_source
from calm.meters.rapl import ProcBusy, RaplMeter
from calm.ports import Meter


class Rising:
    """An energy counter and a GPU whose work is all of the given process's."""

    def __init__(self, pids: tuple[int, ...] = ()) -> None:
        self._j = 0.0
        self._pids = pids

    def joules(self, now_s: float = 0.0) -> float:
        self._j += 1.0
        return self._j

    def weights(self) -> Mapping[int, float]:
        return dict.fromkeys(self._pids, 1.0)


def cpu_time(pid: int) -> Meter:
    return CpuTimeMeter(choose_source(), 5.0)


def rapl(pid: int) -> Meter:
    return RaplMeter(Rising(), choose_source(), ProcBusy())


def nvml(pid: int) -> Meter:
    return NvmlMeter([Rising((pid,))], SystemClock(), min_interval_s=0.0)


def composite(pid: int) -> Meter:
    return CompositeMeter([nvml(pid), rapl(pid)])


def absent(pid: int) -> Meter:
    return AbsentMeter()


Maker = Callable[[int], Meter]
ALL: list[Maker] = [cpu_time, rapl, nvml, composite, absent]
SEEING: list[Maker] = [cpu_time, rapl, nvml, composite]


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "while True:\n    pass"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("make", ALL)
def test_it_has_a_name_and_a_kind(make: Maker) -> None:
    meter = make(1)
    assert meter.name
    assert meter.kind in ("measured", "attributed", "modelled")


@pytest.mark.parametrize("make", ALL)
def test_it_leaves_out_what_it_cannot_see(make: Maker) -> None:
    meter = make(1)
    for _ in range(3):
        assert meter.read({"remote": (), "gone": (2**22 + 1,)}) == {}
    assert meter.read({}) == {}


@pytest.mark.parametrize("make", SEEING)
def test_a_working_group_rises_and_never_falls(make: Maker, worker: subprocess.Popen[bytes]) -> None:
    meter = make(worker.pid)
    groups = {"engine": (worker.pid,)}
    seen = [meter.read(groups).get("engine", 0.0)]
    while seen[-1] <= seen[0] or len(seen) < 20:
        seen.append(meter.read(groups).get("engine", 0.0))
    assert seen == sorted(seen)
    worker.kill()
    worker.wait()
    assert meter.read(groups)["engine"] >= seen[-1]


@pytest.mark.parametrize("make", SEEING)
def test_a_ledger_over_it_gives_a_request_its_joules(make: Maker, worker: subprocess.Popen[bytes]) -> None:
    meter = make(worker.pid)
    ledger = EnergyLedger(meter, ManualClock())
    ledger.begin("r", "engine", (worker.pid,))
    while ledger.totals()["engine"].attributed_j <= 0.0:
        ledger.step()
    reading = ledger.end("r")
    assert reading is not None
    assert (reading.meter, reading.kind) == (meter.name, meter.kind)
    assert reading.joules > 0.0


def test_a_ledger_over_nothing_gives_nothing() -> None:
    ledger = EnergyLedger(AbsentMeter(), ManualClock())
    ledger.begin("r", "engine", (1,))
    ledger.step()
    assert ledger.end("r") is None
