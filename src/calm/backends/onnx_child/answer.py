"""What was written, in the shapes of OpenAI's chat completions; counts and times as llama.cpp gives them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .refusal import Json
from .request import Asked
from .writer import Written


def read_calls(text: str, asked: Asked) -> list[tuple[str, str]] | None:
    """(name as the caller spelled it, arguments as JSON) of each call; None when the text is no calls."""
    try:
        said = json.loads(text)
    except ValueError:
        return None
    names = {tool.plain: tool.name for tool in asked.choosable}
    calls = [_call(one, names) for one in (said if isinstance(said, list) else [said])]
    good = [call for call in calls if call is not None]
    if len(good) < len(calls):
        return None
    return good[:1] if asked.single else good


def _call(said: object, names: Mapping[str, str]) -> tuple[str, str] | None:
    if not isinstance(said, dict):
        return None
    name, arguments = said.get("name"), said.get("arguments")
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return names[name], json.dumps(arguments, ensure_ascii=False)


@dataclass(frozen=True)
class Answer:
    """One answer, as a whole body or as the events of a stream."""

    model: str
    written: Written
    calls: Sequence[tuple[str, str]]
    text: str
    number: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def finish_reason(self) -> str:
        if self.calls:
            return "tool_calls"
        return "stop" if self.written.complete else "length"

    def tool_calls(self) -> list[Json]:
        return [
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for name, arguments in self.calls
        ]

    def whole(self) -> Json:
        message: Json = {"role": "assistant", "content": None if self.calls else self.text}
        if self.calls:
            message = {**message, "tool_calls": self.tool_calls()}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], **self._counts()}

    def events(self, usage: bool) -> Iterator[Json]:
        """A call is known to be one when it is complete, so each comes in one event."""
        yield self._event({"role": "assistant", "content": None if self.calls else self.text})
        for index, call in enumerate(self.tool_calls()):
            yield self._event({"tool_calls": [{"index": index, **call}]})
        yield self._event({}, self.finish_reason)
        if usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], **self._counts()}

    def _event(self, delta: Json, finish: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> Json:
        return {"id": self.number, "object": kind, "created": self.created, "model": self.model}

    def _counts(self) -> Json:
        read, wrote = self.written.prompt_tokens, len(self.written.tokens)
        return {
            "usage": {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote},
            "timings": {
                "cache_n": 0,
                "prompt_n": read,
                "prompt_ms": self.written.read_s * 1e3,
                "predicted_n": wrote,
                "predicted_ms": self.written.write_s * 1e3,
            },
        }
