"""Picks the machine's meter at start, and tells `calm doctor` what was found, what is missing and the fix.

Preference, by how much of the figure is measured: NVML for the GPUs plus the best meter for the CPU part
(RAPL by powercap, RAPL by perf, CPU-time model); without GPUs the CPU part alone; else absent.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal

from calm.clock import SystemClock
from calm.errors import BadInput
from calm.meters.absent import AbsentMeter
from calm.meters.composite import CompositeMeter
from calm.meters.cpu_time import CpuTimeMeter
from calm.meters.nvml import NvmlMeter, open_gpus
from calm.meters.perf_energy import PerfEnergy
from calm.meters.powercap import SYS, MeterUnavailable, Powercap
from calm.meters.processes import PROC, CpuSource, choose_source
from calm.meters.rapl import EnergyCounter, ProcBusy, RaplMeter
from calm.meters.tdp import power_figure
from calm.ports import Clock, Meter
from calm.records import Record, Strict

MeterChoice = Literal["auto", "nvml", "rapl", "cpu-time", "absent"]


class MeterSettings(Strict, frozen=True, kw_only=True):
    """What the operator may say about energy."""

    meter: MeterChoice = "auto"
    """auto: the best one found. Naming one makes its absence an error instead of a silent fallback."""
    watts_per_core: float | None = None
    """Watts of one busy logical CPU, for the CPU-time model; None: from the table of processors."""


class MeterProbe(Record, frozen=True, kw_only=True):
    """One meter that was looked for. `reason` says what was found or why not, `fix` what would change it."""

    name: str
    available: bool
    reason: str
    fix: str | None = None


class MeterReport:
    """The meter to use, and every one that was looked for."""

    def __init__(self, chosen: Meter, found: tuple[MeterProbe, ...]) -> None:
        self.chosen = chosen
        self.found = found


class Probes:
    """The meters built so far and the report about each."""

    def __init__(self) -> None:
        self.found: list[MeterProbe] = []

    def attempt(self, name: str, build: Callable[[], tuple[Meter, str]]) -> Meter | None:
        try:
            meter, reason = build()
        except MeterUnavailable as error:
            self.found.append(MeterProbe(name=name, available=False, reason=error.message, fix=error.fix))
            return None
        self.found.append(MeterProbe(name=name, available=True, reason=reason))
        return meter


def probe(
    settings: MeterSettings,
    *,
    clock: Clock | None = None,
    proc_root: Path = PROC,
    sys_root: Path = SYS,
    nvml: ModuleType | None = None,
) -> MeterReport:
    """Looks for every meter. Raises BadInput when the operator named one that is not to be had."""
    probes, source = Probes(), choose_source(proc_root)
    gpu = probes.attempt("nvml", lambda: build_nvml(clock or SystemClock(), nvml))
    rapl = probes.attempt("rapl-powercap", lambda: build_powercap(source, proc_root, sys_root))
    if rapl is None:
        rapl = probes.attempt("rapl-perf", lambda: build_perf(source, proc_root, sys_root))
    model = probes.attempt("cpu-time", lambda: build_cpu_time(source, settings.watts_per_core, proc_root))
    return MeterReport(choose(settings.meter, gpu, rapl, model, probes.found), tuple(probes.found))


def choose(
    wanted: MeterChoice, gpu: Meter | None, rapl: Meter | None, model: Meter | None, found: list[MeterProbe]
) -> Meter:
    """The numbered preference:

    1. absent when asked for; 2. the CPU part alone (rapl, cpu-time) when asked for; 3. GPU and CPU part;
    4. whichever of the two there is; 5. absent.
    """
    if wanted == "absent":
        return AbsentMeter()
    named = {"nvml": gpu, "rapl": rapl, "cpu-time": model}
    if wanted != "auto" and named[wanted] is None:
        raise missing(wanted, found)
    cpu = {"rapl": rapl, "cpu-time": model}.get(wanted, rapl or model)
    parts = [part for part in (gpu if wanted in ("auto", "nvml") else None, cpu) if part is not None]
    if not parts:
        return AbsentMeter()
    return parts[0] if len(parts) == 1 else CompositeMeter(parts)


def missing(wanted: str, found: list[MeterProbe]) -> BadInput:
    reports = [item for item in found if item.name.startswith(wanted) and not item.available]
    why = "; ".join(
        f"{item.name}: {item.reason}" + (f" ({item.fix})" if item.fix else "") for item in reports
    )
    return BadInput(f"the energy meter {wanted!r} is not available here. {why}", field="energy.meter")


def build_nvml(clock: Clock, nvml: ModuleType | None) -> tuple[Meter, str]:
    gpus = open_gpus(nvml)
    counters = sum(gpu.has_counter for gpu in gpus)
    reason = f"{len(gpus)} GPU(s), {counters} with an energy counter, the others by integrating power"
    return NvmlMeter(gpus, clock), reason


def build_powercap(source: CpuSource, proc_root: Path, sys_root: Path) -> tuple[Meter, str]:
    counter = Powercap(sys_root)
    return build_rapl(counter, source, proc_root), f"zones {', '.join(counter.labels)}"


def build_perf(source: CpuSource, proc_root: Path, sys_root: Path) -> tuple[Meter, str]:
    return build_rapl(PerfEnergy(sys_root), source, proc_root), "power/energy-pkg/ of perf"


def build_rapl(counter: EnergyCounter, source: CpuSource, proc_root: Path) -> Meter:
    return RaplMeter(counter, source, ProcBusy(proc_root, 1.0 / os.sysconf("SC_CLK_TCK")))


def build_cpu_time(source: CpuSource, watts: float | None, proc_root: Path) -> tuple[Meter, str]:
    figure = power_figure(watts, proc_root)
    try:
        meter = CpuTimeMeter(source, figure.watts_per_core)
    except ValueError as error:
        raise BadInput(str(error), field="energy.watts_per_core") from error
    return (
        meter,
        f"{figure.watts_per_core:.2f} W per busy logical CPU, {figure.source}; time by {source.name}",
    )
