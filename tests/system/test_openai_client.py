"""The official `openai` client, sync and async, sees what it expects of OpenAI."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from tests.system.conftest import GEMMA, SMOL, TINY, Launch, Server, eventually

pytestmark = pytest.mark.models

ASKED: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Who painted the Mona Lisa?"}]
COUNT: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me a story about a dog."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "painter": {"type": "string", "maxLength": 30},
        "year": {"type": "integer", "maximum": 3000},
    },
    "required": ["painter", "year"],
    "additionalProperties": False,
}
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

# --- whole answers ----------------------------------------------------------------------------------


def test_whole_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=SMOL, messages=ASKED, temperature=0, max_tokens=12)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens > 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


async def test_async_whole_answer(aclient: openai.AsyncOpenAI) -> None:
    answer = await aclient.chat.completions.create(model=SMOL, messages=ASKED, temperature=0, max_tokens=5)
    assert answer.choices[0].message.content


def test_max_completion_tokens_is_a_limit_too(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=SMOL, messages=ASKED, temperature=0, max_completion_tokens=3
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_same_seed_same_answer(client: openai.OpenAI) -> None:
    def ask(**sampling: Any) -> str | None:
        answer = client.chat.completions.create(model=SMOL, messages=COUNT, max_tokens=12, **sampling)
        return answer.choices[0].message.content

    assert ask(temperature=0, seed=7) == ask(temperature=0, seed=7)
    # A cached prompt is evaluated in other batches than a fresh one, and rounding may then tip a draw.
    fresh = {"extra_body": {"cache_prompt": False}}
    warm = [ask(temperature=1, seed=seed, **fresh) for seed in (7, 7, 8)]
    assert warm[0] == warm[1]
    assert warm[0] != warm[2]


def test_stop_ends_before_the_string(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=GEMMA, messages=ASKED, temperature=0, max_tokens=20)
    cut = client.chat.completions.create(
        model=GEMMA, messages=ASKED, temperature=0, max_tokens=20, stop=["da Vinci"]
    )
    assert "da Vinci" in (whole.choices[0].message.content or "")
    assert "da Vinci" not in (cut.choices[0].message.content or "")
    assert "Leonardo" in (cut.choices[0].message.content or "")
    assert cut.choices[0].finish_reason == "stop"


def test_two_answers_at_once(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=SMOL, messages=COUNT, temperature=1.5, max_tokens=12, n=2, seed=1
    )
    assert sorted(choice.index for choice in answer.choices) == [0, 1]
    first, second = (choice.message.content for choice in answer.choices)
    assert first
    assert second
    assert first != second


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=SMOL, messages=ASKED, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    for token in tokens:
        assert len(token.top_logprobs) == 2
        assert token.logprob == pytest.approx(max(top.logprob for top in token.top_logprobs), abs=1e-4)
        assert token.logprob <= 0


def test_completion_of_several_prompts_and_stop(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=SMOL, prompt="One, two, three, four,", temperature=0, max_tokens=20, stop=", seven"
    )
    assert answer.choices[0].text == " five, six"
    assert answer.choices[0].finish_reason == "stop"


# --- streams ----------------------------------------------------------------------------------------


def test_stream_says_the_same_as_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=GEMMA, messages=ASKED, temperature=0, max_tokens=20)
    chunks = list(
        client.chat.completions.create(model=GEMMA, messages=ASKED, temperature=0, max_tokens=20, stream=True)
    )
    said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert said == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.model for chunk in chunks} == {GEMMA}
    assert all(chunk.usage is None for chunk in chunks), "usage nobody asked for"
    assert all(chunk.choices for chunk in chunks), (
        "a chunk without choices breaks clients that asked for none"
    )


def test_stream_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=SMOL,
            messages=ASKED,
            temperature=0,
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_async_stream(aclient: openai.AsyncOpenAI) -> None:
    stream = await aclient.chat.completions.create(
        model=SMOL, messages=ASKED, temperature=0, max_tokens=6, stream=True
    )
    said = [chunk.choices[0].delta.content async for chunk in stream if chunk.choices]
    assert "".join(text for text in said if text)


def test_completion_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=SMOL, prompt="One, two, three, four,", temperature=0, max_tokens=6, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream).startswith(" five, six")


# --- structured output and tools --------------------------------------------------------------------


@pytest.mark.parametrize("model", [SMOL, GEMMA])
def test_json_schema_is_obeyed(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=ASKED,
        temperature=0,
        max_tokens=100,
        response_format={"type": "json_schema", "json_schema": {"name": "painting", "schema": SCHEMA}},
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert set(found) == {"painter", "year"}
    assert isinstance(found["year"], int)


def test_json_schema_without_a_pinned_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="calm",
        messages=ASKED,
        temperature=0,
        max_tokens=100,
        response_format={"type": "json_schema", "json_schema": {"name": "painting", "schema": SCHEMA}},
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"painter", "year"}


def test_tools_no_model_of_the_default_fleet_can_use_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="does not do tools"):
        client.chat.completions.create(model=SMOL, messages=ASKED, tools=[WEATHER])


TOOL_TEMPLATE = """
template = '''
{%- if tools %}{{- "<|im_start|>system\\nYou may call functions:\\n" }}
{%- for tool in tools %}{{- tool | tojson }}{{- "\\n" }}{%- endfor %}
{{- 'Answer with <tool_call>\\n{"name": "...", "arguments": {...}}\\n</tool_call><|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{{- "<|im_start|>" + message.role + "\\n" + (message.content or "") }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- "}\\n</tool_call>" }}
{%- endfor %}{{- "<|im_end|>\\n" }}{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}
'''
"""


def test_tools_reach_a_model_whose_card_declares_them(launch: Launch) -> None:
    """The tool's definition stands in the prompt, and whatever a model this small says has OpenAI's shape."""
    server = launch(SMOL, start=False)
    card = server.fleet / f"{SMOL}.toml"
    text = re.sub(
        r"\ntemplate = '''.*?'''\n", lambda _: TOOL_TEMPLATE, card.read_text(encoding="utf-8"), flags=re.S
    )
    lines = [
        f'{line.split("]")[0]}, "tools"]' if line.startswith("capabilities") else line
        for line in text.split("\n")
    ]
    card.write_text("\n".join(lines), encoding="utf-8")
    server.start()
    question: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": "What is the weather in Paris?"}
    ]
    with server.openai() as client:
        plain = client.chat.completions.create(model=SMOL, messages=question, temperature=0, max_tokens=4)
        armed = client.chat.completions.create(
            model=SMOL, messages=question, temperature=0, max_tokens=40, tools=[WEATHER], tool_choice="auto"
        )
        message = armed.choices[0].message
        assert plain.usage is not None
        assert armed.usage is not None
        assert armed.usage.prompt_tokens > plain.usage.prompt_tokens + 30
        assert message.content or message.tool_calls
        for call in message.tool_calls or []:
            assert call.type == "function"
            assert call.function.name == "get_weather"
        answered = client.chat.completions.create(
            model=SMOL,
            temperature=0,
            max_tokens=30,
            tools=[WEATHER],
            messages=[
                *question,
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "call_1", "content": "Paris: sunny, 21 degrees"},
            ],
        )
        assert answered.choices[0].message.content or answered.choices[0].message.tool_calls


# --- what CALM does not know, and what is wrong -----------------------------------------------------


def test_unknown_fields_reach_the_engine(client: openai.OpenAI) -> None:
    """A grammar is llama.cpp's own extension: the answer shows that it arrived."""
    answer = client.chat.completions.create(
        model=SMOL,
        messages=ASKED,
        max_tokens=10,
        extra_body={"grammar": 'root ::= "violet" | "orange"', "nobody_knows_this": {"deep": [1]}},
    )
    assert answer.choices[0].message.content in ("violet", "orange")


