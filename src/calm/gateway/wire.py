"""Request bytes become an `Ask` here and nowhere else: everything past this file is typed.

The OpenAI fields CALM understands are checked (a wrong one is BadInput naming it, as `param`); all others
pass to the engine untouched. Wishes come from the body's `calm` object and from `x-calm-*` headers; where
both say something the body wins, because headers are often a client's fixed defaults and the body is about
this one request. Of a key written twice in a JSON object the last counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from calm.errors import BadInput
from calm.gateway.limits import Limits
from calm.gateway.shapes import Chat, Common, Completion, Embeddings, Message, Sampling, T, convert
from calm.gateway.wishes import body_wishes, header_wishes, merge_wishes
from calm.records import Ask, Capability, Wishes

ROUTED = "calm"
"""The model name that asks CALM to choose; `calm/GOAL` does too, and names the goal."""
CHARS_PER_TOKEN = 4
"""How many characters a prompt given as token ids counts for: the usual figure for English text."""
SHORT_TURN_BYTES = 24
"""Below this a user turn ("yes", "and in French?", six CJK characters) is read with the turn before it.

Bytes of UTF-8 and not characters: a script that says more per character also takes more bytes for it.
"""
FOLLOW_UP_REACH = 8
"""At most so many user turns make up the query."""

# --- the three endpoints ------------------------------------------------------------------------


def parse_chat(
    raw: bytes,
    headers: Mapping[str, str],
    *,
    limits: Limits,
    request_id: str,
    now_s: float,
    tenant: str | None = None,
) -> Ask:
    """An `Ask` from a /v1/chat/completions body. Raises BadInput whose field is the JSON path."""
    body, chat = _read(raw, Chat, limits)
    _check_sampling(chat, limits)
    _check_messages(chat.messages, limits)
    wishes, model = _wishes(chat, headers)
    texts = [_text(message) for message in chat.messages]
    user_turns = [text for message, text in zip(chat.messages, texts, strict=True) if message.role == "user"]
    return Ask(
        request_id=request_id,
        kind="chat",
        query=_query(user_turns) if user_turns else texts[-1],
        prompt_chars=sum(map(len, texts)) + _structure_chars(chat),
        body=body,
        requires=_chat_needs(chat),
        stream=bool(chat.stream),
        max_tokens=chat.max_completion_tokens or chat.max_tokens,
        samples=chat.n or 1,
        model=model,
        wishes=wishes,
        tenant=tenant,
        conversation=_conversation(tenant, wishes, chat.messages, texts),
        turns=max(1, len(user_turns)),
        arrived_s=now_s,
    )


def parse_completion(
    raw: bytes,
    headers: Mapping[str, str],
    *,
    limits: Limits,
    request_id: str,
    now_s: float,
    tenant: str | None = None,
) -> Ask:
    """An `Ask` from a /v1/completions body; `samples` counts `n` answers for each prompt."""
    body, completion = _read(raw, Completion, limits)
    _check_sampling(completion, limits)
    wishes, model = _wishes(completion, headers)
    texts, chars, prompts = _inputs(completion.prompt, "prompt", model, limits)
    return Ask(
        request_id=request_id,
        kind="completion",
        query="\n".join(texts),
        prompt_chars=chars,
        body=body,
        requires=frozenset({"completion"}),
        stream=bool(completion.stream),
        max_tokens=completion.max_completion_tokens or completion.max_tokens,
        samples=(completion.n or 1) * prompts,
        model=model,
        wishes=wishes,
        tenant=tenant,
        conversation=_given_conversation(tenant, wishes),
        arrived_s=now_s,
    )


def parse_embeddings(
    raw: bytes,
    headers: Mapping[str, str],
    *,
    limits: Limits,
    request_id: str,
    now_s: float,
    tenant: str | None = None,
) -> Ask:
    """An `Ask` from a /v1/embeddings body."""
    body, embeddings = _read(raw, Embeddings, limits)
    if embeddings.stream:
        raise BadInput("stream: embeddings are not streamed", field="stream")
    wishes, model = _wishes(embeddings, headers)
    texts, chars, _ = _inputs(embeddings.input, "input", model, limits)
    return Ask(
        request_id=request_id,
        kind="embeddings",
        query="\n".join(texts),
        prompt_chars=chars,
        body=body,
        requires=frozenset({"embeddings"}),
        model=model,
        wishes=wishes,
        tenant=tenant,
        conversation=_given_conversation(tenant, wishes),
        arrived_s=now_s,
    )


PARSERS = {"chat": parse_chat, "completion": parse_completion, "embeddings": parse_embeddings}
"""By `Ask.kind`."""


def wants_usage(ask: Ask) -> bool:
    """Whether the client itself asked for the usage chunk of a stream."""
    options = ask.body.get("stream_options")
    return isinstance(options, Mapping) and options.get("include_usage") is True


# --- JSON ---------------------------------------------------------------------------------------


def _read(raw: bytes, shape: type[T], limits: Limits) -> tuple[dict[str, object], T]:
    """The body as it came, less `calm`, beside the checked fields."""
    body = read_object(raw, limits.max_depth)
    checked = convert(body, shape)
    body.pop("calm", None)
    return body, checked


def read_object(raw: bytes, max_depth: int) -> dict[str, Any]:
    """Any JSON object. Raises BadInput for what is not JSON, not an object, or nested too deeply."""
    try:
        value: Any = msgspec.json.decode(raw)
    except RecursionError:
        raise BadInput(f"the body is nested more than {max_depth} levels deep") from None
    except UnicodeDecodeError:
        raise BadInput("the body is not valid UTF-8") from None
    except msgspec.MsgspecError as error:
        raise BadInput(f"the body is not valid JSON: {error}" if raw else "the body is empty") from None
    if not isinstance(value, dict):
        raise BadInput("the body must be a JSON object")
    if raw.count(b"{") + raw.count(b"[") > max_depth:
        _check_depth(value, max_depth)
    return value


def _check_depth(value: Any, max_depth: int) -> None:
    """Level by level and not by recursion: what is nested too deeply to encode again must not get in."""
    level: list[Any] = [value]
    for _ in range(max_depth):
        level = [child for node in level for child in _children(node) if type(child) in (dict, list)]
        if not level:
            return
    raise BadInput(f"the body is nested more than {max_depth} levels deep")


def _children(node: Any) -> Iterable[Any]:
    return node.values() if type(node) is dict else node


# --- checks and readings --------------------------------------------------------------------------


def _check_sampling(body: Sampling, limits: Limits) -> None:
    if body.n and body.n > limits.max_samples:
        raise BadInput(f"n: at most {limits.max_samples} answers at once", field="n")
    if isinstance(body.stop, list) and len(body.stop) > limits.max_stops:
        raise BadInput(f"stop: at most {limits.max_stops} stop strings", field="stop")
    if body.stream_options and not body.stream:
        raise BadInput("stream_options: only with `stream: true`", field="stream_options")


def _check_messages(messages: Sequence[Message], limits: Limits) -> None:
    if not messages:
        raise BadInput("messages: must not be empty", field="messages")
    if len(messages) > limits.max_messages:
        raise BadInput(f"messages: at most {limits.max_messages}", field="messages")
    for index, message in enumerate(messages):
        if message.content is None and not (message.tool_calls or message.function_call):
            field = f"messages[{index}].content"
            raise BadInput(f"{field}: required unless the message has tool_calls", field=field)


def _text(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content or () if part.text)


def _query(user_turns: Sequence[str]) -> str:
    """The last user turn; while that is too short to tell what it is about, the turns before it too."""
    query = user_turns[-1]
    for turn in user_turns[-2 : -1 - FOLLOW_UP_REACH : -1]:
        if len(query.encode()) >= SHORT_TURN_BYTES:
            break
        query = f"{turn}\n{query}"
    return query


def _structure_chars(chat: Chat) -> int:
    """Characters of what the template writes out beside the texts: tool definitions and calls."""
    parts: list[object] = [chat.tools, chat.functions]
    parts += [message.tool_calls for message in chat.messages if message.tool_calls]
    return sum(len(msgspec.json.encode(part)) for part in parts if part)


def _chat_needs(chat: Chat) -> frozenset[Capability]:
    """A single question with tools needs nobody who chats; a conversation about tools needs both."""
    calls = bool(chat.tools or chat.functions) and chat.tool_choice != "none"
    needs: set[Capability] = {"tools"} if calls else {"chat"}
    if calls and not _one_question(chat):
        needs.add("chat")
    if chat.response_format and chat.response_format.type.startswith("json"):
        needs.add("json")
    return frozenset(needs)


def _one_question(chat: Chat) -> bool:
    roles = [message.role for message in chat.messages]
    return (
        not chat.functions and roles.count("user") == 1 and not {"assistant", "tool", "function"} & set(roles)
    )


def _inputs(
    value: str | list[str | int | list[int]], field: str, model: str | None, limits: Limits
) -> tuple[list[str], int, int]:
    """Texts, characters and number of prompts of a prompt or input, in any of OpenAI's four forms."""
    if isinstance(value, str):
        return [value], len(value), 1
    if not value:
        raise BadInput(f"{field}: must not be empty", field=field)
    texts = [item for item in value if isinstance(item, str)]
    if len(texts) == len(value):
        _check_count(len(texts), field, limits)
        return texts, sum(map(len, texts)), len(texts)
    if texts or len({type(item) for item in value}) > 1:
        raise BadInput(f"{field}: texts, token ids and lists of token ids must not be mixed", field=field)
    if model is None:
        reason = "token ids mean something to one tokenizer only: name the model, or send text"
        raise BadInput(f"{field}: {reason}", field=field)
    rows = [item for item in value if isinstance(item, list)]
    _check_count(len(rows), field, limits)
    tokens = sum(map(len, rows)) if rows else len(value)
    return [], tokens * CHARS_PER_TOKEN, len(rows) or 1


