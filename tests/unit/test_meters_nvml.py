"""The GPU meter against a module that behaves like pynvml: counters, samples, and their absence."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import cast

import pytest

from calm.clock import ManualClock
from calm.meters.nvml import NvmlGpu, NvmlMeter, carried_weights, open_gpus
from calm.meters.powercap import MeterUnavailable


class FakeNvmlError(Exception):
    pass


class FakeNvml:
    """One GPU with the functions of pynvml that the meter uses."""

    NVMLError = FakeNvmlError

    def __init__(self) -> None:
        self.count = 1
        self.energy_mj: int | None = 0
        self.power_mw: int | None = 100_000
        self.samples: list[SimpleNamespace] | None = []
        self.running: list[int] | None = []
        self.installed = True

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.installed:
            raise FakeNvmlError("NVML Shared Library Not Found")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, _: int) -> int:  # noqa: N802
        return self.told(self.energy_mj)

    def nvmlDeviceGetPowerUsage(self, _: int) -> int:  # noqa: N802
        return self.told(self.power_mw)

    def nvmlDeviceGetProcessUtilization(self, _: int, since_us: int) -> list[SimpleNamespace]:  # noqa: N802
        if not self.samples:
            raise FakeNvmlError("Not Found")
        return [sample for sample in self.samples if sample.timeStamp > since_us]

    def nvmlDeviceGetComputeRunningProcesses(self, _: int) -> list[SimpleNamespace]:  # noqa: N802
        if self.running is None:
            raise FakeNvmlError("Not Supported")
        return [SimpleNamespace(pid=pid) for pid in self.running]

    def told(self, value: int | None) -> int:
        if value is None:
            raise FakeNvmlError("Not Supported")
        return value

    def sample(self, time_us: int, **sm_by_pid: int) -> None:
        assert self.samples is not None
        self.samples += [
            SimpleNamespace(pid=int(pid[1:]), timeStamp=time_us, smUtil=value)
            for pid, value in sm_by_pid.items()
        ]


def make_meter(nvml: FakeNvml) -> tuple[NvmlMeter, ManualClock]:
    clock = ManualClock(10.0)
    gpus = open_gpus(cast(ModuleType, nvml))
    return NvmlMeter(gpus, clock, min_interval_s=0.05), clock


GROUPS = {"a": (1, 2), "b": (3,), "cold": (4,)}


def test_energy_follows_the_share_of_sm_time() -> None:
    nvml = FakeNvml()
    nvml.energy_mj = 5_000
    meter, clock = make_meter(nvml)
    clock.advance(1.0)
    nvml.energy_mj = 15_000
    nvml.sample(100, p1=30, p2=10, p3=40, p9=20)  # 9 is not ours
    assert meter.read(GROUPS) == pytest.approx({"a": 4.0, "b": 4.0})
    clock.advance(1.0)
    nvml.energy_mj = 25_000
    nvml.sample(200, p3=50)
    assert meter.read(GROUPS) == pytest.approx({"a": 4.0, "b": 14.0})


def test_a_read_is_repeated_within_the_interval() -> None:
    nvml = FakeNvml()
    meter, clock = make_meter(nvml)
    nvml.running = [1]
    nvml.energy_mj = 1_000
    clock.advance(0.01)
    assert meter.read(GROUPS) == {}
    clock.advance(0.05)
    assert meter.read(GROUPS) == pytest.approx({"a": 1.0})


def test_without_samples_the_running_processes_share_alike() -> None:
    nvml = FakeNvml()
    meter, clock = make_meter(nvml)
    nvml.samples, nvml.running, nvml.energy_mj = None, [1, 3], 8_000
    clock.advance(1.0)
    assert meter.read(GROUPS) == pytest.approx({"a": 4.0, "b": 4.0})


def test_old_shares_hold_until_new_samples_come() -> None:
    assert carried_weights({1: 3.0, 2: 1.0}, [1, 7]) == {1: 3.0}
    assert carried_weights({2: 1.0}, [1, 7]) == {1: 1.0, 7: 1.0}
    assert carried_weights({1: 3.0}, []) == {}


def test_power_is_integrated_where_there_is_no_counter() -> None:
    nvml = FakeNvml()
    nvml.energy_mj, nvml.running = None, [1]
    meter, clock = make_meter(nvml)
    clock.advance(1.0)
    nvml.power_mw = 200_000
    assert meter.read(GROUPS) == pytest.approx({"a": 150.0})


def test_a_lost_gpu_keeps_what_was_counted() -> None:
    nvml = FakeNvml()
    nvml.running = [1]
    meter, clock = make_meter(nvml)
    clock.advance(1.0)
    nvml.energy_mj = 1_000
    meter.read(GROUPS)
    clock.advance(1.0)
    nvml.energy_mj = None
    assert meter.read(GROUPS) == pytest.approx({"a": 1.0})


def test_no_driver_or_no_gpu_says_why() -> None:
    nvml = FakeNvml()
    nvml.installed = False
    with pytest.raises(MeterUnavailable, match="Not Found") as caught:
        make_meter(nvml)
    assert "driver" in (caught.value.fix or "")
    nvml.installed, nvml.count = True, 0
    with pytest.raises(MeterUnavailable, match="no GPU"):
        make_meter(nvml)
    nvml.count, nvml.energy_mj, nvml.power_mw = 1, None, None
    with pytest.raises(MeterUnavailable, match="GPU 0"):
        make_meter(nvml)


def test_a_gpu_knows_whether_it_counts() -> None:
    nvml = FakeNvml()
    assert NvmlGpu(cast(ModuleType, nvml), 0).has_counter
    nvml.energy_mj = None
    assert not NvmlGpu(cast(ModuleType, nvml), 0).has_counter
