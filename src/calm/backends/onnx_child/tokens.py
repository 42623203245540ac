"""Text and tokens: the control tokens, and how a text keeps clear of them."""

from __future__ import annotations

from typing import Protocol

EOS, TOOL_CALL, TOOLS = 1, 4, 5


class Tokenizer(Protocol):
    """The part of SentencePieceProcessor that is used."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


def piece_text(piece: str) -> str:
    """A token's text; control tokens have none, and neither has half a character."""
    if piece.startswith("<0x") and piece.endswith(">"):
        byte = int(piece[3:-1], 16)
        return chr(byte) if byte < 128 else ""
    return "" if piece.startswith("<") and piece.endswith(">") else piece.replace("\u2581", " ")


def harmless(text: str) -> str:
    """Without the spellings that the tokenizer takes for its own control tokens."""
    return text.replace("<tools>", "< tools>").replace("<tool_call>", "< tool_call>")
