"""Server-sent events off the wire: an engine's bytes in, whole `data` payloads out.

Exists because an engine's stream is cut at arbitrary bytes, and because engines differ in line endings, in
keep-alive comments and in the space after the colon. Follows the WHATWG HTML standard, section 9.2.6
("Interpreting an event stream"), less event names, ids and retry, which no OpenAI stream uses.
"""

from __future__ import annotations

import re

from calm.errors import EngineLost

MAX_EVENT_BYTES = 16 * 2**20
"""No honest token event comes near this; an engine that never ends one must not eat the memory."""

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class SseParser:
    """Incremental parser of one stream. Its owner feeds it in order; it keeps only the unfinished rest."""

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._bytes = 0
        self._limit = max_event_bytes
        self._started = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Payloads completed by `chunk`, [DONE] included, in order; events without data yield nothing.

        Raises EngineLost when one event grows beyond `max_event_bytes`.
        """
        text = self._rest + chunk if self._rest else chunk
        if not self._started:
            if len(text) < len(_BOM) and _BOM.startswith(text):
                self._rest = text
                return []
            self._started = True
            text = text.removeprefix(_BOM)
        lines, self._rest = _split(text)
        payloads = [payload for line in lines if (payload := self._line(line)) is not None]
        self._check_size()
        return payloads

    def _line(self, line: bytes) -> bytes | None:
        """Take in one line; a blank one ends the event."""
        if not line:
            return self._end_of_event()
        if line.startswith(b"data:"):
            value = line[6:] if line[5:6] == b" " else line[5:]
            self._data.append(value)
            self._bytes += len(value)
        elif line == b"data":
            self._data.append(b"")
        return None

    def _end_of_event(self) -> bytes | None:
        if not self._data:
            return None
        payload = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        self._data, self._bytes = [], 0
        return payload or None

    def _check_size(self) -> None:
        if self._bytes + len(self._rest) > self._limit:
            raise EngineLost(f"the engine sent an event of more than {self._limit} bytes")


def _split(text: bytes) -> tuple[list[bytes], bytes]:
    """Finished lines and the rest. A CR at the very end may be half of a CRLF, so it waits."""
    if b"\r" not in text:
        lines = text.split(b"\n")
        return lines[:-1], lines[-1]
    body, tail = (text[:-1], b"\r") if text.endswith(b"\r") else (text, b"")
    lines = _LINE_END.split(body)
    return lines[:-1], lines[-1] + tail
