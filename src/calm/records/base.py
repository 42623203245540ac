"""What all records share: they are immutable, keyword-only, and of plain words that several of them use."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
Kind = Literal["chat", "completion", "embeddings"]
Capability = Literal["chat", "completion", "tools", "json", "embeddings"]
Placement = Literal["local", "remote"]
Privacy = Literal["any", "local"]
Residency = Literal["cold", "loading", "ready", "draining", "unloading", "failed", "remote"]
MeterKind = Literal["measured", "attributed", "modelled"]
OutcomeStatus = Literal["ok", "error", "cancelled", "timeout", "rejected"]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all records: immutable, keyword-only, JSON-ready through msgspec."""


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything an operator writes: an unknown field is a mistake, not a comment."""
