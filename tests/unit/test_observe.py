"""What is read off an engine's answer, whatever the engine."""

from __future__ import annotations

import pytest

from calm.execute.observe import Observation, error_message


def test_llama_cpp_tells_prefill_cache_and_usage() -> None:
    seen = Observation()
    seen.read(b'{"choices":[{"delta":{"role":"assistant","content":null}}]}', 1.0)
    assert seen.first_token_at_s is None  # a role is no token
    seen.read(b'{"choices":[{"delta":{"content":"Hi"}}]}', 2.0)
    seen.read(b'{"choices":[{"delta":{"content":"!"},"finish_reason":"stop"}]}', 3.0)
    assert seen.tokens_out() == 2
    seen.read(
        b'{"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":3,'
        b'"prompt_tokens_details":{"cached_tokens":4}},"timings":{"prompt_ms":125.0,"cache_n":6}}',
        4.0,
    )
    assert (seen.first_token_at_s, seen.finish_reason) == (2.0, "stop")
    assert (seen.prompt_tokens, seen.tokens_out(), seen.cached_tokens) == (10, 3, 6)
    assert seen.prefill_s == 0.125


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content", "refusal"])
def test_every_kind_of_content_is_a_first_token(key: str) -> None:
    seen = Observation()
    value = '[{"index":0}]' if key == "tool_calls" else '"x"'
    seen.read(f'{{"choices":[{{"delta":{{"{key}":{value}}}}}]}}'.encode(), 1.5)
    assert seen.first_token_at_s == 1.5


@pytest.mark.parametrize(
    "payload",
    [b"", b"no json", b"[]", b"7", b'{"choices":"x"}', b'{"usage":[]}', b'{"choices":[{"delta":3}]}'],
)
def test_what_is_no_answer_changes_nothing(payload: bytes) -> None:
    seen = Observation()
    seen.read(payload, 1.0)
    assert (seen.tokens_out(), seen.prompt_tokens, seen.first_token_at_s, seen.error) == (None,) * 4


def test_nonsense_counts_are_not_taken() -> None:
    seen = Observation()
    seen.read(b'{"usage":{"prompt_tokens":-5,"completion_tokens":2},"timings":{"prompt_ms":-1}}', 1.0)
    assert (seen.prompt_tokens, seen.tokens_out(), seen.prefill_s) == (None, 2, None)


def test_an_error_event_is_noticed() -> None:
    seen = Observation()
    seen.read(b'{"error":{"code":500,"message":"context full"}}', 1.0)
    assert seen.error == "context full"
    fine = Observation()
    fine.read(b'{"error":null,"choices":[]}', 1.0)
    assert fine.error is None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error":{"message":"too long"}}', "too long"),
        (b'{"error":"no"}', "no"),
        (b'{"detail":"gone"}', "gone"),
        (b"{}", "engine error"),
        (b"<html>busy</html>", "<html>busy</html>"),
    ],
)
def test_error_messages_of_all_shapes(body: bytes, said: str) -> None:
    assert error_message(body) == said
