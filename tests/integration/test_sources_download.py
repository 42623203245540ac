"""The downloader against a server that breaks, lies and refuses: never a wrong byte."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from calm.errors import SourceError
from calm.records import SourceSpec
from calm.sources import fetch as fetch_module
from calm.sources.context import FetchOptions, open_session
from calm.sources.download import Digest, Remote, download
from calm.sources.fetch import cache_bytes, cached_path, fetch_weights, remove_cached
from calm.sources.progress import Silent

CONTENT = os.urandom(300_000) + b"the end"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Shelf:
    """One file on a server with moods. `script` holds one behaviour per request, then it serves well."""

    content: bytes = CONTENT
    etag: str | None = '"v1"'
    ranges: bool = True
    chunked: bool = False
    script: list[str] = field(default_factory=list)
    seen: list[dict[str, str]] = field(default_factory=list)
    gate: asyncio.Event | None = None

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.seen.append({key.lower(): value for key, value in request.headers.items()})
        mood = self.script.pop(0) if self.script else "well"
        if mood.isdigit():
            return web.Response(status=int(mood), headers={"Retry-After": "0"})
        first = self._first(request)
        if first is not None and first >= len(self.content):
            return web.Response(status=416, headers={"Content-Range": f"bytes */{len(self.content)}"})
        body = self.content[first or 0 :]
        response = web.StreamResponse(status=200 if first is None else 206)
        if self.etag:
            response.headers["ETag"] = self.etag
        if first is not None:
            response.headers["Content-Range"] = f"bytes {first}-{len(self.content) - 1}/{len(self.content)}"
        if not self.chunked:
            response.content_length = len(body)
        await response.prepare(request)
        if mood == "break":
            await response.write(body[: len(body) // 2])
            assert request.transport is not None
            request.transport.abort()
            return response
        if self.gate is not None:
            await response.write(body[:1000])
            await self.gate.wait()
            body = body[1000:]
        await response.write(body)
        return response

    def _first(self, request: web.Request) -> int | None:
        text = request.headers.get("Range")
        stale = request.headers.get("If-Range") not in (None, self.etag)
        if text is None or not self.ranges or stale:
            return None
        return int(text.removeprefix("bytes=").removesuffix("-"))


class Counted(Silent):
    """A progress that adds up."""

    def __init__(self) -> None:
        self.total: int | None = None
        self.have = 0
        self.done = 0

    def on_start(self, name: str, total: int | None) -> None:
        self.total, self.have = total, 0

    def on_advance(self, n: int) -> None:
        self.have += n

    def on_done(self) -> None:
        self.done += 1


Serve = Callable[[Shelf], str]


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> FetchOptions:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    async def no_sleep(seconds: float) -> None:
        waits.append(seconds)
        await asyncio.sleep(0)

    return FetchOptions(
        env={"PIP_CONFIG_FILE": os.devnull}, home=tmp_path / "home", attempts=3, sleep=no_sleep
    )


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    shelves: dict[str, Shelf] = {}

    async def handle(request: web.Request) -> web.StreamResponse:
        shelf = shelves.get(request.match_info["name"])
        return await shelf.serve(request) if shelf else web.Response(status=404)

    app = web.Application()
    app.router.add_get("/{name}", handle)
    server = TestServer(app)
    await server.start_server()

    def put(shelf: Shelf) -> str:
        name = f"f{len(shelves)}.gguf"
        shelves[name] = shelf
        return str(server.make_url("/" + name))

    yield put
    await server.close()


def spec(*parts: str, content: bytes = CONTENT, size: int | None = None) -> SourceSpec:
    return SourceSpec(parts=parts, sha256=sha256(content), bytes=size)


async def test_a_url_is_fetched_verified_and_cached(
    serve: Serve, options: FetchOptions, tmp_path: Path
) -> None:
    shelf = Shelf()
    source = spec(serve(shelf), size=len(CONTENT))
    progress = Counted()
    assert cached_path(source, tmp_path) is None
    path = await fetch_weights(source, tmp_path, progress, options=options)
    assert path == tmp_path / "sha256" / sha256(CONTENT) / "f0.gguf"
    assert path.read_bytes() == CONTENT
    assert (progress.total, progress.have, progress.done) == (len(CONTENT), len(CONTENT), 1)
    assert cached_path(source, tmp_path) == path
    assert not (tmp_path / "partial" / sha256(CONTENT)).exists()
    assert shelf.seen[0]["accept-encoding"] == "identity"


async def test_a_break_is_resumed_with_range_and_if_range(
    serve: Serve, options: FetchOptions, tmp_path: Path
) -> None:
    shelf = Shelf(script=["break", "break"])
    progress = Counted()
    path = await fetch_weights(spec(serve(shelf)), tmp_path, progress, options=options)
    assert path.read_bytes() == CONTENT
    assert len(shelf.seen) == 3
    assert shelf.seen[1]["range"].startswith("bytes=")
    assert shelf.seen[1]["if-range"] == '"v1"'
    assert progress.have == len(CONTENT)


async def test_a_chunked_break_is_resumed_too(serve: Serve, options: FetchOptions, tmp_path: Path) -> None:
    shelf = Shelf(script=["break"], chunked=True)
    path = await fetch_weights(spec(serve(shelf)), tmp_path, options=options)
    assert path.read_bytes() == CONTENT
    assert "range" in shelf.seen[1]


async def test_a_server_without_ranges_is_read_from_the_start(
    serve: Serve, options: FetchOptions, tmp_path: Path
) -> None:
    progress = Counted()
    path = await fetch_weights(
        spec(serve(Shelf(script=["break"], ranges=False))), tmp_path, progress, options=options
    )
    assert path.read_bytes() == CONTENT
    assert progress.have == len(CONTENT)


async def test_transient_statuses_are_waited_out(
    serve: Serve, options: FetchOptions, tmp_path: Path, waits: list[float]
) -> None:
    path = await fetch_weights(spec(serve(Shelf(script=["503", "429"]))), tmp_path, options=options)
    assert path.read_bytes() == CONTENT
    assert waits == [0.0, 0.0]  # Retry-After: 0


async def test_giving_up_keeps_what_came_and_a_later_run_goes_on(
    serve: Serve, options: FetchOptions, tmp_path: Path
) -> None:
    shelf = Shelf(script=["break", "500", "500", "500"])
    source = spec(serve(shelf))
    with pytest.raises(SourceError, match="goes on where it stopped"):
        await fetch_weights(source, tmp_path, options=options)
    assert cached_path(source, tmp_path) is None
    path = await fetch_weights(source, tmp_path, options=options)
    assert path.read_bytes() == CONTENT
    assert 0 < int(shelf.seen[-1]["range"].removeprefix("bytes=").removesuffix("-")) <= len(CONTENT) // 2


async def test_a_file_that_changed_meanwhile_is_not_glued_together(
    serve: Serve, options: FetchOptions, tmp_path: Path
) -> None:
    shelf = Shelf(content=b"old" * 100_000, script=["break", "500", "500", "500"])
    source = spec(serve(shelf))
    with pytest.raises(SourceError):
        await fetch_weights(source, tmp_path, options=options)
    shelf.content, shelf.etag = CONTENT, '"v2"'
    assert (await fetch_weights(source, tmp_path, options=options)).read_bytes() == CONTENT


async def test_stale_bytes_under_a_published_digest_are_dropped_and_read_again(
    serve: Serve, options: FetchOptions, tmp_path: Path
) -> None:
    shelf = Shelf(etag=None)
    remote = Remote(serve(shelf), Digest("sha256", sha256(CONTENT)))
    target = tmp_path / "a"
    (tmp_path / "a.part").write_bytes(b"x" * 1000)
    (tmp_path / "a.part.json").write_text(json.dumps({"url": remote.url}))
    async with open_session(options) as session:
        await download(session, remote, target, name="a", progress=Silent(), options=options)
    assert target.read_bytes() == CONTENT
    assert len(shelf.seen) == 2
    assert not (tmp_path / "a.part").exists()


async def test_a_complete_part_is_recognised_by_416(
    serve: Serve, options: FetchOptions, tmp_path: Path
) -> None:
    remote = Remote(serve(Shelf()))
    (tmp_path / "a.part").write_bytes(CONTENT)
    (tmp_path / "a.part.json").write_text(json.dumps({"url": remote.url, "validator": '"v1"'}))
    async with open_session(options) as session:
        await download(session, remote, tmp_path / "a", name="a", progress=Silent(), options=options)
    assert (tmp_path / "a").read_bytes() == CONTENT


async def test_an_index_digest_that_does_not_match_is_an_error(
    serve: Serve, options: FetchOptions, tmp_path: Path
) -> None:
    remote = Remote(serve(Shelf()), Digest("sha256", "0" * 64))
    async with open_session(options) as session:
        with pytest.raises(SourceError, match="promised 0000"):
            await download(session, remote, tmp_path / "a", name="a", progress=Silent(), options=options)
    assert next(tmp_path.iterdir(), None) is None  # noqa: ASYNC240


async def test_wrong_content_never_becomes_a_model(
    serve: Serve, options: FetchOptions, tmp_path: Path
) -> None:
    source = SourceSpec(parts=(serve(Shelf()),), sha256="b" * 64, bytes=5_000_000)
    with pytest.raises(SourceError) as caught:
        await fetch_weights(source, tmp_path, name="mine", options=options)
    for words in ("mine", "b" * 64, sha256(CONTENT), f"{len(CONTENT)} bytes", "Fetch it again"):
        assert words in caught.value.message
    assert not (tmp_path / "sha256" / ("b" * 64)).exists()
    assert not (tmp_path / "partial" / ("b" * 64)).exists()


@pytest.mark.parametrize(
    ("status", "words"), [("401", "credentials"), ("403", "credentials"), ("404", "not there")]
)
async def test_refusals_are_not_retried(
    serve: Serve, options: FetchOptions, tmp_path: Path, status: str, words: str
) -> None:
    shelf = Shelf(script=[status])
    with pytest.raises(SourceError, match=words):
        await fetch_weights(spec(serve(shelf) + "?signature=secret"), tmp_path, options=options)
    assert len(shelf.seen) == 1


async def test_messages_hide_signatures(serve: Serve, options: FetchOptions, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        await fetch_weights(
            spec(serve(Shelf(script=["404"])) + "?signature=secret"), tmp_path, options=options
        )
    assert "secret" not in caught.value.message


async def test_plain_http_elsewhere_is_refused_before_a_packet_leaves(
    options: FetchOptions, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="plain http"):
        await fetch_weights(spec("http://192.0.2.1/m.gguf"), tmp_path, options=options)


async def test_a_redirect_may_not_leave_tls(options: FetchOptions, tmp_path: Path) -> None:
    app = web.Application()

    async def away(request: web.Request) -> web.Response:
        raise web.HTTPFound(f"http://calm.localhost.invalid:{request.url.port}/x")

    app.router.add_get("/m.gguf", away)
    server = TestServer(app)
    await server.start_server()
    try:
        with pytest.raises(SourceError):
            await fetch_weights(spec(str(server.make_url("/m.gguf"))), tmp_path, options=options)
    finally:
        await server.close()


async def test_no_room_on_the_disk_is_said_before_the_first_byte(
    serve: Serve, options: FetchOptions, tmp_path: Path
) -> None:
    shelf = Shelf()
    with pytest.raises(SourceError, match="are needed and"):
        await fetch_weights(spec(serve(shelf), size=1 << 60), tmp_path, name="big", options=options)
    assert shelf.seen == []


async def test_parts_are_concatenated_and_a_finished_part_is_not_fetched_again(
    serve: Serve, options: FetchOptions, tmp_path: Path
) -> None:
    one, two = Shelf(content=CONTENT[:200_000]), Shelf(content=CONTENT[200_000:], script=["500"] * 3)
    source = spec(serve(one), serve(two), size=len(CONTENT))
    with pytest.raises(SourceError):
        await fetch_weights(source, tmp_path, options=options)
    path = await fetch_weights(source, tmp_path, options=options)
    assert path.read_bytes() == CONTENT
    assert len(one.seen) == 1
    assert not (tmp_path / "partial" / sha256(CONTENT)).exists()


async def test_a_cancelled_fetch_leaves_no_lock_and_is_taken_up_again(
    serve: Serve, options: FetchOptions, tmp_path: Path
) -> None:
    shelf = Shelf(gate=asyncio.Event())
    source = spec(serve(shelf))
    arrived = asyncio.Event()

    class Tell(Silent):
        def on_advance(self, n: int) -> None:
            if n:
                arrived.set()

    task = asyncio.create_task(fetch_weights(source, tmp_path, Tell(), options=options))
    await asyncio.wait_for(arrived.wait(), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert shelf.gate is not None
    shelf.gate.set()
    shelf.gate = None
    assert (await fetch_weights(source, tmp_path, options=options)).read_bytes() == CONTENT
    assert "range" in shelf.seen[-1]


async def test_many_askers_cause_one_download(serve: Serve, options: FetchOptions, tmp_path: Path) -> None:
    shelf = Shelf()
    source = spec(serve(shelf))
    paths = await asyncio.gather(*(fetch_weights(source, tmp_path, options=options) for _ in range(5)))
    assert len(set(paths)) == 1
    assert len(shelf.seen) == 1


async def test_cards_with_one_digest_share_one_file(
    serve: Serve, options: FetchOptions, tmp_path: Path
) -> None:
    shelf = Shelf()
    source = spec(serve(shelf))
    first = await fetch_weights(source, tmp_path, options=options)
    other = SourceSpec(parts=("https://nowhere.invalid/x",), sha256=source.sha256.upper(), filename="b.gguf")
    second = await fetch_weights(other, tmp_path, options=options)
    assert second.name == "b.gguf"
    assert second.samefile(first)
    assert len(shelf.seen) == 1


async def test_once_cached_no_socket_is_opened(
    serve: Serve, options: FetchOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = spec(serve(Shelf()))
    path = await fetch_weights(source, tmp_path, options=options)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(fetch_module, "open_session", refuse)
    assert await fetch_weights(source, tmp_path, options=options) == path
    assert await fetch_weights(source, tmp_path, verify=True, options=options) == path


async def test_damage_in_the_cache_is_found_and_mended(
    serve: Serve, options: FetchOptions, tmp_path: Path
) -> None:
    shelf = Shelf()
    source = spec(serve(shelf))
    path = await fetch_weights(source, tmp_path, options=options)
    stat = path.stat()
    path.write_bytes(b"!" + CONTENT[1:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time: only a full check sees it
    assert (await fetch_weights(source, tmp_path, options=options)).read_bytes() != CONTENT
    assert (await fetch_weights(source, tmp_path, verify=True, options=options)).read_bytes() == CONTENT
    path.write_bytes(CONTENT[:10])  # a changed size is seen without being asked
    assert (await fetch_weights(source, tmp_path, options=options)).read_bytes() == CONTENT
    assert len(shelf.seen) == 3


async def test_removing_frees_the_bytes(serve: Serve, options: FetchOptions, tmp_path: Path) -> None:
    source = spec(serve(Shelf()))
    await fetch_weights(source, tmp_path, options=options)
    assert cache_bytes(tmp_path) >= len(CONTENT)
    assert remove_cached(source, tmp_path) >= len(CONTENT)
    assert cached_path(source, tmp_path) is None


async def test_a_file_part_is_used_in_place_and_never_touched(options: FetchOptions, tmp_path: Path) -> None:
    card_dir = tmp_path / "fleet"
    card_dir.mkdir()
    file = card_dir / "m.gguf"
    file.write_bytes(CONTENT)
    source = spec("file:m.gguf")
    path = await fetch_weights(source, tmp_path / "cache", base=card_dir, options=options)
    assert path == file
    assert not (tmp_path / "cache" / "sha256").exists()
    file.write_bytes(b"changed")
    with pytest.raises(SourceError, match="does not match its checksum"):
        await fetch_weights(source, tmp_path / "cache", base=card_dir, options=options)
    assert file.read_bytes() == b"changed"
    with pytest.raises(SourceError, match="card's directory is not known"):
        await fetch_weights(source, tmp_path / "cache", options=options)
    with pytest.raises(SourceError, match="does not exist"):
        await fetch_weights(spec("file:/no/such"), tmp_path / "cache", options=options)


async def test_file_parts_are_concatenated_into_the_cache(options: FetchOptions, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT[:1000])
    (tmp_path / "b").write_bytes(CONTENT[1000:])
    source = spec("file:a", "file:b", size=len(CONTENT))
    path = await fetch_weights(source, tmp_path / "cache", base=tmp_path, options=options)
    assert path.read_bytes() == CONTENT
    assert (tmp_path / "a").exists()
    too_big = SourceSpec(parts=("file:a", "file:b"), sha256="c" * 64, bytes=100)
    with pytest.raises(SourceError, match="larger than"):
        await fetch_weights(too_big, tmp_path / "cache", base=tmp_path, options=options)
