"""What a single value of a card may be, once for the validator and for the published JSON Schema."""

from __future__ import annotations

import re
from collections.abc import Mapping

Fragment = Mapping[str, str | int | float]

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"

_POSITIVE: Fragment = {"exclusiveMinimum": 0}
_NOT_NEGATIVE: Fragment = {"minimum": 0}
_AT_LEAST_ONE: Fragment = {"minimum": 1}

LIMITS: Mapping[str, Mapping[str, Fragment]] = {
    "ModelCard": {
        "name": {"pattern": NAME_PATTERN},
        "description": {"minLength": 1},
        "adapter_of": {"pattern": NAME_PATTERN},
        "context": _AT_LEAST_ONE,
        "capabilities": {"minItems": 1},
        "memory_hint_bytes": _AT_LEAST_ONE,
        "max_in_flight": _AT_LEAST_ONE,
    },
    "SourceSpec": {
        "parts": {"minItems": 1},
        "sha256": {"pattern": r"^[0-9a-fA-F]{64}$"},
        "bytes": _AT_LEAST_ONE,
        "filename": {"pattern": r"^[A-Za-z0-9_][^/\\]*$"},
    },
    "ConvertSpec": {"sha256": {"pattern": r"^[0-9a-fA-F]{64}$"}, "bytes": _AT_LEAST_ONE},
    "EngineSpec": {
        "slots": _AT_LEAST_ONE,
        "threads": _AT_LEAST_ONE,
        "health": {"pattern": "^/"},
        "start_timeout_s": _POSITIVE,
        "stop_timeout_s": _NOT_NEGATIVE,
        "url": {"pattern": "^https?://[^/]"},
        "api_key_env": {"pattern": "^[A-Z_][A-Z0-9_]*$"},
        "upstream_model": {"minLength": 1},
    },
    "ChatSpec": {"answer_tokens": _AT_LEAST_ONE},
    "PriorSpec": {
        "prefill_tps": _POSITIVE,
        "decode_tps": _POSITIVE,
        "load_s": _NOT_NEGATIVE,
        "output_tokens": _POSITIVE,
        "energy_j_per_token": _NOT_NEGATIVE,
    },
    "PriceSpec": {"input_usd_per_mtok": _NOT_NEGATIVE, "output_usd_per_mtok": _NOT_NEGATIVE},
    "SandboxSpec": {"nice": {"minimum": -20, "maximum": 19}},
}

RESERVED_NAMES = frozenset({"calm"})
"""Names that mean "choose for me" in a request's `model` field."""

PLACEHOLDERS = frozenset({"path", "port", "socket", "host", "threads", "context", "slots", "name"})
"""What `engine.cmd` may mention in braces."""


def matches(pattern: str, value: str) -> bool:
    """As JSON Schema means it: `$` is the end, where Python would allow one more newline."""
    return re.search(pattern.replace("$", r"\Z"), value) is not None
