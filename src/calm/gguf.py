"""What a GGUF file is, read off its header: architecture, tensors, and whether an adapter fits a base.

llama.cpp gives up a whole load for one adapter of another shape, so CALM looks before it starts an engine. The
`gguf` library's reader makes an object of every entry of the vocabulary, seconds for a model of 262,144 words;
this one steps over arrays without keeping them and is done in milliseconds. Every count and length is held
against the size of the file before it is believed: a broken file is a BadInput in one line and never a large
allocation.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Shapes are ggml's
`ne`: the first number is the length of a row.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from calm.errors import BadInput

Scalar = str | int | float | bool

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMENSIONS: Final = 4
MAX_KEYS, MAX_TENSORS = 1 << 16, 1 << 20
MAX_STRINGS, MAX_STRING_BYTES = 1 << 24, 1 << 24

U32, BOOLEAN, STRING, ARRAY = 4, 7, 8, 9
_SCALARS: Final = {
    number: struct.Struct("<" + letter)
    for number, letter in enumerate("BbHhIif?")
} | {10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d")}  # fmt: skip
_LENGTH: Final = struct.Struct("<Q")
_U32: Final = struct.Struct("<I")

# ggml's types: name, weights per block, bytes per block (ggml-common.h).
TYPES: Final[Mapping[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor's entry. `n_bytes` is None for a type younger than this module."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    """From the start of the data."""
    n_bytes: int | None

    @property
    def type_name(self) -> str:
        return TYPES[self.type][0] if self.type in TYPES else f"type {self.type}"

    @property
    def quantised(self) -> bool:
        """Whether weights share a block's scale."""
        return self.type in TYPES and TYPES[self.type][1] > 1


@dataclass(frozen=True, slots=True)
class Header:
    """A file's metadata without its arrays, and its tensors in the order of the file. Positions in bytes."""

    name: str
    version: int
    metadata: Mapping[str, Scalar]
    tensors: Mapping[str, Tensor]
    alignment: int
    value_at: Mapping[str, tuple[int, int]]
    """Of every key: its value's type and where the value begins."""
    tensors_at: int
    """Where the list of tensors begins: all before it is magic, counts and metadata."""
    data_at: int

    @property
    def architecture(self) -> str | None:
        return _text(self.metadata.get("general.architecture"))

    @property
    def is_lora(self) -> bool:
        kind = (self.metadata.get("general.type"), self.metadata.get("adapter.type"))
        return kind == ("adapter", "lora")

    @property
    def lora_alpha(self) -> float | None:
        """The adapter's scale times its rank; None: 1 per rank."""
        alpha = self.metadata.get("adapter.lora.alpha")
        return float(alpha) if isinstance(alpha, int | float) else None


def read_header(path: Path) -> Header:
    """Blocking: a few pages of the file. Raises BadInput, naming the file and what is wrong with it."""
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return parse_header(data, path.name)
    except OSError as error:
        raise BadInput(f"{path.name}: cannot be read: {error.strerror or error}") from None
    except ValueError:  # mmap's word for an empty file
        raise BadInput(f"{path.name}: the file is empty; fetch it again") from None


def parse_header(data: bytes | mmap.mmap, name: str) -> Header:
    """The header of a whole file in memory; `name` is what messages call it. Raises BadInput."""
    cursor = _Cursor(data, name)
    version = _version(cursor)
    n_tensors = cursor.count("tensors", MAX_TENSORS, least_bytes=24)
    n_keys = cursor.count("metadata keys", MAX_KEYS, least_bytes=13)
    metadata, value_at = _metadata(cursor, n_keys)
    alignment = _alignment(metadata, cursor)
    tensors_at = cursor.at
    tensors = _tensors(cursor, n_tensors, alignment)
    data_at = aligned(cursor.at, alignment)
    _whole(cursor, tensors, data_at)
    return Header(name, version, metadata, tensors, alignment, value_at, tensors_at, data_at)


def aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def tensor_bytes(shape: tuple[int, ...], type_: int) -> int | None:
    """Size of a tensor's data; None for an unknown type. Raises ValueError for rows of broken blocks."""
    if type_ not in TYPES:
        return None
    _, block, block_bytes = TYPES[type_]
    if shape[0] % block:
        raise ValueError(f"rows of {shape[0]} weights do not divide into blocks of {block}")
    return math.prod(shape) // block * block_bytes


# --- adapters ------------------------------------------------------------------------------------


