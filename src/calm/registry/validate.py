"""From the data of one TOML file to a ModelCard, or to every mistake in it at once."""

from __future__ import annotations

import ipaddress
import math
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import get_origin
from urllib.parse import urlsplit

import msgspec

from calm.records import EngineSpec, ModelCard, Strict
from calm.registry.limits import LIMITS, NAME_PATTERN, PLACEHOLDERS, RESERVED_NAMES, Fragment, matches
from calm.registry.problems import CardProblem, did_you_mean
from calm.registry.reference import FileReference, leaf_name, parse_reference

Complaint = tuple[str | None, str, str | None]
"""(dotted field, reason, hint)."""

_PLACE = re.compile(r"^(?P<reason>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]+)`$")


def check(
    data: Mapping[str, object], file: str, stem: str | None
) -> tuple[ModelCard | None, list[CardProblem]]:
    """The card, or None and why not. `stem` is the name the file's name promises; None: it promises none."""
    card, complaints = _convert(data)
    if card is not None:
        card = _with_placement(card, data)
        complaints += [*_limits(card, ""), *_coherent(card, stem), *_adapted(card, data)]
    problems = [CardProblem(file=file, field=f, reason=r, hint=h) for f, r, h in complaints]
    return (None if problems else card), problems


def _convert(data: Mapping[str, object]) -> tuple[ModelCard | None, list[Complaint]]:
    complaints, known = _split_unknown(data, ModelCard, "")
    try:
        return msgspec.convert(known, ModelCard), complaints
    except msgspec.ValidationError as error:
        return None, [*complaints, _translate(str(error))]


def _split_unknown(
    data: Mapping[str, object], struct: type[Strict], prefix: str
) -> tuple[list[Complaint], dict[str, object]]:
    """Every unknown key at any depth, and the data without them, so that types are checked as well."""
    complaints: list[Complaint] = []
    known: dict[str, object] = {}
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(struct)}
    for key, value in data.items():
        if key not in fields:
            hint = did_you_mean(key, fields) or f"known here: {', '.join(sorted(fields))}"
            complaints.append((prefix + key, "unknown field", hint))
            continue
        more, known[key] = _split_inside(value, fields[key], f"{prefix}{key}.")
        complaints += more
    return complaints, known


def _split_inside(value: object, annotation: object, prefix: str) -> tuple[list[Complaint], object]:
    """The same for what a key holds: a table, a table of tables by name, or neither."""
    inner = _struct_in(annotation)
    if inner is None or not isinstance(value, Mapping):
        return [], value
    if get_origin(annotation) is not Mapping:
        return _split_unknown(value, inner, prefix)
    complaints: list[Complaint] = []
    known: dict[str, object] = {}
    for name, entry in value.items():
        more, known[name] = _split_inside(entry, inner, f"{prefix}{name}.")
        complaints += more
    return complaints, known


def _struct_in(annotation: object) -> type[Strict] | None:
    """The Strict class in `X`, `X | None` or a mapping to X."""
    for option in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(option, type) and issubclass(option, Strict):
            return option
    return None


def _translate(message: str) -> Complaint:
    """msgspec says "Expected `int`, got `str` - at `$.engine.slots`"."""
    match = _PLACE.match(message)
    reason, path = (match["reason"], match["path"]) if match else (message, None)
    missing = _MISSING.match(reason)
    if missing is not None:
        field = ".".join(part for part in (path, missing["field"]) if part)
        return field, "missing; every card needs it" if not path else "missing", None
    return path or None, reason[:1].lower() + reason[1:], None


def _with_placement(card: ModelCard, data: Mapping[str, object]) -> ModelCard:
    """A server elsewhere is remote unless its operator vouches for it with `placement = "local"`."""
    url = card.engine.url
    if "placement" in data or card.engine.kind != "openai" or url is None or is_loopback(url):
        return card
    return msgspec.structs.replace(card, placement="remote")


def is_loopback(url: str) -> bool:
    """True for localhost and loopback addresses; a name that only resolves to one is not taken for it."""
    host = _host(url) or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


# --- single values ------------------------------------------------------------------------------


