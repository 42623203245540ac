"""Fetched weights in the type this engine is fast with: converted once, checked by digest, cached as any other.

The conversion itself (`requantise`) runs in a process of its own, so that a server goes on serving. The fetched
file stays in the cache beside the converted one: other cards may share it, and a damaged conversion is then
made good without a network.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path, PurePath

from msgspec.structs import replace

from calm.errors import SourceError
from calm.records import ConvertSpec, SourceSpec
from calm.registry.reference import leaf_name, parse_reference
from calm.sources.context import FetchOptions, in_thread
from calm.sources.download import ensure_room, hash_file
from calm.sources.progress import Progress
from calm.sources.store import Store, locked

PROGRAM = "calm.sources.requantise"


def converted_source(source: SourceSpec) -> SourceSpec:
    """The source as the cache knows it after its conversion; itself where there is none."""
    spec = source.convert
    if spec is None:
        return source
    stem = PurePath(source.filename or leaf_name(parse_reference(source.parts[0]))).stem
    name = f"{stem}-as-{spec.to}.gguf"
    return replace(source, sha256=spec.sha256, bytes=spec.bytes, filename=name, convert=None)


async def convert(
    original: Path, spec: ConvertSpec, store: Store, progress: Progress, name: str, options: FetchOptions
) -> Path:
    """The cached path of `original` converted. `store` is that of `converted_source`.

    Raises SourceError when the file cannot be converted or the result has another digest. When cancelled, the
    process is gone and nothing is left behind.
    """
    async with locked(store.lock, options.sleep):
        return await in_thread(store.find) or await _convert(original, spec, store, progress, name)


async def _convert(original: Path, spec: ConvertSpec, store: Store, progress: Progress, name: str) -> Path:
    target = store.partial / "converted"
    try:
        await in_thread(_prepare, target, spec.bytes or original, name)
        progress.on_start(name, spec.bytes, f"converting to {spec.to}")
        await _run(original, target, spec.to, progress, name)
        await in_thread(_check, target, spec, name)
        progress.on_done()
        return await in_thread(store.publish, target)
    finally:
        shutil.rmtree(store.partial, ignore_errors=True)


def _prepare(target: Path, room: int | Path, name: str) -> None:
    """An empty directory on a disk with room for so many bytes, or for as many as a file has."""
    shutil.rmtree(target.parent, ignore_errors=True)
    target.parent.mkdir(parents=True)
    ensure_room(target.parent, room.stat().st_size if isinstance(room, Path) else room, name)


async def _run(original: Path, target: Path, to: str, progress: Progress, name: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", PROGRAM, str(original), str(target), to),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        _, words = await asyncio.gather(_follow(process.stdout, progress), process.stderr.read())
        code = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code:
        reason = words.decode("utf-8", "replace").strip().rpartition("\n")[2] or f"exit code {code}"
        raise SourceError(f"{name}: its weights could not be converted to {to}: {reason}")


async def _follow(lines: asyncio.StreamReader, progress: Progress) -> None:
    async for line in lines:
        progress.on_advance(int(line))


def _check(target: Path, spec: ConvertSpec, name: str) -> None:
    found, size = hash_file(target, "sha256"), target.stat().st_size
    if found != spec.sha256.lower() or spec.bytes not in (None, size):
        expected = "" if spec.bytes is None else f" and {spec.bytes} bytes"
        raise SourceError(
            f"{name}: converted to {spec.to} the weights have sha256 {found} and {size} bytes, expected sha256 "
            f"{spec.sha256}{expected}: correct source.convert if the rule of the conversion is what you meant"
        )
