"""What stands between this machine and a good service, found without changing anything.

Each check looks at one thing and returns `Check` records: what was found, whether that is fine, and what to
do where it is not. Printing is the command line's business. A check never raises: what it cannot find out is
itself a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from calm.doctor.check import Check, Status, failed, fine, guarded, poor
from calm.doctor.engines import check_engines
from calm.doctor.fleet import check_fleet
from calm.doctor.machine import check_cores, check_gpus, check_memory, check_meters
from calm.doctor.service import check_config, check_door
from calm.doctor.storage import check_cache, check_knowledge
from calm.errors import CalmError
from calm.monitor.resources import ControlGroup
from calm.registry import Fleet, FleetLoad, load_fleet
from calm.settings import Settings, budget_bytes, cache_dir, fleet_dir, knowledge_path

__all__ = ["Check", "Status", "diagnose", "failed", "fine", "poor"]


def diagnose(load_settings: Callable[[], Settings], config_file: Path | None) -> Iterator[Check]:
    """Every check in the order an operator would look. A broken configuration is reported, and the defaults
    are looked at instead."""
    settings, found = check_config(load_settings, config_file)
    yield from found
    group = ControlGroup()
    yield from guarded("cores", lambda: check_cores(settings, group))
    yield from guarded("memory", lambda: check_memory(settings, group))
    yield from guarded("GPUs", check_gpus)
    yield from guarded("energy", lambda: check_meters(settings))
    directory, load, problems = read_fleet(settings)
    yield from guarded("engines", lambda: check_engines(tuple(load.fleet.values())))
    yield from problems or guarded("fleet", lambda: check_fleet(directory, load, budget(settings)))
    yield from guarded("cache", lambda: check_cache(cache_dir(), directory, load.fleet))
    yield from guarded("knowledge", lambda: check_knowledge(knowledge_path(settings)))
    yield from guarded("door", lambda: check_door(settings))


def read_fleet(settings: Settings) -> tuple[Path, FleetLoad, list[Check]]:
    """Where the cards are and what they say; an unreadable directory is a finding."""
    directory = fleet_dir(settings)
    try:
        return directory, load_fleet(directory), []
    except CalmError as error:
        return directory, FleetLoad(Fleet()), [failed("fleet", error.message, None)]


def budget(settings: Settings) -> int | None:
    """None where the setting is wrong, which another check reports."""
    try:
        return budget_bytes(settings)
    except CalmError:
        return None
