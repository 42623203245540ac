"""Forgets old rows in small batches, so that no transaction is long and the file stays bounded."""

from __future__ import annotations

import sqlite3

DAY_S = 86_400.0
EVERY_S = 60.0
ROWS = 500
"""Rows deleted from a table in one go: a few milliseconds."""
PAGES = 256
"""Pages given back to the file system in one go: 1 MB."""
TABLES = ("requests", "outcomes", "feedback", "events")


class Retention:
    """When to delete and how far. Belongs to the writer's thread."""

    def __init__(self, retention_days: float | None, max_requests: int | None) -> None:
        if retention_days is not None and retention_days <= 0:
            raise ValueError("retention_days must be positive; None keeps everything")
        if max_requests is not None and max_requests < 1:
            raise ValueError("max_requests must be at least 1; None sets no limit")
        self._days = retention_days
        self._cap = max_requests
        self._due_at_s = 0.0

    def due_in_s(self, now_s: float) -> float | None:
        """Seconds until rows have to be looked at though nothing is written; None: never."""
        return None if self._days is None else max(0.0, self._due_at_s - now_s)

    def enforce(self, connection: sqlite3.Connection, now_s: float, wall_s: float, written: int) -> None:
        """After each commit the cap, once a minute the age; more often while there is a backlog."""
        deleted = self._cap_rows(connection, max(ROWS, 2 * written)) if self._cap and written else 0
        if self._days is not None and now_s >= self._due_at_s:
            old = [delete_prefix(connection, table, wall_s - self._days * DAY_S, ROWS) for table in TABLES]
            self._due_at_s = now_s + (1.0 if ROWS in old else EVERY_S)
            deleted += sum(old)
        if deleted:
            # The pragma frees one page per step, and execute() would step once.
            connection.executescript(f"PRAGMA incremental_vacuum({PAGES});")

    def _cap_rows(self, connection: sqlite3.Connection, limit: int) -> int:
        """Requests beyond the cap, and what is older than the oldest request kept."""
        low, high = connection.execute("SELECT min(seq), max(seq) FROM requests").fetchone()
        if low is None or self._cap is None or high - low < self._cap:
            return 0
        last = min(high - self._cap, low + limit)
        deleted = connection.execute("DELETE FROM requests WHERE seq <= ?", (last,)).rowcount
        (oldest,) = connection.execute("SELECT wall_s FROM requests ORDER BY seq LIMIT 1").fetchone()
        if oldest is not None:
            for table in TABLES[1:]:
                delete_prefix(connection, table, oldest, limit)
        return deleted


def delete_prefix(connection: sqlite3.Connection, table: str, cutoff_wall_s: float, limit: int) -> int:
    """Deletes those of the table's `limit` first rows that are older; rows lie in order of arrival."""
    return connection.execute(
        f"DELETE FROM {table} WHERE seq IN (SELECT seq FROM"
        f" (SELECT seq, wall_s FROM {table} ORDER BY seq LIMIT ?) WHERE wall_s < ?)",
        (limit, cutoff_wall_s),
    ).rowcount
