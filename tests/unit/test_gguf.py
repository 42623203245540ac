"""The header reader against the gguf library, against broken files, and the rule of which adapter fits."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.gguf_files import WIDTH, WORDS, Matrix, good_tensors, numbers, write_base, write_lora

from calm.errors import BadInput
from calm.gguf import TYPES, Header, fits, parse_header, read_header

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "calm"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base.gguf")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_lora(tmp_path_factory.mktemp("lora") / "lora.gguf").read_bytes()


def same_as_the_library(path: Path) -> None:
    ours, theirs = read_header(path), GGUFReader(path)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(map(int, tensor.shape))
        assert mine.type_name == tensor.tensor_type.name
        assert mine.n_bytes == tensor.n_bytes
        assert ours.data_at + mine.offset == tensor.data_offset
    known = {key for key in theirs.fields if not key.startswith("GGUF.")}
    assert set(ours.value_at) == known
    for key, value in ours.metadata.items():
        assert theirs.fields[key].contents() == value


def test_a_base_and_an_adapter_as_the_library_reads_them(base: Path, tmp_path: Path) -> None:
    same_as_the_library(base)
    same_as_the_library(write_lora(tmp_path / "lora.gguf"))


@pytest.mark.models
def test_real_files_as_the_library_reads_them() -> None:
    files = sorted(CACHE.rglob("*.gguf"), key=lambda path: path.stat().st_size)
    if not files:
        pytest.skip("no weights: run `calm models pull`")
    same_as_the_library(files[0])


def test_sizes_of_types_are_the_librarys() -> None:
    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items() if int(kind) in TYPES}
    assert {number: (block, n_bytes) for number, (_, block, n_bytes) in TYPES.items()} == sizes
    assert all(GGMLQuantizationType(number).name == name for number, (name, _, _) in TYPES.items())


def test_what_it_tells(base: Path, good: bytes) -> None:
    header = read_header(base)
    assert (header.architecture, header.is_lora, header.lora_alpha) == ("llama", False, None)
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True
    assert "tokenizer.ggml.tokens" not in header.metadata  # arrays are stepped over
    assert header.tensors["token_embd.weight"].shape == (WIDTH, WORDS)
    adapter = parse_header(good, "lora")
    assert (adapter.is_lora, adapter.lora_alpha) == (True, 8.0)


# --- broken files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda data: b"", "not a GGUF"),
        (lambda data: b"GGU", "not a GGUF"),
        (lambda data: b"PK" + data[2:], "not a GGUF"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "of version 1"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
        (lambda data: data[:8] + struct.pack("<Q", 1 << 60) + data[16:], "claims 1152921504606846976 tensors"),
        (lambda data: data[:16] + struct.pack("<Q", 1 << 40) + data[24:], "metadata keys"),
        (lambda data: data[:24] + struct.pack("<Q", 1 << 50) + data[32:], "claims a string of"),
        (lambda data: data[:24] + struct.pack("<Q", 1 << 20) + data[32:], "truncated or not a GGUF"),
        (lambda data: data[:-64], "truncated"),
        (lambda data: data.replace(b"general.type", b"general.arch", 1).replace(b"\x08\0\0\0", b"\x63\0\0\0", 1),
         "unknown type, 99"),
        (lambda data: data.replace(b"lora_b", b"lora_a"), "stands twice"),
        (lambda data: data.replace(b"adapter.type", b"adapter.t\xff\xffe", 1), "not UTF-8"),
    ],
)  # fmt: skip
def test_broken_files_are_named(good: bytes, change: Callable[[bytes], bytes], complaint: str) -> None:
    with pytest.raises(BadInput, match=r"^odd\.gguf: ") as broken:
        parse_header(change(good), "odd.gguf")
    assert complaint in str(broken.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"a\.gguf: cannot be read: No such file"):
        read_header(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").touch()
    with pytest.raises(BadInput, match=r"b\.gguf: the file is empty"):
        read_header(tmp_path / "b.gguf")


def parsed(data: bytes) -> Header | None:
    """The header, or None for a refusal; any other exception fails the test."""
    try:
        return parse_header(data, "x")
    except BadInput:
        return None


@given(cut=st.integers(min_value=0, max_value=5000))
def test_every_truncation_is_noticed(good: bytes, cut: int) -> None:
    end = min(cut, len(good) - 33)  # the last 32 bytes may be padding
    assert parsed(good[:end]) is None


@given(places=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=8))
def test_no_byte_can_make_it_fail_otherwise(good: bytes, places: list[tuple[int, int]]) -> None:
    data = bytearray(good)
    for at, value in places:
        data[at] = value
    tracemalloc.start()
    header = parsed(bytes(data))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20
    if header is not None:
        assert fits(header, header) is None or isinstance(fits(header, header), str)


@given(data=st.binary(max_size=400))
def test_nor_any_bytes_behind_the_magic(data: bytes) -> None:
    parsed(b"GGUF" + struct.pack("<I", 3) + data)


@given(numbers=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=40))
def test_nor_any_counts(numbers: list[int]) -> None:
    parsed(b"GGUF" + struct.pack("<I", 3) + struct.pack(f"<{len(numbers)}Q", *numbers))


def test_a_vocabulary_whose_lengths_run_away(good: bytes) -> None:
    key = b"tokens"
    array = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, 3)
    runaway = array + struct.pack("<Q", 2**64 - 9) + bytes(64)
    data = good[:8] + struct.pack("<QQ", 0, 1) + runaway
    with pytest.raises(BadInput, match="truncated"):
        parse_header(data, "x")


# --- which adapter fits ----------------------------------------------------------------------------


def judged(base: Path, tmp_path: Path, tensors: dict[str, Matrix] | None = None, **how: object) -> str | None:
    adapter = write_lora(tmp_path / "lora.gguf", tensors, **how)  # type: ignore[arg-type]
    return fits(read_header(base), read_header(adapter))


def test_a_good_one(base: Path, tmp_path: Path) -> None:
    assert judged(base, tmp_path) is None


def test_norms_beside_the_pairs_are_stepped_over(base: Path, tmp_path: Path) -> None:
    assert judged(base, tmp_path, {**good_tensors(), "blk.0.attn_norm.weight": numbers(WIDTH)}) is None


def test_the_embeddings_halves_are_turned_round(base: Path, tmp_path: Path) -> None:
    a, b = numbers(WORDS, 4), numbers(WIDTH, 4)
    assert judged(base, tmp_path, {"token_embd.weight.lora_a": a, "token_embd.weight.lora_b": b}) is None
    reason = judged(base, tmp_path, {"token_embd.weight.lora_a": b, "token_embd.weight.lora_b": a})
    assert reason is not None
    assert "token_embd.weight is 64x50 in the base" in reason


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "it changes no weight"),
        ({"blk.9.attn_q.weight.lora_a": (4, WIDTH), "blk.9.attn_q.weight.lora_b": (WIDTH, 4)},
         "the base has no tensor blk.9.attn_q.weight"),
        ({"blk.0.attn_q.weight.lora_a": (4, 32), "blk.0.attn_q.weight.lora_b": (WIDTH, 4)},
         "blk.0.attn_q.weight is 64x64 in the base, the adapter's halves are 32x4 and 4x64"),
        ({"blk.0.attn_q.weight.lora_a": (4, WIDTH), "blk.0.attn_q.weight.lora_b": (WIDTH, 8)}, "64x4 and 8x64"),
        ({"blk.0.attn_q.weight.lora_a": (WIDTH, 4), "blk.0.attn_q.weight.lora_b": (WIDTH, 4)}, "4x64 and 4x64"),
        ({"blk.0.attn_q.weight.lora_a": (4, WIDTH)}, "blk.0.attn_q.weight.lora_a lacks the other half"),
        ({"blk.0.attn_q.weight": (WIDTH, WIDTH)}, "blk.0.attn_q.weight is neither .lora_a nor .lora_b"),
        ({"blk.0.attn_q.weight.lora_a": (2, 4, WIDTH), "blk.0.attn_q.weight.lora_b": (2, WIDTH, 4)}, "64x4x2"),
    ],
)  # fmt: skip
def test_misfits(base: Path, tmp_path: Path, tensors: dict[str, tuple[int, ...]], reason: str) -> None:
    found = judged(base, tmp_path, {name: numbers(*shape) for name, shape in tensors.items()})
    assert found is not None
    assert reason in found


def test_other_sorts_of_file(base: Path, tmp_path: Path) -> None:
    assert judged(base, tmp_path, architecture="gemma3") == "it was made for gemma3, the base is llama"
    assert "general.type is 'model'" in (judged(base, tmp_path, type_="model") or "")
    assert "alpha is nan" in (judged(base, tmp_path, alpha=float("nan")) or "")
    header = read_header(base)
    assert fits(header, header) == "base.gguf is not a LoRA adapter: its general.type is not stated"


def test_a_base_in_several_files_is_left_to_the_engine(base: Path, good: bytes) -> None:
    header = read_header(base)
    part = Header(header.name, 3, {**header.metadata, "split.count": np.uint16(3).item()}, {}, 32, {}, 0, 0)
    assert fits(part, parse_header(good, "lora")) is None
