"""Writes the calls, token by token: greedy, within the grammar, several tokens a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .grammar import Place, spelled
from .network import Network
from .prompt_lookup import guessed
from .refusal import Left, Refused
from .request import Asked
from .tokens import EOS, TOOL_CALL, TOOLS, Tokenizer, harmless, piece_text

if TYPE_CHECKING:
    from .network import Rows

READ_TOKENS = 1024
FORCED = '[{"name":"'
USUAL = ('[{"name":"x","arguments":{"', '"}}]', '"}},{"name":"')
GUESSED_TOKENS = 4


@dataclass
class Written:
    """One answer's tokens, as far as it got."""

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    complete: bool = False
    runs: int = 0
    read_s: float = 0.0
    write_s: float = 0.0


class Writer:
    """A question and tools in, the text of the calls out."""

    def __init__(self, network: Network, tokenizer: Tokenizer, pieces: Sequence[str], context: int) -> None:
        self._network = network
        self._tokenizer = tokenizer
        self._texts = [piece_text(piece) for piece in pieces]
        self._room = min(context, READ_TOKENS)
        self._usual = [token for text in USUAL for token in tokenizer.encode(text)]
        self._forced = [TOOL_CALL, *tokenizer.encode(FORCED)]

    def write(self, asked: Asked, alive: Callable[[], bool]) -> Written:
        """Raises Refused when the prompt is too long, Left when `alive` says that nobody waits any more."""
        prompt = self._prompt(asked)
        written = Written(prompt_tokens=len(prompt))
        started = time.perf_counter()
        hidden = self._network.read(prompt)
        written.read_s = time.perf_counter() - started
        self._continue(asked, hidden, [*self._usual, *prompt], written, alive)
        written.write_s = time.perf_counter() - started - written.read_s
        return written

    def text(self, written: Written) -> str:
        ids = [token for token in written.tokens if token != TOOL_CALL]
        return self._tokenizer.decode(ids).strip()

    def _prompt(self, asked: Asked) -> list[int]:
        tools = json.dumps([tool.described() for tool in asked.tools], separators=(",", ":"))
        question = self._tokenizer.encode(harmless(asked.question))
        prompt = [*question, TOOLS, *self._tokenizer.encode(harmless(tools))]
        if len(prompt) > self._room:
            reason = f"question and tools take {len(prompt)} tokens, the model reads {self._room}"
            raise Refused(f"messages: {reason}; give fewer tools or shorter descriptions", param="messages")
        return prompt

    def _continue(
        self, asked: Asked, hidden: object, seen: Sequence[int], written: Written, alive: Callable[[], bool]
    ) -> None:
        place = Place({tool.plain: spelled(tool.parameters) for tool in asked.choosable})
        written.tokens = list(self._forced) if asked.must_call else []
        place = place.after("".join(self._texts[token] for token in written.tokens)) or place
        while len(written.tokens) < asked.limit:
            if not alive():
                raise Left
            known = [EOS, *written.tokens]
            guess = guessed(known, seen, min(GUESSED_TOKENS, asked.limit - len(written.tokens) - 1))
            rows = self._network.score(hidden, [*known, *guess], len(guess) + 1)
            written.runs += 1
            for row, expected in zip(rows, [*guess, None], strict=True):
                token, place = self._pick(row, place)
                if token == EOS:
                    written.complete = True
                    return
                written.tokens.append(token)
                if token != expected:
                    break

    def _pick(self, row: Rows, place: Place) -> tuple[int, Place]:
        """The likeliest token that may come here, and the place after it: greedy, temperature is not read."""
        likeliest = int(row.argmax())
        following = self._after(place, likeliest)
        if following is not None:
            return likeliest, following
        for token in row.argsort()[::-1].tolist():
            following = self._after(place, token)
            if following is not None:
                return token, following
        return likeliest, place

    def _after(self, place: Place, token: int) -> Place | None:
        if token == EOS:
            return None if place.inside else place
        text = self._texts[token]
        if not text:  # a control token, or part of a character
            return place if place.takes_anything() else None
        return place.after(text)
