"""`npm:name@version/path`: find the tarball in the registry the user's npm is configured for.

npm itself is not needed: its .npmrc files and variables are read as npm's documentation ("npmrc", "config")
describes them, and the registry is asked for the version's document.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import aiohttp

from calm.errors import SourceError
from calm.registry.reference import NpmReference
from calm.sources.context import FetchOptions
from calm.sources.download import Digest, Remote, public
from calm.sources.pages import decode_json, get_page

_DEFAULT_REGISTRY = "https://registry.npmjs.org/"
_GLOBAL_FILES = ("/etc/npmrc", "/usr/etc/npmrc", "/usr/local/etc/npmrc")
_VARIABLE = re.compile(r"\$\{([^}]+)\}")


@dataclass(frozen=True, slots=True)
class NpmConfig:
    """npm's flat key -> value settings; credentials stand under their host (`//host/:_authToken`)."""

    values: Mapping[str, str]

    def registry(self, package: str) -> str:
        """The scope's own registry, else the general one; ends with a slash."""
        scope = package.split("/")[0] if package.startswith("@") else ""
        chosen = self.values.get(f"{scope}:registry") if scope else None
        return (chosen or self.values.get("registry") or _DEFAULT_REGISTRY).rstrip("/") + "/"

    def authorization(self, url: str) -> dict[str, str]:
        """The header for the longest configured prefix of this URL; never for another host."""
        split = urlsplit(url)
        path = split.path
        while True:
            prefix = f"//{split.netloc}{path.rstrip('/')}/"
            header = self._credential(prefix)
            if header is not None:
                return {"Authorization": header}
            if not path.strip("/"):
                return {}
            path = path.rstrip("/").rpartition("/")[0]

    def _credential(self, prefix: str) -> str | None:
        if token := self.values.get(f"{prefix}:_authToken"):
            return f"Bearer {token}"
        if basic := self.values.get(f"{prefix}:_auth"):
            return f"Basic {basic}"
        user, password = self.values.get(f"{prefix}:username"), self.values.get(f"{prefix}:_password")
        if not (user and password):
            return None
        with contextlib.suppress(binascii.Error):
            pair = user.encode() + b":" + base64.b64decode(password)
            return "Basic " + base64.b64encode(pair).decode()
        return None


def read_npm_config(env: Mapping[str, str], home: Path) -> NpmConfig:
    """Global npmrc, then the user's, then npm_config_* variables; a later value replaces an earlier one."""
    variables = {
        key.lower().removeprefix("npm_config_"): value
        for key, value in env.items()
        if key.lower().startswith("npm_config_")
    }
    user_file = variables.get("userconfig") or str(home / ".npmrc")
    global_file = variables.get("globalconfig")
    values: dict[str, str] = {}
    for file in ((global_file,) if global_file else _GLOBAL_FILES) + (user_file,):
        values.update(_npmrc(Path(file), env))
    return NpmConfig({**values, **variables})


def _npmrc(file: Path, env: Mapping[str, str]) -> dict[str, str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    pairs = (line.partition("=") for line in lines if "=" in line and line.strip()[:1] not in ("#", ";"))
    return {key.strip(): _expand(value.strip().strip("\"'"), env) for key, _, value in pairs}


def _expand(text: str, env: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: env.get(match[1], match[0]), text)


async def resolve_npm(
    session: aiohttp.ClientSession, reference: NpmReference, config: NpmConfig, options: FetchOptions
) -> Remote:
    """The tarball's URL and published digest. Raises SourceError."""
    name = f"npm:{reference.name}@{reference.version}"
    registry = config.registry(reference.name)
    dist = await _dist(session, reference, registry, config, options, name)
    tarball = dist.get("tarball")
    if not isinstance(tarball, str):
        raise SourceError(f"{name}: {public(registry)} names no tarball for this version")
    url = own_host(tarball, registry)
    if not options.may_use(url):
        raise SourceError(f"{name}: {public(url)} is plain http. Use https, or allow http sources.")
    integrity = dist.get("integrity")
    digest = Digest.from_integrity(integrity) if isinstance(integrity, str) else None
    return Remote(url, digest, headers=config.authorization(url))


async def _dist(
    session: aiohttp.ClientSession,
    reference: NpmReference,
    registry: str,
    config: NpmConfig,
    options: FetchOptions,
    name: str,
) -> Mapping[str, object]:
    """The version's `dist`: from its own document, else (some registries have none) from the package's."""
    package = registry + quote(reference.name, safe="@")
    for url in (f"{package}/{reference.version}", package):
        page = await get_page(
            session,
            url,
            accept="application/json",
            name=name,
            options=options,
            headers=config.authorization(url),
        )
        document = decode_json(page, name) if page is not None else {}
        versions = document.get("versions")
        if isinstance(versions, Mapping):
            document = versions.get(reference.version, {})
        dist = document.get("dist")
        if isinstance(dist, Mapping):
            return dist
    raise SourceError(f"{name}: not in {public(registry)}. Check name and version in the card.")


def own_host(tarball: str, registry: str) -> str:
    """npm's `replace-registry-host`: a mirror's documents may still name the public registry's host."""
    if urlsplit(tarball).netloc != urlsplit(_DEFAULT_REGISTRY).netloc or registry == _DEFAULT_REGISTRY:
        return tarball
    ours = urlsplit(registry)
    path = ours.path.rstrip("/") + urlsplit(tarball).path
    return urlsplit(tarball)._replace(scheme=ours.scheme, netloc=ours.netloc, path=path).geturl()
