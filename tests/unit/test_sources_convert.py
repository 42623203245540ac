"""Weights converted after they were fetched: the rule byte for byte, the cache, and what may go wrong."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from msgspec.structs import replace
from tests.unit.gguf_files import write_base

from calm.errors import BadInput, SourceError
from calm.gguf import read_header
from calm.records import ConvertSpec, SourceSpec
from calm.sources import convert as convert_module
from calm.sources import requantise as requantise_module
from calm.sources.convert import converted_source
from calm.sources.fetch import at_hand, cached_path, digests, fetch_weights, remove_cached
from calm.sources.progress import PlainLines
from calm.sources.requantise import main, requantise


def nothing(n_bytes: int) -> None:
    pass


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def converted(directory: Path, to: str = "Q4_0", **how: object) -> tuple[Path, Path]:
    """(a small base, the same converted)."""
    base = write_base(directory / "base.gguf", **how)  # type: ignore[arg-type]
    requantise(base, directory / "new.gguf", to, nothing)
    return base, directory / "new.gguf"


# --- the rule --------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0"])
def test_blocks_become_the_new_type_and_all_else_stays(tmp_path: Path, kind: str, to: str) -> None:
    base, new = converted(tmp_path, to, kind=kind)
    old, made = GGUFReader(base), GGUFReader(new)
    assert [t.name for t in made.tensors] == [t.name for t in old.tensors]
    for before, after in zip(old.tensors, made.tensors, strict=True):
        if before.name.startswith("blk.") and before.tensor_type.name == kind:
            assert after.tensor_type.name == to
            weights = dequantize(before.data, before.tensor_type)
            assert np.array_equal(after.data, quantize(weights, GGMLQuantizationType[to]))
        else:
            assert after.tensor_type == before.tensor_type
            assert np.array_equal(after.data, before.data)
    assert {t.tensor_type.name for t in made.tensors} == {to, "Q8_0", "F32"}


def test_metadata_is_kept_but_for_the_file_type(tmp_path: Path) -> None:
    base, new = converted(tmp_path)
    old, made = GGUFReader(base).fields, GGUFReader(new).fields
    changed = {key for key in old if old[key].contents() != made[key].contents()}
    assert changed == {"general.file_type"}
    assert made["general.file_type"].contents() == 2
    assert list(made) == list(old)


def test_a_file_without_a_file_type_gets_none(tmp_path: Path) -> None:
    _, new = converted(tmp_path, file_type=None)
    assert "general.file_type" not in read_header(new).metadata


def test_the_same_bytes_every_time_and_again_from_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, new = converted(tmp_path)
    monkeypatch.setattr(requantise_module, "PIECE_WEIGHTS", 100)  # a row at a time
    requantise(base, tmp_path / "again.gguf", "Q4_0", nothing)
    requantise(new, tmp_path / "twice.gguf", "Q4_0", nothing)
    assert sha256(new) == sha256(tmp_path / "again.gguf") == sha256(tmp_path / "twice.gguf")


def test_what_is_written_is_told(tmp_path: Path) -> None:
    told: list[int] = []
    requantise(write_base(tmp_path / "b.gguf"), tmp_path / "n.gguf", "Q4_0", told.append)
    assert sum(told) == (tmp_path / "n.gguf").stat().st_size


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="cannot convert to Q2_K: it is one of Q4_0, Q8_0"):
        requantise(write_base(tmp_path / "b.gguf"), tmp_path / "n.gguf", "Q2_K", nothing)
    (tmp_path / "odd.gguf").write_bytes(b"GGUFnot")
    assert main([str(tmp_path / "odd.gguf"), str(tmp_path / "n.gguf"), "Q4_0"]) == 1
    assert capsys.readouterr().err.startswith("odd.gguf: ")


# --- as a source -----------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> SourceSpec:
    """A `file:` source whose conversion is pinned rightly."""
    base, new = converted(tmp_path)
    spec = ConvertSpec(to="Q4_0", sha256=sha256(new), bytes=new.stat().st_size)
    new.unlink()
    return SourceSpec(parts=(f"file:{base}",), sha256=sha256(base), convert=spec)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def assembled(source: SourceSpec, directory: Path) -> SourceSpec:
    """The same in two parts, so that the original lies in the cache and not in place."""
    whole = Path(source.parts[0].removeprefix("file:")).read_bytes()
    for name, part in (("one", whole[:999]), ("two", whole[999:])):
        (directory / name).write_bytes(part)
    parts = (f"file:{directory / 'one'}", f"file:{directory / 'two'}")
    return replace(source, parts=parts, filename="m.Q4_1.gguf")


async def test_converted_once_and_cached_under_its_own_digest(source: SourceSpec, cache: Path) -> None:
    assert source.convert is not None
    assert (cached_path(source, cache), at_hand(source, cache)) == (None, True)
    lines = io.StringIO()
    path = await fetch_weights(source, cache, PlainLines(lines), name="m")
    assert (path.name, sha256(path)) == ("base-as-Q4_0.gguf", source.convert.sha256)
    assert lines.getvalue().startswith("m: converting to Q4_0 ")
    assert "m: done, " in lines.getvalue()
    assert cached_path(source, cache) == path
    before = path.stat().st_mtime_ns
    assert await fetch_weights(source, cache) == path
    assert await fetch_weights(source, cache, verify=True) == path
    assert path.stat().st_mtime_ns == before


async def test_no_network_is_needed_while_the_original_is_here(
    source: SourceSpec, cache: Path, tmp_path: Path
) -> None:
    cut = assembled(source, tmp_path)
    path = await fetch_weights(cut, cache)
    path.write_bytes(b"damaged")
    (tmp_path / "one").unlink()  # the source itself is gone
    assert at_hand(cut, cache)
    again = await fetch_weights(cut, cache)
    assert again.name == "m.Q4_1-as-Q4_0.gguf"
    assert source.convert is not None
    assert sha256(again) == source.convert.sha256


async def test_removing_frees_both_files_but_not_what_others_use(
    source: SourceSpec, cache: Path, tmp_path: Path
) -> None:
    cut = assembled(source, tmp_path)
    assert source.convert is not None
    assert digests(cut) == {cut.sha256, source.convert.sha256}
    sizes = [(await fetch_weights(each, cache)).stat().st_size for each in (cut, replace(cut, convert=None))]
    freed = remove_cached(cut, cache, keep=digests(replace(cut, convert=None)))
    assert sizes[0] <= freed < sum(sizes)
    assert cached_path(replace(cut, convert=None), cache) is not None
    await fetch_weights(cut, cache)
    assert remove_cached(cut, cache) >= sum(sizes)
    assert not at_hand(cut, cache)


async def test_a_conversion_with_another_digest_is_refused_and_leaves_nothing(
    source: SourceSpec, cache: Path
) -> None:
    wrong = replace(source, convert=ConvertSpec(to="Q4_0", sha256="0" * 64))
    with pytest.raises(SourceError, match=r"m: converted to Q4_0 .* expected sha256 0000") as refused:
        await fetch_weights(wrong, cache, name="m")
    assert "correct source.convert" in str(refused.value)
    assert cached_path(wrong, cache) is None
    assert not list((cache / "partial").iterdir())


async def test_weights_that_are_no_gguf_are_named(source: SourceSpec, cache: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(b"not a model at all")
    wrong = replace(source, parts=(f"file:{odd}",), sha256=sha256(odd))
    with pytest.raises(
        SourceError, match=r"m: .* could not be converted to Q4_0: odd\.gguf: this is not a GGUF"
    ):
        await fetch_weights(wrong, cache, name="m")


async def test_a_cancelled_conversion_ends_its_process_and_leaves_nothing(
    source: SourceSpec, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn: Callable[..., object] = asyncio.create_subprocess_exec
    spawned: list[asyncio.subprocess.Process] = []

    async def slow(*command: str, **how: object) -> asyncio.subprocess.Process:
        process = await spawn(command[0], "-c", "import time; time.sleep(600)", **how)  # type: ignore[misc]
        spawned.append(process)
        return process

    monkeypatch.setattr(convert_module.asyncio, "create_subprocess_exec", slow)
    fetching = asyncio.create_task(fetch_weights(source, cache))
    while not spawned:
        await asyncio.sleep(0.001)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert spawned[0].returncode is not None
    assert not list((cache / "partial").iterdir())
    monkeypatch.undo()
    assert (await fetch_weights(source, cache)).is_file()


def test_a_source_without_conversion_is_itself(source: SourceSpec) -> None:
    plain = replace(source, convert=None)
    assert converted_source(plain) is plain
    assert digests(plain) == {plain.sha256}
