"""Cores, memory, GPUs and energy meters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from calm.doctor.check import Check, fine, megabytes, poor
from calm.monitor.resources import ControlGroup, affinity, usable_cores
from calm.settings import Settings, budget_bytes

if TYPE_CHECKING:
    from calm.meters.choose import MeterProbe, MeterReport

PCI = Path("/sys/bus/pci/devices")
CPUINFO = Path("/proc/cpuinfo")
SMALL_BUDGET_BYTES = 256_000_000
"""Below this not even the smallest language model with its buffers fits."""


# --- cores and memory ---------------------------------------------------------------------------


def check_cores(settings: Settings, group: ControlGroup) -> Iterator[Check]:
    allowed, quota = affinity(), group.cpu_cores()
    usable = usable_cores(allowed, quota)
    limits = "" if quota is None else f", cgroup quota {quota:g}"
    found = f"{usable} usable of {os.cpu_count() or 1} (affinity {allowed}{limits})"
    yield judged_cores(found, usable, settings.scheduling.cores)


def judged_cores(found: str, usable: int, chosen: int | None) -> Check:
    if chosen is None:
        return fine("cores", found)
    found = f"{found}; scheduling.cores is {chosen}"
    if chosen <= usable:
        return fine("cores", found)
    fix = f"set scheduling.cores to {usable} or less: more threads than cores run several times slower"
    return poor("cores", found, fix)


def check_memory(settings: Settings, group: ControlGroup) -> Iterator[Check]:
    import psutil

    memory = psutil.virtual_memory()
    budget = budget_bytes(settings)
    limit = group.memory()
    found = (
        f"{megabytes(memory.available)} free of {megabytes(memory.total)}; "
        f"models may take {megabytes(budget)} (memory.budget = {settings.memory.budget})"
    )
    yield judged_budget(found, budget, memory.available, limit[1] if limit else None)


def judged_budget(found: str, budget: int, available: int, group_available: int | None) -> Check:
    """`group_available`: bytes left under the control group's limit, None without one."""
    if group_available is not None and budget > group_available:
        found = f"{found}; the control group leaves {megabytes(group_available)}"
        return poor("memory", found, "lower memory.budget, or raise the container's memory limit")
    if budget > available:
        return poor("memory", found, "lower memory.budget, or end other programs: this much is not free now")
    if budget < SMALL_BUDGET_BYTES:
        return poor("memory", found, "free memory or raise memory.budget: hardly a model fits")
    return fine("memory", found)


# --- GPUs ---------------------------------------------------------------------------------------


def check_gpus(pci: Path = PCI) -> Iterator[Check]:
    names, trouble = nvidia_gpus()
    if names:
        yield fine("GPUs", "; ".join(names))
    elif has_nvidia(pci):
        fix = "install the NVIDIA driver; in a container: --gpus all"
        yield poor("GPUs", f"an NVIDIA GPU that cannot be used: {trouble}", fix)
    else:
        yield fine("GPUs", "none found; models run on the CPU")


def nvidia_gpus() -> tuple[list[str], str]:
    """What NVML sees, and why it sees nothing."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
        return [describe_gpu(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)], ""
    except pynvml.NVMLError as error:
        return [], str(error)


def has_nvidia(pci: Path = PCI) -> bool:
    """True when the bus has a display device (class 03) of NVIDIA (vendor 10de), driver or not."""
    return any(
        read(device / "vendor") == "0x10de" and read(device / "class").startswith("0x03")
        for device in pci.glob("*")
    )


def read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def describe_gpu(handle: object) -> str:
    import pynvml

    name = pynvml.nvmlDeviceGetName(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return f"{name}, {megabytes(memory.free)} free of {megabytes(memory.total)}"


# --- energy -------------------------------------------------------------------------------------


def check_meters(settings: Settings, pci: Path = PCI) -> Iterator[Check]:
    from calm.meters.choose import MeterSettings, probe

    energy = settings.energy
    report = probe(MeterSettings(meter=energy.meter, watts_per_core=energy.watts_per_core))
    yield from judged_meters(report, has_gpu=has_nvidia(pci))


def judged_meters(report: MeterReport, *, has_gpu: bool) -> Iterator[Check]:
    """The meter in use, then the others looked for; a better one that could be had is a warning."""
    chosen = report.chosen
    absent = chosen.name == "absent"
    if absent:
        fix = "see the meters below; until then energy is unknown and no choice is made by it"
        yield poor("energy", "no meter: joules stay unknown", fix)
    else:
        reasons = "; ".join(meter.reason for meter in report.found if meter.available)
        yield fine("energy", f"uses {chosen.name} ({chosen.kind}): {reasons}")
    for meter in report.found:
        if not meter.available:
            wanted = has_gpu if meter.name == "nvml" else absent or chosen.kind == "modelled"
            yield unavailable(meter, wanted=wanted)


def unavailable(meter: MeterProbe, *, wanted: bool) -> Check:
    name, why = f"meter {meter.name}", f"not available: {meter.reason}"
    return poor(name, why, meter.fix) if wanted and meter.fix is not None else fine(name, why)
