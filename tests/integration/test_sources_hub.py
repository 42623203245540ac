"""`hf:` against a local server that speaks the hub's protocol: linked etags, tokens, ranges."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from calm.errors import SourceError
from calm.records import SourceSpec
from calm.sources.context import FetchOptions
from calm.sources.fetch import fetch_weights

CONTENT = os.urandom(200_000) + b"end"
SHA = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A repository `owner/repo` with `sub/m.gguf` at tag v1, stored as large files are: behind a redirect."""

    url: str = ""
    token: str | None = None
    gated: bool = False
    breaks: int = 0
    heads: list[dict[str, str]] = field(default_factory=list)
    gets: list[dict[str, str]] = field(default_factory=list)
    cdn: list[dict[str, str]] = field(default_factory=list)

    async def resolve(self, request: web.Request) -> web.StreamResponse:
        headers = {key.lower(): value for key, value in request.headers.items()}
        (self.heads if request.method == "HEAD" else self.gets).append(headers)
        refusal = self._refusal(request, headers)
        if refusal:
            status, code, words = refusal
            return web.Response(status=status, headers={"X-Error-Code": code, "X-Error-Message": words})
        return web.Response(
            status=302,
            headers={
                "Location": self.url.replace("127.0.0.1", "localhost") + "/cdn/blob",  # another host
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{SHA}"',
                "X-Linked-Size": str(len(CONTENT)),
                "ETag": '"pointer"',
            },
        )

    def _refusal(self, request: web.Request, headers: dict[str, str]) -> tuple[int, str, str] | None:
        match = request.match_info
        if self.gated:
            return 403, "GatedRepo", "Access to this repository is restricted"
        if self.token and headers.get("authorization") != f"Bearer {self.token}":
            return 401, "RepoNotFound", "Repository not found"
        if f"{match['owner']}/{match['repo']}" != "owner/repo":
            return 404, "RepoNotFound", "Repository not found"
        if match["revision"] not in ("v1", COMMIT):
            return 404, "RevisionNotFound", "Invalid rev id"
        return None if match["path"] == "sub/m.gguf" else (404, "EntryNotFound", "Entry not found")

    async def blob(self, request: web.Request) -> web.StreamResponse:
        if request.method == "HEAD":
            return web.Response(headers={"Content-Length": str(len(CONTENT)), "ETag": '"blob"'})
        self.cdn.append({key.lower(): value for key, value in request.headers.items()})
        first = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        response = web.StreamResponse(status=206 if first else 200, headers={"ETag": '"blob"'})
        if first:
            response.headers["Content-Range"] = f"bytes {first}-{len(CONTENT) - 1}/{len(CONTENT)}"
        response.content_length = len(CONTENT) - first
        await response.prepare(request)
        if self.breaks:
            self.breaks -= 1
            await response.write(CONTENT[first : first + 70_000])
            await asyncio.sleep(0.05)
            assert request.transport is not None
            request.transport.abort()
            return response
        await response.write(CONTENT[first:])
        return response


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    made = Hub()
    app = web.Application()
    app.router.add_route("*", "/{owner}/{repo}/resolve/{revision}/{path:.+}", made.resolve)
    app.router.add_route("*", "/cdn/blob", made.blob)
    server = TestServer(app)
    await server.start_server()
    made.url = str(server.make_url("/")).rstrip("/")
    yield made
    await server.close()


@pytest.fixture
def options(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FetchOptions:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}

    async def no_sleep(_: float) -> None:
        await asyncio.sleep(0)

    return FetchOptions(env=env, home=tmp_path, attempts=3, sleep=no_sleep)


def spec(reference: str, sha256: str = SHA) -> SourceSpec:
    return SourceSpec(parts=(reference,), sha256=sha256, bytes=len(CONTENT))


def with_env(options: FetchOptions, **env: str) -> FetchOptions:
    return FetchOptions(
        env={**options.env, **env}, home=options.home, attempts=options.attempts, sleep=options.sleep
    )


