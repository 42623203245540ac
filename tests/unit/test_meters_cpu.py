"""CPU meters on fake proc and sys trees: units, wraps, shares, and reasons when something is missing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.meters.cpu_time import CpuTimeMeter
from calm.meters.perf_energy import PerfEnergy, parse_cpumask, perf_event_open, read_count
from calm.meters.powercap import MeterUnavailable, Powercap, unwrapped
from calm.meters.processes import (
    PROC,
    GroupClock,
    KernelClock,
    ProcStat,
    Psutil,
    choose_source,
    parse_stat_ticks,
)
from calm.meters.rapl import BusyShare, ProcBusy, RaplMeter, parse_busy_ticks
from calm.meters.tdp import DEFAULT_WATTS_PER_CORE, FAMILIES, match, name_from_cpuinfo, power_figure


class Seconds:
    """A CpuSource whose numbers a test sets."""

    name = "set by hand"

    def __init__(self, **by_pid: float) -> None:
        self.by_pid = {int(pid[1:]): used for pid, used in by_pid.items()}

    def seconds(self, pid: int) -> float | None:
        return self.by_pid.get(pid)


# --- process CPU time ---


def write_stat(root: Path, pid: int, utime: int, stime: int, name: str = "llama (x) server") -> None:
    folder = root / str(pid)
    folder.mkdir(parents=True, exist_ok=True)
    fields = ["S", "1", "1", "1", "0", "-1", "0", "0", "0", "0", "0", str(utime), str(stime), "99", "99"]
    (folder / "stat").write_text(f"{pid} ({name}) {' '.join(fields)}\n")


def test_stat_is_read_past_a_name_with_parentheses(tmp_path: Path) -> None:
    write_stat(tmp_path, 7, 250, 50, name="a) b (c")
    assert ProcStat(tmp_path, tick_s=0.01).seconds(7) == pytest.approx(3.0)
    assert ProcStat(tmp_path, tick_s=0.01).seconds(8) is None
    assert parse_stat_ticks("7 (x) S 1") is None


@pytest.mark.skipif(sys.platform != "linux", reason="Linux clocks")
def test_all_sources_agree_on_a_real_process() -> None:
    loop = "while True:\n    pass"
    process = subprocess.Popen([sys.executable, "-c", loop])
    try:
        sources = (KernelClock(), ProcStat(), Psutil())
        while (KernelClock().seconds(process.pid) or 0.0) < 0.3:
            pass
        process.send_signal(19)  # SIGSTOP: the clock stands still while the three are compared
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        values = [source.seconds(process.pid) for source in sources]
        assert all(value == pytest.approx(values[0], abs=0.05) for value in values)
    finally:
        process.kill()
        process.wait()
    assert [source.seconds(process.pid) for source in sources] == [None, None, None]


def test_nobody_is_mistaken_for_this_process() -> None:
    assert KernelClock().seconds(0) is None
    assert KernelClock().seconds(-1) is None


def test_a_proc_tree_elsewhere_is_read_as_files(tmp_path: Path) -> None:
    assert isinstance(choose_source(tmp_path), ProcStat)
    assert choose_source(PROC).seconds(os.getpid()) is not None


def test_group_counts_from_its_first_sight() -> None:
    source = Seconds(p1=100.0, p2=50.0)
    clock = GroupClock(source)
    assert clock.read({"a": (1, 2)}) == {"a": 0.0}
    source.by_pid |= {1: 101.0, 2: 50.5}
    assert clock.read({"a": (1, 2)}) == {"a": 1.5}


def test_vanished_and_restarted_processes_never_take_back() -> None:
    source = Seconds(p1=10.0)
    clock = GroupClock(source)
    clock.read({"a": (1,)})
    source.by_pid[1] = 12.0
    clock.read({"a": (1,)})
    del source.by_pid[1]
    assert clock.read({"a": (1,)}) == {"a": 2.0}
    assert clock.read({"a": ()}) == {"a": 2.0}
    source.by_pid[2] = 0.5
    assert clock.read({"a": (2,)}) == {"a": 2.5}
    source.by_pid[2] = 0.1  # the number went to a new process
    assert clock.read({"a": (2,)}) == {"a": 2.6}


def test_unseen_groups_are_left_out() -> None:
    meter = CpuTimeMeter(Seconds(p1=1.0), 10.0)
    assert set(meter.read({"a": (1,), "gone": (9,), "remote": ()})) == {"a"}


def test_cpu_time_times_watts() -> None:
    source = Seconds(p1=1.0)
    meter = CpuTimeMeter(source, 10.0)
    meter.read({"a": (1,)})
    source.by_pid[1] = 1.5
    assert meter.read({"a": (1,)}) == {"a": 5.0}
    assert meter.kind == "modelled"


@pytest.mark.parametrize("watts", [0.0, -3.0, float("nan"), 1e6])
def test_absurd_watts_are_refused(watts: float) -> None:
    with pytest.raises(ValueError, match="watts_per_core"):
        CpuTimeMeter(Seconds(), watts)


# --- RAPL through powercap ---


def write_zone(root: Path, name: str, label: str, energy_uj: int, range_uj: int = 1_000_000) -> Path:
    zone = root / "class" / "powercap" / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "name").write_text(f"{label}\n")
    (zone / "energy_uj").write_text(f"{energy_uj}\n")
    (zone / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return zone / "energy_uj"


def test_packages_and_memory_are_summed_and_nothing_twice(tmp_path: Path) -> None:
    counted = [
        write_zone(tmp_path, "intel-rapl:0", "package-0", 0),
        write_zone(tmp_path, "intel-rapl:1", "package-1", 0),
        write_zone(tmp_path, "intel-rapl:0:1", "dram", 0),
    ]
    twice = [
        write_zone(tmp_path, "intel-rapl:2", "psys", 0),
        write_zone(tmp_path, "intel-rapl:0:0", "core", 0),
        write_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    counter = Powercap(tmp_path)
    for path in (*counted, *twice):
        path.write_text("500000\n")
    assert counter.joules() == pytest.approx(1.5)
    assert counter.joules() == pytest.approx(1.5)
    counter.close()


def test_a_counter_wraps_at_its_range(tmp_path: Path) -> None:
    path = write_zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    counter = Powercap(tmp_path)
    path.write_text("100000\n")
    assert counter.joules() == pytest.approx(0.2)
    counter.close()


@given(st.lists(st.integers(0, 999), max_size=50), st.integers(0, 999))
def test_wraps_never_lose_energy(steps: list[int], start: int) -> None:
    position, seen, total = start, start, 0
    for step in steps:
        position += step
        total += unwrapped(seen, position % 1000, 1000)
        seen = position % 1000
    assert total == sum(steps)


def test_a_counter_without_range_is_reset_not_negative() -> None:
    assert unwrapped(900, 100, None) == 100


def test_a_zone_that_turns_unreadable_keeps_its_sum(tmp_path: Path) -> None:
    path = write_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    counter = Powercap(tmp_path)
    path.write_text("500000\n")
    counter.joules()
    path.write_text("")
    assert counter.joules() == pytest.approx(0.5)
    counter.close()


def test_missing_powercap_says_why(tmp_path: Path) -> None:
    with pytest.raises(MeterUnavailable, match="virtual machine") as caught:
        Powercap(tmp_path)
    assert caught.value.fix is not None
    write_zone(tmp_path, "dtpm", "dtpm", 0)
    with pytest.raises(MeterUnavailable, match="no RAPL package zone"):
        Powercap(tmp_path)


def test_missing_permission_tells_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zone(tmp_path, "intel-rapl:0", "package-0", 0)

    def denied(path: object, *_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("calm.meters.powercap.os.open", denied)
    with pytest.raises(MeterUnavailable, match=r"no permission to read .*energy_uj") as caught:
        Powercap(tmp_path)
    assert caught.value.fix is not None
    assert "chmod" in caught.value.fix


# --- RAPL through perf ---


def write_pmu(root: Path) -> None:
    device = root / "bus" / "event_source" / "devices" / "power"
    (device / "events").mkdir(parents=True)
    (device / "type").write_text("23\n")
    (device / "cpumask").write_text("0,18\n")
    for name, config in (("energy-pkg", "event=0x02"), ("energy-ram", "event=0x03")):
        (device / "events" / name).write_text(config + "\n")
        (device / "events" / f"{name}.scale").write_text("0.5\n")


def test_perf_events_are_opened_for_each_package_and_scaled(tmp_path: Path) -> None:
    write_pmu(tmp_path)
    opened: list[tuple[int, int, int]] = []
    counts: dict[int, int] = {}

    def opener(event_type: int, config: int, cpu: int) -> int:
        opened.append((event_type, config, cpu))
        fd = os.open("/dev/null", os.O_RDONLY)
        counts[fd] = 1000
        return fd

    counter = PerfEnergy(tmp_path, opener, counts.__getitem__)
    assert opened == [(23, 2, 0), (23, 2, 18), (23, 3, 0), (23, 3, 18)]
    assert counter.joules() == 0.0
    for fd in counts:
        counts[fd] += 4
    assert counter.joules() == pytest.approx(8.0)
    counter.close()


def refusing(number: int) -> Callable[[int, int, int], int]:
    def opener(*_: int) -> int:
        raise OSError(number, os.strerror(number))

    return opener


def test_perf_without_permission_tells_the_fix(tmp_path: Path) -> None:
    with pytest.raises(MeterUnavailable, match="does not exist"):
        PerfEnergy(tmp_path)
    write_pmu(tmp_path)
    with pytest.raises(MeterUnavailable, match="no permission") as caught:
        PerfEnergy(tmp_path, refusing(errno.EACCES))
    assert "perf_event_paranoid" in (caught.value.fix or "")
    with pytest.raises(MeterUnavailable, match="do not open"):
        PerfEnergy(tmp_path, refusing(errno.ENODEV))


def test_the_system_call_itself_counts() -> None:
    """On the software clock event (type 1, config 0), which every kernel has."""
    try:
        fd = perf_event_open(1, 0, 0)
    except OSError as error:
        pytest.skip(f"perf events are not allowed here: {error}")
    try:
        before = read_count(fd)
        sum(range(200_000))
        assert read_count(fd) > before
    finally:
        os.close(fd)


@pytest.mark.parametrize(("text", "cpus"), [("0", (0,)), ("0,18", (0, 18)), ("0-2,5", (0, 1, 2, 5))])
def test_cpumasks(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpumask(text) == cpus


# --- attribution of package joules ---


class Package:
    def __init__(self) -> None:
        self.now_j = 1000.0

    def joules(self) -> float:
        return self.now_j


def test_package_joules_follow_the_share_of_busy_time() -> None:
    package, source, busy = Package(), Seconds(p1=0.0, p2=0.0), [0.0]
    meter = RaplMeter(package, source, lambda: busy[0])
    groups = {"a": (1,), "b": (2,)}
    assert meter.read(groups) == {"a": 0.0, "b": 0.0}
    package.now_j, busy[0] = 1100.0, 10.0
    source.by_pid |= {1: 5.0, 2: 2.0}  # the other three seconds are somebody else's
    assert meter.read(groups) == pytest.approx({"a": 50.0, "b": 20.0})


def test_groups_never_get_more_than_the_package_used() -> None:
    package, source = Package(), Seconds(p1=0.0)
    meter = RaplMeter(package, source, lambda: 0.0)  # busy time too coarse to have moved
    meter.read({"a": (1,)})
    package.now_j, source.by_pid[1] = 1004.0, 0.004
    assert meter.read({"a": (1,)}) == pytest.approx({"a": 4.0})


@given(st.lists(st.tuples(st.floats(0.0, 0.1), st.floats(0.0, 0.1)), min_size=1, max_size=60))
def test_many_short_intervals_weigh_like_one_long(intervals: list[tuple[float, float]]) -> None:
    """Busy time in 10 ms ticks, groups exact: the sum of the intervals stays within one tick per CPU."""
    groups_s = others_s = used_s = 0.0
    ticked = [0.0]
    share = BusyShare(lambda: ticked[0])
    for group, other in intervals:
        groups_s, others_s = groups_s + group, others_s + other
        ticked[0] = int((groups_s + others_s) * 100) / 100
        interval = share.interval_s(group)
        assert interval >= group
        used_s += interval
    assert used_s == pytest.approx(groups_s + others_s, abs=0.12)


def test_busy_ticks_leave_out_idle_and_steal(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  100 1 20 9999 50 3 4 777 60 0\ncpu0 1 1 1 1\n")
    assert parse_busy_ticks("cpu  100 1 20 9999 50 3 4 777 60 0") == 128
    busy = ProcBusy(tmp_path, 0.01)
    assert busy() == pytest.approx(1.28)
    (tmp_path / "stat").write_text("nonsense\n")
    assert busy() == pytest.approx(1.28)


# --- watts per core ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AMD EPYC 7763 64-Core Processor", "EPYC 7763"),
        ("AMD EPYC 7B12", "EPYC 7742"),
        ("AMD EPYC 7R13 Processor", "EPYC 7763"),
        ("AMD EPYC 9654 96-Core Processor", "EPYC 9654"),
        ("AMD EPYC 9R14", "EPYC 9654"),
        ("AMD EPYC 9754 128-Core Processor", "EPYC 9754"),
        ("AMD EPYC 9755 128-Core Processor", "EPYC 9755"),
        ("AMD EPYC-Rome Processor", "EPYC 7742"),
        ("Intel(R) Xeon(R) Platinum 8175M CPU @ 2.50GHz", "Platinum 8180"),
        ("Intel(R) Xeon(R) Platinum 8275CL CPU @ 3.00GHz", "Platinum 8280"),
        ("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", "Platinum 8380"),
        ("Intel(R) Xeon(R) Platinum 8488C", "Platinum 8480+"),
        ("INTEL(R) XEON(R) PLATINUM 8581C CPU @ 2.30GHz", "Platinum 8592+"),
        ("Intel(R) Xeon(R) 6975P-C", "Xeon 6980P"),
        ("Intel(R) Xeon(R) CPU E5-2686 v4 @ 2.30GHz", "E5-2680 v4"),
        ("Intel(R) Xeon(R) CPU E5-2620 v3 @ 2.40GHz", "E5-2680 v3"),
        ("Intel Xeon Processor (Icelake)", "Platinum 8380"),
        ("Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz", "i7-8700K"),
        ("Intel(R) Core(TM) i7-8565U CPU @ 1.80GHz", "i7-8565U"),
        ("11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz", "i7-1260P"),
        ("12th Gen Intel(R) Core(TM) i7-1260P", "i7-1260P"),
        ("12th Gen Intel(R) Core(TM) i9-12900K", "i9-12900K"),
        ("13th Gen Intel(R) Core(TM) i9-13900K", "i9-13900K"),
        ("Intel(R) Core(TM) Ultra 7 155H", "Ultra 7 155H"),
        ("Intel(R) N100", "N100"),
        ("AMD Ryzen 7 7840U w/ Radeon 780M Graphics", "7840U"),
        ("AMD Ryzen 9 7950X 16-Core Processor", "7950X"),
        ("AMD Ryzen 5 5600X 6-Core Processor", "5600X"),
        ("AMD Ryzen Threadripper 1950X 16-Core Processor", "Threadripper"),
        ("Apple M1 Pro", "Apple"),
        ("Neoverse-N1", "Altra"),
        ("Neoverse-V1", "Altra"),
        ("Neoverse-V2", "Grace"),
        ("Raspberry Pi 4 Model B Rev 1.4", "Pi 4 B"),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "Pi 3 B"),
    ],
)
def test_processors_are_recognised(name: str, expected: str) -> None:
    family = match(name)
    assert family is not None
    assert expected in family.source


def test_every_row_is_plausible() -> None:
    for family in FAMILIES:
        assert 0.5 < family.watts_per_core < 10.0, family
        assert family.source


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model name": "AMD EPYC 7763 64-Core Processor"}, "AMD EPYC 7763 64-Core Processor"),
        (
            {
                "vendor_id": "GenuineIntel", "cpu family": "6", "model": "143",
                "model name": "Intel(R) Xeon(R) Processor",
            },
            "Intel Xeon (SapphireRapids)",
        ),
        (
            {"vendor_id": "GenuineIntel", "model name": "Intel(R) Xeon(R) CPU @ 2.20GHz"},
            "Intel(R) Xeon(R) CPU @ 2.20GHz",
        ),
        ({"CPU implementer": "0x41", "CPU part": "0xd0c"}, "Neoverse-N1"),
        ({"CPU part": "0xd08", "Model": "Raspberry Pi 4 Model B Rev 1.4"}, "Raspberry Pi 4 Model B Rev 1.4"),
        ({}, ""),
    ],
)  # fmt: skip
def test_names_from_cpuinfo(fields: Mapping[str, str], expected: str) -> None:
    text = "".join(f"{key}\t: {value}\n" for key, value in fields.items())
    assert name_from_cpuinfo(text) == expected


def test_the_operator_knows_best(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name : AMD EPYC 7763 64-Core Processor\n")
    assert power_figure(4.5, tmp_path).watts_per_core == 4.5
    assert power_figure(None, tmp_path).watts_per_core == pytest.approx(280 / 128)
    (tmp_path / "cpuinfo").write_text("model name : Abacus\n")
    figure = power_figure(None, tmp_path)
    assert figure.watts_per_core == DEFAULT_WATTS_PER_CORE
    assert "Abacus" in figure.source