def _limits(struct: Strict, prefix: str) -> Iterator[Complaint]:
    limits = LIMITS.get(type(struct).__name__, {})
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if isinstance(value, Strict):
            yield from _limits(value, f"{prefix}{name}.")
        elif value is not None and name in limits:
            reason = _broken(value, limits[name])
            if reason is not None:
                yield prefix + name, reason, None


def _broken(value: object, limit: Fragment) -> str | None:
    """Why a value breaks its limit. The value is not repeated: it may be a key pasted by mistake."""
    if isinstance(value, str | Sequence):
        return _broken_text(value, limit)
    if not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        return "must be a finite number"
    if "exclusiveMinimum" in limit and not value > float(limit["exclusiveMinimum"]):
        return f"must be greater than {limit['exclusiveMinimum']}"
    if "minimum" in limit and not value >= float(limit["minimum"]):
        return f"must be at least {limit['minimum']}"
    if "maximum" in limit and not value <= float(limit["maximum"]):
        return f"must be at most {limit['maximum']}"
    return None


def _broken_text(value: str | Sequence[object], limit: Fragment) -> str | None:
    size = len(value.strip()) if isinstance(value, str) else len(value)
    if size < int(limit.get("minLength", limit.get("minItems", 0))):
        return "must not be empty"
    if isinstance(value, str) and "pattern" in limit and not matches(str(limit["pattern"]), value):
        return f"must match {limit['pattern']}"
    return None


# --- values against each other ------------------------------------------------------------------


def _coherent(card: ModelCard, stem: str | None) -> Iterator[Complaint]:
    yield from _named(card.name, stem)
    yield from _sourced(card)
    yield from _runnable(card)
    yield from _believable(card)


def _named(name: str, stem: str | None) -> Iterator[Complaint]:
    if name in RESERVED_NAMES:
        yield "name", f"`{name}` is reserved: it asks CALM to choose", "take another name"
    elif stem is not None and name != stem and matches(NAME_PATTERN, name):
        yield (
            "name",
            f"`{name}` differs from the file's name",
            f"call the file {name}.toml or the model `{stem}`",
        )


def _sourced(card: ModelCard) -> Iterator[Complaint]:
    for index, part in enumerate(card.source.parts if card.source else ()):
        try:
            parse_reference(part)
        except ValueError as error:
            yield f"source.parts[{index}]", str(error), None
    yield from _converted(card)


def _converted(card: ModelCard) -> Iterator[Complaint]:
    """Only a GGUF can be re-quantised, and only the built-in engine gains by it."""
    source = card.source
    if source is None or source.convert is None:
        return
    if card.adapter_of is not None:
        yield "source.convert", "is for the weights of a base, not for an adapter", "remove it"
    elif card.engine.kind != "llamacpp":
        yield "source.convert", f"is not read by kind `{card.engine.kind}`", "only llamacpp reads a GGUF"
    elif ".gguf" not in (_file_name(card) or ".gguf"):
        yield "source.convert", "converts a .gguf file and this source is none", "remove it"


def _file_name(card: ModelCard) -> str | None:
    """What the weights are called; None where the parts are wrong, which is said elsewhere."""
    assert card.source is not None
    try:
        return card.source.filename or leaf_name(parse_reference(card.source.parts[0]))
    except (ValueError, IndexError):
        return None


def _runnable(card: ModelCard) -> Iterator[Complaint]:
    if card.adapter_of is not None:
        return  # how it runs is its base's: see registry.adapters
    engine = card.engine
    match engine.kind:
        case "llamacpp" | "onnx":
            if card.source is None:
                yield "source", f"a {engine.kind} engine needs weights", "add [source] with parts and sha256"
        case "command":
            yield from _command(card)
        case "openai":
            yield from _server(card)
    if engine.kind != "openai":
        if card.placement == "remote":
            yield "placement", f"a {engine.kind} engine runs on this machine", 'leave it out or write "local"'
        for field in ("url", "api_key_env"):
            if getattr(engine, field) is not None:
                yield (
                    f"engine.{field}",
                    f"is not read by kind `{engine.kind}`",
                    'did you mean kind = "openai"?',
                )


