"""The official openai client at the door: it parses answers, and each failure to its own exception class."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from calm.errors import DeadlineExceeded, EngineLost, NoCandidate, QueueFull, UnknownModel
from calm.gateway.auth import Guard, Keys
from calm.gateway.fake import CHAT_CHUNKS, Script, ScriptedService, serving
from calm.gateway.limits import Limits
from calm.gateway.server import Server

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService()


@pytest.fixture
async def server(service: ScriptedService, tmp_path: Path) -> AsyncIterator[Server]:
    limits = Limits(max_body_bytes=10_000)
    async with serving(service, Keys(tmp_path / "k.toml"), limits=limits) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{server.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


async def test_answers(client: openai.AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model="calm", messages=MESSAGES, extra_body={"calm": {"goal": "energy"}}
    )
    assert chat.choices[0].message.content == "hello"
    assert chat.usage.total_tokens == 7
    assert chat.calm["energy_j"] == 1.5
    text = await client.completions.create(model="small", prompt="x")
    assert text.choices[0].text == "hello"
    vectors = await client.embeddings.create(model="small", input=["x"], encoding_format="float")
    assert vectors.data[0].embedding == [0.6, 0.8]
    assert "calm" in [model.id async for model in client.models.list()]
    assert (await client.models.retrieve("small")).id == "small"


async def test_streams(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="calm", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello"
    assert chunks[-1].usage.completion_tokens == 2
    assert chunks[-1].calm["model"] == "small"


@pytest.mark.parametrize(
    ("failure", "kind", "code"),
    [
        (QueueFull("full", retry_after_s=1), openai.RateLimitError, "queue_full"),
        (NoCandidate("none"), openai.UnprocessableEntityError, "no_eligible_model"),
        (UnknownModel("which", field="model"), openai.NotFoundError, "model_not_found"),
        (DeadlineExceeded("late"), openai.InternalServerError, "deadline_exceeded"),
        (EngineLost("gone"), openai.InternalServerError, "engine_lost"),
        (RuntimeError("bug"), openai.InternalServerError, "internal_error"),
    ],
)
async def test_failures_are_the_clients_own_exceptions(
    client: openai.AsyncOpenAI,
    service: ScriptedService,
    failure: Exception,
    kind: type[openai.APIStatusError],
    code: str,
) -> None:
    service.script = lambda ask: Script(before=(failure,))
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(model="calm", messages=MESSAGES, stream=stream)
        assert caught.value.code == code
        assert caught.value.response.headers["x-calm-request-id"]


async def test_a_bad_request_names_its_field(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="calm", messages=MESSAGES, temperature=9)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.APIStatusError) as large:
        await client.completions.create(model="calm", prompt="x" * 20_000)
    assert large.value.status_code == 413


async def test_keys(tmp_path: Path, service: ScriptedService) -> None:
    keys = Keys(tmp_path / "keys.toml")
    key = keys.create("ann")
    async with serving(service, keys, guard=Guard(keys)) as server:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="calm-wrong", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()
        async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as ann:
            assert (await ann.models.list()).data
            with pytest.raises(openai.PermissionDeniedError):
                await ann.post(f"{server.url}/calm/v1/models/small/unload", cast_to=object)


async def test_a_stream_that_breaks_raises(client: openai.AsyncOpenAI, service: ScriptedService) -> None:
    service.script = lambda ask: Script(steps=(*CHAT_CHUNKS[:3], EngineLost("it died")))
    stream = await client.chat.completions.create(model="calm", messages=MESSAGES, stream=True)
    seen = [(await anext(stream)).choices[0].delta.content for _ in range(3)]
    assert seen == ["", "hel", "lo"]
    with pytest.raises(openai.APIError, match="it died"):
        await anext(stream)


async def test_closing_a_stream_cancels_the_work(
    client: openai.AsyncOpenAI, service: ScriptedService
) -> None:
    service.script = lambda ask: Script(steps=CHAT_CHUNKS[:1] * 200_000)
    stream = await client.chat.completions.create(model="calm", messages=MESSAGES, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await service.ended.wait()
    assert service.outcomes[0].status == "cancelled"
