"""Opens the knowledge database: one writer, numbered migrations, and a way past a corrupt file.

A file that SQLite cannot make sense of is moved aside, never deleted, and a fresh one is started: an
orchestrator that cannot remember is still worth more than one that does not come up.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from calm.errors import CalmError

log = logging.getLogger(__name__)

CHECK_AT_MOST_BYTES = 256 << 20
"""After a crash a database up to this size is checked at open: about a second; a larger one is trusted."""
BUSY_TIMEOUT_S = 5.0
CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class KnowledgeError(CalmError):
    """The knowledge database cannot be used; the message says why and what to do."""

    code = "knowledge_unavailable"


class Migration(NamedTuple):
    version: int
    name: str
    sql: str


@cache
def load_migrations() -> tuple[Migration, ...]:
    """The numbered .sql files of this package, in order."""
    folder = resources.files("calm.stores") / "migrations"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".sql"))
    return tuple(Migration(int(name[:4]), name, (folder / name).read_text()) for name in names)


def open_writer(
    path: Path, wall_s: float, migrations: Sequence[Migration] | None = None
) -> sqlite3.Connection:
    """The database at `path`, created, migrated and checked. Corrupt files are moved aside with an error log.

    Raises KnowledgeError when the schema is newer than this CALM or the file cannot be opened at all.
    """
    known = tuple(migrations) if migrations is not None else load_migrations()
    try:
        return try_open(path, wall_s, known)
    except sqlite3.DatabaseError as error:
        if not is_corrupt(error):
            raise KnowledgeError(f"cannot open the knowledge database {path}: {error}") from error
        move_aside(path, wall_s, str(error))
    return try_open(path, wall_s, known)


def try_open(path: Path, wall_s: float, migrations: Sequence[Migration]) -> sqlite3.Connection:
    """Raises sqlite3.DatabaseError, KnowledgeError."""
    create_private(path)
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        configure(connection)
        migrate(connection, migrations, wall_s, path)
        check_after_crash(connection, path)
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('clean', '0')")
    except BaseException:
        connection.close()
        raise
    return connection


def create_private(path: Path) -> None:
    """Only its owner may read what users asked; SQLite gives the -wal and -shm files the same mode."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise KnowledgeError(
            f"cannot write the knowledge database {path}: {error.strerror}; check the folder's owner and mode"
        ) from error


def configure(connection: sqlite3.Connection) -> None:
    """synchronous=FULL syncs each commit; at four commits a second that costs next to nothing and makes

    "at most the last second" true for a power cut too, which NORMAL would not.
    """
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA journal_size_limit=16777216")


def migrate(
    connection: sqlite3.Connection, migrations: Sequence[Migration], wall_s: float, path: Path
) -> None:
    """Applies what is missing, each step in its own transaction. Raises KnowledgeError on a newer schema."""
    connection.execute(
        "CREATE TABLE IF NOT EXISTS schema_version (version INTEGER PRIMARY KEY, name TEXT, wall_s REAL)"
    )
    at = schema_version(connection)
    if at > (known := newest(migrations)):
        raise KnowledgeError(
            f"{path} has schema {at}, this CALM knows up to {known}: upgrade CALM, "
            "or point it to another knowledge file"
        )
    for step in migrations:
        if step.version > at:
            apply(connection, step, wall_s)


def schema_version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchone()
    return int(version)


def apply(connection: sqlite3.Connection, step: Migration, wall_s: float) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement in statements(step.sql):
            connection.execute(statement)
        connection.execute("INSERT INTO schema_version VALUES (?, ?, ?)", (step.version, step.name, wall_s))
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def statements(sql: str) -> list[str]:
    """The script's statements one by one: executescript() would commit before the first."""
    found, current = [], ""
    for line in sql.splitlines(keepends=True):
        current += line
        if sqlite3.complete_statement(current):
            found.append(current)
            current = ""
    return found


def check_after_crash(connection: sqlite3.Connection, path: Path) -> None:
    """Raises sqlite3.DatabaseError (corrupt) when an unclean end left damage."""
    row = connection.execute("SELECT value FROM meta WHERE key='clean'").fetchone()
    if row is None or row[0] == "1" or path.stat().st_size > CHECK_AT_MOST_BYTES:
        return
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise corrupt_error(str(verdict))


def corrupt_error(message: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(message)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def is_corrupt(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in CORRUPT


def move_aside(path: Path, wall_s: float, reason: str) -> Path:
    """Renames the database and its -wal and -shm; returns the new name of the database."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(wall_s))
    aside = free_name(path.with_name(f"{path.name}.corrupt-{stamp}"))
    for suffix in ("", "-wal", "-shm"):
        source = path.with_name(path.name + suffix)
        if source.exists():
            source.rename(aside.with_name(aside.name + suffix))
    log.error(
        "the knowledge database is corrupt (%s): moved to %s, starting an empty one; "
        "what can be saved: sqlite3 %s .recover",
        reason,
        aside,
        aside,
    )
    return aside


def free_name(path: Path) -> Path:
    count = 1
    candidate = path
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}.{count}")
    return candidate


def open_reader(path: Path) -> sqlite3.Connection:
    """A read-only connection that works beside a running writer. Raises KnowledgeError."""
    if not path.exists():
        raise KnowledgeError(
            f"there is no knowledge database at {path}; start CALM once, or name another path"
        )
    uri = f"{path.resolve().as_uri()}?mode=ro"
    connection: sqlite3.Connection | None = None
    try:
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        known, at = newest(load_migrations()), schema_version(connection)
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        raise KnowledgeError(f"cannot read the knowledge database {path}: {error}") from error
    if at != known:
        connection.close()
        raise KnowledgeError(f"{path} has schema {at}, this CALM reads {known}: {other_schema(at, known)}")
    connection.row_factory = sqlite3.Row
    return connection


def other_schema(at: int, known: int) -> str:
    return "upgrade CALM" if at > known else "start its server once, which migrates it"


def newest(migrations: Sequence[Migration]) -> int:
    return max(step.version for step in migrations)


def mark_interrupted(connection: sqlite3.Connection, wall_s: float) -> int:
    """Unended requests of an earlier process get the outcome error `interrupted`. Returns how many."""
    row = connection.execute("SELECT value FROM meta WHERE key='checked_seq'").fetchone()
    checked = int(row[0]) if row else 0
    with closing(connection.cursor()) as cursor:
        cursor.execute("BEGIN IMMEDIATE")
        cursor.execute(
            "INSERT INTO outcomes (request_id, wall_s, model, status, total_s, queue_s, load_s, concurrency,"
            " attempts, error) SELECT id, ?, chosen, 'error', 0, 0, 0, 1, 1, 'interrupted' FROM requests"
            " WHERE seq > ? AND NOT EXISTS (SELECT 1 FROM outcomes WHERE request_id = id)",
            (wall_s, checked),
        )
        marked = cursor.rowcount
        cursor.execute(
            "INSERT OR REPLACE INTO meta SELECT 'checked_seq', coalesce(max(seq), 0) FROM requests"
        )
        cursor.execute("COMMIT")
    return marked
