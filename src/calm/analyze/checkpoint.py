"""What was learned, as bytes that can be trusted after a crash: version and checksum before the content.

Anything unexpected (another version, a flipped bit, half a file) is None, and the caller stays on its priors.
"""

from __future__ import annotations

import hashlib

import msgspec

from calm.analyze.evidence import RowState

MAGIC = b"CALMest1"

_DIGEST_BYTES = 16
_FORMATS = (MAGIC,)


class ModelMemory(msgspec.Struct, frozen=True):
    """Everything learned about one model. `identity` tells whether it is still the same model."""

    identity: str
    states: dict[str, RowState]
    service_s: float | None = None


class Memory(msgspec.Struct, frozen=True):
    """The whole checkpoint. `quality_basis`: quality states are only good for this embedder and table."""

    quality_basis: str
    models: dict[str, ModelMemory]


def encode(memory: Memory) -> bytes:
    content = msgspec.msgpack.encode(memory)
    return MAGIC + _digest(content) + content


def decode(data: bytes) -> Memory | None:
    """None when the bytes are not a whole, unharmed checkpoint of this version."""
    head = len(MAGIC) + _DIGEST_BYTES
    content = data[head:]
    if data[: len(MAGIC)] not in _FORMATS or data[len(MAGIC) : head] != _digest(content):
        return None
    try:
        return msgspec.msgpack.decode(content, type=Memory)
    except msgspec.MsgspecError:
        return None


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
