"""The one downloader: resumes across breaks and across runs, retries what may pass, checks what arrived.

A transfer lives in `TARGET.part` beside `TARGET.part.json` (URL and validators); it becomes TARGET by an
atomic rename once complete and, where the index published a digest, once that matches. Resuming follows
RFC 9110, sections 13.1.5 (If-Range) and 14 (Range).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import aiohttp
import msgspec
from yarl import URL

from calm.errors import SourceError
from calm.sources.context import FetchOptions, in_thread
from calm.sources.progress import Progress, megabytes

_CHUNK_BYTES = 1 << 20
_DISK_MARGIN_BYTES = 64 << 20
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_BACKOFF_MAX_S = 30.0
_CONTENT_RANGE = re.compile(r"bytes (?:(?P<first>\d+)-\d+|\*)/(?P<total>\d+|\*)")


@dataclass(frozen=True, slots=True)
class Digest:
    """A published checksum of a whole file, e.g. sha256 of a wheel, sha512 of a tarball."""

    algorithm: str
    hexadecimal: str

    @classmethod
    def from_integrity(cls, text: str) -> Digest | None:
        """The strongest entry of a Subresource Integrity string (`sha512-BASE64 ...`), None if none."""
        entries = dict(entry.split("-", 1) for entry in text.split() if "-" in entry)
        for algorithm in ("sha512", "sha384", "sha256"):
            if algorithm in entries:
                encoded = entries[algorithm].split("?")[0]
                with contextlib.suppress(binascii.Error):
                    return cls(algorithm, base64.b64decode(encoded, validate=True).hex())
        return None


@dataclass(frozen=True, slots=True)
class Remote:
    """One downloadable file. `headers` may hold credentials, so they are never part of a message."""

    url: str
    digest: Digest | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    trusted_hosts: frozenset[str] = frozenset()


class _Sidecar(msgspec.Struct, frozen=True):
    url: str
    validator: str | None = None
    total: int | None = None


class _TransientError(Exception):
    """Worth another try, after `wait_s` when the server said so."""

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


async def download(
    session: aiohttp.ClientSession,
    remote: Remote,
    target: Path,
    *,
    name: str,
    progress: Progress,
    options: FetchOptions,
) -> None:
    """Leaves `target` complete and verified against the published digest, or raises SourceError.

    What was received stays in `target.part` after a break or a cancellation, and the next call goes on there.
    """
    transfer = _Transfer(session, remote, target, name, progress, options)
    if transfer.finished():
        return
    resumed = transfer.have() > 0
    await transfer.run()
    wrong = await in_thread(digest_mismatch, transfer.part, remote.digest)
    if wrong and resumed:  # the file changed between two runs, or the disk lied: once more from nothing
        transfer.restart()
        await transfer.run()
        wrong = await in_thread(digest_mismatch, transfer.part, remote.digest)
    if wrong:
        transfer.restart()
        raise SourceError(f"{name}: {public(remote.url)} {wrong}. The bytes were discarded; try again.")
    transfer.finish()


class _Transfer:
    """One file on its way. Sole owner of its .part and sidecar."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        remote: Remote,
        target: Path,
        name: str,
        progress: Progress,
        options: FetchOptions,
    ) -> None:
        self._session = session
        self._remote = remote
        self._target = target
        self._name = name
        self._progress = progress
        self._options = options
        self._started = False
        target.parent.mkdir(parents=True, exist_ok=True)
        self.part = target.with_name(target.name + ".part")
        self._sidecar_path = target.with_name(target.name + ".part.json")
        sidecar = _read_sidecar(self._sidecar_path)
        if sidecar is None or sidecar.url != remote.url:
            self.restart()
            sidecar = None
        self._sidecar = sidecar or _Sidecar(remote.url)

    def finished(self) -> bool:
        return self._target.exists()

    def have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def restart(self) -> None:
        self.part.unlink(missing_ok=True)
        self._sidecar_path.unlink(missing_ok=True)
        self._sidecar = _Sidecar(self._remote.url)
        self._started = False

    def finish(self) -> None:
        self.part.replace(self._target)
        self._sidecar_path.unlink(missing_ok=True)
        self._progress.on_done()

    async def run(self) -> None:
        """Until complete. `attempts` failures in a row without one new byte end it."""
        failures = 0
        while not self._complete():
            before = self.have()
            try:
                await self._once()
                if self._complete():
                    return
                raise _TransientError("the connection closed early")
            except (_TransientError, aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                _reject_permanent(error, self._name, self._remote.url)
                failures = 1 if self.have() > before else failures + 1
                if failures >= self._options.attempts:
                    raise SourceError(_gave_up(self._name, self._remote.url, error, failures)) from error
                await self._options.sleep(backoff_s(failures, getattr(error, "wait_s", None)))

    def _complete(self) -> bool:
        return self._sidecar.total is not None and self.have() == self._sidecar.total

    async def _once(self) -> None:
        have = self.have()
        headers = dict(self._remote.headers)
        if have:
            headers["Range"] = f"bytes={have}-"
            if self._sidecar.validator:
                headers["If-Range"] = self._sidecar.validator
        async with self._session.get(self._remote.url, headers=headers) as response:
            refuse_downgrade(response, self._options, self._remote.trusted_hosts, self._name)
            if response.status == 416:
                self._answer_416(response, have)
                return
            _raise_for_status(response, self._name, self._remote.url)
            if response.status == 200 and have:
                self._forget(have)
            await self._receive(response)

    def _answer_416(self, response: aiohttp.ClientResponse, have: int) -> None:
        """Nothing after what is there: complete if the server's total says so, else start again."""
        total = _range_total(response)
        if total == have:
            self._note(response, total)
            return
        self._forget(have)
        raise _TransientError("the server could not resume")

    def _forget(self, have: int) -> None:
        self.part.unlink(missing_ok=True)
        if self._started:
            self._progress.on_advance(-have)

    async def _receive(self, response: aiohttp.ClientResponse) -> None:
        have = self.have()
        total = _total(response, have)
        self._note(response, total)
        if not self._started:
            self._started = True
            self._progress.on_start(self._name, total)
            self._progress.on_advance(have)
        if total is not None:
            ensure_room(self.part.parent, total - have, self._name)
        with self.part.open("ab") as stream:
            async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                await in_thread(_write, stream, chunk, self._name)
                self._progress.on_advance(len(chunk))
        if total is None:  # chunked and whole: the body's end is the file's end
            self._note(response, self.have())

    def _note(self, response: aiohttp.ClientResponse, total: int | None) -> None:
        self._sidecar = _Sidecar(self._remote.url, _validator(response.headers), total)
        self._sidecar_path.write_bytes(msgspec.json.encode(self._sidecar))


def public(url: str) -> str:
    """A URL fit for a message: without credentials, query and fragment, which may hold signatures."""
    parsed = URL(url)
    return str(parsed.with_user(None).with_query(None).with_fragment(None))


def refuse_downgrade(
    response: aiohttp.ClientResponse, options: FetchOptions, trusted: frozenset[str], name: str
) -> None:
    """Raises SourceError when any hop went over plain http without leave."""
    for hop in (*response.history, response):
        if not options.may_use(str(hop.url), trusted):
            raise SourceError(
                f"{name}: {public(str(hop.url))} is plain http. Use https, or allow http sources."
            )


def ensure_room(directory: Path, needed_bytes: int, name: str) -> None:
    """Raises SourceError when the disk has not `needed_bytes` and a margin left."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes + _DISK_MARGIN_BYTES:
        raise SourceError(
            f"{name}: {megabytes(needed_bytes)} are needed and {megabytes(free)} are free in {directory}. "
            "Free some space, or point the cache at another disk."
        )


def hash_file(path: Path, algorithm: str) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def digest_mismatch(path: Path, digest: Digest | None) -> str | None:
    if digest is None:
        return None
    found = hash_file(path, digest.algorithm)
    if found == digest.hexadecimal.lower():
        return None
    return f"has {digest.algorithm} {found}, but the index promised {digest.hexadecimal}"


def _write(stream: BinaryIO, chunk: bytes, name: str) -> None:
    try:
        stream.write(chunk)
    except OSError as error:
        raise SourceError(
            f"{name}: cannot write to {stream.name}: {os.strerror(error.errno or 0)}"
        ) from error


def _read_sidecar(path: Path) -> _Sidecar | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Sidecar)
    except (OSError, msgspec.MsgspecError):
        return None


def _validator(headers: Mapping[str, str]) -> str | None:
    """A strong ETag, else Last-Modified (RFC 9110, 13.1.5: a weak ETag must not be used)."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified")