async def test_a_tag_is_fetched_from_the_configured_endpoint(
    hub: Hub, options: FetchOptions, tmp_path: Path
) -> None:
    path = await fetch_weights(spec("hf:owner/repo/sub/m.gguf@v1"), tmp_path / "c", options=options)
    assert path.name == "m.gguf"
    assert path.read_bytes() == CONTENT
    assert "authorization" not in hub.heads[0]


async def test_the_token_is_sent_and_needed(hub: Hub, options: FetchOptions, tmp_path: Path) -> None:
    hub.token = "hf_secret"
    source = spec("hf:owner/repo/sub/m.gguf@v1")
    with pytest.raises(SourceError, match="HF_TOKEN"):
        await fetch_weights(source, tmp_path / "c", options=options)
    with pytest.raises(SourceError) as caught:
        await fetch_weights(source, tmp_path / "c", options=with_env(options, HF_TOKEN="hf_wrong"))
    assert "hf_wrong" not in str(caught.value)
    path = await fetch_weights(source, tmp_path / "c", options=with_env(options, HF_TOKEN="hf_secret"))
    assert path.read_bytes() == CONTENT
    assert hub.gets[-1]["authorization"] == "Bearer hf_secret"
    assert "authorization" not in hub.cdn[-1]  # the token is the hub's, not its storage's


async def test_a_broken_transfer_is_resumed(hub: Hub, options: FetchOptions, tmp_path: Path) -> None:
    hub.breaks = 2
    path = await fetch_weights(spec("hf:owner/repo/sub/m.gguf@v1"), tmp_path / "c", options=options)
    assert path.read_bytes() == CONTENT
    assert len(hub.cdn) == 3
    assert hub.cdn[-1]["range"].startswith("bytes=")
    assert hub.cdn[-1]["if-range"] == '"blob"'


async def test_a_broken_transfer_is_resumed_by_a_later_run(
    hub: Hub, options: FetchOptions, tmp_path: Path
) -> None:
    hub.breaks = 1
    source = spec("hf:owner/repo/sub/m.gguf@v1")
    once = FetchOptions(env=options.env, home=options.home, attempts=1, sleep=options.sleep)
    with pytest.raises(SourceError, match="goes on where it stopped"):
        await fetch_weights(source, tmp_path / "c", options=once)
    assert (await fetch_weights(source, tmp_path / "c", options=options)).read_bytes() == CONTENT
    assert "range" in hub.cdn[-1]


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("hf:owner/repo/sub/m.gguf@v2", "no such revision"),
        ("hf:owner/repo/other.gguf@v1", "no such file"),
        ("hf:owner/none/sub/m.gguf@v1", "no such repository"),
    ],
)
async def test_what_is_missing_is_named(
    hub: Hub, options: FetchOptions, tmp_path: Path, reference: str, words: str
) -> None:
    with pytest.raises(SourceError, match=words):
        await fetch_weights(spec(reference), tmp_path / "c", options=options)
    assert hub.cdn == []


async def test_a_gated_repository_says_what_to_do(hub: Hub, options: FetchOptions, tmp_path: Path) -> None:
    hub.gated = True
    with pytest.raises(SourceError, match="Accept its terms"):
        await fetch_weights(spec("hf:owner/repo/sub/m.gguf@v1"), tmp_path / "c", options=options)


async def test_a_digest_that_cannot_match_is_refused_before_the_download(
    hub: Hub, options: FetchOptions, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="the card expects"):
        await fetch_weights(spec("hf:owner/repo/sub/m.gguf@v1", "d" * 64), tmp_path / "c", options=options)
    assert hub.cdn == []


async def test_a_hub_that_is_away_is_named(options: FetchOptions, tmp_path: Path) -> None:
    away = with_env(options, HF_ENDPOINT="http://127.0.0.1:9")
    with pytest.raises(SourceError, match="does not answer"):
        await fetch_weights(spec("hf:owner/repo/sub/m.gguf@v1"), tmp_path / "c", options=away)
