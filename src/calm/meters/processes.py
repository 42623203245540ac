"""CPU seconds of process groups: what every CPU meter divides joules by.

Three sources, best first:

1. the kernel's own clock of a process (`clock_getcpuclockid(3)`): nanoseconds, all threads, exited ones
   included, about a quarter of a microsecond to read;
2. /proc/PID/stat, utime + stime: the same in clock ticks, commonly 10 ms, about ten microseconds;
3. psutil, on systems that have neither.

None counts children: a group lists every process that works for it. A child that was not listed is not seen,
neither while it runs nor after it was reaped.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

PROC = Path("/proc")


class CpuSource(Protocol):
    """Reads the CPU time of one process."""

    @property
    def name(self) -> str: ...

    def seconds(self, pid: int) -> float | None:
        """User plus system seconds since the process started; None when it cannot be read."""
        ...


class KernelClock:
    """The process's CPU-time clock, addressed the way glibc's clock_getcpuclockid() does (Linux)."""

    name = "kernel clock"

    def seconds(self, pid: int) -> float | None:
        if pid <= 0:
            return None
        try:
            return time.clock_gettime((~pid << 3) | 2)
        except OSError:
            return None


class ProcStat:
    """utime + stime of PROC/PID/stat, in clock ticks."""

    name = "/proc/PID/stat"

    def __init__(self, proc_root: Path = PROC, tick_s: float | None = None) -> None:
        self._root = proc_root
        self._tick_s = tick_s if tick_s is not None else 1.0 / os.sysconf("SC_CLK_TCK")

    def seconds(self, pid: int) -> float | None:
        try:
            text = (self._root / str(pid) / "stat").read_text()
        except OSError:
            return None
        ticks = parse_stat_ticks(text)
        return None if ticks is None else ticks * self._tick_s


class Psutil:
    """psutil's cpu_times, for systems without /proc."""

    name = "psutil"

    def seconds(self, pid: int) -> float | None:
        import psutil

        try:
            times = psutil.Process(pid).cpu_times()
        except (psutil.Error, ValueError):
            return None
        return float(times.user + times.system)


def parse_stat_ticks(text: str) -> int | None:
    """utime + stime (fields 14 and 15 of proc(5)); the command's name may hold spaces and parentheses."""
    fields = text.rpartition(")")[2].split()
    try:
        return int(fields[11]) + int(fields[12])
    except (IndexError, ValueError):
        return None


def choose_source(proc_root: Path = PROC) -> CpuSource:
    """The best source that can read this very process; a proc tree elsewhere is always read as files."""
    if proc_root != PROC:
        return ProcStat(proc_root)
    candidates: tuple[CpuSource, ...] = (KernelClock(), ProcStat()) if sys.platform == "linux" else ()
    for source in candidates:
        if source.seconds(os.getpid()) is not None:
            return source
    return Psutil()


class GroupClock:
    """Cumulative CPU seconds of groups of processes; owner of the last reading of each process.

    A group's sum starts at 0 when it is first seen. It never falls: a process that vanished keeps what it had
    used by the last read, and a process that joins a known group (a restarted engine) counts from its start.
    """

    def __init__(self, source: CpuSource) -> None:
        self._source = source
        self._last_s: dict[str, dict[int, float]] = {}
        self._total_s: dict[str, float] = {}

    def read(self, groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """Seconds by group; a group of which no process was ever readable is left out."""
        for name, pids in groups.items():
            self._advance(name, pids)
        return {name: self._total_s[name] for name in groups if name in self._total_s}

    def _advance(self, name: str, pids: Sequence[int]) -> None:
        seconds = self._source.seconds
        now = {pid: used_s for pid in pids if (used_s := seconds(pid)) is not None}
        if name not in self._total_s:
            if now:
                self._total_s[name], self._last_s[name] = 0.0, now
            return
        last = self._last_s[name]
        for pid, used_s in now.items():
            before_s = last.get(pid, 0.0)
            # Less than before: the number was given to a new process, whose whole time is new.
            self._total_s[name] += used_s - before_s if used_s >= before_s else used_s
        self._last_s[name] = now
