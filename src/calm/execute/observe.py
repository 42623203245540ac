"""What an engine's answer tells about itself: first token, usage, timings, finish, error.

Reads OpenAI payloads (a whole body or one stream chunk) and llama.cpp's `timings`. Anything an engine leaves
out stays None; anything it adds is ignored. Pure: bytes in, observation updated.
"""

from __future__ import annotations

import msgspec


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Timings(msgspec.Struct):
    """llama.cpp: milliseconds of prefill, tokens found in the KV cache, tokens really prefilled."""

    prompt_ms: float | None = None
    cache_n: int | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    delta: msgspec.Raw = msgspec.Raw(b"")
    text: str | None = None


class _Payload(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


_decode = msgspec.json.Decoder(_Payload).decode


class Observation:
    """Accumulates what one answer says; its owner is the dispatch of that request."""

    def __init__(self) -> None:
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.prefill_s: float | None = None
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.first_token_at_s: float | None = None
        self._chunks = 0

    def read(self, payload: bytes, at_s: float) -> None:
        """Take in one JSON payload received at `at_s`; a payload that is no such JSON changes nothing."""
        try:
            seen = _decode(payload)
        except msgspec.MsgspecError:
            return
        if bytes(seen.error) not in (b"", b"null"):
            self.error = error_message(bytes(seen.error))
        for choice in seen.choices:
            self._choice(choice, at_s)
        if seen.usage:
            self._usage(seen.usage)
        if seen.timings:
            self._timings(seen.timings)

    def _choice(self, choice: _Choice, at_s: float) -> None:
        if choice.finish_reason:
            self.finish_reason = choice.finish_reason
        if choice.text or _carries_content(bytes(choice.delta)):
            self._chunks += 1
            if self.first_token_at_s is None:
                self.first_token_at_s = at_s

    def _usage(self, usage: _Usage) -> None:
        self.prompt_tokens = _count(usage.prompt_tokens, self.prompt_tokens)
        self.completion_tokens = _count(usage.completion_tokens, self.completion_tokens)
        if usage.prompt_tokens_details:
            self.cached_tokens = _count(usage.prompt_tokens_details.cached_tokens, self.cached_tokens)

    def _timings(self, timings: _Timings) -> None:
        if timings.prompt_ms is not None and timings.prompt_ms >= 0:
            self.prefill_s = timings.prompt_ms / 1000
        self.cached_tokens = _count(timings.cache_n, self.cached_tokens)

    def tokens_out(self, samples: int = 1) -> int | None:
        """Completion tokens as the engine counts them, else the content chunks seen (one token each).

        With several samples the larger of the two: llama.cpp counts only one of them.
        """
        if self.completion_tokens is None:
            return self._chunks or None
        return max(self.completion_tokens, self._chunks) if samples > 1 else self.completion_tokens


def _count(seen: int | None, before: int | None) -> int | None:
    return seen if seen is not None and seen >= 0 else before


def _carries_content(delta: bytes) -> bool:
    """True when a stream delta holds a token, not just the role."""
    if not delta or delta == b"null":
        return False
    try:
        fields = msgspec.json.decode(delta)
    except msgspec.MsgspecError:
        return False
    if not isinstance(fields, dict):
        return False
    return any(fields.get(key) for key in ("content", "tool_calls", "reasoning_content", "refusal"))


def error_message(error: bytes) -> str:
    """The human part of an engine's error, whatever its shape."""
    try:
        value = msgspec.json.decode(error)
    except msgspec.MsgspecError:
        return error.decode("utf-8", "replace")[:500]
    while isinstance(value, dict):
        value = value.get("error") or value.get("message") or value.get("detail") or "engine error"
    return str(value)[:500]
