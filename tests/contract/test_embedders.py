"""One suite that every embedder passes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from calm.monitor.embed import (
    CACHED_TEXTS,
    HEAD_CHARS,
    TAIL_CHARS,
    MiniLmEmbedder,
    RecentTexts,
    StaticEmbedder,
    head_and_tail,
    map_safetensors,
    unit,
)
from calm.ports import Embedder
from calm.settings import cache_dir
from calm.sources.assets import cached_minilm

MINILM = cached_minilm(cache_dir())


@pytest.fixture(scope="module", params=["static", pytest.param("minilm", marks=pytest.mark.models)])
def embedder(request: pytest.FixtureRequest) -> Iterator[Embedder]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", _no_network)
        if request.param == "static":
            yield StaticEmbedder()
        elif MINILM is None:
            pytest.skip("MiniLM is not in the cache: run `make weights`")
        else:
            yield MiniLmEmbedder(*MINILM)


def _no_network(*_: object) -> None:
    raise AssertionError("an embedder opened a socket")


def test_is_a_unit_vector_of_the_promised_shape(embedder: Embedder) -> None:
    vector = embedder.embed("Which drug lowers blood pressure?")
    assert vector.shape == (embedder.dimensions,)
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)
    assert embedder.name


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_text_without_content_is_all_zeros(embedder: Embedder, text: str) -> None:
    assert not embedder.embed(text).any()


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "🙂" * 50,
        "写一首诗",
        "a" * 100_000,
        "\ud800 lone surrogate".encode("utf-8", "replace").decode(),
    ],
)
def test_takes_any_text(embedder: Embedder, text: str) -> None:
    vector = embedder.embed(text)
    assert np.isfinite(vector).all()


def test_meaning_is_near_meaning(embedder: Embedder) -> None:
    dose = embedder.embed("What dose of ibuprofen should the patient take?")
    pain = embedder.embed("Which medicine helps against pain and fever?")
    code = embedder.embed("Write a Python function that reverses a list.")
    assert dose @ pain > dose @ code


def test_is_deterministic_and_read_only(embedder: Embedder) -> None:
    first = embedder.embed("the same text")
    for index in range(CACHED_TEXTS + 5):
        embedder.embed(f"other {index}") if embedder.dimensions == 256 else None
    assert np.array_equal(first, embedder.embed("the same text"))
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1.0


def test_only_the_ends_of_a_long_text_count(embedder: Embedder) -> None:
    head, tail = "h " * HEAD_CHARS, "t " * TAIL_CHARS
    assert np.array_equal(embedder.embed(head + "x" * 5000 + tail), embedder.embed(head + "y" * 9000 + tail))


def test_head_and_tail_keeps_short_texts_whole() -> None:
    assert head_and_tail("abc") == "abc"
    assert len(head_and_tail("a" * 100_000)) == HEAD_CHARS + TAIL_CHARS + 1


def test_recent_texts_are_computed_once_and_bounded() -> None:
    computed: list[str] = []

    def compute(text: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        computed.append(text)
        return unit(np.ones(2, np.float32))

    recent = RecentTexts(compute, size=2)
    for text in ("a", "b", "a", "c", "a", "b"):
        recent.get(text)
    assert computed == ["a", "b", "c", "b"]
    assert len(recent) == 2


def test_a_non_finite_vector_becomes_zeros() -> None:
    assert not unit(np.asarray([np.nan, 1.0], np.float32)).any()


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, (2).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        map_safetensors(path)


def test_the_mapped_table_equals_the_library_s(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    save_file({"embedding": table}, tmp_path / "t.safetensors")
    assert np.array_equal(map_safetensors(tmp_path / "t.safetensors"), table)
