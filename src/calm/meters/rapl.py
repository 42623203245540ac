"""Joules of the CPU packages, from the processor's own energy counters (RAPL), shared out by CPU time.

The counters cover whole packages (and the memory where the platform reports it), so what one group used is
attributed: package joules of an interval x the group's share of the busy CPU time in it. Whoever works alone
therefore also pays the package's idle floor.

Source of the counters: `powercap.py`, or the kernel's perf events in `perf_energy.py`.
Method: Khan et al., "RAPL in Action", ACM TOMPECS 3(2), 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from calm.meters.processes import PROC, CpuSource, GroupClock
from calm.records import MeterKind

# user nice system idle iowait irq softirq steal; guest time is contained in user (proc(5)).
BUSY_FIELDS = (0, 1, 2, 5, 6)


class EnergyCounter(Protocol):
    """Joules of all packages since the counter was made, monotone."""

    def joules(self) -> float: ...


class RaplMeter:
    """Implements ports.Meter over an energy counter, process CPU time and the machine's busy time."""

    name = "rapl"
    kind: MeterKind = "attributed"

    def __init__(self, counter: EnergyCounter, source: CpuSource, busy_s: Callable[[], float]) -> None:
        self._counter = counter
        self._clock = GroupClock(source)
        self._busy = BusyShare(busy_s)
        self._last_j = counter.joules()
        self._last_s: dict[str, float] = {}
        self._total_j: dict[str, float] = {}

    def read(self, groups: Mapping[str, Sequence[int]]) -> Mapping[str, float]:
        """Every running group has to be named in each call: the interval is split among those named."""
        used = self._clock.read(groups)
        delta_s = {name: total - self._last_s.get(name, total) for name, total in used.items()}
        self._last_s.update(used)
        package_j = self._package_delta_j()
        busy_s = self._busy.interval_s(sum(delta_s.values()))
        for name, seconds in delta_s.items():
            share = seconds / busy_s if busy_s > 0.0 else 0.0
            self._total_j[name] = self._total_j.get(name, 0.0) + package_j * share
        return {name: self._total_j[name] for name in used}

    def _package_delta_j(self) -> float:
        now_j = self._counter.joules()
        delta_j, self._last_j = max(0.0, now_j - self._last_j), now_j
        return delta_j


class BusyShare:
    """Busy CPU seconds of each interval, never less than what the metered groups used themselves.

    The machine's busy time comes in ticks of 10 ms, the groups' in nanoseconds. Where an interval is shorter
    than a tick the groups' own time stands in, and the excess is taken off the intervals that follow: over
    many short reads the shares come out as over one long read.
    """

    def __init__(self, busy_s: Callable[[], float]) -> None:
        self._busy_s = busy_s
        self._last_s = busy_s()
        self._borrowed_s = 0.0

    def interval_s(self, groups_s: float) -> float:
        now_s = self._busy_s()
        measured_s, self._last_s = max(0.0, now_s - self._last_s), now_s
        used_s = max(groups_s, measured_s - self._borrowed_s)
        self._borrowed_s = max(0.0, self._borrowed_s + used_s - measured_s)
        return used_s


class ProcBusy:
    """Busy CPU seconds of the whole machine, from the first line of PROC/stat."""

    def __init__(self, proc_root: Path = PROC, tick_s: float = 0.01) -> None:
        self._path = proc_root / "stat"
        self._tick_s = tick_s
        self._last_s = 0.0

    def __call__(self) -> float:
        try:
            with self._path.open("rb") as file:
                self._last_s = parse_busy_ticks(file.readline().decode()) * self._tick_s
        except (OSError, ValueError, IndexError):
            pass  # the interval then counts as idle, and BusyShare falls back on the groups' own time
        return self._last_s


def parse_busy_ticks(line: str) -> int:
    """Busy ticks of the `cpu` line of /proc/stat. Raises ValueError or IndexError on another line."""
    name, *fields = line.split()
    if name != "cpu":
        raise ValueError(f"not the cpu line of /proc/stat: {line!r}")
    return sum(int(fields[index]) for index in BUSY_FIELDS)
