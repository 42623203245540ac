"""The command line's HTTP client: small, synchronous, quick to import, and clear about what went wrong.

Where the server is and which key opens it belong to the caller's shell, not to the server's settings, so
they are read here: `--url` or CALM_URL, and the key from the environment only (a key on a command line would
stand in the process list). Connects directly: no proxy, no redirect that could carry the key elsewhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import SplitResult, quote, urlsplit

import click

from calm.errors import BadInput, CalmError

if TYPE_CHECKING:
    from http.client import HTTPConnection, HTTPResponse

DEFAULT_URL = "http://127.0.0.1:8420"
KEY_ENV = "CALM_API_KEY"
CONNECT_S = 5.0
READ_S = 60.0
"""For answers that the server has at hand."""
WORK_S = 900.0
"""For answers that wait for a model: longer than any deadline or load a server is likely to allow."""

C = TypeVar("C", bound=Callable[..., object])
T = TypeVar("T")


class NoServer(CalmError):
    """Nobody answers at the URL."""

    code = "no_server"


class ServerSaid(CalmError):
    """The server's own error, with what to do about it where the status tells."""

    def __init__(self, message: str, *, status: int, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code or "error"


def client_options(command: C) -> C:
    """`--url` and `--key-env`."""
    for option in (
        click.option(
            "--key-env",
            default=KEY_ENV,
            show_default=True,
            metavar="NAME",
            help="Environment variable that holds the API key.",
        ),
        click.option(
            "--url",
            envvar="CALM_URL",
            default=DEFAULT_URL,
            show_default=True,
            show_envvar=True,
            help="Where the server is.",
        ),
    ):
        command = option(command)
    return command


def connect(url: str, key_env: str = KEY_ENV) -> Client:
    """A client for a server. Raises BadInput when the URL is none."""
    return Client(url, os.environ.get(key_env) or None)


class Client:
    """One server. Every call opens a connection of its own."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = split(url)
        self._port = parts.port
        self._secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._key = key
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{self._root}"

    def get(self, path: str, shape: type[T], *, timeout_s: float = READ_S) -> T:
        """The JSON answer, decoded. Raises NoServer, ServerSaid."""
        return decode(self.call("GET", path, timeout_s=timeout_s), shape)

    def call(self, method: str, path: str, body: object = None, *, timeout_s: float = READ_S) -> bytes:
        """The whole body of a good answer. Raises NoServer, ServerSaid."""
        with self._open(method, path, body, timeout_s) as response:
            return response.read()

    def stream(self, path: str, body: object, *, timeout_s: float = WORK_S) -> Generator[bytes]:
        """Payloads of a server-sent event stream until [DONE].

        Raises ServerSaid for an error event and for a stream that ends without [DONE]. Closing the iterator
        closes the connection, which stops the work.
        """
        with self._open("POST", path, body, timeout_s) as response:
            for payload in sse_payloads(response):
                if payload == b"[DONE]":
                    return
                if payload.startswith(b'{"error"'):
                    raise said(200, payload)
                yield payload
        raise CalmError("the answer broke off before its end; the server's log says why")

    @contextmanager
    def _open(self, method: str, path: str, body: object, timeout_s: float) -> Iterator[HTTPResponse]:
        from http.client import HTTPException

        connection = self._connection()
        try:
            self._connect(connection)
            if connection.sock is not None:
                connection.sock.settimeout(timeout_s)
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self._root + path, data, self._headers(data))
            response = connection.getresponse()
            if response.status >= 300:
                raise said(response.status, response.read(), response.headers.get("Retry-After"))
            yield response
        except TimeoutError:
            raise CalmError(f"{self.url} did not answer within {timeout_s:g} s") from None
        except (ConnectionError, HTTPException) as error:
            raise CalmError(f"the connection to {self.url} broke: {error or type(error).__name__}") from error
        finally:
            connection.close()

    def _connection(self) -> HTTPConnection:
        from http.client import HTTPConnection, HTTPSConnection

        kind = HTTPSConnection if self._secure else HTTPConnection
        return kind(self._host, self._port, timeout=CONNECT_S)

    def _connect(self, connection: HTTPConnection) -> None:
        try:
            connection.connect()
        except OSError as error:
            reason = "" if isinstance(error, ConnectionRefusedError) else f" ({error.strerror or error})"
            raise NoServer(
                f"no CALM server at {self.url}{reason}; "
                "start one with `calm serve`, or name another with --url"
            ) from error

    def _headers(self, data: bytes | None) -> dict[str, str]:
        headers = {"Accept": "application/json, text/event-stream", "User-Agent": "calm-cli"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return headers


def decode(raw: bytes, shape: type[T]) -> T:
    """An answer's JSON. Raises CalmError when it is something else."""
    import msgspec

    try:
        return msgspec.json.decode(raw, type=shape)
    except msgspec.MsgspecError as error:
        raise CalmError(
            f"the server answered with something else than expected ({error}); is it CALM of this version?"
        ) from error


def split(url: str) -> SplitResult:
    """The parts of a server's URL; without a scheme http is meant. Raises BadInput."""
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass
    raise BadInput(f'"{url}" is no URL of a server; e.g. {DEFAULT_URL}', field="url")


def segment(name: str) -> str:
    """A name as one segment of a path."""
    return quote(name, safe="")


def sse_payloads(lines: Iterator[bytes] | HTTPResponse) -> Iterator[bytes]:
    """`data:` of each event (WHATWG server-sent events); comments and other fields are skipped."""
    data: list[bytes] = []
    for line in lines:
        line = line.rstrip(b"\r\n")
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
        elif not line and data:
            yield b"\n".join(data)
            data = []


def said(status: int, raw: bytes, retry_after: str | None = None) -> ServerSaid:
    """An error answer in OpenAI's shape, or whatever came instead."""
    error: object = None
    try:
        document = json.loads(raw)
        error = document.get("error") if isinstance(document, dict) else None
    except ValueError:
        pass
    fields: Mapping[str, object] = error if isinstance(error, dict) else {}
    message = str(fields.get("message") or f"the server answered {status}, which is no answer of CALM")
    code = fields.get("code")
    hint = hint_for(status, retry_after)
    return ServerSaid(
        f"{message}; {hint}" if hint else message, status=status, code=str(code) if code else None
    )


def hint_for(status: int, retry_after: str | None) -> str | None:
    """What to do about a status, where that is always the same."""
    if status == 401:
        return f"put a key in {KEY_ENV} (its operator makes one with `calm keys create NAME`)"
    if status == 403:
        return f"this needs an admin key in {KEY_ENV} (`calm keys create NAME --admin`)"
    if status == 429 and retry_after:
        return f"try again in {retry_after} s"
    return None
