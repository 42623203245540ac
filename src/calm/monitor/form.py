"""The form of a question: how it is laid out, whatever it is about.

A word embedding sees what a text is about and forgets how it stands there: a passage with a question under it, a list of
lettered options and a list of tables are the same bag of words without it. Fourteen cheap numbers say how, each about
0 where a chat message of one sentence has it and at most LIMIT away. They tell fields apart (calm.analyze.fields);
docs/decisions/0004-prediction.md has what they gain.
"""

from __future__ import annotations

import re
from math import log, log1p

LIMIT = 2.5
_SAMPLE_CHARS = 4096
"""Of a longer text its beginning and its last line speak for the rest."""

_OPTIONS = re.compile(r"^Options: ", re.MULTILINE)
_LETTERED = re.compile(r"^[A-Z]\. ", re.MULTILINE)
_NUMBER = re.compile(r"\d+")
_DIGITS = b"0123456789"
_CAPITALS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def form_of(text: str) -> tuple[float, ...]:
    """(14,), each within -LIMIT..LIMIT. Any text will do, an empty one too; microseconds."""
    whole = text.strip()
    sample = whole[:_SAMPLE_CHARS]
    raw = sample.encode("utf-8", "surrogatepass")
    size = max(len(sample), 1)

    def share(of: bytes) -> float:
        return (len(raw) - len(raw.translate(None, of))) / size

    said = (
        (log(max(len(whole), 1)) - 5.0) / 1.5,
        log1p(whole.count("\n") + 1) - 1.0,
        1.0 if "\n\n" in whole else 0.0,
        30.0 * share(_DIGITS),
        15.0 * share(_CAPITALS) - 0.4,
        60.0 * share(b"()"),
        40.0 * share(b","),
        60.0 * share(b";"),
        60.0 * share(b"_"),
        1.0 if whole.endswith("?") else 0.0,
        1.0 if _OPTIONS.search(sample) else 0.0,
        1.0 if len(_LETTERED.findall(sample)) >= 2 else 0.0,
        log1p(len(_NUMBER.findall(sample))) - 0.7,
        log1p(len(whole[whole.rfind("\n") + 1 :].split())) - 2.0,
    )
    return tuple(min(max(number, -LIMIT), LIMIT) for number in said)
