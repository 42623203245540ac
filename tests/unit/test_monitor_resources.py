"""Cores and memory as control groups of both versions grant them, from fake /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from calm.monitor.resources import ControlGroup, Resources, affinity, group_paths, usable_cores, within


def tree(root: Path, files: dict[str, str]) -> ControlGroup:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return ControlGroup(root)


def test_v2_takes_the_tightest_of_the_chain(tmp_path: Path) -> None:
    group = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/app\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/app/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/memory.max": "1000\n",
            "sys/fs/cgroup/pod/memory.current": "900\n",
            "sys/fs/cgroup/pod/memory.stat": "anon 1\ninactive_file 50\n",
            "sys/fs/cgroup/pod/app/memory.max": "max\n",
            "sys/fs/cgroup/pod/app/memory.current": "700\n",
        },
    )
    assert group.cpu_cores() == pytest.approx(1.5)
    assert group.memory() == (1000, 150)


def test_in_a_container_the_mount_s_root_is_ours(tmp_path: Path) -> None:
    group = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/docker/abc\n",
            "sys/fs/cgroup/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/memory.max": "4096\n",
            "sys/fs/cgroup/memory.current": "96\n",
        },
    )
    assert group.cpu_cores() == pytest.approx(2.0)
    assert group.memory() == (4096, 4000)


def test_v1(tmp_path: Path) -> None:
    group = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/a\n3:cpu,cpuacct:/a\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "2000",
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "500",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5",
        },
    )
    assert group.cpu_cores() == pytest.approx(0.5)
    assert group.memory() == (2000, 1500)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "garbage\n", "sys/fs/cgroup/cpu.max": "much\n"},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100 0\n", "sys/fs/cgroup/memory.max": "x"},
        {
            "proc/self/cgroup": "3:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    ],
)
def test_no_limit_where_none_can_be_read(tmp_path: Path, files: dict[str, str]) -> None:
    group = tree(tmp_path, files)
    assert group.cpu_cores() is None
    assert group.memory() is None


def test_group_paths_of_joined_controllers() -> None:
    assert group_paths("3:cpu,cpuacct:/x:y\n0::/\n") == {
        "cpu,cpuacct": "/x:y",
        "cpu": "/x:y",
        "cpuacct": "/x:y",
        "": "/",
    }


@pytest.mark.parametrize(
    ("allowed", "quota", "expected"), [(8, None, 8), (8, 1.5, 2), (8, 2.0, 2), (1, 4.0, 1), (8, 0.1, 1)]
)
def test_usable_cores(allowed: int, quota: float | None, expected: int) -> None:
    assert usable_cores(allowed, quota) == expected


def test_memory_is_cut_to_the_group() -> None:
    assert within(100, 80, None) == (100, 80)
    assert within(100, 80, (50, 20)) == (50, 20)
    assert within(100, 10, (50, 20)) == (50, 10)


def test_a_sample_of_this_machine_is_sane(tmp_path: Path) -> None:
    limited = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cpu.max": "100000 100000\n",
            "sys/fs/cgroup/memory.max": "1000000\n",
            "sys/fs/cgroup/memory.current": "400000\n",
        },
    )
    sample = Resources(limited).sample()
    assert sample.cores == 1
    assert (sample.memory_total_bytes, sample.memory_available_bytes) == (1_000_000, 600_000)
    assert 0.0 <= sample.cpu_load <= 1.0
    assert 1 <= Resources().cores() <= affinity()
