"""A chat completion as OpenAI spells it, checked, and what it asks of this model."""

from __future__ import annotations

from dataclasses import dataclass

from .refusal import Json, Refused
from .tools import Tool, read_tools

WRITTEN_TOKENS = 256


@dataclass(frozen=True)
class Asked:
    """A checked request. `choosable` are the tools that may be called, `must_call` at least one of them."""

    question: str
    tools: tuple[Tool, ...]
    choosable: tuple[Tool, ...]
    must_call: bool
    single: bool
    limit: int
    stream: bool
    usage_in_stream: bool


def read_request(body: object) -> Asked:
    """Raises Refused, naming the field, for what this model cannot do."""
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    _refuse_unsupported(body)
    tools = read_tools(body.get("tools"))
    choosable, must_call, named = _choice(body.get("tool_choice"), tools)
    options = body.get("stream_options")
    return Asked(
        question=read_question(body.get("messages")),
        tools=tools,
        choosable=choosable,
        must_call=must_call,
        single=named or body.get("parallel_tool_calls") is False,
        limit=_limit(body),
        stream=body.get("stream") is True,
        usage_in_stream=isinstance(options, dict) and options.get("include_usage") is True,
    )


def _refuse_unsupported(body: Json) -> None:
    wanted = body.get("response_format")
    unsupported = {
        "n": body.get("n") not in (None, 1),
        "logprobs": bool(body.get("logprobs")),
        "top_logprobs": bool(body.get("top_logprobs")),
        "stop": bool(body.get("stop")),
        "functions": bool(body.get("functions")),
        "response_format": isinstance(wanted, dict) and wanted.get("type", "text") != "text",
    }
    for param, asked in unsupported.items():
        if asked:
            raise Refused(f"{param}: this model only writes tool calls, one answer, greedily", param=param)


def _limit(body: Json) -> int:
    for param in ("max_completion_tokens", "max_tokens"):
        given = body.get(param)
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
            raise Refused(f"{param}: a number of at least 1 is wanted", param=param)
        if isinstance(given, int):
            return min(given, WRITTEN_TOKENS)
    return WRITTEN_TOKENS


def _choice(given: object, tools: tuple[Tool, ...]) -> tuple[tuple[Tool, ...], bool, bool]:
    """(what may be called, whether something must be, whether one function is named)."""
    if given in (None, "auto", "required"):
        return tools, given == "required", False
    if given == "none":
        raise Refused("tool_choice: none, but this model does nothing else", param="tool_choice")
    function = given.get("function") if isinstance(given, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    chosen = tuple(tool for tool in tools if tool.name == name)
    if not chosen:
        reason = "auto, required or one of the functions in tools is wanted"
        raise Refused(f"tool_choice: {reason}", param="tool_choice")
    return chosen, True, True


def read_question(messages: object) -> str:
    """The last message, which must be the user's: the model reads one question and no history."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "user":
        reason = "the last one must be the user's; this model reads neither tool results nor its own answers"
        raise Refused(f"messages: {reason}", param="messages")
    text = _text(last.get("content"))
    if not text.strip():
        raise Refused("messages: the last one holds no text", param="messages")
    return text


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise Refused("messages: this model reads text only", param="messages")
    return "\n".join(map(str, texts))
