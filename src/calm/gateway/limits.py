"""What one caller may ask of the door, in one record, so that wiring sets it and nothing else decides it."""

from __future__ import annotations

from calm.records import Record


class Limits(Record, frozen=True, kw_only=True):
    """Bounds on a request and on a connection. Exceeding one is a clean 4xx that names the bound."""

    max_body_bytes: int = 8 * 2**20
    """Largest request body, after decompression (413 beyond)."""
    body_timeout_s: float = 30.0
    """Time for the whole body to arrive (408 beyond): a caller that trickles bytes holds no handler."""
    keepalive_s: float = 75.0
    """An idle connection, or one whose request headers do not complete, is closed after this."""
    ping_s: float = 15.0
    """A silent stream gets an SSE comment this often, so that proxies keep it open."""
    stall_s: float = 60.0
    """A client that takes in nothing of its stream for this long is cut off: it holds a model's slot."""
    max_samples: int = 16
    """Largest `n`."""
    max_messages: int = 4096
    """Most messages in a chat."""
    max_inputs: int = 2048
    """Most prompts or embedding inputs in one request."""
    max_depth: int = 64
    """Deepest nesting of the JSON body."""
    max_stops: int = 16
    """Most stop strings."""