def test_listing(server: Server, client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "calm"
    assert {"calm/energy", "calm/quality", SMOL, GEMMA, TINY} <= set(names)
    assert client.models.retrieve(SMOL).id == SMOL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="smollm3-135m", messages=ASKED)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert SMOL in caught.value.message


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("temperature", {"temperature": 9}),
    ("max_tokens", {"max_tokens": 0}),
    ("messages", {"messages": []}),
    ("messages[0].role", {"messages": [{"role": "wizard", "content": "x"}]}),
    ("n", {"n": 1000}),
    ("stop", {"stop": ["x"] * 99}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
]


@pytest.mark.parametrize(("field", "change"), WRONG, ids=[field for field, _ in WRONG])
def test_bad_request_names_the_field(client: openai.OpenAI, field: str, change: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": SMOL, "messages": ASKED, **change})
    assert caught.value.param == field
    assert field in caught.value.message


def test_prompt_longer_than_every_context_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="context"):
        client.chat.completions.create(
            model="calm", messages=[{"role": "user", "content": "word " * 30_000}], max_tokens=5
        )


def test_embeddings_without_a_capable_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="does not do embeddings"):
        client.embeddings.create(model="calm", input="a dog")


def test_embeddings_of_a_card_that_offers_them(launch: Launch) -> None:
    server = launch(SMOL, start=False)
    card = server.fleet / f"{SMOL}.toml"
    lines = card.read_text(encoding="utf-8").split("\n")
    lines = ['capabilities = ["chat", "embeddings"]' if ln.startswith("capabilities") else ln for ln in lines]
    card.write_text("\n".join(lines), encoding="utf-8")
    server.start()
    with server.openai() as client:
        texts = ["A dog ran home.", "The dog runs home.", "Quarterly tax filing rules"]
        found = client.embeddings.create(model=SMOL, input=texts)
        vectors = [item.embedding for item in found.data]
        assert found.usage.prompt_tokens > 10
        assert [item.index for item in found.data] == [0, 1, 2]
        near, far = dot(vectors[0], vectors[1]), dot(vectors[0], vectors[2])
        assert near > far
        whole = client.chat.completions.create(model=SMOL, messages=ASKED, max_tokens=3)
        assert whole.choices[0].message.content, "one engine does both"


def dot(first: list[float], second: list[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))


# --- many at once -----------------------------------------------------------------------------------


async def test_concurrent_streams_keep_apart(aclient: openai.AsyncOpenAI, server: Server) -> None:
    """Eight callers of four slots and two models: each gets its own answer, whole."""
    import asyncio

    async def count(number: int) -> str:
        stream = await aclient.chat.completions.create(
            model=(SMOL, GEMMA)[number % 2],
            messages=COUNT,
            stream=True,
            max_tokens=40,
            extra_body={"grammar": f'root ::= "caller {number} is served"'},
        )
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        return "".join(parts)

    said = await asyncio.gather(*(count(number) for number in range(8)))
    assert said == [f"caller {number} is served" for number in range(8)]
    eventually("no request in flight", lambda: server.snapshot()["in_flight"] == 0)


def test_the_raw_bytes_end_with_done(server: Server) -> None:
    with server.stream("Hi", SMOL, max_tokens=2) as response:
        text = response.read().decode()
    assert text.rstrip().endswith("data: [DONE]")
    assert check_frames(text, json.loads)


def check_frames(text: str, decode: Callable[[str], Any]) -> bool:
    frames = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return all(decode(frame)["object"] == "chat.completion.chunk" for frame in frames[:-1])
