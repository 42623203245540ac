"""A whole answer out of its stream: what a client of a plain request must not be able to tell apart."""

from __future__ import annotations

import json

from calm.execute.assemble import Assembly


def chunk(index: int = 0, finish: str | None = None, **fields: object) -> bytes:
    choice = {"index": index, "finish_reason": finish, **fields}
    return json.dumps(
        {"object": "chat.completion.chunk", "id": "x", "model": "m", "choices": [choice]}
    ).encode()


def assembled(*payloads: bytes, chat: bool = True) -> dict:  # type: ignore[type-arg]
    assembly = Assembly(chat=chat)
    for payload in payloads:
        assembly.add(payload)
    return json.loads(assembly.body())  # type: ignore[no-any-return]


def test_text_joins_in_order_with_usage_and_timings() -> None:
    body = assembled(
        chunk(delta={"role": "assistant", "content": None}),
        chunk(delta={"content": "Hel"}),
        chunk(delta={"content": "lo"}),
        chunk(finish="stop", delta={}),
        b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5},"timings":{"a":1}}',
    )
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}
    ]
    assert body["usage"]["completion_tokens"] == 2
    assert (body["id"], body["model"], body["timings"]) == ("x", "m", {"a": 1})


def test_tool_calls_come_in_pieces() -> None:
    body = assembled(
        chunk(delta={"role": "assistant", "content": None}),
        chunk(
            delta={"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "add"}}]}
        ),
        chunk(delta={"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]}),
        chunk(delta={"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}),
        chunk(delta={"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "b", "arguments": "{}"}}]}),
        chunk(finish="tool_calls", delta={}),
    )
    calls = body["choices"][0]["message"]["tool_calls"]
    assert [(call["id"], call["function"]) for call in calls] == [
        ("c1", {"name": "add", "arguments": '{"a":1}'}),
        ("c2", {"name": "b", "arguments": "{}"}),
    ]
    assert body["choices"][0]["message"]["content"] is None
    assert body["choices"][0]["finish_reason"] == "tool_calls"


def test_several_samples_keep_their_places_and_all_their_tokens_count() -> None:
    body = assembled(
        chunk(1, delta={"content": "b1"}),
        chunk(0, delta={"content": "a1"}),
        chunk(1, delta={"content": "b2"}),
        chunk(0, "stop", delta={}),
        chunk(1, "length", delta={}),
        b'{"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":2,"total_tokens":6}}',
    )
    assert [choice["message"]["content"] for choice in body["choices"]] == ["a1", "b1b2"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}


def test_logprobs_continue_their_lists() -> None:
    body = assembled(
        chunk(delta={"content": "a"}, logprobs={"content": [{"token": "a"}], "refusal": None}),
        chunk(delta={"content": "b"}, logprobs={"content": [{"token": "b"}]}),
    )
    assert body["choices"][0]["logprobs"]["content"] == [{"token": "a"}, {"token": "b"}]


def test_completions_join_their_text() -> None:
    body = assembled(
        b'{"object":"text_completion","choices":[{"index":0,"text":"one "}]}',
        b'{"object":"text_completion","choices":[{"index":0,"text":"two","finish_reason":"length"}]}',
        chat=False,
    )
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "one two", "finish_reason": "length"}]


def test_what_is_no_chunk_is_left_out() -> None:
    assert assembled(b"nonsense", b"[]", b'{"choices":7}', b'{"choices":[3]}', chunk(delta=4))["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": None}, "finish_reason": None}
    ]
