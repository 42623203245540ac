"""Which texts are calls of the given tools.

As in the model's own code, names of functions and arguments can only come out as given; here a value also
begins as its type does, an enumeration yields its members, and the text ends only where the JSON does.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping

from .tools import Parameter

# What a value of each JSON Schema type begins with; any other type may begin with anything.
BEGINNINGS = {
    "string": '"',
    "integer": "-0123456789",
    "number": "-0123456789",
    "boolean": "tf",
    "array": "[",
    "object": "{",
}
ANY_BEGINNING = "".join(BEGINNINGS.values()) + "n"


class Place:
    """Where in the JSON of the calls the text ends; it knows which characters may come next."""

    def __init__(self, functions: Mapping[str, Mapping[str, Parameter]]) -> None:
        self._functions = functions
        self._function = ""
        self._word: str | None = None
        self._is_key = False
        self._escaped = False
        self._open = ""
        self._keys: tuple[str, ...] = ()
        self._last = ""

    @property
    def inside(self) -> bool:
        """Whether the text cannot end here."""
        return bool(self._open)

    def after(self, text: str) -> Place | None:
        """The place after more text, None where the tools' schemas do not allow it."""
        following = copy.copy(self)
        return following if all(following._step(char) for char in text) else None

    def takes_anything(self) -> bool:
        """False inside a word of which only some spellings are known."""
        return self._word is None or self._words() is None

    def _step(self, char: str) -> bool:
        return self._outside(char) if self._word is None else self._in_word(self._word, char)

    def _in_word(self, word: str, char: str) -> bool:
        words = self._words()
        if char == '"' and not self._escaped:
            self._close(word)
            return words is None or word in words
        self._escaped = char == "\\" and not self._escaped
        self._word = word + char
        return words is None or any(known.startswith(self._word) for known in words)

    def _close(self, word: str) -> None:
        if self._is_key:
            self._keys = (*self._keys[:-1], word)
        elif self._at_name():
            self._function = word
        self._word, self._last = None, '"'

    def _outside(self, char: str) -> bool:
        if char.isspace():
            return True
        fits = char in self._beginnings() if self._last == ":" else True
        if char == '"':
            self._word = ""
            self._is_key = self._open.endswith("{") and self._last in ("{", ",")
            fits = fits and self._words() != []
        elif char in "[{":
            self._open, self._keys = self._open + char, (*self._keys, "")
        elif char in "]}":
            self._open, self._keys = self._open[:-1], self._keys[:-1]
        self._last = char
        return fits

    def _words(self) -> list[str] | None:
        """What the word may be: a function, an argument's name, a member of its enumeration; None: anything."""
        if self._is_key:
            return list(self._parameters()) if self._in_arguments() else None
        if self._at_name():
            return list(self._functions)
        parameter = self._parameters().get(self._keys[-1]) if self._in_arguments() else None
        return list(parameter.members) if parameter and parameter.members else None

    def _beginnings(self) -> str:
        """Characters that the value of the argument just named may begin with."""
        parameter = self._parameters().get(self._keys[-1]) if self._in_arguments() else None
        return BEGINNINGS.get(parameter.kind if parameter else "", ANY_BEGINNING)

    def _parameters(self) -> Mapping[str, Parameter]:
        return self._functions.get(self._function, {})

    def _at_name(self) -> bool:
        return self._keys[-1:] == ("name",) and "arguments" not in self._keys

    def _in_arguments(self) -> bool:
        *outer, holder, _ = self._keys if len(self._keys) >= 2 else ("", "", "")
        return holder == "arguments" and "arguments" not in outer


def spelled(parameters: Mapping[str, Parameter]) -> Mapping[str, Parameter]:
    """By name as it stands in JSON, where é is \\u00e9."""
    return {json.dumps(name)[1:-1]: parameter for name, parameter in parameters.items()}
