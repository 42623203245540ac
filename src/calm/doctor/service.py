"""The configuration in force, the port, and who may come in."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from calm.doctor.check import Check, failed, fine, poor
from calm.errors import CalmError
from calm.gateway.auth import Keys
from calm.gateway.server import check_bind
from calm.settings import Settings, keys_path

PROBE_S = 2.0


def check_config(load: Callable[[], Settings], file: Path | None) -> tuple[Settings, list[Check]]:
    """The settings, or the defaults and what is wrong."""
    try:
        settings = load()
    except CalmError as error:
        return Settings(), [failed("config", error.message, "correct it; the checks below use the defaults")]
    return settings, [
        fine("config", str(file) if file else "no file in force: defaults, environment and flags")
    ]


def check_door(settings: Settings) -> Iterator[Check]:
    server = settings.server
    keys = Keys(keys_path())
    count = len(keys.list())
    try:
        check_bind(server.host, keys, insecure=server.insecure)
    except CalmError as error:
        yield failed("keys", error.message, "calm keys create NAME")
    else:
        yield judged_keys(server.host, count)
    yield check_port(server.host, server.port)


def judged_keys(host: str, count: int) -> Check:
    if count:
        return fine("keys", f"{count} in {keys_path()}; every caller needs one")
    if host in ("127.0.0.1", "::1", "localhost"):
        return fine("keys", "none needed: the server is reached from this machine only")
    return poor("keys", f"none, and {host} is reachable by others", "calm keys create NAME")


def check_port(host: str, port: int) -> Check:
    """Free, or a CALM server, or somebody else."""
    if port == 0:
        return fine("port", "any free one")
    version = answering(host, port)
    if version is not None:
        return fine("port", f"a CALM server {version} answers at {host}:{port}")
    try:
        bind(host, port)
    except OSError as error:
        return failed(
            "port", f"{host}:{port} cannot be had: {error.strerror or error}", "choose another with --port"
        )
    return fine("port", f"{host}:{port} is free")


def bind(host: str, port: int) -> None:
    """Raises OSError when the address cannot be listened on."""
    family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


def answering(host: str, port: int) -> str | None:
    """The version of the CALM that answers there; None for silence and for strangers."""
    reach = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = HTTPConnection(reach, port, timeout=PROBE_S)
    try:
        connection.request("GET", "/")
        document = json.loads(connection.getresponse().read(1 << 16))
    except (OSError, HTTPException, ValueError):
        return None
    finally:
        connection.close()
    if not isinstance(document, dict) or document.get("name") != "CALM":
        return None
    return str(document.get("version", ""))
