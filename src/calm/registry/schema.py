"""The JSON Schema of a metadata file, for editors: types from records, limits from the validator."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from typing import cast

import msgspec

from calm import records
from calm.records import ModelCard
from calm.registry.limits import LIMITS, Fragment

Schema = dict[str, object]

_SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"


def card_schema() -> Schema:
    """JSON Schema (2020-12) of a model card, each field described by its docstring in records."""
    schema = cast(Schema, msgspec.json.schema(ModelCard))
    for name, definition in cast(dict[str, Schema], schema["$defs"]).items():
        _describe(definition, _field_docs(name), LIMITS.get(name, {}))
    return {"$schema": _SCHEMA_ID, "title": "CALM model card", **schema}


def schema_text() -> str:
    """The schema as it is published: indented, with a final newline."""
    encoded = msgspec.json.encode(card_schema())
    return msgspec.json.format(encoded, indent=2).decode() + "\n"


def _describe(definition: Schema, docs: Mapping[str, str], limits: Mapping[str, Fragment]) -> None:
    for field, spec in cast(dict[str, Schema], definition.get("properties", {})).items():
        _forget_null(spec)
        if field in docs:
            spec["description"] = docs[field]
        spec.update(limits.get(field, {}))


def _forget_null(spec: Schema) -> None:
    """TOML has no null, so an editor must not offer one: `X | null` becomes X, `default: null` nothing."""
    if spec.get("default", ...) is None:
        del spec["default"]
    branches = [b for b in cast(list[Schema], spec.get("anyOf", [])) if b != {"type": "null"}]
    if len(branches) == 1:
        del spec["anyOf"]
        spec.update(branches[0])
    if isinstance(spec.get("default"), dict):
        del spec["default"]  # a table's defaults stand at its own fields


def _field_docs(struct: str) -> dict[str, str]:
    """The string that follows each annotated field in the class body."""
    body = ast.parse(textwrap.dedent(inspect.getsource(getattr(records, struct)))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        text = after.value if isinstance(after, ast.Expr) else None
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            docs[field.target.id] = inspect.cleandoc(text.value)
    return docs
