"""Which meter a machine gets, and what `calm doctor` is told about the others."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import cast

import pytest

from calm.clock import ManualClock
from calm.errors import BadInput
from calm.meters.choose import MeterReport, MeterSettings, probe
from calm.meters.composite import CompositeMeter


class NoGpu:
    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None:  # noqa: N802
        raise self.NVMLError("NVML Shared Library Not Found")


class OneGpu(NoGpu):
    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, _: int) -> int:  # noqa: N802
        return 0


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    (proc).mkdir()
    sys.mkdir()
    (proc / "stat").write_text("cpu 1 1 1 1 1 1 1 1 1 1\n")
    (proc / "cpuinfo").write_text("model name : AMD EPYC 7763 64-Core Processor\n")
    return proc, sys


def add_rapl(sys: Path) -> None:
    zone = sys / "class" / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    for name, text in (("name", "package-0"), ("energy_uj", "0"), ("max_energy_range_uj", "262143328850")):
        (zone / name).write_text(text + "\n")


def look(roots: tuple[Path, Path], nvml: object, settings: MeterSettings | None = None) -> MeterReport:
    return probe(
        settings or MeterSettings(),
        clock=ManualClock(),
        proc_root=roots[0],
        sys_root=roots[1],
        nvml=cast(ModuleType, nvml),
    )


def test_without_anything_the_cpu_model_is_left(roots: tuple[Path, Path]) -> None:
    report = look(roots, NoGpu())
    assert (report.chosen.name, report.chosen.kind) == ("cpu-time", "modelled")
    found = {item.name: item for item in report.found}
    assert {name: item.available for name, item in found.items()} == {
        "nvml": False,
        "rapl-powercap": False,
        "rapl-perf": False,
        "cpu-time": True,
    }
    assert all(item.reason for item in report.found)
    assert found["nvml"].fix is not None
    assert "2.19 W" in found["cpu-time"].reason
    assert "EPYC 7763" in found["cpu-time"].reason


def test_rapl_is_preferred_to_the_model(roots: tuple[Path, Path]) -> None:
    add_rapl(roots[1])
    report = look(roots, NoGpu())
    assert (report.chosen.name, report.chosen.kind) == ("rapl", "attributed")


def test_gpu_and_cpu_parts_are_summed_under_both_names(roots: tuple[Path, Path]) -> None:
    assert look(roots, OneGpu()).chosen.name == "nvml+cpu-time"
    assert look(roots, OneGpu()).chosen.kind == "modelled"
    add_rapl(roots[1])
    report = look(roots, OneGpu())
    assert (report.chosen.name, report.chosen.kind) == ("nvml+rapl", "attributed")


@pytest.mark.parametrize(
    ("wanted", "name"),
    [("absent", "absent"), ("cpu-time", "cpu-time"), ("rapl", "rapl"), ("nvml", "nvml+rapl")],
)
def test_the_operator_may_name_one(roots: tuple[Path, Path], wanted: str, name: str) -> None:
    add_rapl(roots[1])
    settings = MeterSettings(meter=wanted)  # type: ignore[arg-type]
    assert look(roots, OneGpu(), settings).chosen.name == name


@pytest.mark.parametrize("wanted", ["rapl", "nvml"])
def test_a_named_meter_that_is_missing_is_an_error_with_its_reason(
    roots: tuple[Path, Path], wanted: str
) -> None:
    with pytest.raises(BadInput, match=rf"'{wanted}' is not available here\. {wanted}.*: ") as caught:
        look(roots, NoGpu(), MeterSettings(meter=wanted))  # type: ignore[arg-type]
    assert caught.value.field == "energy.meter"


def test_absurd_watts_name_the_setting(roots: tuple[Path, Path]) -> None:
    with pytest.raises(BadInput, match="watts_per_core") as caught:
        look(roots, NoGpu(), MeterSettings(watts_per_core=-1.0))
    assert caught.value.field == "energy.watts_per_core"


def test_a_composite_needs_parts() -> None:
    with pytest.raises(ValueError, match="at least one"):
        CompositeMeter([])


def test_this_machine_gets_a_meter() -> None:
    report = probe(MeterSettings())
    assert report.chosen.name
    assert report.chosen.read({"nobody": ()}) == {}
