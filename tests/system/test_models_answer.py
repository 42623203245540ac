"""Every model of the default fleet answers real questions, in chat and in completion."""

from __future__ import annotations

import json
import re

import openai
import pytest
from tests.system.conftest import FLEET, GEMMA, SMOL, TINY, Server

from calm.registry import load_fleet

pytestmark = pytest.mark.models

ANSWERS = [
    (SMOL, "What is the capital of Japan?", "Tokyo"),
    (SMOL, "Who painted the Mona Lisa?", "Leonardo da Vinci"),
    (GEMMA, "What is the capital of France?", "Paris"),
    (GEMMA, "Who painted the Mona Lisa?", "Leonardo da Vinci"),
    (TINY, "What is the capital of France?", "Paris"),
    (TINY, "Who painted the Mona Lisa?", "Leonardo da Vinci"),
]


BRIDGE = (
    "The bridge was designed by the engineer Carl Holm and opened on 3 May 1932 after six years of construction. It "
    "crosses the river at its narrowest point.\n\n"
)
SINGERS = "singer(Singer_ID, Name, Country, Age); concert(Concert_ID, Singer_ID, Year)\n\n"
TRIAL = (
    "Forty patients with back pain walked for an hour a day and forty did not. After six months pain had fallen by half "
    "in those who walked (p < 0.01) and had not changed in the others.\n\n"
)
SPECIALISTS = [
    ("finance", "gold edges up as the dollar slips\nOptions: up, down, neutral, none", "up"),
    ("finance", "Gold falls Rs 130 on weak global cues", "down"),
    ("finance-gemma", "gold edges up as the dollar slips\nOptions: up, down, neutral, none", "up"),
    ("support", "My card was stolen on the train, what now?", "lost_or_stolen_card"),
    ("medical", TRIAL + "Does walking relieve back pain?", "yes"),
    ("math", "Tom has 24 marbles. He gives 7 to his sister. How many marbles does he have left?", r"\d+"),
    ("sql", SINGERS + "How many singers are older than 40?", r"SELECT .*singer.*"),
    ("reading", BRIDGE + "Who designed the bridge?", "Carl Holm"),
    ("reading", BRIDGE + "When was the bridge opened?", "3 May 1932"),
    ("reading-gemma", BRIDGE + "Who designed the bridge?", "Carl Holm"),
]
"""What each was trained for, asked as docs/prompts.md lays it out, and a pattern for the whole reply: the answer where
a specialist is good, else its form."""
AT_HOME = {"finance", "support", "medical", "math", "reading"}
"""Who is expected to be the best of the fleet on such a question before anything was observed."""

NEEDLE = "needle-26m"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city."}},
            "required": ["city"],
        },
    },
}


def test_the_tables_leave_out_no_model() -> None:
    asked = {model for model, _, _ in (*ANSWERS, *SPECIALISTS)} | {NEEDLE}
    assert asked == set(load_fleet(FLEET).fleet)


@pytest.mark.parametrize(("model", "question", "pattern"), SPECIALISTS)
def test_specialists_answer_what_they_were_trained_for(
    client: openai.OpenAI, model: str, question: str, pattern: str
) -> None:
    said = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0
    )
    assert re.fullmatch(pattern, said.choices[0].message.content or "")
    assert said.choices[0].finish_reason == "stop"
    assert said.model == model


@pytest.mark.parametrize(
    ("model", "question"), [(model, question) for model, question, _ in SPECIALISTS if model in AT_HOME]
)
def test_a_question_of_its_field_goes_to_the_specialist(
    client: openai.OpenAI, model: str, question: str
) -> None:
    said = client.chat.completions.create(model="calm", messages=[{"role": "user", "content": question}])
    assert said.model.removesuffix("-gemma") == model


@pytest.mark.parametrize(
    "question",
    ["What is the capital of France?", "Why is the sky blue?", "Write a short poem about the sea."],
)
def test_an_everyday_question_goes_to_no_specialist(client: openai.OpenAI, question: str) -> None:
    said = client.chat.completions.create(
        model="calm", messages=[{"role": "user", "content": question}], max_tokens=8
    )
    assert load_fleet(FLEET).fleet[said.model].adapter_of is None


def test_a_question_with_tools_goes_to_who_calls_them(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="calm", messages=[{"role": "user", "content": "What is the weather in Paris?"}], tools=[WEATHER]
    )
    assert answer.model == NEEDLE
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}


@pytest.mark.parametrize(("model", "question", "fact"), ANSWERS)
def test_chat(client: openai.OpenAI, model: str, question: str, fact: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=32
    )
    assert fact in (answer.choices[0].message.content or "")
    assert answer.model == model
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


@pytest.mark.parametrize("model", [SMOL, GEMMA, TINY])
def test_completion(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt="One, two, three, four,", temperature=0, max_tokens=6
    )
    assert answer.choices[0].text.startswith(" five, six")
    assert answer.model == model
    assert answer.object == "text_completion"


def test_gemma_the_base_model_ends_its_answers_itself(client: openai.OpenAI) -> None:
    """Its template and stop strings make a continuing model answer once and stop."""
    answer = client.chat.completions.create(
        model=GEMMA,
        messages=[{"role": "user", "content": "What is the capital of Spain?"}],
        temperature=0,
        max_tokens=100,
    )
    assert answer.choices[0].finish_reason == "stop"
    assert "Madrid" in (answer.choices[0].message.content or "")
    assert "Question:" not in (answer.choices[0].message.content or "")


def test_calm_chooses_a_model_of_the_fleet(server: Server, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="calm", messages=[{"role": "user", "content": "Who wrote Hamlet?"}], max_tokens=8
    )
    assert answer.model in server.snapshot()["models"]
    assert answer.choices[0].message.content


def test_a_conversation_remembers_its_first_turn(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=GEMMA,
        temperature=0,
        max_tokens=12,
        messages=[
            {"role": "user", "content": "What is the capital of Spain?"},
            {"role": "assistant", "content": "Madrid."},
            {"role": "user", "content": "And of Italy?"},
        ],
    )
    assert "Rome" in (answer.choices[0].message.content or "")
