"""Logging of `calm serve`: plain readable lines on stderr, with what looks like a secret blotted out.

The last line of defence only: code that logs leaves credentials out by itself. A URL with a password or a
token in an exception's text would still get through, so the formatter looks at every finished line.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import TextIO

BLOT = "[hidden]"
_SECRETS = (
    (re.compile(r"(://)[^/\s@]+@"), rf"\1{BLOT}@"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}"), rf"\1 {BLOT}"),
    (re.compile(r"\b(?:calm-[A-Za-z0-9_-]{43}|hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,})"), BLOT),
    (
        re.compile(r"(?i)\b((?:api[_-]?key|token|password|secret)[\"']?\s*[=:]\s*[\"']?)[^\s\"',&]{6,}"),
        rf"\1{BLOT}",
    ),
)
CHATTY = ("aiohttp", "asyncio", "watchfiles", "huggingface_hub", "filelock", "urllib3")
"""Libraries that say little of use below warning."""


class PlainFormatter(logging.Formatter):
    """`14:02:31 warning calm.gateway: text`, without `info` and without secrets."""

    def __init__(self) -> None:
        super().__init__(datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()} "
        return f"{self.formatTime(record, self.datefmt)} {level}{record.name}: {record.getMessage()}"

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


def without_secrets(text: str) -> str:
    """The text with credentials of URLs, Authorization headers, and known kinds of keys replaced."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def set_up_logging(level: str, stream: TextIO | None = None) -> None:
    """One handler on stderr for everything; `level` is debug, info, warning or error."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(PlainFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    if level != "debug":
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
