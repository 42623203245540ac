"""RAPL through perf events (`power/energy-pkg/`): the second way, where powercap cannot be read.

Needs x86-64 and kernel.perf_event_paranoid <= 0, CAP_PERFMON or root. The counters are 64 bits wide and do
not wrap. See perf_event_open(2) and the kernel's arch/x86/events/rapl.c; units and CPUs are read from sysfs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Callable
from pathlib import Path

from calm.meters.powercap import SYS, MeterUnavailable, read_text

SYS_PERF_EVENT_OPEN_X86_64 = 298
PERF_FLAG_FD_CLOEXEC = 8
ATTR_SIZE_VER0 = 64
EVENTS = ("energy-pkg", "energy-ram")
FIX = "sudo sysctl kernel.perf_event_paranoid=0, or: sudo setcap cap_perfmon+ep on the Python that runs CALM"

Opener = Callable[[int, int, int], int]
"""(event type, config, cpu) -> file descriptor. Raises OSError."""


def perf_event_open(event_type: int, config: int, cpu: int) -> int:
    """A counting event on one CPU for all processes. Raises OSError, as perf_event_open(2) does."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        raise OSError(errno.ENOSYS, "perf energy events exist on x86-64 Linux only")
    attr = struct.pack("=IIQQQQQIIQ", event_type, ATTR_SIZE_VER0, config, 0, 0, 0, 0, 0, 0, 0)
    buffer = ctypes.create_string_buffer(attr, ATTR_SIZE_VER0)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(
        libc.syscall(
            ctypes.c_long(SYS_PERF_EVENT_OPEN_X86_64), buffer, ctypes.c_long(-1), ctypes.c_long(cpu),
            ctypes.c_long(-1), ctypes.c_ulong(PERF_FLAG_FD_CLOEXEC),
        )
    )  # fmt: skip
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd


def read_count(fd: int) -> int:
    (count,) = struct.unpack("=Q", os.read(fd, 8))
    return int(count)


class PerfEnergy:
    """Joules of all packages (and memory) since it was opened."""

    def __init__(
        self, sys_root: Path = SYS, opener: Opener = perf_event_open, read: Callable[[int], int] = read_count
    ) -> None:
        self._read = read
        self._events = open_events(sys_root / "bus" / "event_source" / "devices" / "power", opener)
        self._start_j = 0.0
        self._start_j = self.joules()

    def joules(self) -> float:
        return sum(self._read(fd) * scale_j for fd, scale_j in self._events) - self._start_j

    def close(self) -> None:
        for fd, _ in self._events:
            os.close(fd)
        self._events = ()


def open_events(device: Path, opener: Opener) -> tuple[tuple[int, float], ...]:
    """(descriptor, joules per count) for each event and package. Raises MeterUnavailable."""
    if not device.is_dir():
        raise MeterUnavailable(f"{device} does not exist: the kernel offers no RAPL perf events here")
    opened: list[tuple[int, float]] = []
    try:
        for event_type, config, cpu, scale_j in list_events(device):
            opened.append((opener(event_type, config, cpu), scale_j))
    except (OSError, ValueError) as error:
        for fd, _ in opened:
            os.close(fd)
        raise refused(error) from error
    if not opened:
        raise MeterUnavailable(f"{device} has no energy-pkg event")
    return tuple(opened)


def list_events(device: Path) -> list[tuple[int, int, int, float]]:
    """(type, config, cpu, joules per count) of every energy event. Raises ValueError."""
    event_type = int(read_text(device / "type") or "")
    cpus = parse_cpumask(read_text(device / "cpumask") or "0")
    found = []
    for name in EVENTS:
        path = device / "events" / name
        text, scale = read_text(path), read_text(path.with_name(name + ".scale"))
        if text and scale:
            found += [(event_type, parse_config(text), cpu, float(scale)) for cpu in cpus]
    return found


def refused(error: OSError | ValueError) -> MeterUnavailable:
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        return MeterUnavailable("no permission for perf's energy events", fix=FIX)
    return MeterUnavailable(f"perf's energy events do not open: {error}")


def parse_config(text: str) -> int:
    """`event=0x02` -> 2. Raises ValueError."""
    name, _, value = text.strip().partition("=")
    if name != "event":
        raise ValueError(f"unknown perf event format {text!r}")
    return int(value, 16)


def parse_cpumask(text: str) -> tuple[int, ...]:
    """`0,18` or `0-1` -> CPU numbers. Raises ValueError."""
    cpus: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return tuple(cpus)
