"""Cores, memory, GPUs and energy meters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from calm.doctor.check import Check, fine, megabytes, poor
from calm.settings import Settings, budget_bytes

if TYPE_CHECKING:
    from calm.meters.choose import MeterReport

CGROUP = Path("/sys/fs/cgroup")
CPUINFO = Path("/proc/cpuinfo")
SMALL_BUDGET_BYTES = 256_000_000
"""Below this not even the smallest language model with its buffers fits."""


# --- cores --------------------------------------------------------------------------------------


def check_cores(settings: Settings, cgroup: Path = CGROUP) -> Iterator[Check]:
    installed = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else installed
    quota = cpu_quota(cgroup)
    usable = usable_cores(allowed, quota)
    limits = "" if quota is None else f", cgroup quota {quota:g}"
    chosen = settings.scheduling.cores
    used = f"; scheduling.cores is {chosen}" if chosen is not None else ""
    found = f"{usable} usable of {installed} (affinity {allowed}{limits}){used}"
    if chosen is not None and chosen > usable:
        fix = f"set scheduling.cores to {usable} or less: more threads than cores run several times slower"
        yield poor("cores", found, fix)
    else:
        yield fine("cores", found)


def usable_cores(allowed: int, quota: float | None) -> int:
    """Whole cores; a quota below one still leaves one thread, which then is throttled."""
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def cpu_quota(cgroup: Path = CGROUP) -> float | None:
    """Cores' worth of time that a cgroup (v2, else v1) allows; None without a limit."""
    fields = words(cgroup / "cpu.max")
    if len(fields) == 2:
        return None if fields[0] == "max" else share(fields[0], fields[1])
    quota, period = words(cgroup / "cpu" / "cpu.cfs_quota_us"), words(cgroup / "cpu" / "cpu.cfs_period_us")
    return share(quota[0], period[0]) if quota and period else None


def words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError):
        return []


def share(quota: str, period: str) -> float | None:
    try:
        value = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return value if value > 0 else None


# --- memory -------------------------------------------------------------------------------------


def check_memory(settings: Settings, cgroup: Path = CGROUP) -> Iterator[Check]:
    import psutil

    memory = psutil.virtual_memory()
    budget = budget_bytes(settings)
    limit = memory_limit(cgroup)
    found = (
        f"{megabytes(memory.available)} free of {megabytes(memory.total)}; "
        f"models may take {megabytes(budget)} (memory.budget = {settings.memory.budget})"
    )
    yield judged_budget(found, budget, memory.available, limit)


def judged_budget(found: str, budget: int, available: int, limit: int | None) -> Check:
    if limit is not None and budget > limit:
        return poor("memory", f"{found}; the cgroup allows {megabytes(limit)} in all", "lower memory.budget")
    if budget > available:
        return poor("memory", found, "lower memory.budget, or end other programs: this much is not free now")
    if budget < SMALL_BUDGET_BYTES:
        return poor("memory", found, "free memory or raise memory.budget: hardly a model fits")
    return fine("memory", found)


def memory_limit(cgroup: Path = CGROUP) -> int | None:
    """Bytes that a cgroup allows; None without a limit (v1 writes a huge number for that)."""
    for path in (cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"):
        fields = words(path)
        if fields and fields[0].isdigit() and int(fields[0]) < 1 << 60:
            return int(fields[0])
    return None


# --- GPUs ---------------------------------------------------------------------------------------


def check_gpus() -> Iterator[Check]:
    import pynvml

    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
        names = [describe_gpu(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]
    except pynvml.NVMLError:
        names = []
    yield fine("GPUs", "; ".join(names) or "none found; models run on the CPU")


def describe_gpu(handle: object) -> str:
    import pynvml

    name = pynvml.nvmlDeviceGetName(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return f"{name}, {megabytes(memory.free)} free of {megabytes(memory.total)}"


# --- energy -------------------------------------------------------------------------------------


def check_meters(settings: Settings) -> Iterator[Check]:
    from calm.meters.choose import MeterSettings, probe

    energy = settings.energy
    report = probe(MeterSettings(meter=energy.meter, watts_per_core=energy.watts_per_core))
    yield from judged_meters(report)


def judged_meters(report: MeterReport) -> Iterator[Check]:
    """The meter in use, then the others looked for; a better one that could be had is a warning."""
    chosen = report.chosen
    if chosen.name == "absent":
        fix = "see the meters below; until then energy is unknown and no choice is made by it"
        yield poor("energy", "no meter: joules stay unknown", fix)
    else:
        reasons = "; ".join(meter.reason for meter in report.found if meter.available)
        yield fine("energy", f"uses {chosen.name} ({chosen.kind}): {reasons}")
    measured = chosen.name != "absent" and chosen.kind != "modelled"
    for meter in report.found:
        if meter.available:
            continue
        name, why = f"meter {meter.name}", f"not available: {meter.reason}"
        yield fine(name, why) if measured or meter.fix is None else poor(name, why, meter.fix)
