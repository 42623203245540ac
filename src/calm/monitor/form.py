"""The form of a question: how it is laid out, whatever it is about.

A word embedding sees what a text is about and forgets how it stands there: a passage with a question under it, a list of
lettered options and a list of tables are the same bag of words without it. Sixteen cheap numbers say how, each near 0
in a short chat message and never beyond LIMIT. How long a text is is not among them: a short abstract is an abstract.
They tell fields apart (calm.analyze.fields); docs/decisions/0004-prediction.md has what they gain.
"""

from __future__ import annotations

import re
from math import log1p

LIMIT = 2.5
_SAMPLE_CHARS = 4096
"""Of a longer text its beginning and its end speak for the rest."""

_OPTIONS = re.compile(r"^Options: ", re.MULTILINE)
_LETTERED = re.compile(r"^[A-Z]\. ", re.MULTILINE)
_NUMBER = re.compile(r"\d+")
_OPTION = re.compile(r"(?:Options: |[A-Z]\. )")
_SENTENCE_END = re.compile(r"(?<=[.!?:;]) +")
_POLAR = re.compile(
    r"(?:is|are|was|were|do|does|did|can|could|will|would|should|has|have|had|may|might)\b", re.IGNORECASE
)
_OPEN = re.compile(r"\b(?:who|whom|whose|what|when|where|which|why|how)\b", re.IGNORECASE)
_COUNTING = re.compile(r"\bhow (?:many|much)\b", re.IGNORECASE)
_DIGITS = b"0123456789"
_CAPITALS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def form_of(text: str) -> tuple[float, ...]:
    """(FORM,), each within -LIMIT..LIMIT. Any text will do, an empty one too; microseconds."""
    whole = text.strip()
    sample = whole[:_SAMPLE_CHARS]
    raw = sample.encode("utf-8", "surrogatepass")
    size = max(len(sample), 1)
    end = whole[-_SAMPLE_CHARS:]
    asked = _question(end)

    def share(of: bytes) -> float:
        return (len(raw) - len(raw.translate(None, of))) / size

    said = (
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
        log1p(len(end[end.rfind("\n") + 1 :].split())) - 2.0,
        1.0 if _POLAR.match(asked) else 0.0,
        1.0 if _OPEN.search(asked) else 0.0,
        1.0 if _COUNTING.search(asked) else 0.0,
    )
    return tuple(min(max(number, -LIMIT), LIMIT) for number in said)


def _question(text: str) -> str:
    """The last sentence before any options."""
    for line in reversed(text.split("\n")):
        if line.strip() and not _OPTION.match(line):
            return _SENTENCE_END.split(line.strip())[-1]
    return ""
