"""The JSON an OpenAI-compatible engine answers with, in the shape of llama.cpp's server."""

from __future__ import annotations

import hashlib

import msgspec
from aiohttp import web

JsonObject = dict[str, object]


def json_reply(body: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


def event(body: object) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def limit(body: JsonObject) -> int | None:
    value = body.get("max_tokens", body.get("max_completion_tokens"))
    return value if isinstance(value, int) else None


def samples(body: JsonObject) -> int:
    value = body.get("n")
    return value if isinstance(value, int) else 1


def adapter_number(body: JsonObject) -> int | None:
    """The LoRA adapter a request asks llama.cpp for: `"lora": [{"id": 0, "scale": 1.0}]`."""
    match body.get("lora"):
        case [{"id": int(number), "scale": float(scale) | int(scale)}, *_] if scale:
            return number
    return None


def finish_reason(body: JsonObject, available: int) -> str:
    cap = limit(body)
    return "length" if cap is not None and cap < available else "stop"


def _is_chat(body: JsonObject) -> bool:
    return "messages" in body


def _head(body: JsonObject, model: str, kind: str) -> JsonObject:
    return {"id": "fake-1", "object": kind, "created": 1_700_000_000, "model": body.get("model", model)}


def whole_answer(body: JsonObject, model: str, text: str, closing: JsonObject) -> JsonObject:
    chat = _is_chat(body)
    content: JsonObject = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    choices = [
        {"index": index, "finish_reason": closing["finish_reason"], **content}
        for index in range(samples(body))
    ]
    head = _head(body, model, "chat.completion" if chat else "text_completion")
    return {**head, "choices": choices, "usage": closing["usage"], "timings": closing["timings"]}


def chunk(body: JsonObject, model: str, index: int, text: str | None, finish: str | None) -> JsonObject:
    head = _head(body, model, "chat.completion.chunk" if _is_chat(body) else "text_completion")
    delta: JsonObject = {} if text is None else {"content": text}
    content: JsonObject = {"delta": delta} if _is_chat(body) else {"text": text or ""}
    return {**head, "choices": [{"index": index, "finish_reason": finish, **content}]}


def usage_event(body: JsonObject, model: str, closing: JsonObject) -> bytes:
    options = body.get("stream_options")
    if not (isinstance(options, dict) and options.get("include_usage")):
        return b""
    head = _head(body, model, "chat.completion.chunk" if _is_chat(body) else "text_completion")
    return event({**head, "choices": [], "usage": closing["usage"], "timings": closing["timings"]})


def embedding_answer(body: JsonObject, model: str) -> JsonObject:
    given = body.get("input")
    texts = given if isinstance(given, list) else [given]
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(str(text))}
        for index, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
    return {"object": "list", "model": body.get("model", model), "data": data, "usage": usage}


def _vector(text: str) -> list[float]:
    return [byte / 255.0 for byte in hashlib.sha256(text.encode()).digest()[:8]]
