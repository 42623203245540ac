"""What is read off a request, and the language it is in."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.monitor.features import estimate_tokens, extract, tokens_per_char
from calm.monitor.language import LanguageDetector, clean, code, enough
from calm.records import Ask, Capability, Vector


class Constant:
    name = "constant"
    dimensions = 3

    def embed(self, text: str) -> Vector:
        return np.asarray([1.0, 0.0, float(len(text) > 0)], np.float32)


def ask(query: str, requires: tuple[Capability, ...] = (), body: Mapping[str, object] | None = None) -> Ask:
    return Ask(
        request_id="r",
        kind="chat",
        query=query,
        prompt_chars=4 * len(query),
        body=body or {},
        requires=frozenset(requires),
        max_tokens=64,
        samples=2,
        turns=3,
        conversation="c",
    )


def test_extract_carries_everything_the_predictors_read() -> None:
    features = extract(ask("What is the capital of France?"), Constant(), lambda _: "en")
    assert features.language == "en"
    assert features.embedder == "constant"
    assert features.embedding is not None
    assert (features.turns, features.samples, features.max_tokens, features.conversation) == (3, 2, 64, "c")
    assert features.prompt_tokens == pytest.approx(120 / 4, rel=0.15)


def test_without_an_embedder_there_is_no_embedding() -> None:
    features = extract(ask("hello"), None, lambda _: "und")
    assert features.embedding is None
    assert features.embedder is None


@pytest.mark.parametrize(
    ("requires", "body", "expected"),
    [
        (("json",), {}, True),
        ((), {"response_format": {"type": "json_schema"}}, True),
        ((), {"response_format": {"type": "text"}}, False),
        ((), {"response_format": "json_object"}, False),
        ((), {}, False),
    ],
)
def test_json_is_wanted_by_capability_or_format(
    requires: tuple[Capability, ...], body: Mapping[str, object], expected: bool
) -> None:
    assert extract(ask("x", requires, body), None, lambda _: "und").wants_json is expected


def test_tools_are_wanted_by_capability() -> None:
    assert extract(ask("x", ("tools",)), None, lambda _: "und").wants_tools


def test_scripts_differ_in_tokens_a_character() -> None:
    latin, russian, chinese = map(tokens_per_char, ("the quick brown fox", "быстрая лиса", "敏捷的棕色狐狸"))
    assert latin < russian < chinese


@given(st.integers(0, 10**7), st.text(max_size=300))
def test_token_estimate_is_positive_and_bounded(chars: int, sample: str) -> None:
    assert 1.0 <= estimate_tokens(chars, sample) <= max(1.0, chars)


@pytest.fixture(scope="module")
def detector() -> LanguageDetector:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", _no_network)
        return LanguageDetector()


def _no_network(*_: object) -> None:
    raise AssertionError("the language detector opened a socket")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is the fastest way to learn to swim?", "en"),
        ("HOW DO I CANCEL MY ORDER TODAY PLEASE", "en"),
        ("Quel est le plus court chemin entre Paris et Lyon ?", "fr"),
        ("Wie heißt die Hauptstadt\nvon Österreich?", "de"),
        ("写一首关于春天的诗", "zh"),
        ("ok", "und"),
        ("12345 + 678 = ?", "und"),
        ("", "und"),
    ],
)
def test_language(detector: LanguageDetector, text: str, expected: str) -> None:
    assert detector(text) == expected


def test_language_reads_only_the_head(detector: LanguageDetector) -> None:
    english = "The weather is lovely today and we are going out for a walk. " * 10
    assert detector(english + "这是中文。" * 10_000) == "en"


def test_weak_or_unusual_guesses_are_undetermined() -> None:
    assert code(["__label__en"], [0.4]) == "und"
    assert code(["__label__ceb"], [0.99]) == "und"
    assert code([], []) == "und"
    assert code(["__label__pt"], [0.9]) == "pt"


def test_clean_is_one_line_and_lowers_shouting() -> None:
    assert clean("A\nB\tC") == "a b c"
    assert not enough("a 1 b 2")
    assert enough("春天")
