"""What lies on disk: the weight cache and the knowledge database."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from calm.doctor.check import Check, failed, fine, megabytes, poor
from calm.records import ModelCard
from calm.sources.fetch import cache_bytes, cached_path
from calm.stores.schema import (
    KnowledgeError,
    is_corrupt,
    load_migrations,
    newest,
    open_reader,
    schema_version,
)

CHECK_AT_MOST_BYTES = 256 << 20
"""A larger database is not read through: that would take longer than an operator waits."""
LOW_DISK_BYTES = 1_000_000_000


def check_cache(cache: Path, directory: Path, fleet: Mapping[str, ModelCard]) -> Iterator[Check]:
    """The cache, the weights that are not in it, and room for them."""
    place = nearest(cache)
    free = shutil.disk_usage(place).free
    found = f"{cache}, {megabytes(cache_bytes(cache))}; {megabytes(free)} free on its disk"
    if not os.access(place, os.W_OK):
        yield failed("cache", f"{found}; not writable", f"make {place} writable, or set CALM_CACHE_DIR")
    elif free < LOW_DISK_BYTES:
        yield poor("cache", found, "free some space, or set CALM_CACHE_DIR to another disk")
    else:
        yield fine("cache", found)
    yield from check_weights(cache, directory, fleet, free)


def check_weights(
    cache: Path, directory: Path, fleet: Mapping[str, ModelCard], free_bytes: int
) -> Iterator[Check]:
    sourced = [card for card in fleet.values() if card.source is not None]
    absent = [card for card in sourced if card.source and cached_path(card.source, cache, directory) is None]
    if sourced and not absent:
        yield fine("weights", f"cached and verified: {', '.join(card.name for card in sourced)}")
    needed = sum(card.source.bytes or 0 for card in absent if card.source)
    if needed > free_bytes:
        yield failed(
            "weights", f"{megabytes(needed)} missing, {megabytes(free_bytes)} free", "free some space"
        )
    for card in absent:
        length = card.source.bytes if card.source else None
        size = f" ({megabytes(length)})" if length else ""
        yield poor(f"weights of {card.name}", f"not cached{size}", f"calm models pull {card.name}")


def nearest(path: Path) -> Path:
    """The path itself, or the closest parent that exists."""
    return next((place for place in (path, *path.absolute().parents) if place.exists()), Path("/"))


def check_knowledge(path: Path) -> Iterator[Check]:
    if not path.exists():
        place = nearest(path)
        if os.access(place, os.W_OK):
            yield fine("knowledge", f"{path}: not there yet, made at the first start")
        else:
            yield failed(
                "knowledge", f"{path} cannot be made", f"make {place} writable, or set CALM_STATE_DIR"
            )
        return
    size = path.stat().st_size
    try:
        requests, health = examine(path, thoroughly=size <= CHECK_AT_MOST_BYTES)
    except KnowledgeError as error:
        yield unusable(path, error, error.__cause__)
        return
    except sqlite3.Error as error:
        requests, health = 0, str(error)
    if health == "ok":
        yield fine("knowledge", f"{path}, {megabytes(size)}, {requests} requests")
    else:
        yield damaged(path, health)


def unusable(path: Path, error: KnowledgeError, cause: BaseException | None) -> Check:
    """A schema of a newer CALM stops `calm serve`; an older one is migrated, a corrupt file moved aside."""
    if isinstance(cause, sqlite3.DatabaseError) and is_corrupt(cause):
        return damaged(path, str(cause))
    if isinstance(cause, sqlite3.Error):
        return poor("knowledge", error.message, "move the file away if `calm serve` does not start with it")
    return (
        failed("knowledge", error.message, None) if is_newer(path) else poor("knowledge", error.message, None)
    )


def is_newer(path: Path) -> bool:
    """Whether a CALM of a later version wrote the database."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        return schema_version(connection) > newest(load_migrations())


def damaged(path: Path, health: str) -> Check:
    fix = f"`calm serve` moves it aside and starts an empty one; to rescue it: sqlite3 {path} .recover"
    return poor("knowledge", f"{path} is damaged: {health}", fix)


def examine(path: Path, *, thoroughly: bool) -> tuple[int, str]:
    """(stored requests, "ok" or the first damage). Read-only. Raises sqlite3.Error, KnowledgeError."""
    with closing(open_reader(path)) as connection:
        (requests,) = connection.execute("SELECT count(*) FROM requests").fetchone()
        health = connection.execute("PRAGMA quick_check(1)").fetchone()[0] if thoroughly else "ok"
    return int(requests), str(health)