def _total(response: aiohttp.ClientResponse, have: int) -> int | None:
    if response.status == 206:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or match["first"] is None or int(match["first"]) != have:
            raise _TransientError("the server answered with another range than asked")
    if response.content_length is None:
        return _range_total(response)
    return have + response.content_length


def _range_total(response: aiohttp.ClientResponse) -> int | None:
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return int(match["total"]) if match and match["total"] != "*" else None


def _raise_for_status(response: aiohttp.ClientResponse, name: str, url: str) -> None:
    if response.status in (200, 206):
        return
    if response.status in _TRANSIENT_STATUS:
        raise _TransientError(f"HTTP {response.status}", retry_after_s(response.headers))
    raise SourceError(f"{name}: {public(url)} answered {response.status}. {status_hint(response.status)}")


def status_hint(status: int) -> str:
    if status in (401, 403):
        return "Access is refused: check the token or credentials for this host, and the licence terms."
    if status in (404, 410):
        return "It is not there: check the name, version and path in the card."
    return "Check the source in the card."


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by Retry-After, given in seconds; a date counts as no advice."""
    text = headers.get("Retry-After", "").strip()
    return min(float(text), _BACKOFF_MAX_S) if text.isdigit() else None


def backoff_s(failures: int, advised_s: float | None) -> float:
    """Exponential with full jitter over its upper half, so that clients do not return in step."""
    if advised_s is not None:
        return advised_s
    ceiling = min(_BACKOFF_MAX_S, 0.5 * 2.0**failures)
    return ceiling * random.uniform(0.5, 1.0)


def _reject_permanent(error: Exception, name: str, url: str) -> None:
    if isinstance(error, aiohttp.ClientSSLError | aiohttp.InvalidURL | aiohttp.TooManyRedirects):
        hint = "Set SSL_CERT_FILE to your organisation's bundle if it inspects TLS."
        raise SourceError(f"{name}: {public(url)}: {error}. {hint}") from error


def _gave_up(name: str, url: str, error: Exception, failures: int) -> str:
    reason = str(error) or type(error).__name__
    return (
        f"{name}: {public(url)} failed {failures} times without progress: {reason}. "
        "Check the network or the proxy and run the same command again; it goes on where it stopped."
    )
