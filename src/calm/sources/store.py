"""The content-addressed cache of weights: what is there has been verified, and stays so cheaply.

ROOT/sha256/DIGEST/FILENAME          the finished file; cards with the same digest share it
ROOT/sha256/DIGEST/.verified.json    size and mtime at the moment the digest was checked
ROOT/in-place/KEY.json               the same for a file: source, which is used where it stands
ROOT/partial/DIGEST/                 what a broken or cancelled fetch left for the next one
ROOT/archives/                       wheels and tarballs, deleted once extracted
ROOT/locks/
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from calm.errors import SourceError
from calm.records import SourceSpec
from calm.registry.reference import FileReference, leaf_name, parse_reference
from calm.sources.download import hash_file

_LOCK_POLL_S = 0.2


class Stamp(msgspec.Struct, frozen=True):
    """Proof that a file's digest was checked: it holds while size and mtime stay the same."""

    sha256: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path, sha256: str) -> Stamp:
        stat = path.stat()
        return cls(sha256, stat.st_size, stat.st_mtime_ns)


class Store:
    """Paths of one source in the cache, and what may be believed about them. Blocking; needs no network."""

    def __init__(self, root: Path, source: SourceSpec) -> None:
        self.root = root
        self.sha256 = source.sha256.lower()
        self._home = root / "sha256" / self.sha256
        self.target = self._home / (source.filename or leaf_name(parse_reference(source.parts[0])))
        self.partial = root / "partial" / self.sha256
        self.lock = root / "locks" / f"{self.sha256}.lock"
        self._stamp = self._home / ".verified.json"

    def find(self, *, verify: bool = False) -> Path | None:
        """The cached file if it is good. A file that changed since it was verified is read in full again;
        one that no longer matches is deleted."""
        path = self.target if self.target.is_file() else self._twin()
        if path is None:
            return None
        if not verify and _read_stamp(self._stamp) == Stamp.of(path, self.sha256):
            return self._named(path)
        if hash_file(path, "sha256") != self.sha256:
            shutil.rmtree(self._home, ignore_errors=True)
            return None
        _write_stamp(self._stamp, Stamp.of(path, self.sha256))
        return self._named(path)

    def publish(self, assembled: Path) -> Path:
        """Make a verified file the cached one: synced, renamed, stamped, in this order."""
        self._home.mkdir(parents=True, exist_ok=True)
        _sync(assembled)
        assembled.replace(self.target)
        _sync(self._home)
        _write_stamp(self._stamp, Stamp.of(self.target, self.sha256))
        shutil.rmtree(self.partial, ignore_errors=True)
        return self.target

    def remove(self) -> int:
        """Forget the file and its leftovers; the bytes freed."""
        freed = sum(tree_bytes(directory) for directory in (self._home, self.partial))
        for directory in (self._home, self.partial):
            shutil.rmtree(directory, ignore_errors=True)
        return freed

    def _twin(self) -> Path | None:
        """The same content under another card's file name."""
        names = sorted(self._home.iterdir()) if self._home.is_dir() else []
        return next((name for name in names if name.is_file() and not name.name.startswith(".")), None)

    def _named(self, path: Path) -> Path:
        """The file under the name this card wants: a second link, or the other name if links fail."""
        if path == self.target:
            return path
        try:
            self.target.hardlink_to(path)
        except OSError:
            return path
        return self.target


def verified_in_place(root: Path, path: Path, source: SourceSpec, *, verify: bool) -> Path:
    """A `file:` source where it stands, read in full the first time and whenever it changed. Blocking.

    Raises SourceError; the file itself is never touched.
    """
    sha256 = source.sha256.lower()
    if not path.is_file():
        raise SourceError(f"{path} does not exist. Correct the path in the card's source.parts.")
    key = hashlib.sha256(str(path).encode()).hexdigest()[:32]
    stamp_path = root / "in-place" / f"{key}.json"
    if not verify and _read_stamp(stamp_path) == Stamp.of(path, sha256):
        return path
    before = Stamp.of(path, sha256)
    found = hash_file(path, "sha256")
    if found != sha256:
        raise SourceError(mismatch(str(path), sha256, found, path.stat().st_size, source.bytes))
    _write_stamp(stamp_path, before)
    return path


def in_place_path(source: SourceSpec, base: Path | None) -> Path | None:
    """Where a source of one `file:` part stands; None for every other source."""
    if len(source.parts) != 1:
        return None
    reference = parse_reference(source.parts[0])
    return local_path(reference, base) if isinstance(reference, FileReference) else None


def local_path(reference: FileReference, base: Path | None) -> Path:
    """Absolute; a relative one starts at the card's directory. Raises SourceError when that is not known."""
    path = Path(reference.path)
    if not path.is_absolute() and base is None:
        raise SourceError(f"file:{path} is relative and the card's directory is not known here")
    return path if path.is_absolute() else (base or Path()).absolute() / path


def mismatch(what: str, expected: str, found: str, size: int, expected_size: int | None) -> str:
    sizes = f"{size} bytes" + (f", {expected_size} expected" if expected_size is not None else "")
    return (
        f"{what} does not match its checksum: expected sha256 {expected}, found {found} ({sizes}). "
        "Fetch it again; if it happens twice the source has changed: correct source.parts or source.sha256."
    )


@asynccontextmanager
async def locked(path: Path, sleep: Callable[[float], Awaitable[None]]) -> AsyncIterator[None]:
    """Exclusive over all processes that share the cache. Waiting can be cancelled."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False)
    while True:
        try:
            lock.acquire(blocking=False)
            break
        except Timeout:
            await sleep(_LOCK_POLL_S)
    try:
        yield
    finally:
        lock.release()


def tree_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _read_stamp(path: Path) -> Stamp | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Stamp)
    except (OSError, msgspec.MsgspecError):
        return None


def _write_stamp(path: Path, stamp: Stamp) -> None:
    """Losing a stamp costs one more reading of the file, so a read-only place is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(msgspec.json.encode(stamp))
        temporary.replace(path)
    except OSError:
        pass


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
