"""Which indexes the user's pip works with, read from pip's own files and variables; pip need not be there.

Order and meaning follow pip's documentation ("Configuration"): global files, then the user's, then the
environment's, then PIP_CONFIG_FILE, then PIP_* variables; a later value replaces an earlier one whole.
"""

from __future__ import annotations

import configparser
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_DEFAULT_INDEX = "https://pypi.org/simple"
_SECTIONS = ("global", "install", "download")


@dataclass(frozen=True, slots=True)
class PipConfig:
    """Where to look, in this order: `find_links` (pages, directories), then `indexes` (simple API roots)."""

    indexes: tuple[str, ...]
    find_links: tuple[str, ...] = ()
    cert: str | None = None
    trusted_hosts: frozenset[str] = frozenset()


def read_pip_config(env: Mapping[str, str], home: Path) -> PipConfig:
    values: dict[str, str] = {}
    for file in _config_files(env, home):
        values.update(_file_values(file))
    values.update(_env_values(env))
    indexes = (values.get("index-url", _DEFAULT_INDEX), *values.get("extra-index-url", "").split())
    return PipConfig(
        indexes=() if _is_true(values.get("no-index", "")) else tuple(dict.fromkeys(indexes)),
        find_links=tuple(values.get("find-links", "").split()),
        cert=values.get("cert"),
        trusted_hosts=frozenset(host.split(":")[0] for host in values.get("trusted-host", "").split()),
    )


def _config_files(env: Mapping[str, str], home: Path) -> Iterator[Path]:
    chosen = env.get("PIP_CONFIG_FILE")
    if chosen == os.devnull:
        return
    for directory in reversed(env.get("XDG_CONFIG_DIRS", "/etc/xdg").split(os.pathsep)):
        yield Path(directory, "pip", "pip.conf")
    yield from (Path("/Library/Application Support/pip/pip.conf"), Path("/etc/pip.conf"))
    if not (chosen and Path(chosen).exists()):
        yield home / ".pip" / "pip.conf"
        yield Path(env.get("XDG_CONFIG_HOME") or home / ".config", "pip", "pip.conf")
        yield home / "Library" / "Application Support" / "pip" / "pip.conf"
    yield Path(env.get("VIRTUAL_ENV") or sys.prefix, "pip.conf")
    if chosen:
        yield Path(chosen)


def _file_values(file: Path) -> dict[str, str]:
    """A file pip could not read either is passed over, as pip does for unreadable ones."""
    parser = configparser.RawConfigParser()
    try:
        parser.read(file, encoding="utf-8")
    except (configparser.Error, OSError, UnicodeDecodeError):
        return {}
    values: dict[str, str] = {}
    for section in _SECTIONS:
        if parser.has_section(section):
            values.update({_normal(key): value for key, value in parser.items(section)})
    return values


def _env_values(env: Mapping[str, str]) -> dict[str, str]:
    return {
        _normal(key.removeprefix("PIP_")): value
        for key, value in env.items()
        if key.startswith("PIP_") and value
    }


def _normal(key: str) -> str:
    return key.lower().replace("_", "-")


def _is_true(text: str) -> bool:
    return text.strip().lower() in {"1", "true", "yes", "on", "y", "t"}
