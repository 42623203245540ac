"""Joules of NVIDIA GPUs, shared out by each process's part of the streaming multiprocessors' time.

The energy of a GPU is its total energy counter (Volta and newer), else its power integrated over time. The
share of a process is its sum of SM-utilisation samples over all processes' sums; where a driver has no
samples (MIG, WSL, the first moments of a process) the GPU's running compute processes share alike. Counters
and samples are renewed every 20 to 200 ms, so a read repeats the last one for `min_interval_s`.

NVML names processes by their numbers on the host: inside a container with its own PID namespace no engine is
recognised, and its group is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Protocol

from calm.meters.powercap import MeterUnavailable
from calm.ports import Clock
from calm.records import MeterKind


class Gpu(Protocol):
    """One GPU."""

    def joules(self, now_s: float) -> float:
        """Since the driver was loaded or since the first call, monotone. Raises OSError when it is lost."""
        ...

    def weights(self) -> Mapping[int, float]:
        """Part of the work since the last call by process; the values need not sum to 1."""
        ...


class NvmlMeter:
    """Implements ports.Meter over all GPUs of the machine."""

    name = "nvml"
    kind: MeterKind = "attributed"

    def __init__(self, gpus: Sequence[Gpu], clock: Clock, *, min_interval_s: float = 0.05) -> None:
        self._clock = clock
        self._min_interval_s = min_interval_s
        self._read_at_s = clock.now()
        self._gpus = [(gpu, gpu.joules(self._read_at_s)) for gpu in gpus]
        self._total_j: dict[str, float] = {}

    def read(self, groups: Mapping[str, Sequence[int]]) -> Mapping[str, float]:
        now_s = self._clock.now()
        if now_s - self._read_at_s >= self._min_interval_s:
            self._read_at_s = now_s
            owner = {pid: name for name, pids in groups.items() for pid in pids}
            self._gpus = [(gpu, self._share_out(gpu, last_j, now_s, owner)) for gpu, last_j in self._gpus]
        return {name: self._total_j[name] for name in groups if name in self._total_j}

    def _share_out(self, gpu: Gpu, last_j: float, now_s: float, owner: Mapping[int, str]) -> float:
        """Credits one GPU's interval to the groups; returns the counter's new value."""
        try:
            now_j, weights = gpu.joules(now_s), gpu.weights()
        except OSError:
            return last_j
        delta_j, whole = max(0.0, now_j - last_j), sum(weights.values())
        for pid, weight in weights.items():
            name = owner.get(pid)
            if name is not None and whole > 0.0:
                self._total_j[name] = self._total_j.get(name, 0.0) + delta_j * weight / whole
        return now_j


class NvmlGpu:
    """One GPU through the `pynvml` module of nvidia-ml-py (or a module with the same functions)."""

    def __init__(self, nvml: ModuleType, index: int) -> None:
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
        self._seen_us = 0
        self._weights: dict[int, float] = {}
        self._integral_j = 0.0
        self._power: tuple[float, float] | None = None
        self.has_counter = self._probe_counter()

    def _probe_counter(self) -> bool:
        """Raises OSError when the GPU tells neither energy nor power."""
        try:
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError:
            self.joules_from_power(0.0)
            self._power = None
            return False
        return True

    def joules(self, now_s: float) -> float:
        if not self.has_counter:
            return self.joules_from_power(now_s)
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) * 1e-3
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    def joules_from_power(self, now_s: float) -> float:
        """Trapezoids between the power readings of the calls."""
        try:
            power_w = float(self._nvml.nvmlDeviceGetPowerUsage(self._handle)) * 1e-3
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error
        if self._power is not None:
            before_s, before_w = self._power
            self._integral_j += 0.5 * (power_w + before_w) * max(0.0, now_s - before_s)
        self._power = (now_s, power_w)
        return self._integral_j

    def weights(self) -> Mapping[int, float]:
        fresh = self._fresh_samples()
        self._weights = fresh or carried_weights(self._weights, self._running())
        return self._weights

    def _fresh_samples(self) -> dict[int, float]:
        try:
            samples = self._nvml.nvmlDeviceGetProcessUtilization(self._handle, self._seen_us)
        except self._nvml.NVMLError:
            return {}
        sums: dict[int, float] = {}
        for sample in samples:
            if sample.timeStamp > self._seen_us and sample.smUtil > 0:
                sums[sample.pid] = sums.get(sample.pid, 0.0) + float(sample.smUtil)
        self._seen_us = max([self._seen_us, *(int(sample.timeStamp) for sample in samples)])
        return sums

    def _running(self) -> tuple[int, ...]:
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._nvml.NVMLError:
            return ()
        return tuple(int(process.pid) for process in processes)


def carried_weights(before: Mapping[int, float], running: Sequence[int]) -> dict[int, float]:
    """Weights where no new sample came: as before for those still running; all alike if none was known."""
    kept = {pid: before[pid] for pid in running if pid in before}
    return kept or dict.fromkeys(running, 1.0)


def open_gpus(nvml: ModuleType | None = None) -> tuple[NvmlGpu, ...]:
    """Every GPU whose energy or power can be read. Raises MeterUnavailable with the reason."""
    nvml = nvml if nvml is not None else import_nvml()
    try:
        nvml.nvmlInit()
        count = int(nvml.nvmlDeviceGetCount())
    except nvml.NVMLError as error:
        raise MeterUnavailable(
            f"NVML does not start: {error}", fix="install the NVIDIA driver; in a container: --gpus all"
        ) from error
    gpus, reasons = [], []
    for index in range(count):
        try:
            gpus.append(NvmlGpu(nvml, index))
        except (nvml.NVMLError, OSError) as error:
            reasons.append(f"GPU {index}: {error}")
    if not gpus:
        raise MeterUnavailable("; ".join(reasons) or "NVML sees no GPU")
    return tuple(gpus)


def import_nvml() -> ModuleType:
    try:
        import pynvml
    except ImportError as error:
        raise MeterUnavailable(
            "the Python package nvidia-ml-py is missing", fix="pip install nvidia-ml-py"
        ) from error
    module: ModuleType = pynvml
    return module