def _check_count(count: int, field: str, limits: Limits) -> None:
    if count > limits.max_inputs:
        raise BadInput(f"{field}: at most {limits.max_inputs} at once", field=field)


# --- wishes, model, conversation --------------------------------------------------------------------


def _wishes(body: Common, headers: Mapping[str, str]) -> tuple[Wishes, str | None]:
    """Wishes and the pinned model. Strongest first: `calm` object, the goal in `calm/GOAL`, headers."""
    pinned, goal = split_model(body.model)
    wishes = header_wishes(headers)
    if goal:
        wishes = merge_wishes(Wishes(goal=goal), wishes)
    if body.calm:
        wishes = merge_wishes(body_wishes(body.calm), wishes)
    return wishes, pinned


def split_model(name: str | None) -> tuple[str | None, str | None]:
    """(pinned model, goal) of a `model` field: absent, empty, "calm" and "calm/GOAL" pin nothing."""
    if not name or name == ROUTED:
        return None, None
    if name.startswith(f"{ROUTED}/"):
        goal = name.removeprefix(f"{ROUTED}/")
        return None, goal if goal not in ("", "auto") else None
    return name, None


def _given_conversation(tenant: str | None, wishes: Wishes) -> str | None:
    """Scoped to the tenant, so that no one can steer another's stickiness by guessing a name."""
    given = wishes.conversation
    return f"{tenant}:{given}" if given and tenant else given


def _conversation(
    tenant: str | None, wishes: Wishes, messages: Sequence[Message], texts: Sequence[str]
) -> str:
    """The id given, else a hash of the opening, which every later turn repeats (and so its KV prefix)."""
    if given := _given_conversation(tenant, wishes):
        return given
    digest = hashlib.blake2b((tenant or "").encode(), digest_size=12)
    for message, text in zip(messages, texts, strict=True):
        digest.update(b"\0" + message.role.encode() + b"\0" + text.encode())
        if message.role == "user":
            break
    return digest.hexdigest()
