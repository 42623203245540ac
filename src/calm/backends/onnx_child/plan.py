"""What the parent tells the child, in a JSON file: the one record that both sides know."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Plan:
    """`library` are the directories of the packages, since `-I -S` hides them.

    `weights` is one file, because a card's source is one: encoder.onnx and decoder.onnx, whose lengths in bytes
    `sizes` gives, then the SentencePiece model. `home` is a private directory for them while they are read.
    """

    library: Sequence[str]
    weights: str
    sizes: Sequence[int]
    socket: str
    home: str
    model: str
    threads: int
    context: int
    slots: int


def read_plan(path: str) -> Plan:
    return Plan(**json.loads(Path(path).read_bytes()))
