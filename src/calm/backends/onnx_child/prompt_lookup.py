"""Guesses a few tokens from what was read (Saxena 2023, prompt lookup decoding).

The decoder keeps no cache: every run reads all tokens so far. One run checks all guesses, and the answer is the
greedy one all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from .tokens import TOOL_CALL, TOOLS


def guessed(known: Sequence[int], seen: Sequence[int], count: int) -> list[int]:
    """What followed where the last two tokens, else the last one, stood in `seen` for the last time."""
    if len(known) == 1:
        return [TOOL_CALL, *seen[:3]][:count]
    for length in (2, 1):
        tail = list(known[-length:])
        for start in range(len(seen) - length - 1, -1, -1):
            if list(seen[start : start + length]) == tail:
                following = list(seen[start + length : start + length + count])
                return following[: following.index(TOOLS)] if TOOLS in following else following
    return []
