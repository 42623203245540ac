"""The checked part of OpenAI's request bodies. The types are the validation; msgspec names the wrong path."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec

from calm.errors import BadInput

T = TypeVar("T")
Range2 = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Common(msgspec.Struct):
    """Fields that all endpoints share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    calm: dict[str, object] | None = None


class Sampling(Common):
    n: Count | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    presence_penalty: Range2 | None = None
    frequency_penalty: Range2 | None = None
    stop: str | list[str] | None = None
    seed: int | None = None


class Part(msgspec.Struct):
    type: str
    text: str | None = None


class Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    tool_calls: list[dict[str, object]] | None = None
    function_call: dict[str, object] | None = None


class ResponseFormat(msgspec.Struct):
    type: str


class Chat(Sampling, kw_only=True):
    messages: list[Message]
    tools: list[dict[str, object]] | None = None
    tool_choice: str | dict[str, object] | None = None
    functions: list[dict[str, object]] | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None


class Completion(Sampling, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | bool | None = None


class Embeddings(Common, kw_only=True):
    input: str | list[str | int | list[int]]


def convert(value: object, shape: type[T], root: str = "") -> T:
    """`msgspec.convert` whose ValidationError becomes BadInput with the dotted path as its field."""
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at `")
        path = where.rstrip("`").removeprefix("$").lstrip(".")
        missing = reason.partition("missing required field `")[2].rstrip("`")
        field = ".".join(filter(None, (root, path, missing)))
        reason = reason[:1].lower() + reason[1:]
        raise BadInput(f"{field}: {reason}" if field else reason, field=field or None) from None
