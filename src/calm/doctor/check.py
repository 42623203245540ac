"""The record that every check returns, and how a check that stumbles becomes a finding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from calm.errors import CalmError
from calm.records import Record

Status = Literal["ok", "warn", "fail"]


class Check(Record, frozen=True, kw_only=True):
    """One finding. `fix` says what to do, where something can be done."""

    name: str
    status: Status
    found: str
    fix: str | None = None


def fine(name: str, found: str) -> Check:
    return Check(name=name, status="ok", found=found)


def poor(name: str, found: str, fix: str | None) -> Check:
    """CALM works, but less well than it could."""
    return Check(name=name, status="warn", found=found, fix=fix)


def failed(name: str, found: str, fix: str | None) -> Check:
    """`calm serve` would not start, or would serve nothing."""
    return Check(name=name, status="fail", found=found, fix=fix)


def guarded(name: str, check: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """The findings of a check; an error in it is one too, and the checks after it still run."""
    try:
        yield from check()
    except CalmError as error:
        yield failed(name, error.message, None)
    except OSError as error:
        yield failed(
            name, f"cannot be looked at: {error.filename or ''} {error.strerror or error}".strip(), None
        )


def megabytes(count: float) -> str:
    """98.4 MB, 12.3 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
