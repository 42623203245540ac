"""One request to one engine, sent the way dispatch sends it, with every moment that matters written down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import cast

import msgspec

from calm.errors import EngineLost, UpstreamRejected
from calm.execute.assemble import Assembly
from calm.execute.dispatch import PATHS
from calm.execute.observe import Observation, error_message
from calm.execute.sse import SseParser
from calm.gateway.relay import encode_for
from calm.ports import Upstream, UpstreamReply
from calm.records import Ask, Endpoint, Kind, ModelCard, Record

REQUEST_S = 900.0
"""Longer than any honest answer of these lengths: a hung engine must not hang the profile."""
DONE = b"[DONE]"


class Answered(Record, frozen=True, kw_only=True):
    """An answer as it arrived. Times are of one monotonic clock."""

    prompt_chars: int
    prompt_tokens: int | None
    """The engine's count, template included."""
    cached_tokens: int
    """Of those, in the prefix cache."""
    prefill_s: float | None
    """What the engine says that reading the prompt took."""
    sent_s: float
    tokens_s: tuple[float, ...]
    """When each token came; the one that ends an answer without a word comes with the end."""
    ended_s: float
    text: str

    @property
    def output_tokens(self) -> int:
        return len(self.tokens_s)

    @property
    def ttft_s(self) -> float:
        return self.tokens_s[0] - self.sent_s

    @property
    def total_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def read_tokens(self) -> int | None:
        """Prompt tokens that had to be read."""
        return None if self.prompt_tokens is None else max(0, self.prompt_tokens - self.cached_tokens)


def kind_of(card: ModelCard) -> Kind:
    return "chat" if "chat" in card.capabilities else "completion"


def ask_of(card: ModelCard, prompt: str, max_tokens: int, *, endless: bool = False) -> Ask:
    """A greedy, streamed request. `endless`: the answer runs to `max_tokens`, where the engine can be told."""
    kind = kind_of(card)
    said: dict[str, object] = (
        {"messages": [{"role": "user", "content": prompt}]} if kind == "chat" else {"prompt": prompt}
    )
    body = {**said, "max_tokens": max_tokens, "temperature": 0}
    if endless and not card.remote:
        body["ignore_eos"] = True  # known to llama.cpp and vLLM; a cloud API would refuse it
    return Ask(
        request_id="profile",
        kind=kind,
        query=prompt,
        prompt_chars=len(prompt),
        body=body,
        requires=frozenset(),
        stream=True,
        max_tokens=max_tokens,
    )


def talkative(card: ModelCard) -> ModelCard:
    """The card without its stop strings and its limit, for answers that must not end early."""
    return msgspec.structs.replace(card, chat=msgspec.structs.replace(card.chat, stop=(), answer_tokens=None))


async def send(
    upstream: Upstream,
    endpoint: Endpoint,
    card: ModelCard,
    prompt: str,
    max_tokens: int,
    *,
    endless: bool = False,
) -> Answered:
    """Raises EngineLost, and UpstreamRejected when the engine refuses this very request."""
    ask = ask_of(card, prompt, max_tokens, endless=endless)
    body = encode_for(ask, talkative(card) if endless else card, endpoint)
    sent_s = time.perf_counter()
    try:
        async with asyncio.timeout(REQUEST_S), upstream.post(endpoint, PATHS[ask.kind], body) as reply:
            await refuse_bad_status(reply, card.name)
            return await _listen(reply, ask, sent_s, card)
    except TimeoutError:
        raise EngineLost(f"{card.name} gave no whole answer within {REQUEST_S:g} s") from None


async def refuse_bad_status(reply: UpstreamReply, model: str) -> None:
    if reply.status < 400:
        return
    body = await reply.read()
    said = f"{model} answered {reply.status}: {error_message(body)}"
    if reply.status >= 500:
        raise EngineLost(said)
    raise UpstreamRejected(said, status=reply.status, body=body)


async def _listen(reply: UpstreamReply, ask: Ask, sent_s: float, card: ModelCard) -> Answered:
    seen, whole, tokens_s = Observation(), Assembly(chat=ask.kind == "chat"), list[float]()
    async for payload, at_s in _payloads(reply):
        seen.read(payload, at_s)
        whole.add(payload)
        # The usage at the end also counts the token that ended the answer, which carries no text.
        tokens_s.extend([at_s] * ((seen.tokens_out() or 0) - len(tokens_s)))
    if seen.error is not None:
        raise EngineLost(f"{card.name} broke off: {seen.error}")
    ended_s = time.perf_counter()
    text = text_of(whole.body())
    return Answered(
        prompt_chars=ask.prompt_chars,
        prompt_tokens=seen.prompt_tokens,
        cached_tokens=seen.cached_tokens or 0,
        prefill_s=seen.prefill_s,
        sent_s=sent_s,
        tokens_s=tuple(tokens_s) or (ended_s,),
        ended_s=ended_s,
        text=text.lstrip() if card.chat.trim else text,
    )


async def _payloads(reply: UpstreamReply) -> AsyncIterator[tuple[bytes, float]]:
    """Every event with the moment it came."""
    parser = SseParser()
    async for chunk in reply.chunks():
        at_s = time.perf_counter()
        for payload in parser.feed(chunk):
            if payload != DONE:
                yield payload, at_s


def text_of(body: bytes) -> str:
    """What the first choice of an assembled answer says."""
    choices = cast("list[dict[str, object]]", msgspec.json.decode(body)["choices"])
    if not choices:
        return ""
    message = choices[0].get("message")
    said = message.get("content") if isinstance(message, dict) else choices[0].get("text")
    return str(said or "")
