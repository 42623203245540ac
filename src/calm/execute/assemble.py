"""A whole answer out of its stream.

llama.cpp's server looks for a client that left only now and then while it works on a plain request, and not
at all while another request on the same engine emits tokens; on a stream it notices at the next token. So
dispatch always streams from it, and a caller who wanted one JSON body gets the one assembled here. Streaming
also shows the first token, which a plain answer hides. Pure: chunks in, body out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import msgspec

JsonObject = dict[str, object]
_decode = msgspec.json.Decoder(dict[str, object]).decode
WHOLE = {"chat.completion.chunk": "chat.completion"}
JOINED = ("content", "reasoning_content", "refusal")


class Assembly:
    """Feed it every payload of one stream in order, then take `body()`."""

    def __init__(self, *, chat: bool) -> None:
        self._chat = chat
        self._top: JsonObject = {}
        self._choices: dict[int, JsonObject] = {}
        self._tokens: dict[int, int] = {}

    def add(self, payload: bytes) -> None:
        """Take in one chunk. What is no chunk is left out."""
        try:
            chunk = _decode(payload)
        except msgspec.MsgspecError:
            return
        choices = chunk.pop("choices", None)
        self._top.update({key: value for key, value in chunk.items() if value is not None})
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self._merge(cast("JsonObject", choice))

    def body(self) -> bytes:
        """The answer as the engine would have given it without a stream."""
        top = dict(self._top)
        top["object"] = WHOLE.get(str(top.get("object")), top.get("object"))
        top["choices"] = [self._choices[index] for index in sorted(self._choices)]
        usage = top.get("usage")
        if isinstance(usage, dict) and len(self._choices) > 1:
            top["usage"] = summed(usage, sum(self._tokens.values()))
        return msgspec.json.encode(top)

    def _merge(self, chunk: JsonObject) -> None:
        index = chunk.get("index")
        place = index if isinstance(index, int) else 0
        whole = self._choices.get(place)
        if whole is None:
            empty: JsonObject = (
                {"message": {"role": "assistant", "content": None}} if self._chat else {"text": ""}
            )
            whole = self._choices[place] = {"index": place, **empty, "finish_reason": None}
        if chunk.get("finish_reason") is not None:
            whole["finish_reason"] = chunk["finish_reason"]
        said = self._merge_chat(whole, chunk) if self._chat else self._merge_text(whole, chunk)
        self._tokens[place] = self._tokens.get(place, 0) + said
        self._merge_logprobs(whole, chunk.get("logprobs"))

    def _empty(self, place: int) -> JsonObject:
        said: JsonObject = {"text": ""}
        if self._chat:
            said = {"message": {"role": "assistant", "content": None}}
        return {"index": place, **said, "finish_reason": None}

    def _merge_chat(self, whole: JsonObject, chunk: JsonObject) -> bool:
        delta = chunk.get("delta")
        if not isinstance(delta, dict):
            return False
        message = cast("JsonObject", whole["message"])
        for key, value in delta.items():
            if key in JOINED and isinstance(value, str):
                message[key] = f"{message.get(key) or ''}{value}"
            elif key == "tool_calls" and isinstance(value, list):
                merge_calls(cast("list[JsonObject]", message.setdefault("tool_calls", [])), value)
            elif value is not None and key not in JOINED:
                message[key] = value
        return any(delta.get(key) for key in (*JOINED, "tool_calls"))

    def _merge_text(self, whole: JsonObject, chunk: JsonObject) -> bool:
        text = chunk.get("text")
        if not isinstance(text, str):
            return False
        whole["text"] = f"{whole['text']}{text}"
        return bool(text)

    def _merge_logprobs(self, whole: JsonObject, piece: object) -> None:
        """Every list of the piece (content, refusal, tokens, ...) continues the list of that name."""
        if not isinstance(piece, dict):
            return
        merged = cast("JsonObject", whole.setdefault("logprobs", {}))
        for key, value in piece.items():
            before = merged.get(key)
            if isinstance(before, list) and isinstance(value, list):
                before.extend(value)
            elif value is not None or key not in merged:
                merged[key] = value


def merge_calls(calls: list[JsonObject], pieces: list[object]) -> None:
    """Tool calls come in pieces: id and name first, then the arguments' text bit by bit."""
    for piece in pieces:
        if not isinstance(piece, dict):
            continue
        place = piece.get("index")
        place = place if isinstance(place, int) else max(0, len(calls) - 1)
        while len(calls) <= place:
            calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
        call = calls[place]
        call.update({k: v for k, v in piece.items() if k not in ("index", "function") and v is not None})
        function, more = cast("JsonObject", call["function"]), piece.get("function")
        if isinstance(more, dict):
            for key in ("name", "arguments"):
                function[key] = f"{function[key]}{more.get(key) or ''}"


def summed(usage: Mapping[str, object], completion_tokens: int) -> JsonObject:
    """llama.cpp counts one choice of several; the tokens that were streamed are the truth."""
    prompt = usage.get("prompt_tokens")
    total = completion_tokens + (prompt if isinstance(prompt, int) else 0)
    return {**usage, "completion_tokens": completion_tokens, "total_tokens": total}
