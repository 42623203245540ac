"""What the machine can give: cores, memory and GPUs, within the limits of the container we run in.

A container with two of 64 cores and 4 of 512 GB sees the whole machine in /proc. Affinity and the control
group's quota say what is ours, and the tighter one counts. Sampled once an adaptation tick, never a request.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Protocol

import msgspec

from calm.records import GpuState

_UNLIMITED_V1_BYTES = 1 << 60  # cgroup v1 writes a page-rounded 2^63 where there is no limit


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The machine at one moment."""

    cores: int
    cpu_load: float
    """0..1 of our cores."""
    memory_total_bytes: int
    memory_available_bytes: int
    gpus: tuple[GpuState, ...]


class Sensors(Protocol):
    """What the loop samples once a tick."""

    def sample(self) -> Sample: ...


class ControlGroup:
    """Limits of the control group of this process and of all above it, version 2 or 1. Missing means none."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._mount = root / "sys/fs/cgroup"
        self._paths = group_paths(_read(root / "proc/self/cgroup") or "")

    def cpu_cores(self) -> float | None:
        """CPU quota in cores: the smallest of the chain."""
        quotas = [quota_v2(_read(folder / "cpu.max")) for folder in self._chain("")]
        quotas += [
            quota_v1(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))
            for folder in self._chain("cpu", "cpu,cpuacct")
        ]
        return min((quota for quota in quotas if quota is not None), default=None)

    def memory(self) -> tuple[int, int] | None:
        """(limit, bytes still free under it) of the group with the least left; None without a limit."""
        found = [
            room(folder, "memory.max", "memory.current", "inactive_file") for folder in self._chain("")
        ] + [
            room(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            for folder in self._chain("memory")
        ]
        return min((entry for entry in found if entry is not None), key=lambda entry: entry[1], default=None)

    def _chain(self, *controllers: str) -> list[Path]:
        """Folders of our group and its ancestors. In a container the path may be the host's while the mount
        shows our own root: then only the root exists, and it is ours."""
        folders: list[Path] = []
        for controller in controllers:
            base = self._mount / controller if controller else self._mount
            path = PurePosixPath(self._paths.get(controller, "/"))
            relatives = [path.relative_to("/"), *(parent.relative_to("/") for parent in path.parents)]
            folders += [base / relative for relative in dict.fromkeys(relatives)]
        return folders


class Resources:
    """Samples the machine. The first CPU figure covers the time since this object was made."""

    def __init__(self, group: ControlGroup | None = None) -> None:
        import psutil

        self._psutil = psutil
        self._group = group or ControlGroup()
        self._gpus = open_gpus()
        psutil.cpu_percent(interval=None)

    def cores(self) -> int:
        """Whole cores we may use, at least 1: affinity, then the CPU quota rounded up."""
        return usable_cores(affinity(), self._group.cpu_cores())

    def sample(self) -> Sample:
        """One look: about 0.2 ms without GPUs."""
        memory = self._psutil.virtual_memory()
        total, available = within(int(memory.total), int(memory.available), self._group.memory())
        return Sample(
            cores=self.cores(),
            cpu_load=min(1.0, max(0.0, float(self._psutil.cpu_percent(interval=None)) / 100.0)),
            memory_total_bytes=total,
            memory_available_bytes=available,
            gpus=self._gpus(),
        )


def affinity() -> int:
    """CPUs the scheduler may put us on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_cores(allowed: int, quota: float | None) -> int:
    """A quota of 1.5 cores keeps two threads busy for three quarters of the time, so it rounds up."""
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota - 1e-6)))


def within(total: int, available: int, limit: tuple[int, int] | None) -> tuple[int, int]:
    """(total, available) of the machine, cut to the group's (limit, free)."""
    if limit is None:
        return total, available
    return min(total, limit[0]), max(0, min(available, limit[1]))


def group_paths(text: str) -> dict[str, str]:
    """/proc/self/cgroup: controller -> path; the unified hierarchy (v2) under ''."""
    paths: dict[str, str] = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if separator and path.startswith("/"):
            for controller in [controllers, *controllers.split(",")]:
                paths[controller] = path
    return paths


def quota_v2(text: str | None) -> float | None:
    """cpu.max: `max 100000` or `150000 100000`."""
    parts = (text or "").split()
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or int(parts[1]) == 0:
        return None
    return int(parts[0]) / int(parts[1]) or None


def quota_v1(quota: str | None, period: str | None) -> float | None:
    """cpu.cfs_quota_us is -1 without a limit."""
    cores = quota_v2(f"{(quota or '').strip()} {(period or '').strip()}")
    return cores if cores else None


def room(folder: Path, limit_file: str, usage_file: str, reclaimable: str) -> tuple[int, int] | None:
    """(limit, free) of one group. Cached file pages that the kernel would drop count as free."""
    limit, usage = _number(_read(folder / limit_file)), _number(_read(folder / usage_file))
    if limit is None or usage is None or limit >= _UNLIMITED_V1_BYTES:
        return None
    cached = _field(_read(folder / "memory.stat") or "", reclaimable)
    return limit, max(0, limit - usage + cached)


def open_gpus() -> Callable[[], tuple[GpuState, ...]]:
    """A reader of all NVIDIA GPUs; one that finds none where there is no driver."""
    try:
        import pynvml
    except ImportError:
        return _no_gpus
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return _no_gpus

    def read() -> tuple[GpuState, ...]:
        try:
            return tuple(_gpu(pynvml, handle) for handle in handles)
        except pynvml.NVMLError:  # a GPU fell off the bus or a driver is being replaced
            return ()

    return read


class _Memory(Protocol):
    total: int
    used: int


class _Utilisation(Protocol):
    gpu: int


class _Nvml(Protocol):
    NVMLError: type[Exception]

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> _Memory: ...  # noqa: N802

    def nvmlDeviceGetUtilizationRates(self, handle: object) -> _Utilisation: ...  # noqa: N802

    def nvmlDeviceGetName(self, handle: object) -> str | bytes: ...  # noqa: N802


def _gpu(nvml: _Nvml, handle: object) -> GpuState:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    name = nvml.nvmlDeviceGetName(handle)
    return GpuState(
        name=name.decode() if isinstance(name, bytes) else name,
        memory_total_bytes=int(memory.total),
        memory_used_bytes=int(memory.used),
        utilisation=_utilisation(nvml, handle),
    )


def _utilisation(nvml: _Nvml, handle: object) -> float:
    """0..1. A partitioned (MIG) GPU has no such figure, so the busy share reads 0 there."""
    try:
        return min(1.0, nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100.0)
    except nvml.NVMLError:
        return 0.0


def _no_gpus() -> tuple[GpuState, ...]:
    return ()


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _number(text: str | None) -> int | None:
    digits = (text or "").strip()
    return int(digits) if digits.isdigit() else None


def _field(text: str, name: str) -> int:
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return _number(value) or 0
    return 0
