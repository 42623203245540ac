"""Request bytes to an Ask: what is read, what is refused and with which field, what is left alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.errors import BadInput
from calm.gateway.limits import Limits
from calm.gateway.wire import (
    SHORT_TURN_BYTES,
    parse_chat,
    parse_completion,
    parse_embeddings,
    split_model,
    wants_usage,
)
from calm.records import Ask, Weights

LIMITS = Limits(max_samples=4, max_messages=20, max_inputs=3, max_depth=16, max_stops=4)
NO_HEADERS: Mapping[str, str] = MappingProxyType({})
USER = {"role": "user", "content": "Why is the sky blue at noon but red at dusk?"}


def chat(headers: Mapping[str, str] = NO_HEADERS, tenant: str | None = None, **fields: object) -> Ask:
    body = msgspec.json.encode({"messages": [USER], **fields})
    return parse_chat(body, headers, limits=LIMITS, request_id="r1", now_s=2.0, tenant=tenant)


def completion(**fields: object) -> Ask:
    return parse_completion(
        msgspec.json.encode(fields), NO_HEADERS, limits=LIMITS, request_id="r1", now_s=2.0
    )


def embeddings(**fields: object) -> Ask:
    return parse_embeddings(
        msgspec.json.encode(fields), NO_HEADERS, limits=LIMITS, request_id="r1", now_s=2.0
    )


def said(*turns: str) -> list[dict[str, str]]:
    """A conversation of user turns, each answered but the last."""
    messages = []
    for turn in turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "…"}]
    return messages[:-1]


# --- what is read ---------------------------------------------------------------------------------


def test_a_plain_chat() -> None:
    ask = chat(model="calm", max_tokens=7, temperature=0.5, frobnicate={"deep": [1, None]})
    assert (ask.kind, ask.model, ask.stream, ask.samples, ask.turns) == ("chat", None, False, 1, 1)
    assert (ask.request_id, ask.arrived_s, ask.max_tokens) == ("r1", 2.0, 7)
    assert ask.query == USER["content"]
    assert ask.prompt_chars == len(USER["content"])
    assert ask.requires == {"chat"}
    assert ask.body["frobnicate"] == {"deep": [1, None]}


def test_the_calm_object_stays_here_and_unknown_fields_go_on() -> None:
    ask = chat(calm={"goal": "latency"}, top_k=5)
    assert "calm" not in ask.body
    assert ask.body["top_k"] == 5
    assert ask.wishes.goal == "latency"


def test_max_completion_tokens_is_the_newer_name_and_wins() -> None:
    assert chat(max_tokens=9, max_completion_tokens=3).max_tokens == 3
    assert chat().max_tokens is None


def test_text_parts_are_read_and_others_passed() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    parts = [{"type": "text", "text": "What is"}, image, {"type": "text", "text": "in this picture?"}]
    ask = chat(messages=[{"role": "user", "content": parts}])
    assert ask.query == "What is\nin this picture?"
    assert ask.body["messages"] == [{"role": "user", "content": parts}]


def test_a_chat_without_a_user_turn_is_about_its_last_message() -> None:
    assert chat(messages=[{"role": "system", "content": "Tell a story."}]).query == "Tell a story."


@pytest.mark.parametrize("short", ["yes", "ok", "да", "もっと詳しく", "👍", "and in French?", ""])
def test_a_short_follow_up_carries_the_turn_before(short: str) -> None:
    ask = chat(messages=said("Explain photosynthesis to a child.", short))
    assert ask.query == f"Explain photosynthesis to a child.\n{short}"
    assert ask.turns == 2


@pytest.mark.parametrize("full", ["Now explain relativity.", "光合成を簡単に説明してください"])
def test_a_full_turn_stands_alone(full: str) -> None:
    assert len(full.encode()) >= SHORT_TURN_BYTES - 1
    assert chat(messages=said("Explain photosynthesis.", full + "!")).query == full + "!"


def test_a_row_of_short_turns_reaches_back_to_what_they_are_about() -> None:
    turns = ["long before all this, a question", "Explain photosynthesis.!", "no", "hm", "yes"]
    assert chat(messages=said(*turns)).query == "Explain photosynthesis.!\nno\nhm\nyes"
    assert chat(messages=said(*"abcdefghij")).query == "\n".join("cdefghij")


def test_tools_and_json_become_requirements() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    assert chat(tools=[tool]).requires == {"tools"}
    assert chat(tools=[tool], messages=said("One.", "Two.")).requires == {"chat", "tools"}
    assert chat(functions=[tool["function"]]).requires == {"chat", "tools"}
    assert chat(tools=[tool], tool_choice="none").requires == {"chat"}
    assert chat(tools=[]).requires == {"chat"}
    assert chat(response_format={"type": "json_schema", "json_schema": {}}).requires == {"chat", "json"}
    assert chat(response_format={"type": "text"}).requires == {"chat"}
    assert chat(tools=[tool]).prompt_chars == chat().prompt_chars + len(msgspec.json.encode([tool]))


def test_tool_calls_count_as_prompt_and_may_have_no_content() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    ask = chat(messages=[USER, turn, {"role": "tool", "content": "sunny", "tool_call_id": "1"}])
    assert ask.query == USER["content"]
    assert ask.prompt_chars == len(USER["content"]) + len("sunny") + len(msgspec.json.encode([call]))


def test_completion_prompts_in_every_form() -> None:
    assert completion(prompt="Once upon").query == "Once upon"
    several = completion(prompt=["one", "two"], n=2)
    assert (several.query, several.samples, several.prompt_chars) == ("one\ntwo", 4, 6)
    assert completion(prompt=[1, 2, 3], model="m").prompt_chars == 12
    rows = completion(prompt=[[1, 2], [3]], model="m")
    assert (rows.samples, rows.prompt_chars, rows.query) == (2, 12, "")
    assert rows.requires == {"completion"}


def test_embedding_inputs() -> None:
    ask = embeddings(input=["a", "bc"], model="minilm", dimensions=8)
    assert (ask.kind, ask.requires, ask.prompt_chars) == ("embeddings", {"embeddings"}, 3)
    assert ask.body["dimensions"] == 8


def test_wants_usage() -> None:
    assert wants_usage(chat(stream=True, stream_options={"include_usage": True}))
    assert not wants_usage(chat(stream=True, stream_options={"include_usage": False}))
    assert not wants_usage(chat(stream=True))


# --- model, wishes, conversation --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pinned", "goal"),
    [
        (None, None, None),
        ("", None, None),
        ("calm", None, None),
        ("calm/", None, None),
        ("calm/auto", None, None),
        ("calm/latency", None, "latency"),
        ("calmer", "calmer", None),
        ("org/model", "org/model", None),
    ],
)
def test_which_model(name: str | None, pinned: str | None, goal: str | None) -> None:
    assert split_model(name) == (pinned, goal)


def test_every_header_becomes_a_wish() -> None:
    ask = chat(
        {
            "x-calm-goal": "quality",
            "x-calm-weights": "latency=1, quality=3",
            "x-calm-deadline-s": "2.5",
            "x-calm-max-energy-j": "10",
            "x-calm-max-cost-usd": "0",
            "x-calm-models": "a, b,",
            "x-calm-privacy": "local",
            "x-calm-conversation": "c7",
        }
    )
    wishes = ask.wishes
    assert wishes.weights == Weights(latency=1, energy=0, quality=3, cost=0)
    assert (wishes.goal, wishes.deadline_s, wishes.max_energy_j, wishes.max_cost_usd) == (
        "quality",
        2.5,
        10,
        0,
    )
    assert (wishes.allowed_models, wishes.privacy, ask.conversation) == (("a", "b"), "local", "c7")


def test_the_body_wins_over_headers_field_by_field() -> None:
    headers = {"x-calm-deadline-s": "9", "x-calm-privacy": "local", "x-calm-goal": "energy"}
    wishes = chat(headers, model="calm/latency", calm={"deadline_s": 1, "privacy": None}).wishes
    assert (wishes.deadline_s, wishes.privacy, wishes.goal) == (1, "local", "latency")
    assert chat(headers, model="calm/latency", calm={"goal": "quality"}).wishes.goal == "quality"


def test_a_weight_left_out_counts_nothing() -> None:
    assert chat(calm={"weights": {"energy": 1}}).wishes.weights == Weights(
        latency=0, energy=1, quality=0, cost=0
    )


def test_a_conversation_keeps_its_id_as_it_grows() -> None:
    first = chat(messages=said("Explain photosynthesis."))
    later = chat(messages=said("Explain photosynthesis.", "Go on, in more detail please."))
    assert first.conversation == later.conversation
    assert first.conversation != chat(messages=said("Explain relativity.")).conversation
    assert first.conversation != chat(messages=said("Explain photosynthesis."), tenant="ann").conversation
    assert chat(calm={"conversation": "c1"}, tenant="ann").conversation == "ann:c1"


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [USER] * 21}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [USER, {"content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": 7}, "model"),
        ({"tools": {}}, "tools"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"calm": "fast"}, "calm"),
        ({"calm": {"speed": 1}}, "calm"),
        ({"calm": {"deadline_s": 0}}, "calm.deadline_s"),
        ({"calm": {"deadline_s": "1"}}, "calm.deadline_s"),
        ({"calm": {"max_energy_j": -1}}, "calm.max_energy_j"),
        ({"calm": {"max_cost_usd": -1}}, "calm.max_cost_usd"),
        ({"calm": {"privacy": "secret"}}, "calm.privacy"),
        ({"calm": {"allowed_models": []}}, "calm.allowed_models"),
        ({"calm": {"weights": {}}}, "calm.weights"),
        ({"calm": {"weights": {"latency": -1, "quality": 2}}}, "calm.weights"),
        ({"calm": {"weights": {"speed": 1}}}, "calm.weights"),
        ({"calm": {"weights": 3}}, "calm.weights"),
        ({"calm": {"conversation": "x" * 300}}, "calm.conversation"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, object], field: str) -> None:
    with pytest.raises(BadInput) as caught:
        chat(**fields)
    assert caught.value.field == field
    assert field in caught.value.message
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-calm-deadline-s", "soon"),
        ("x-calm-deadline-s", "nan"),
        ("x-calm-deadline-s", "inf"),
        ("x-calm-max-energy-j", "-1"),
        ("x-calm-weights", "latency"),
        ("x-calm-weights", "latency=inf"),
        ("x-calm-weights", "speed=1"),
        ("x-calm-weights", ""),
        ("x-calm-models", ","),
        ("x-calm-privacy", "secret"),
    ],
)
def test_a_wrong_header_is_named(header: str, value: str) -> None:
    with pytest.raises(BadInput) as caught:
        chat({header: value})
    assert caught.value.field == header


@pytest.mark.parametrize(
    ("make", "fields", "field"),
    [
        (completion, {}, "prompt"),
        (completion, {"prompt": []}, "prompt"),
        (completion, {"prompt": ["a", 1], "model": "m"}, "prompt"),
        (completion, {"prompt": [1, 2]}, "prompt"),
        (completion, {"prompt": ["a"] * 4}, "prompt"),
        (completion, {"prompt": [["a"]], "model": "m"}, "prompt[0][0]"),
        (embeddings, {}, "input"),
        (embeddings, {"input": [[1]] * 4, "model": "m"}, "input"),
        (embeddings, {"input": "a", "stream": True}, "stream"),
    ],
)
def test_wrong_prompts_and_inputs(make: Callable[..., Ask], fields: dict[str, object], field: str) -> None:
    with pytest.raises(BadInput) as caught:
        make(**fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"hi"',
        b"\xff\xfe",
        b'{"messages": "\xff"}',
        b'{"\xff": 1}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"temperature": NaN}',
        b'{"temperature": 1e999}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        b'{"messages": [{"role": "user", "content": "x"}], "a": ' + b"[" * 20 + b"]" * 20 + b"}",
        b'\xef\xbb\xbf{"messages": []}',
        b'{"messages": []} {}',
    ],
    ids=range(17),
)
def test_odd_json_is_a_clean_refusal(raw: bytes) -> None:
    with pytest.raises(BadInput):
        parse_chat(raw, NO_HEADERS, limits=LIMITS, request_id="r", now_s=0.0)


def test_of_a_key_written_twice_the_last_counts() -> None:
    raw = b'{"messages": [{"role": "user", "content": "one"}], "n": 9, "n": 1}'
    assert parse_chat(raw, NO_HEADERS, limits=LIMITS, request_id="r", now_s=0.0).samples == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["messages", "model", "stream", "n", "stop", "calm", "tools", "prompt", "input", "max_tokens", "role"]
)
BODIES = st.dictionaries(FIELDS | st.text(max_size=6), JSON, max_size=6)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool"]), "content": JSON}), max_size=4
)


@given(BODIES, st.none() | MESSAGES)
def test_any_json_is_an_ask_or_a_bad_input(
    body: dict[str, object], messages: list[dict[str, object]] | None
) -> None:
    if messages is not None:
        body = {**body, "messages": messages}
    raw = msgspec.json.encode(body)
    for parse in (parse_chat, parse_completion, parse_embeddings):
        with suppress(BadInput):
            ask = parse(raw, NO_HEADERS, limits=Limits(), request_id="r", now_s=0.0)
            assert ask.prompt_chars >= 0
            assert {**ask.body, "calm": 0} == {**msgspec.json.decode(raw), "calm": 0}


@given(st.binary(max_size=200))
def test_any_bytes_are_an_ask_or_a_bad_input(raw: bytes) -> None:
    with pytest.raises(BadInput):
        parse_chat(raw, NO_HEADERS, limits=LIMITS, request_id="r", now_s=0.0)
