"""The one thread that writes to the knowledge database, behind a bounded queue.

Whoever records appends to a deque and goes on: no lock, no disk, no serialisation. The thread wakes, gathers
for `COMMIT_EVERY_S` and writes everything in one transaction. Rows are built one at a time while they are
inserted, so it holds the interpreter for tens of microseconds and not for a whole batch. Trouble on disk
never reaches the request path: the thread keeps what it has and tries again, the queue fills, drops are
counted and logged.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from calm.ports import Clock
from calm.stores.retention import Retention
from calm.stores.rows import EVENT_COLUMNS, FEEDBACK_COLUMNS, OUTCOME_COLUMNS, REQUEST_COLUMNS, Row
from calm.stores.schema import KnowledgeError, is_corrupt

log = logging.getLogger(__name__)

COMMIT_EVERY_S = 0.25
RETRY_AFTER_S = 1.0
BATCH = 2_000
"""Most records of one transaction; what is more follows in the next one, at once."""


class Entry(Protocol):
    """Something queued: its table and, when the writer comes to it, its row."""

    @property
    def table(self) -> str: ...

    def row(self) -> Row: ...


def insert_sql(table: str, columns: Sequence[str]) -> str:
    marks = ", ".join("?" * len(columns))
    return f"INSERT OR REPLACE INTO {table} ({', '.join(columns)}) VALUES ({marks})"


# In this order within a transaction.
INSERTS = {
    "requests": insert_sql("requests", REQUEST_COLUMNS),
    "outcomes": insert_sql("outcomes", OUTCOME_COLUMNS),
    "feedback": insert_sql("feedback", FEEDBACK_COLUMNS),
    "events": insert_sql("events", EVENT_COLUMNS),
    "estimators": (
        "INSERT INTO estimators (name, version, wall_s, state, checksum) VALUES (?, 1, ?, ?, ?)"
        " ON CONFLICT (name) DO UPDATE SET version = version + 1, wall_s = excluded.wall_s,"
        " state = excluded.state, checksum = excluded.checksum"
    ),
}


class Writer:
    """Owns the write connection from `start` to `close`. `submit` may be called from any thread."""

    def __init__(
        self,
        reopen: Callable[[str | None], sqlite3.Connection],
        retention: Retention,
        clock: Clock,
        *,
        capacity: int,
    ) -> None:
        """`reopen(None)` gives the connection; `reopen(reason)` a fresh one in a corrupt one's place."""
        self._reopen = reopen
        self._connection = reopen(None)
        self._retention = retention
        self._clock = clock
        self._capacity = capacity
        self._queue: deque[Entry] = deque()
        self._held: list[Entry] = []
        self._waiting: deque[threading.Event] = deque()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._asleep = False
        self._closing = False
        self._failure: str | None = None
        self._dropped = 0
        self._drop_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="calm-knowledge", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def dropped(self) -> int:
        return self._dropped

    @property
    def failure(self) -> str | None:
        """Why the last attempt to write failed; None while all is well."""
        return self._failure

    def submit(self, entry: Entry, *, always: bool = False) -> None:
        """Queue it, or count it as dropped when the queue is full (unless `always`). Never blocks."""
        if self._closing or (len(self._queue) >= self._capacity and not always):
            self._drop(1, "it is closed" if self._closing else "its queue is full")
            return
        self._queue.append(entry)
        if self._asleep:
            self._wake.set()

    def flush(self) -> None:
        """Blocks until all that was submitted is on disk. Raises KnowledgeError when it cannot be written."""
        if not self._thread.is_alive():
            raise KnowledgeError("the knowledge database is closed")
        done = threading.Event()
        self._waiting.append(done)
        self._hurry.set()
        self._wake.set()
        while not done.wait(0.05):
            if self._failure is not None or not self._thread.is_alive():
                raise KnowledgeError(
                    f"knowledge cannot be written: {self._failure or 'its writer has stopped'}"
                )

    def close(self) -> None:
        """Writes what is queued, then stops. Idempotent. What cannot be written is logged with its count."""
        self._closing = True
        self._hurry.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    # --- below runs in the thread ---

    def _run(self) -> None:
        try:
            while not (self._closing and not self._queue and not self._held):
                self._sleep()
                if not self._round() and self._closing:
                    self._give_up()
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES ('clean', '1')")
        except Exception:
            log.exception("the knowledge writer stopped; nothing more is recorded")
            self._failure = self._failure or "its writer has stopped"
            self._closing = True
        finally:
            self._connection.close()
            self._answer()

    def _sleep(self) -> None:
        """Until there is work or retention is due, then for the rest of the commit interval."""
        self._asleep = True
        if not (self._queue or self._held or self._waiting or self._closing):
            self._wake.wait(self._retention.due_in_s(self._clock.now()))
        self._asleep = False
        self._wake.clear()
        if self._failure is not None:
            self._hurry.wait(RETRY_AFTER_S)
        elif len(self._queue) < BATCH and not self._closing:
            self._hurry.wait(COMMIT_EVERY_S)
        self._hurry.clear()

    def _round(self) -> bool:
        """One transaction and its share of retention. False when the disk refused."""
        flushes = len(self._waiting)
        while True:
            batch = self._held or self._take()
            self._held = batch
            if batch and not self._commit(batch):
                return False
            self._held = []
            # A flush promises all that was queued before it: go on until the queue was seen empty.
            if not flushes or not self._queue:
                break
        self._failure = None
        for _ in range(flushes):
            self._waiting.popleft().set()
        self._retain(len(batch))
        return True

    def _take(self) -> list[Entry]:
        return [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]

    def _commit(self, batch: Sequence[Entry]) -> bool:
        try:
            self._write(batch)
        except sqlite3.Error as error:
            if is_corrupt(error):
                self._connection.close()
                self._connection = self._reopen(str(error))
            return self._failed(error)
        return True

    def _write(self, batch: Sequence[Entry]) -> None:
        """All of the batch in one transaction; where one row is bad, row by row without it."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            for table, sql in INSERTS.items():
                entries = [entry for entry in batch if entry.table == table]
                if entries:
                    self._insert(sql, entries)
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _insert(self, sql: str, entries: Sequence[Entry]) -> None:
        self._connection.execute("SAVEPOINT rows")
        try:
            self._connection.executemany(sql, (entry.row() for entry in entries))
        except Exception as error:
            if disk_trouble(error):
                raise
            self._connection.execute("ROLLBACK TO rows")
            self._insert_each(sql, entries)
        self._connection.execute("RELEASE rows")

    def _insert_each(self, sql: str, entries: Sequence[Entry]) -> None:
        for entry in entries:
            try:
                self._connection.execute(sql, entry.row())
            except Exception as error:
                if disk_trouble(error):
                    raise
                self._drop(1, f"one of {entry.table} cannot be stored ({error!r})")

    def _failed(self, error: sqlite3.Error) -> bool:
        if self._failure is None:
            log.error("knowledge cannot be written, trying again every %g s: %s", RETRY_AFTER_S, error)
        self._failure = str(error)
        return False

    def _give_up(self) -> None:
        lost = len(self._held) + len(self._queue)
        self._held = []
        self._queue.clear()
        self._drop(lost, "it was closed while the disk refused")

    def _retain(self, written: int) -> None:
        try:
            self._retention.enforce(self._connection, self._clock.now(), self._clock.wall(), written)
        except sqlite3.Error as error:
            self._failed(error)

    def _answer(self) -> None:
        while self._waiting and self._failure is None:
            self._waiting.popleft().set()

    def _drop(self, count: int, why: str) -> None:
        with self._drop_lock:
            first, self._dropped = self._dropped == 0, self._dropped + count
        if first:
            log.error("the knowledge database drops records (their number is in its summary): %s", why)


def disk_trouble(error: Exception) -> bool:
    """Whether the database refused, which passes; else it is the record, which never will be storable."""
    bad_record = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError)
    return isinstance(error, sqlite3.Error) and not isinstance(error, bad_record)
