"""How benchmarks/tools.py judges a call, and that its questions are whole."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.tools import (  # noqa: E402
    QUESTIONS,
    Case,
    Expected,
    Function,
    Questions,
    Result,
    judge,
    misses,
    report,
    request_body,
)

TIMER = Expected(name="set_timer", arguments={"minutes": [25], "label": ["Eggs", None]})
STOP = Expected(name="stop", arguments={})


def case(*calls: Expected) -> Case:
    return Case(set="first", question="q", tools=("set_timer", "stop"), calls=calls)


@pytest.mark.parametrize(
    ("arguments", "exact"),
    [
        ('{"minutes": 25}', True),
        ('{"minutes": 25.0, "label": " eggs "}', True),
        ('{"minutes": 25, "label": null}', True),
        ('{"minutes": "25"}', False),
        ('{"minutes": true}', False),
        ('{"minutes": 25, "label": "rice"}', False),
        ('{"minutes": 25, "volume": 3}', False),
        ("{}", False),
        ("[]", False),
        ("{", False),
    ],
)
def test_arguments_are_compared_by_value(arguments: str, exact: bool) -> None:
    assert judge(case(TIMER), [Function(name="set_timer", arguments=arguments)]) == (True, exact)


def test_functions_are_compared_as_a_bag() -> None:
    timer, stop = (
        Function(name="set_timer", arguments='{"minutes":25}'),
        Function(name="stop", arguments="{}"),
    )
    assert judge(case(TIMER, STOP), [stop, timer]) == (True, True)
    assert judge(case(TIMER, STOP), [timer]) == (False, False)
    assert judge(case(TIMER), [timer, timer]) == (False, False)
    assert judge(case(), []) == (True, True)
    assert judge(case(), [stop]) == (False, False)


def test_two_calls_of_one_function_find_their_own_expectation() -> None:
    twice = case(Expected(name="f", arguments={"x": [1, 2]}), Expected(name="f", arguments={"x": [1]}))
    made = [Function(name="f", arguments='{"x":1}'), Function(name="f", arguments='{"x":2}')]
    assert judge(twice, made) == (True, True)


def test_the_questions_are_whole() -> None:
    questions = msgspec.json.decode(QUESTIONS.read_bytes(), type=Questions)
    assert len({one.question for one in questions.cases}) == len(questions.cases)
    for one in questions.cases:
        assert 1 <= len(one.tools) <= 5
        assert set(one.tools) <= questions.tools.keys()
        assert {call.name for call in one.calls} <= set(one.tools)
        for call in one.calls:
            parameters = msgspec.convert(questions.tools[call.name]["parameters"], dict[str, object])
            known = msgspec.convert(parameters["properties"], dict[str, object])
            needed = msgspec.convert(parameters["required"], list[str])
            assert set(needed) <= call.arguments.keys() <= known.keys()
        sent = msgspec.json.decode(request_body("m", one, questions.tools), type=dict[str, object])
        assert sent["model"] == "m"


def test_the_report_counts_and_names_what_failed() -> None:
    made = (Function(name="stop", arguments="{}"),)
    good = Result(case(STOP), made, True, True, 0.5, 10, 2.0)
    bad = Result(case(), made, False, False, 0.5, 10, None)
    lost = Result(case(STOP), (), False, False, 0.1, 0, None, error="no model")
    text = report([good, bad, lost])
    assert "one call               2      0.50    0.50" in text
    assert "mean latency 500 ms, 10.0 tokens, 20 tokens/s" in text
    assert "mean energy 2.00 J per question (1 known)" in text
    assert "1 requests failed, the first with: no model" in text
    assert misses([good, bad, lost]).count("q\n") == 2
