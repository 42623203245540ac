"""Answers files: what each model said to each query when it was asked for real, and how good that was.

JSON lines of `Recorded`, as `calm profile --answers` writes them. Of several lines for one query and model the
last one counts, so that a file may be appended to.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path

import msgspec

from calm.workloads.files import json_rows, malformed
from calm.workloads.names import names_in
from calm.workloads.records import Recorded

FIELD = "answers"


def read_answers(path: Path, models: Collection[str]) -> dict[str, dict[str, Recorded]]:
    """By query, by model of the fleet. Raises BadInput (field `answers`) with file, line and reason."""
    records = _read(path)
    own = names_in(models, {record.model for record in records})
    fleet_name = {theirs: ours for ours, theirs in own.items()}
    found: dict[str, dict[str, Recorded]] = {}
    for record in records:
        if ours := fleet_name.get(record.model):
            found.setdefault(record.query_id, {})[ours] = msgspec.structs.replace(record, model=ours)
    return found


def models_in(path: Path) -> tuple[str, ...]:
    """The models an answers file speaks of, sorted."""
    return tuple(sorted({record.model for record in _read(path)}))


def merged(first: Mapping[str, Recorded], then: Mapping[str, Recorded]) -> dict[str, Recorded]:
    """What was recorded overrides what a table says."""
    return {**first, **then}


@lru_cache(maxsize=8)
def _read(path: Path) -> tuple[Recorded, ...]:
    return tuple(_checked(record, path, number) for number, record in json_rows(path, Recorded, FIELD))


def _checked(record: Recorded, path: Path, number: int) -> Recorded:
    if not 0 <= record.quality <= 1:
        raise malformed(path, number, f"quality {record.quality} is not 0..1", FIELD)
    if min(record.prompt_tokens or 0, record.output_tokens or 0) < 0:
        raise malformed(path, number, "tokens must be 0 or more", FIELD)
    return record
