"""The journal of residency: every change of every model, numbered, for the admin API, metrics and the store.

The executor tells it; it owns the numbering and the latest entries, and passes each on to its readers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from calm.ports import Clock, EventLog
from calm.records import Record, Residency

KEPT = 2000


class Entry(Record, frozen=True, kw_only=True):
    """One change. `seq` grows by one; a reader asks for what came after the last it saw."""

    seq: int
    wall_s: float
    model: str
    old: Residency
    new: Residency
    detail: str | None


class Journal:
    """Subscribe its `moved` to the executor."""

    def __init__(
        self, clock: Clock, log: EventLog, readers: Sequence[Callable[[str, Residency, Residency], None]] = ()
    ) -> None:
        self._clock = clock
        self._log = log
        self._readers = list(readers)
        self._entries: deque[Entry] = deque(maxlen=KEPT)
        self._seq = 0

    def moved(self, model: str, old: Residency, new: Residency, at_s: float, detail: str | None) -> None:
        self._seq += 1
        entry = Entry(seq=self._seq, wall_s=self._clock.wall(), model=model, old=old, new=new, detail=detail)
        self._entries.append(entry)
        self._log.record_event("residency", model=model, detail={"old": old, "new": new, "why": detail})
        for reader in self._readers:
            reader(model, old, new)

    def since(self, seq: int, limit: int) -> list[Entry]:
        """Entries numbered above `seq`, oldest first; those long gone are left out."""
        return [entry for entry in self._entries if entry.seq > seq][:limit]