def fits(base: Header, adapter: Header) -> str | None:
    """Why llama.cpp would refuse `adapter` beside `base`, in plain words; None when the two fit.

    The rule of llama_adapter_lora_init (llama.cpp, src/llama-adapter.cpp): for a weight of ne = (in, out)
    `lora_a` has (in, r) and `lora_b` (r, out); for the token embedding a has (r, words), b (r, width).
    """
    if not adapter.is_lora:
        return f"{adapter.name} is not a LoRA adapter: its general.type is {_said(adapter, 'general.type')}"
    if adapter.architecture != base.architecture:
        return f"it was made for {adapter.architecture or 'an unnamed architecture'}, the base is {base.architecture}"
    if adapter.lora_alpha is not None and not math.isfinite(adapter.lora_alpha):
        return f"its adapter.lora.alpha is {adapter.lora_alpha}"
    pairs = lora_pairs(adapter)
    if isinstance(pairs, str):
        return pairs
    if "split.count" in base.metadata and base.metadata["split.count"] != 1:
        return None  # a base in several files: this header does not know all tensors, so the engine decides
    return next(filter(None, (_misfit(base, name, a, b) for name, (a, b) in pairs.items())), None)


def lora_pairs(adapter: Header) -> dict[str, tuple[Tensor, Tensor]] | str:
    """(a, b) by the weight they change, or what is wrong with the file's tensors."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        weight, _, half = name.rpartition(".")
        if half in ("lora_a", "lora_b"):
            halves.setdefault(weight, {})[half] = tensor
        elif not name.endswith("_norm.weight"):  # llama.cpp steps over those
            return f"its tensor {name} is neither .lora_a nor .lora_b"
    if not halves:
        return "it changes no weight: it holds no .lora_a and .lora_b tensors"
    lonely = next(
        (f"{weight}.{half}" for weight, found in halves.items() for half in found if len(found) < 2), ""
    )
    if lonely:
        return f"its tensor {lonely} lacks the other half"
    return {weight: (found["lora_a"], found["lora_b"]) for weight, found in halves.items()}


def _misfit(base: Header, name: str, a: Tensor, b: Tensor) -> str | None:
    weight = base.tensors.get(name)
    if weight is None:
        return f"the base has no tensor {name}"
    (w_in, w_out, *w_more), (a_in, a_out, *a_more), (b_in, b_out, *b_more) = map(_ne, (weight, a, b))
    if name.endswith("token_embd.weight"):
        right = (w_in, w_out, a_in) == (b_out, a_out, b_in)
    else:
        right = (w_in, w_out, a_out) == (a_in, b_out, b_in) and w_more == a_more == b_more
    if right:
        return None
    shapes = " and ".join("x".join(map(str, tensor.shape)) for tensor in (a, b))
    return f"{name} is {'x'.join(map(str, weight.shape))} in the base, the adapter's halves are {shapes}"


def _ne(tensor: Tensor) -> tuple[int, ...]:
    """Four numbers, as in ggml."""
    return tensor.shape + (1,) * (MAX_DIMENSIONS - len(tensor.shape))


def _said(header: Header, key: str) -> str:
    return repr(header.metadata[key]) if key in header.metadata else "not stated"


def _text(value: Scalar | None) -> str | None:
    return value if isinstance(value, str) else None


# --- reading -------------------------------------------------------------------------------------


class _Cursor:
    """A place in the file that only moves forward and never past the end."""

    __slots__ = ("at", "data", "name", "size")

    def __init__(self, data: bytes | mmap.mmap, name: str) -> None:
        self.data, self.name, self.size, self.at = data, name, len(data), 0

    def broken(self, what: str) -> BadInput:
        return BadInput(f"{self.name}: {what}; fetch the file again or correct the card's source")

    def take(self, n_bytes: int) -> int:
        """Step over `n_bytes`; where they began."""
        if n_bytes > self.size - self.at:
            raise self.broken(f"the file is truncated or not a GGUF: it ends at byte {self.size}")
        began, self.at = self.at, self.at + n_bytes
        return began

    def number(self, form: struct.Struct) -> Scalar:
        value: Scalar = form.unpack_from(self.data, self.take(form.size))[0]
        return value

    def u32(self) -> int:
        return int(self.number(_U32))

    def u64(self) -> int:
        return int(self.number(_LENGTH))

    def count(self, of: str, most: int, *, least_bytes: int) -> int:
        """How many entries follow, if that many can be: each takes `least_bytes` of the file at least."""
        n = self.u64()
        if n > most or n * least_bytes > self.size - self.at:
            raise self.broken(f"it claims {n} {of}, more than there can be")
        return n

    def string(self, errors: str = "replace") -> str:
        n_bytes = self.u64()
        if n_bytes > MAX_STRING_BYTES:
            raise self.broken(f"it claims a string of {n_bytes} bytes")
        began = self.take(n_bytes)
        return self.data[began : self.at].decode("utf-8", errors)

    def name_of(self, what: str) -> str:
        try:
            return self.string("strict")
        except UnicodeDecodeError:
            raise self.broken(f"the name of a {what} is not UTF-8") from None

    def skip_strings(self, n: int) -> None:
        """The vocabulary: this loop is where the time goes."""
        at, data, read, broken = self.at, self.data, _LENGTH.unpack_from, self.size
        try:
            for _ in range(n):
                at += 8 + read(data, at)[0]
        except (struct.error, OverflowError):
            at = broken + 1
        self.take(at - self.at)


def _version(cursor: _Cursor) -> int:
    if cursor.size < 4 or cursor.data[cursor.take(4) : 4] != MAGIC:
        raise cursor.broken("this is not a GGUF file")
    version = cursor.u32()
    if version not in VERSIONS and not version & 0xFFFF:
        raise cursor.broken("this GGUF is big-endian, which llama.cpp reads on big-endian machines only")
    if version not in VERSIONS:
        raise cursor.broken(f"this GGUF is of version {version}; 2 and 3 can be read")
    return version


def _metadata(cursor: _Cursor, n: int) -> tuple[dict[str, Scalar], dict[str, tuple[int, int]]]:
    values: dict[str, Scalar] = {}
    positions: dict[str, tuple[int, int]] = {}
    for _ in range(n):
        key, type_ = cursor.name_of("key"), cursor.u32()
        if key in positions:
            raise cursor.broken(f"the key {key!r} stands twice")
        positions[key] = (type_, cursor.at)
        if type_ == ARRAY:
            _skip_array(cursor, key)
        else:
            values[key] = _value(cursor, type_, key)
    return values, positions


def _value(cursor: _Cursor, type_: int, key: str) -> Scalar:
    if type_ == STRING:
        return cursor.string()
    if type_ not in _SCALARS:
        raise cursor.broken(f"the key {key!r} is of an unknown type, {type_}")
    return cursor.number(_SCALARS[type_])


def _skip_array(cursor: _Cursor, key: str) -> None:
    type_ = cursor.u32()
    if type_ == STRING:
        cursor.skip_strings(cursor.count(f"strings in {key!r}", MAX_STRINGS, least_bytes=8))
    elif type_ in _SCALARS:
        each = _SCALARS[type_].size
        cursor.take(each * cursor.count(f"numbers in {key!r}", cursor.size, least_bytes=each))
    else:
        raise cursor.broken(f"the array {key!r} holds an unknown type, {type_}")


def _alignment(metadata: Mapping[str, Scalar], cursor: _Cursor) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or not 8 <= value <= 1 << 20 or value & (value - 1):
        raise cursor.broken(f"its general.alignment is {value!r}")
    return value


def _tensors(cursor: _Cursor, n: int, alignment: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for _ in range(n):
        tensor = _tensor(cursor)
        if tensor.name in tensors:
            raise cursor.broken(f"the tensor {tensor.name!r} stands twice")
        if tensor.offset % alignment:
            raise cursor.broken(
                f"the tensor {tensor.name!r} does not begin at a multiple of {alignment} bytes"
            )
        tensors[tensor.name] = tensor
    return tensors


def _tensor(cursor: _Cursor) -> Tensor:
    name, n_dimensions = cursor.name_of("tensor"), cursor.u32()
    if not 1 <= n_dimensions <= MAX_DIMENSIONS:
        raise cursor.broken(f"the tensor {name!r} has {n_dimensions} dimensions")
    shape = tuple(cursor.u64() for _ in range(n_dimensions))
    type_, offset = cursor.u32(), cursor.u64()
    if not 0 < math.prod(shape) < 1 << 63:
        raise cursor.broken(f"the tensor {name!r} has the shape {shape}")
    try:
        return Tensor(name, shape, type_, offset, tensor_bytes(shape, type_))
    except ValueError as error:
        raise cursor.broken(f"the tensor {name!r}: {error}") from None


def _whole(cursor: _Cursor, tensors: Mapping[str, Tensor], data_at: int) -> None:
    ends = (data_at + tensor.offset + (tensor.n_bytes or 0) for tensor in tensors.values())
    end = max(ends, default=cursor.at)
    if end > cursor.size:
        raise cursor.broken(f"the file is truncated: {cursor.size} bytes of {end}")
