"""Every setting of CALM, with its default and its reason: the only reader of environment and config files.

Precedence, lowest first: the defaults below, the config file (`--config`, `$CALM_CONFIG`, or
`$XDG_CONFIG_HOME/calm/calm.toml`), environment variables `CALM_<SECTION>__<FIELD>`, command-line flags.
The reference page docs/reference/settings.md is made from this file and tested against it.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import msgspec
import platformdirs
import psutil

from calm.errors import BadInput
from calm.records import Strict, Weights

Positive = Annotated[float, msgspec.Meta(gt=0)]
Inside = Annotated[float, msgspec.Meta(gt=0, lt=1)]
PositiveInt = Annotated[int, msgspec.Meta(gt=0)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class Server(Strict, frozen=True, kw_only=True):
    """The door."""

    host: str = "127.0.0.1"
    """Address to bind. Anything but loopback needs API keys (`calm keys create`) or `insecure`."""
    port: Port = 8420
    """TCP port; 0 picks a free one."""
    insecure: bool = False
    """Serve without keys on a non-loopback address. Anyone who reaches the port can use it."""
    max_body_bytes: PositiveInt = 8 * 2**20
    """Largest request body accepted (413 beyond)."""
    max_queue: PositiveInt = 256
    """Requests that may wait for a model; the next one gets 429 with Retry-After."""
    deadline_s: Positive = 300.0
    """Deadline of a request that states none (504 beyond)."""
    ping_s: Positive = 15.0
    """A comment is sent this often on a stream that waits, so that proxies keep it open."""
    shutdown_grace_s: Positive = 10.0
    """On SIGTERM, how long running answers may take to finish."""
    cors_origins: tuple[str, ...] = ()
    """Browser origins that may call the API; none by default."""
    allowed_hosts: tuple[str, ...] = ()
    """Further Host header values to accept (DNS-rebinding guard on loopback)."""


class FleetSettings(Strict, frozen=True, kw_only=True):
    """The metadata files."""

    dir: str | None = None
    """Directory of *.toml cards. Unset: ./fleet if it has any, else $XDG_CONFIG_HOME/calm/fleet, made
    from the default fleet at first use."""
    fetch: bool = True
    """Fetch missing weights at start and when a card is added. false: such a model stays unavailable."""


class Memory(Strict, frozen=True, kw_only=True):
    """Residency: which models stay loaded."""

    budget: str = "60%"
    """Bytes for models: "6GiB", "800MB", or a share of the memory free at start, "60%"."""
    eviction: str = "calm"
    """Who leaves first: calm, lru, lfu, fifo; with a count cap as in `lru:3`."""
    preload: bool = True
    """Load models before they are asked for, while the budget has room."""
    idle_unload_s: float | None = None
    """Unload a model nobody used for this long; unset: keep until the space is needed."""


class Scheduling(Strict, frozen=True, kw_only=True):
    """The waiting line and the cores."""

    queue: Literal["fifo", "stcf"] = "fifo"
    """fifo: first come first served; stcf: shortest predicted time first, aged so that none starves."""
    bypass_s: Positive = 2.0
    """How long a younger request may overtake an older one that is blocked."""
    cores: PositiveInt | None = None
    """Cores the engines may use; unset: those of this process (affinity and cgroup quota respected)."""
    threads: PositiveInt | None = None
    """Threads per engine; unset: cores divided by the engines that can be active at once."""


class PolicySettings(Strict, frozen=True, kw_only=True):
    """Who serves a request."""

    name: str = "calm"
    """calm, paper[:mode[:lambda]], fixed:NAME, random[:seed], round-robin, least-loaded, or a plug-in."""
    goal: str = "balanced"
    """Named weights: balanced, latency, energy, quality, or one of [goals]."""
    weights: Weights | None = None
    """Explicit weights; they override the goal."""
    quality_floor: Inside | None = None
    """Mean quality (above 0, below 1) to hold at the least latency and energy; unset: the weights alone decide."""
    embedder: Literal["static", "minilm", "none"] = "static"
    """static: 256-d word vectors; minilm: 384-d sentence vectors, slower and heavier; none: no content."""
    seed: int = 0
    """Seed of everything random in a policy."""
    attempts: PositiveInt = 3
    """Models tried for one request before it fails; failover happens only before the first byte."""


class KnowledgeSettings(Strict, frozen=True, kw_only=True):
    """What is remembered."""

    path: str | None = None
    """SQLite file; unset: $XDG_STATE_HOME/calm/knowledge.sqlite3."""
    store_prompts: bool = False
    """Keep the query text. Off: features and figures only."""
    retention_days: float | None = 90.0
    """Requests older than this are deleted."""
    max_requests: PositiveInt | None = 1_000_000
    """Rows kept at most."""
    checkpoint_s: Positive = 10.0
    """How often learned state is saved."""


class EnergySettings(Strict, frozen=True, kw_only=True):
    """How joules are obtained."""

    meter: Literal["auto", "nvml", "rapl", "cpu-time", "absent"] = "auto"
    """auto takes the best meter this machine allows; see `calm doctor`."""
    watts_per_core: Positive | None = None
    """For the cpu-time model: watts of one busy core; unset: the CPU's TDP table."""


