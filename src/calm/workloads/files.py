"""Text files as other people left them, gzip or plain: line by line, and every fault named with file and line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from calm.errors import BadInput

REFERENCE = "docs/reference/workloads.md"
MAX_LINE_CHARS = 8_000_000
"""No row of a real set comes near; a file without line breaks must not fill memory."""

T = TypeVar("T")


def data_file(data: str | None, *parts: str) -> Path:
    """Where a file of the data directory lies. Raises BadInput (field `data`) when no directory was given."""
    if not data:
        raise BadInput(f"give --data DIR or set CALM_DATA; see {REFERENCE}", field="data")
    directory = Path(data)
    if not directory.is_dir():
        raise BadInput(
            f"{data}: no such directory; give --data DIR or set CALM_DATA; see {REFERENCE}", field="data"
        )
    return directory.joinpath(*parts)


def numbered_lines(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end), empty lines left out; `.gz` is unpacked on the way.

    Raises BadInput (`field`) with one line when the file cannot be read or is not UTF-8 text.
    """
    number = 0
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig") as file
        ):
            while line := file.readline(MAX_LINE_CHARS + 1):
                number += 1
                if len(line) > MAX_LINE_CHARS:
                    raise malformed(path, number, f"longer than {MAX_LINE_CHARS} characters", field)
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise malformed(path, number + 1, "not UTF-8 text", field) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: {reason}; see {REFERENCE}", field=field) from None


def json_rows(path: Path, kind: type[T], field: str) -> Iterator[tuple[int, T]]:
    """JSON lines as records, with their line numbers. Raises BadInput (`field`) with file, line and reason."""
    decoder = msgspec.json.Decoder(kind)
    for number, line in numbered_lines(path, field):
        try:
            yield number, decoder.decode(line)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise malformed(path, number, str(error), field) from None


def malformed(path: Path, line: int, reason: str, field: str) -> BadInput:
    """The one shape in which a fault in a file is told."""
    return BadInput(f"{path}:{line}: {reason}", field=field)
