"""One member out of a wheel or an npm tarball, streamed into an open file.

Nothing is ever written under a name the archive chose, so a hostile path has nowhere to go.
"""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, BinaryIO

from calm.errors import SourceError
from calm.registry.problems import did_you_mean

_BLOCK_BYTES = 1 << 20


def append_member(archive: Path, member: str, sink: BinaryIO, limit_bytes: int | None) -> None:
    """Append the member to `sink`. Raises SourceError when it is missing, broken or larger than the limit."""
    try:
        if zipfile.is_zipfile(archive):
            _append_from_wheel(archive, member, sink, limit_bytes)
        else:
            _append_from_tarball(archive, member, sink, limit_bytes)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError) as error:
        raise SourceError(f"{archive.name}: the archive is broken ({error}); try again") from error


def append_file(path: Path, sink: BinaryIO, limit_bytes: int | None) -> None:
    with path.open("rb") as stream:
        _copy(stream, sink, limit_bytes, path.name)


def _append_from_wheel(archive: Path, member: str, sink: BinaryIO, limit_bytes: int | None) -> None:
    with zipfile.ZipFile(archive) as wheel:
        try:
            info = wheel.getinfo(member)
        except KeyError:
            raise _missing(member, wheel.namelist()) from None
        with wheel.open(info) as stream:
            _copy(stream, sink, limit_bytes, member)


def _append_from_tarball(archive: Path, member: str, sink: BinaryIO, limit_bytes: int | None) -> None:
    """npm puts everything under one directory, by custom `package/`: it may be written or left out."""
    seen: list[str] = []
    with tarfile.open(archive, "r|gz") as tarball:
        for entry in tarball:
            inside = entry.name.partition("/")[2]
            if not entry.isreg():
                continue
            if member in (entry.name, inside):
                stream = tarball.extractfile(entry)
                assert stream is not None  # regular files always have one
                _copy(stream, sink, limit_bytes, member)
                return
            seen.append(inside)
    raise _missing(member, seen)


def _copy(stream: IO[bytes], sink: BinaryIO, limit_bytes: int | None, name: str) -> None:
    written = 0
    while block := stream.read(_BLOCK_BYTES):
        written += len(block)
        if limit_bytes is not None and written > limit_bytes:
            raise SourceError(f"{name} is larger than the card's source.bytes allows; correct the card")
        sink.write(block)


def _missing(member: str, names: Iterable[str]) -> SourceError:
    hint = did_you_mean(member, names) or "list the archive to find the right path"
    return SourceError(f"the package holds no `{member}`; {hint}")