class Logging(Strict, frozen=True, kw_only=True):
    """What is said on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message shown."""


class Settings(Strict, frozen=True, kw_only=True):
    """The whole configuration."""

    server: Server = Server()
    fleet: FleetSettings = FleetSettings()
    memory: Memory = Memory()
    scheduling: Scheduling = Scheduling()
    policy: PolicySettings = PolicySettings()
    goals: Mapping[str, Weights] = {}
    """Named weights of your own: [goals.NAME] latency = …, energy = …, quality = …, cost = …"""
    knowledge: KnowledgeSettings = KnowledgeSettings()
    energy: EnergySettings = EnergySettings()
    log: Logging = Logging()


SECTIONS: Mapping[str, type[Strict]] = {
    "server": Server,
    "fleet": FleetSettings,
    "memory": Memory,
    "scheduling": Scheduling,
    "policy": PolicySettings,
    "knowledge": KnowledgeSettings,
    "energy": EnergySettings,
    "log": Logging,
}


# --- reading ------------------------------------------------------------------------------------


def load_settings(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Mapping[str, object]] | None = None,
) -> Settings:
    """Merge file, environment and flags. Raises BadInput naming the setting, its place and the reason."""
    environ = os.environ if environ is None else environ
    path = path or config_path(environ)
    tree = _read_file(path) if path else {}
    for place, layer in ((_env_place, _from_environ(environ)), (_flag_place, overrides or {})):
        for section, fields in layer.items():
            known = tree.setdefault(section, {})
            if not isinstance(known, dict):
                raise BadInput(f"{path}: [{section}] must be a table", field=section)
            known.update({key: value for key, value in fields.items() if value is not None})
            _convert({section: known}, place(section))
    return _convert(tree, str(path) if path else "settings")


def config_path(environ: Mapping[str, str]) -> Path | None:
    """The config file in force: an explicit one must exist, the default one may be absent."""
    if explicit := environ.get("CALM_CONFIG"):
        return Path(explicit).expanduser()
    default = platformdirs.user_config_path("calm") / "calm.toml"
    return default if default.is_file() else None


