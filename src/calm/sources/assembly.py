"""Parts -> one file, one after the other, so that the disk holds the result and one part, never everything.

A journal beside the growing file says how many parts are whole. After a break the file is cut back to that
point and the next part is appended again: a crash costs one part, never a wrong byte.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from calm.errors import SourceError

Fill = Callable[[BinaryIO], None]


class _Journal(msgspec.Struct, frozen=True):
    parts: tuple[str, ...]
    done: int = 0
    size: int = 0


class Assembly:
    """The unfinished file of one digest. The caller holds that digest's lock. Blocking."""

    def __init__(self, directory: Path, parts: tuple[str, ...]) -> None:
        self.directory = directory
        self.path = directory / "assembled"
        self._journal_path = directory / "journal.json"
        directory.mkdir(parents=True, exist_ok=True)
        self._journal = self._recover(parts)

    @property
    def done(self) -> int:
        """Parts that need not be fetched again."""
        return self._journal.done

    @property
    def size(self) -> int:
        return self._journal.size

    def append(self, fill: Fill) -> None:
        """Let `fill` write the next part at the end."""
        try:
            with self.path.open("r+b" if self.path.exists() else "w+b") as stream:
                stream.truncate(self._journal.size)
                stream.seek(self._journal.size)
                fill(stream)
                stream.flush()
                os.fsync(stream.fileno())
                size = stream.tell()
        except OSError as error:
            raise SourceError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._note(size)

    def take(self, whole: Path) -> None:
        """The only part is a plain file of ours: no copy is needed."""
        whole.replace(self.path)
        self._note(self.path.stat().st_size)

    def discard(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _note(self, size: int) -> None:
        self._journal = _Journal(self._journal.parts, self._journal.done + 1, size)
        temporary = self._journal_path.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.encode(self._journal))
        temporary.replace(self._journal_path)

    def _recover(self, parts: tuple[str, ...]) -> _Journal:
        """The journal, if it is about the same parts and the bytes it speaks of are there."""
        try:
            journal = msgspec.json.decode(self._journal_path.read_bytes(), type=_Journal)
            if journal.parts == parts and self.path.stat().st_size >= journal.size:
                return journal
        except (OSError, msgspec.MsgspecError):
            pass
        self.path.unlink(missing_ok=True)
        return _Journal(parts)