def _command(card: ModelCard) -> Iterator[Complaint]:
    if not (card.engine.cmd or "").strip():
        yield (
            "engine.cmd",
            "a command engine needs its command",
            'e.g. "llama-server -m {path} --port {port}"',
        )
        return
    try:
        used = {name for _, name, _, _ in string.Formatter().parse(card.engine.cmd or "") if name is not None}
    except ValueError as error:
        yield "engine.cmd", f"is no template: {error}", "write {{ and }} for literal braces"
        return
    for name in sorted(used - PLACEHOLDERS):
        hint = did_you_mean(name, PLACEHOLDERS) or f"known: {', '.join(sorted(PLACEHOLDERS))}"
        yield "engine.cmd", f"unknown placeholder {{{name}}}", hint
    if not used & {"port", "socket"}:
        yield "engine.cmd", "says neither {port} nor {socket}", "CALM must be able to tell it where to listen"
    if "path" in used and card.source is None:
        yield "source", "engine.cmd uses {path}, so weights are needed", "add [source] with parts and sha256"


def _server(card: ModelCard) -> Iterator[Complaint]:
    url = card.engine.url
    if url is None:
        yield "engine.url", "an openai engine needs its base URL", 'e.g. "http://127.0.0.1:11434/v1"'
    elif _host(url) is None:
        yield "engine.url", "has no host", 'e.g. "http://127.0.0.1:11434/v1"'
    elif "@" in urlsplit(url).netloc:
        yield (
            "engine.url",
            "must not carry credentials",
            "name the key's environment variable in engine.api_key_env",
        )
    if card.engine.cmd is not None:
        yield "engine.cmd", "is not read by kind `openai`", 'did you mean kind = "command"?'
    if card.source is not None:
        yield "source", "an openai engine has its own weights", "remove [source]"


def _believable(card: ModelCard) -> Iterator[Complaint]:
    for domain, quality in card.priors.quality.items():
        if not 0.0 <= quality <= 1.0:
            yield f"priors.quality.{domain}", "must be between 0 and 1", None
    yield from _fields(card)
    if any(not domain.strip() for domain in card.domains):
        yield "domains", "holds an empty domain", None
    if "" in card.chat.stop:
        yield "chat.stop", "holds an empty string, which would stop every answer at once", None


def _fields(card: ModelCard) -> Iterator[Complaint]:
    for name, field in card.fields.items():
        again = f"run `calm models field {card.name} --data FILE` again"
        try:
            field.numbers()
        except ValueError:
            yield f"fields.{name}.weights", "is not base64 of finite 16-bit floats", again
        if field.untrained is not None and not 0.0 <= field.untrained <= 1.0:
            yield f"fields.{name}.untrained", "must be between 0 and 1", None


# --- adapters -----------------------------------------------------------------------------------

BORROWED = ("context", "placement", "max_in_flight", "sandbox")
"""Fields that are its base's: an adapter that states one would be believed and not obeyed."""
OWN_ENGINE = ("upstream_model",)
"""What an adapter may say about the engine: the name by which a server knows it."""


def _adapted(card: ModelCard, data: Mapping[str, object]) -> Iterator[Complaint]:
    """What an adapter's card states although it is its base's. Whether there is a base, only the fleet knows."""
    base = card.adapter_of
    if base is None:
        return
    if base == card.name:
        yield "adapter_of", "names the card itself", "name the card of the base model"
    stated = [field for field in BORROWED if field in data]
    engine = [field for field in EngineSpec.__struct_fields__ if field not in OWN_ENGINE]
    stated += [f"engine.{field}" for field in engine if field in _table(data, "engine")]
    stated += ["chat.template"] if "template" in _table(data, "chat") else []
    for field in stated:
        yield field, f"is its base's, `{base}`, and cannot differ for an adapter", "remove it"


def _table(data: Mapping[str, object], name: str) -> Mapping[str, object]:
    table = data.get(name)
    return table if isinstance(table, Mapping) else {}


def relative_parts(card: ModelCard) -> tuple[str, ...]:
    """`file:` parts that mean something else when the card stands in another directory."""
    parts = card.source.parts if card.source else ()
    references = ((part, parse_reference(part)) for part in parts)
    return tuple(p for p, r in references if isinstance(r, FileReference) and not r.path.startswith("/"))
