"""A GGUF made anew with the weights of its blocks in another type: `python -m calm.sources.requantise`.

The rule, which a pinned digest relies on: every block-quantised tensor whose name begins with `blk.` and whose
rows divide into the new type's blocks becomes `to`; every other tensor, the metadata and the order of both are
copied byte for byte, but for `general.file_type`. Numbers come from the quantisers of the `gguf` library, which
work weight by weight, so the result is the same on every machine.

It is a program of its own because dequantising holds Python's GIL for seconds, which a server cannot spare. It
writes one line with a number of bytes for each piece it has written, so that its caller can show progress.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from calm.errors import BadInput
from calm.gguf import TYPES, U32, Header, Tensor, aligned, read_header, tensor_bytes

Bytes = NDArray[np.uint8]

FILE_TYPES = {"Q4_0": 2, "Q8_0": 7}
"""llama.cpp's LLAMA_FTYPE_MOSTLY_*, as `general.file_type` states it."""
PIECE_WEIGHTS = 1 << 22
"""Weights in floating point at once: 16 MiB, whatever the tensor's size."""
BACKGROUND_NICE = 10


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's place in the new file."""

    tensor: Tensor
    type: int
    offset: int
    n_bytes: int


def requantise(source: Path, target: Path, to: str, on_written: Callable[[int], None]) -> None:
    """Write `target`. Blocking. Raises BadInput for a file that cannot be read or converted, OSError for the disk."""
    header = read_header(source)
    old = np.memmap(source, dtype=np.uint8, mode="r")
    with target.open("wb") as stream:
        for piece in pieces(header, old, to):
            stream.write(piece)
            on_written(len(piece))
        _sync(stream)


def pieces(header: Header, old: Bytes, to: str) -> Iterator[bytes]:
    """The new file from its first byte to its last."""
    places = layout(header, number_of(to))
    yield preamble(header, old, places, to)
    for place in places:
        yield from _tensor_pieces(header, old, place)
        yield bytes(aligned(place.n_bytes, header.alignment) - place.n_bytes)


def number_of(type_name: str) -> int:
    """ggml's number of a type that can be converted to."""
    if type_name not in FILE_TYPES:
        raise BadInput(f"cannot convert to {type_name}: it is one of {', '.join(FILE_TYPES)}", field="to")
    return next(number for number, (name, _, _) in TYPES.items() if name == type_name)


def layout(header: Header, to: int) -> list[Place]:
    places, offset = [], 0
    for tensor in header.tensors.values():
        type_ = to if _changes(tensor, to) else tensor.type
        n_bytes = tensor_bytes(tensor.shape, type_)
        if n_bytes is None:
            raise BadInput(f"{header.name}: cannot convert {tensor.name}, which is of {tensor.type_name}")
        places.append(Place(tensor, type_, offset, n_bytes))
        offset += aligned(n_bytes, header.alignment)
    return places


def _changes(tensor: Tensor, to: int) -> bool:
    _, block, _ = TYPES[to]
    return tensor.quantised and tensor.name.startswith("blk.") and tensor.shape[0] % block == 0


def preamble(header: Header, old: Bytes, places: list[Place], to: str) -> bytes:
    """Everything before the data, padding included."""
    start = bytearray(old[: header.tensors_at].tobytes())
    value_type, value_at = header.value_at.get("general.file_type", (U32, None))
    if value_at is not None and value_type == U32:
        struct.pack_into("<I", start, value_at, FILE_TYPES[to])
    text = bytes(start) + b"".join(map(_entry, places))
    return text + bytes(aligned(len(text), header.alignment) - len(text))


def _entry(place: Place) -> bytes:
    name, shape = place.tensor.name.encode(), place.tensor.shape
    lengths = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name + lengths + struct.pack("<IQ", place.type, place.offset)


def _tensor_pieces(header: Header, old: Bytes, place: Place) -> Iterator[bytes]:
    tensor = place.tensor
    assert tensor.n_bytes is not None  # layout refused unknown types
    begin = header.data_at + tensor.offset
    rows = old[begin : begin + tensor.n_bytes].reshape(
        -1, tensor.n_bytes * tensor.shape[0] // _weights(tensor)
    )
    step = max(1, PIECE_WEIGHTS // tensor.shape[0])
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        yield some.tobytes() if place.type == tensor.type else _converted(some, tensor, place.type)


def _weights(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64))


def _converted(rows: Bytes, tensor: Tensor, to: int) -> bytes:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    try:
        weights = dequantize(rows, GGMLQuantizationType(tensor.type))
    except NotImplementedError:
        raise BadInput(
            f"{tensor.name} is of {tensor.type_name}, which the gguf library cannot read"
        ) from None
    new: Bytes = quantize(weights, GGMLQuantizationType(to))
    return new.tobytes()


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def main(arguments: list[str]) -> int:
    """SOURCE TARGET TYPE. Exit code 1 with one line on standard error when it cannot be done."""
    if len(arguments) != 3:
        print("usage: python -m calm.sources.requantise SOURCE TARGET TYPE", file=sys.stderr)
        return 2
    source, target, to = arguments
    with suppress(OSError):
        os.nice(BACKGROUND_NICE)
    try:
        requantise(Path(source), Path(target), to, lambda n: print(n, flush=True))
    except (BadInput, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
