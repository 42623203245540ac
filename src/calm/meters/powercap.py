"""RAPL through /sys/class/powercap: the first choice, since it needs nothing but read permission.

Zones named package-N (and their `dram` child) are summed. `psys` covers the packages a second time,
`core` and `uncore` lie within them, and intel-rapl-mmio repeats them: those are left out. AMD's processors
appear under the same names. https://www.kernel.org/doc/html/latest/power/powercap/powercap.html
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from calm.errors import CalmError

SYS = Path("/sys")
FIX = (
    "let CALM's user read the counters: sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj "
    "/sys/class/powercap/intel-rapl:*:*/energy_uj (until the next boot; docs/howto/energy.md has a udev rule)"
)


class MeterUnavailable(CalmError):
    """A meter that this machine or this user cannot have; `fix` says what would change that."""

    code = "meter_unavailable"

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message)
        self.fix = fix


@dataclass
class Zone:
    """One counter of microjoules that wraps at `range_uj`; keeps its file open to read it in microseconds."""

    label: str
    fd: int
    range_uj: int | None
    last_uj: int = field(init=False)

    def __post_init__(self) -> None:
        self.last_uj = self._read_uj()

    def delta_uj(self) -> int:
        """Microjoules since the last call, over at most one wrap; 0 while the zone cannot be read."""
        try:
            now_uj = self._read_uj()
        except (OSError, ValueError):
            return 0
        before_uj, self.last_uj = self.last_uj, now_uj
        return unwrapped(before_uj, now_uj, self.range_uj)

    def _read_uj(self) -> int:
        return int(os.pread(self.fd, 32, 0))


def unwrapped(before_uj: int, now_uj: int, range_uj: int | None) -> int:
    """The step of a counter that starts again at 0 after `range_uj`; without a range a fall is a reset."""
    if now_uj >= before_uj:
        return now_uj - before_uj
    return now_uj - before_uj + range_uj if range_uj and range_uj >= before_uj else now_uj


class Powercap:
    """Joules of all package and memory zones since it was opened. Read it at least every few minutes:

    a 32-bit counter in 61 uJ steps wraps after 262 kJ, 17 minutes at 250 W.
    """

    def __init__(self, sys_root: Path = SYS) -> None:
        self._total_uj = 0
        self._zones = open_zones(sys_root)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(zone.label for zone in self._zones)

    def joules(self) -> float:
        self._total_uj += sum(zone.delta_uj() for zone in self._zones)
        return self._total_uj * 1e-6

    def close(self) -> None:
        for zone in self._zones:
            os.close(zone.fd)
        self._zones = ()


def open_zones(sys_root: Path) -> tuple[Zone, ...]:
    """Raises MeterUnavailable with the reason and the fix when no package can be read."""
    root = sys_root / "class" / "powercap"
    if not root.is_dir():
        raise MeterUnavailable(
            f"{root} does not exist: the kernel has no powercap driver, or this is a virtual machine",
            fix="on bare metal: sudo modprobe intel_rapl_msr; a virtual machine's host does not pass it on",
        )
    paths = [path for path in sorted(root.glob("intel-rapl:*")) if wanted(path)]
    if not any(path.name.count(":") == 1 for path in paths):
        raise MeterUnavailable(f"{root} has no RAPL package zone", fix="sudo modprobe intel_rapl_msr")
    zones: list[Zone] = []
    try:
        zones.extend(map(open_zone, paths))
    except OSError as error:
        for zone in zones:
            os.close(zone.fd)
        raise denied(error, str(getattr(error, "filename", None) or root)) from error
    return tuple(zones)


def denied(error: OSError, path: str) -> MeterUnavailable:
    if isinstance(error, PermissionError):
        return MeterUnavailable(f"no permission to read {path}", fix=FIX)
    return MeterUnavailable(f"cannot read {path}: {error.strerror}")


def wanted(path: Path) -> bool:
    """Packages at the top, memory one level down."""
    label = read_text(path / "name")
    depth = path.name.count(":")
    return label is not None and (
        (depth == 1 and label.startswith("package")) or (depth == 2 and label == "dram")
    )


def open_zone(path: Path) -> Zone:
    """Raises OSError when the counter cannot be read."""
    fd = os.open(path / "energy_uj", os.O_RDONLY | os.O_CLOEXEC)
    limit = read_text(path / "max_energy_range_uj")
    try:
        return Zone(
            label=f"{path.name} {read_text(path / 'name')}",
            fd=fd,
            range_uj=int(limit) if limit and limit.isdigit() else None,
        )
    except (OSError, ValueError) as error:
        os.close(fd)
        raise OSError(getattr(error, "errno", None) or 5, "not a counter", str(path / "energy_uj")) from error


def read_text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