def _read_file(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such config file", field="config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not valid TOML: {error}", field="config") from None


def _from_environ(environ: Mapping[str, str]) -> dict[str, dict[str, object]]:
    layer: dict[str, dict[str, object]] = {}
    for name, value in environ.items():
        match = re.fullmatch(r"CALM_([A-Z]+)__([A-Z_]+)", name)
        if match:
            section, field = match[1].lower(), match[2].lower()
            layer.setdefault(section, {})[field] = _typed(section, field, value)
    return layer


def _typed(section: str, field: str, value: str) -> object:
    """Lists are comma-separated in the environment; numbers and booleans are converted by msgspec."""
    hint = get_type_hints(SECTIONS[section]).get(field) if section in SECTIONS else None
    if hint == tuple[str, ...]:
        return [part.strip() for part in value.split(",") if part.strip()]
    if value == "" and hint is not str:
        return None
    return value


def _env_place(section: str) -> str:
    return f"environment CALM_{section.upper()}__…"


def _flag_place(_section: str) -> str:
    return "command line"


def _convert(tree: Mapping[str, object], place: str) -> Settings:
    try:
        return msgspec.convert(tree, Settings, strict=False)
    except msgspec.ValidationError as error:
        field, reason = explain(error, Settings)
        raise BadInput(f"{place}: {field or 'settings'}: {reason}", field=field) from None


def explain(error: msgspec.ValidationError, root: type[msgspec.Struct]) -> tuple[str, str]:
    """(dotted field, reason) of a validation error, with a suggestion for a misspelt field."""
    text, _, where = str(error).partition(" - at `")
    field = where.rstrip("`").removeprefix("$").lstrip(".")
    unknown = re.search(r"unknown field `(\w+)`", text)
    if unknown:
        owner = SECTIONS.get(field, root)
        close = difflib.get_close_matches(unknown[1], owner.__struct_fields__, 1)
        hint = f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(owner.__struct_fields__)}"
        return ".".join(filter(None, (field, unknown[1]))), f"unknown setting{hint}"
    return field, text


# --- derived ------------------------------------------------------------------------------------

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str, free_bytes: int) -> int:
    """ "800MB", "6GiB", "123456" or "60%" (of `free_bytes`) to bytes. Raises BadInput."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[kmgt]i?b?|b)?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        hint = f'memory.budget: "{text}" is no size; try "6GiB", "800MB" or "60%"'
        raise BadInput(hint, field="memory.budget")
    number, unit = float(match[1]), (match[2] or "").lower()
    if unit == "%":
        if number > 100:
            raise BadInput("memory.budget: more than 100% of the memory", field="memory.budget")
        return int(free_bytes * number / 100)
    unit = unit.removesuffix("b")
    return int(number * (_BINARY.get(unit) or _UNITS[unit]))


def budget_bytes(settings: Settings) -> int:
    return parse_bytes(settings.memory.budget, psutil.virtual_memory().available)


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Weights and other fetched files; `CALM_CACHE_DIR` moves it."""
    environ = os.environ if environ is None else environ
    return Path(environ.get("CALM_CACHE_DIR") or platformdirs.user_cache_path("calm")).expanduser()


def state_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Knowledge and keys; `CALM_STATE_DIR` moves it."""
    environ = os.environ if environ is None else environ
    return Path(environ.get("CALM_STATE_DIR") or platformdirs.user_state_path("calm")).expanduser()


def knowledge_path(settings: Settings) -> Path:
    own = settings.knowledge.path
    return Path(own).expanduser() if own else state_dir() / "knowledge.sqlite3"


def keys_path() -> Path:
    return state_dir() / "keys.toml"


def secret(name: str) -> str | None:
    """The value of an environment variable that a card names as its key; never logged, never stored."""
    return os.environ.get(name) or None


def default_fleet_dir() -> Path:
    """The fleet that ships with CALM."""
    packaged = Path(__file__).parent / "fleet"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "fleet"


def fleet_dir(settings: Settings) -> Path:
    """The fleet directory in force; the user's own is made from the shipped one at first use."""
    if settings.fleet.dir:
        return Path(settings.fleet.dir).expanduser()
    if any(Path("fleet").glob("*.toml")):
        return Path("fleet").resolve()
    own = platformdirs.user_config_path("calm") / "fleet"
    if not own.is_dir():
        own.mkdir(parents=True)
        for card in default_fleet_dir().glob("*.toml"):
            (own / card.name).write_bytes(card.read_bytes())
    return own
