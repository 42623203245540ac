"""The functions that may be called, flattened to what the model was trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .refusal import Json, Refused


@dataclass(frozen=True)
class Parameter:
    """One argument of a function. `members` are the JSON spellings of an enumeration of strings."""

    kind: str
    description: str
    required: bool
    members: tuple[str, ...] = ()

    def described(self) -> Json:
        return {"type": self.kind or "string", "description": self.description, "required": self.required}


@dataclass(frozen=True)
class Tool:
    """One function. `plain` is its name in snake case, the only spelling the model was trained on."""

    name: str
    plain: str
    description: str
    parameters: Mapping[str, Parameter]

    def described(self) -> Json:
        """In the layout of the training data, which knows no nesting under `properties`."""
        inner = {name: parameter.described() for name, parameter in self.parameters.items()}
        return {"name": self.plain, "description": self.description, "parameters": inner}


def read_tools(given: object) -> tuple[Tool, ...]:
    if not isinstance(given, list) or not given:
        raise Refused("tools: this model only calls tools, and none is given", param="tools")
    tools = tuple(_tool(item, f"tools[{index}]") for index, item in enumerate(given))
    names: dict[str, str] = {}
    for tool in tools:
        other = names.setdefault(tool.plain, tool.name)
        if other != tool.name:
            raise Refused(f"tools: {other} and {tool.name} read alike to this model", param="tools")
    return tools


def _tool(item: object, where: str) -> Tool:
    function = item.get("function") if isinstance(item, dict) and item.get("type") == "function" else None
    if not isinstance(function, dict):
        raise Refused(f'{where}: {{"type": "function", "function": ...}} is wanted', param=where)
    name = function.get("name")
    plain = snake_case(name) if isinstance(name, str) else ""
    if not isinstance(name, str) or not plain:
        raise Refused(f"{where}.function.name: a name with letters is wanted", param=f"{where}.function.name")
    return Tool(
        name=name,
        plain=plain,
        description=str(function.get("description") or ""),
        parameters=flat_parameters(function.get("parameters")),
    )


def snake_case(name: str) -> str:
    """camelCase, PascalCase and dots as the model's training data spelled them."""
    words = re.sub(r"[^a-zA-Z0-9_]+", "_", name)
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", words)
    words = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", words)
    return re.sub(r"_+", "_", words).lower().strip("_")


def flat_parameters(schema: object) -> Mapping[str, Parameter]:
    """A JSON Schema's properties. The inside of nested objects is left out: the model never saw any."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    required = schema.get("required") if isinstance(schema, dict) else None
    needed = required if isinstance(required, list) else []
    if not isinstance(properties, dict):
        return {}
    return {name: _parameter(inner, name in needed) for name, inner in properties.items()}


def _parameter(schema: object, required: bool) -> Parameter:
    given: Json = schema if isinstance(schema, dict) else {}
    kinds, members = given.get("type", ""), given.get("enum")
    kind = next((k for k in kinds if k != "null"), "") if isinstance(kinds, list) else kinds
    described, texts = str(given.get("description") or ""), []
    if isinstance(members, list):
        described = f"{described} One of: {', '.join(map(str, members))}.".strip()
        texts = members if all(isinstance(member, str) for member in members) else []
    return Parameter(
        kind=str(kind or ("string" if texts else "")),
        description=described,
        required=required,
        members=tuple(json.dumps(text)[1:-1] for text in texts),
    )
