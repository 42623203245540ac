"""Who may come in: API keys hashed at rest, and the browser guards of a server without keys.

A key is 256 random bits, so one SHA-256 is enough to keep it: there is no dictionary to run against it, and a
slow password hash would only slow each request. The file holds name, hash, role and date, never a key.

Without any key, whoever reaches the loopback address is the administrator, as on any developer's machine.
The danger there is a web page in the user's own browser, hence two guards: a Host header that does not name
this machine is refused (DNS rebinding), and so is a state-changing request with a foreign Origin.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from calm.errors import BadInput, Forbidden, Unauthorised
from calm.records import Record, Strict

Role = Literal["user", "admin"]
PREFIX = "calm-"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
REREAD_S = 1.0
"""A key made or revoked on the command line counts in a running server after at most this long."""
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Identity(Record, frozen=True, kw_only=True):
    """Who asks. `name` is the key's name, None on a server without keys."""

    name: str | None
    role: Role


class KeyEntry(Strict, frozen=True, kw_only=True):
    """What is kept of a key."""

    sha256: str
    role: Role
    created: str


class _KeyFile(Strict, frozen=True, kw_only=True):
    keys: Mapping[str, KeyEntry] = {}


class Keys:
    """The key file: the command line writes it, the server reads it and follows its changes."""

    def __init__(self, path: Path, *, now: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._now = now
        self._stamp: tuple[int, int, int] | None = None
        self._looked_s = float("-inf")
        self._entries: Mapping[str, KeyEntry] = {}
        self._by_hash: Mapping[str, Identity] = {}
        self.refresh()

    @property
    def empty(self) -> bool:
        self._follow()
        return not self._by_hash

    def find(self, key: str) -> Identity | None:
        """The identity behind a key, or None. Takes the same time for near misses as for far ones.

        The lookup is by SHA-256, whose prefix a caller cannot steer; the full digests are then compared in
        constant time.
        """
        self._follow()
        digest = _hash(key)
        identity = self._by_hash.get(digest)
        if identity is None or identity.name is None:
            return None
        return identity if hmac.compare_digest(self._entries[identity.name].sha256, digest) else None

    def list(self) -> Mapping[str, KeyEntry]:
        """Entries by name."""
        self.refresh()
        return dict(self._entries)

    def create(self, name: str, role: Role = "user") -> str:
        """Make a key and return it: the only time it is seen. Raises BadInput for a bad or used name."""
        self.refresh()
        if not NAME.fullmatch(name):
            raise BadInput("key name: letters, digits, - and _ only, at most 64", field="name")
        if name in self._entries:
            raise BadInput(f'a key named "{name}" exists; revoke it first or pick another name', field="name")
        key = PREFIX + secrets.token_urlsafe(32)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        entry = KeyEntry(sha256=_hash(key), role=role, created=created)
        self._write({**self._entries, name: entry})
        return key

    def revoke(self, name: str) -> None:
        """Raises BadInput when there is no such key."""
        self.refresh()
        if name not in self._entries:
            known = ", ".join(self._entries) or "none"
            raise BadInput(f'no key named "{name}" (keys: {known})', field="name")
        self._write({other: entry for other, entry in self._entries.items() if other != name})

    def refresh(self) -> None:
        """Read the file again if it changed. Raises BadInput when it is broken or others may write it."""
        self._looked_s = self._now()
        try:
            status = self._path.stat()
        except FileNotFoundError:
            self._take({}, None)
            return
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp == self._stamp:
            return
        if os.name == "posix" and status.st_mode & 0o022:
            raise BadInput(f"{self._path}: others may write this file; run: chmod 600 {self._path}")
        self._take(_read(self._path), stamp)

    def _follow(self) -> None:
        """Refresh at most once a second; a file broken meanwhile leaves the keys as they were."""
        if self._now() - self._looked_s >= REREAD_S:
            with suppress(BadInput, OSError):
                self.refresh()

    def _take(self, entries: Mapping[str, KeyEntry], stamp: tuple[int, int, int] | None) -> None:
        self._stamp = stamp
        self._entries = entries
        self._by_hash = {e.sha256: Identity(name=name, role=e.role) for name, e in entries.items()}

    def _write(self, entries: Mapping[str, KeyEntry]) -> None:
        """Whole file or none: written beside, then renamed. mkstemp makes it 0600 from the start."""
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=".keys-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(_toml(entries))
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self._path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self.refresh()


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _read(path: Path) -> Mapping[str, KeyEntry]:
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _KeyFile).keys
    except (msgspec.ValidationError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not a key file: {error}") from None


def _toml(entries: Mapping[str, KeyEntry]) -> str:
    """Names and values are restricted to characters that need no escaping."""
    lines = ["# API keys of CALM, hashed. Made by `calm keys create`, removed by `calm keys revoke`."]
    for name, entry in entries.items():
        lines.append(f'\n[keys."{name}"]')
        lines += [f'{field} = "{getattr(entry, field)}"' for field in KeyEntry.__struct_fields__]
    return "\n".join(lines) + "\n"


class Guard:
    """Decides about one request from its headers. Microseconds, no I/O but a `stat` a second."""

    def __init__(
        self,
        keys: Keys,
        *,
        loopback: bool = True,
        insecure: bool = False,
        allowed_hosts: tuple[str, ...] = (),
        allowed_origins: tuple[str, ...] = (),
    ) -> None:
        """`loopback`: the server is bound to loopback only. `insecure`: it may be open to others too."""
        self._keys = keys
        self._loopback = loopback
        self._insecure = insecure
        self._hosts = LOCAL_HOSTS | {host.lower() for host in allowed_hosts}
        self._origins = frozenset(origin.lower().rstrip("/") for origin in allowed_origins)

    def admit(self, method: str, headers: Mapping[str, str], peer: str | None) -> Identity:
        """Raises Unauthorised (no or wrong key) or Forbidden (wrong Host or Origin).

        `peer` is the caller's address; None for a unix socket, whose file mode is the guard.
        """
        if method not in SAFE_METHODS:
            self._check_origin(headers)
        key = presented_key(headers)
        if not self._keys.empty:
            return self._known(key)
        if self._insecure:
            return _OPEN
        if not self._loopback or not is_loopback(peer):
            raise Unauthorised("this server needs an API key; its operator makes one with `calm keys create`")
        self._check_host(headers)
        return _OPEN

    def allows_origin(self, origin: str) -> bool:
        return "*" in self._origins or origin.lower() in self._origins

    def _known(self, key: str | None) -> Identity:
        if key is None:
            raise Unauthorised("no API key: send `Authorization: Bearer calm-…` or `x-api-key: calm-…`")
        identity = self._keys.find(key)
        if identity is None:
            raise Unauthorised("this API key is not known here; it may have been revoked")
        return identity

    def _check_host(self, headers: Mapping[str, str]) -> None:
        host = headers.get("Host", "")
        if host_name(host) not in self._hosts:
            raise Forbidden(
                f'Host "{host[:80]}" is not this machine: refused against DNS rebinding. '
                "Add it to server.allowed_hosts, or make an API key."
            )

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        origin = headers.get("Origin")
        if origin is None or self.allows_origin(origin):
            return
        if origin.partition("://")[2].lower() == headers.get("Host", "").lower():
            return
        raise Forbidden(f'pages from "{origin[:80]}" may not call this server; add it to server.cors_origins')


_OPEN = Identity(name=None, role="admin")


def presented_key(headers: Mapping[str, str]) -> str | None:
    """The key of an Authorization: Bearer or x-api-key header."""
    scheme, _, value = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return headers.get("x-api-key") or None


def host_name(host: str) -> str:
    """The name of a Host header without its port, in lower case: `[::1]:8420` -> `[::1]`."""
    if host.startswith("["):
        return host.partition("]")[0].lower() + "]"
    return host.partition(":")[0].lower().rstrip(".")


def is_loopback(address: str | None) -> bool:
    """True for 127/8, ::1 (also as mapped IPv4), localhost, and None: a unix socket."""
    if address is None or address == "localhost":
        return True
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def require_admin(identity: Identity) -> None:
    """Raises Forbidden for a user key."""
    if identity.role != "admin":
        raise Forbidden("this needs an admin key: `calm keys create NAME --admin`")
