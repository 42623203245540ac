"""A second real client: LangChain's ChatOpenAI works with nothing but a base URL."""

from __future__ import annotations

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from tests.system.conftest import GEMMA, PATIENCE_S, SMOL, Server

pytestmark = pytest.mark.models


def chat(server: Server, model: str) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",  # type: ignore[arg-type]
        model=model,
        temperature=0,
        max_tokens=24,  # type: ignore[call-arg]
        max_retries=0,
        timeout=PATIENCE_S,
    )


def test_invoke(server: Server) -> None:
    answer = chat(server, GEMMA).invoke("What is the capital of France?")
    assert "Paris" in str(answer.content)
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["model_name"] == GEMMA


def test_routed(server: Server) -> None:
    answer = chat(server, "calm").invoke("What is the capital of France?")
    assert answer.content
    assert answer.response_metadata["model_name"] in server.snapshot()["models"]


def test_stream(server: Server) -> None:
    parts = list(chat(server, GEMMA).stream("What is the capital of France?"))
    assert len(parts) > 2
    assert "Paris" in "".join(str(part.content) for part in parts)


async def test_async_stream(server: Server) -> None:
    parts = [part async for part in chat(server, SMOL).astream("Who painted the Mona Lisa?")]
    assert "Vinci" in "".join(str(part.content) for part in parts)


def test_two_turns(server: Server) -> None:
    model = chat(server, GEMMA)
    turns: list[BaseMessage] = [
        SystemMessage("You answer briefly."),
        HumanMessage("What is the capital of Spain?"),
    ]
    first = model.invoke(turns)
    assert "Madrid" in str(first.content)
    second = model.invoke([*turns, AIMessage("Madrid."), HumanMessage("And of Italy?")])
    assert "Rome" in str(second.content)
