"""The soak's clients: what each is going to ask, when it comes, when it leaves, and how it ended.

One client is one TCP connection, as a new user is. Everything random is drawn beforehand from one seed, so
that two runs offer the same requests in the same order; how long the server takes is all that differs.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import aiohttp

How = Literal["complete", "broken", "refused", "left", "hung", "cut", "unreached"]
"""complete: [DONE] came. broken: an error event. refused: an HTTP error. left: our own disconnect.
hung: no end long after the deadline. cut: the stream just stopped. unreached: no connection."""

SUBJECTS = (
    "the moon", "a bicycle", "bread", "the French Revolution", "rain", "a contract", "chess", "the heart",
    "glass", "inflation", "a volcano", "tea", "the Roman army", "magnets", "sleep", "a bank loan",
)  # fmt: skip
SHORT = (
    "What is {}?",
    "Why do people care about {}?",
    "Say something kind about {}.",
    "Name three facts about {}.",
    "Explain {} to a child.",
)
LONG = (
    "I have to give a short talk about {0} next week and I have never done that before. The audience is "
    "mixed: some know a lot about {0}, some nothing at all, and two of them will ask hard questions. Please "
    "suggest how to begin, which two points matter most, and how to end.",
    "Rewrite this so that it is easier to read: In consideration of the circumstances pertaining to {0}, it "
    "would appear advisable that such measures be adopted as may be deemed necessary by those concerned.",
)
LONG_SHARE = 0.1
ROUTED_SHARE = 0.5
"""The other half is spread evenly over the models by name."""


@dataclass(frozen=True)
class Call:
    """One request, sent `at_s` after the start; who leaves does so after some seconds or some events."""

    tag: str
    at_s: float
    model: str
    prompt: str
    max_tokens: int
    leave_after_s: float | None = None
    leave_after_events: int | None = None

    @property
    def leaves(self) -> bool:
        return self.leave_after_s is not None or self.leave_after_events is not None


@dataclass
class Ending:
    """How a call ended, as its client saw it. Times from the moment it was sent."""

    call: Call
    how: How = "unreached"
    status: int | None = None
    code: str | None = None
    request_id: str | None = None
    model: str | None = None
    retry_after: str | None = None
    ttft_s: float | None = None
    total_s: float = 0.0
    events: int = 0
    at_s: float = 0.0
    """When it was really sent, on the clock of `Call.at_s`."""
    finish: set[str] = field(default_factory=set)

    @property
    def accepted(self) -> bool:
        """The server took it on, however it ended: it answered, and not with 429."""
        return self.status not in (None, 429)


def calls(
    count: int,
    models: Sequence[str],
    rate_rps: float,
    *,
    seed: int,
    leavers: float,
    patience_s: float,
    name: str,
) -> list[Call]:
    """`count` requests as a Poisson process of `rate_rps`; a share `leavers` hangs up at a random moment."""
    draw = random.Random(seed)
    at_s, made = 0.0, []
    for number in range(count):
        at_s += draw.expovariate(rate_rps)
        leaves, by_time = draw.random() < leavers, draw.random() < 0.5
        after_s, after_events = draw.uniform(0.0, patience_s), draw.randint(1, 20)
        made.append(
            Call(
                tag=f"{name}-{number}",
                at_s=at_s,
                model="calm" if draw.random() < ROUTED_SHARE else draw.choice(list(models)),
                prompt=prompt(draw),
                max_tokens=draw.randint(24, 32),
                leave_after_s=after_s if leaves and by_time else None,
                leave_after_events=after_events if leaves and not by_time else None,
            )
        )
    return made


def prompt(draw: random.Random) -> str:
    forms = LONG if draw.random() < LONG_SHARE else SHORT
    return draw.choice(forms).format(draw.choice(SUBJECTS))


def body(call: Call, deadline_s: float) -> dict[str, object]:
    """The tag travels as the conversation's id and so lies beside the record, also where no answer came."""
    return {
        "model": call.model,
        "stream": True,
        "max_tokens": call.max_tokens,
        "messages": [{"role": "user", "content": call.prompt}],
        "calm": {"deadline_s": deadline_s, "conversation": call.tag},
    }


class Clients:
    """Sends calls to one server. Close with `async with`."""

    def __init__(self, url: str, deadline_s: float, hung_after_s: float) -> None:
        self._url = url
        self._deadline_s = deadline_s
        self._hung_after_s = hung_after_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def snapshot(self) -> dict[str, object]:
        async with self._session.get(f"{self._url}/calm/v1/snapshot") as response:
            response.raise_for_status()
            found: dict[str, object] = await response.json()
            return found

    async def text(self, path: str) -> str:
        async with self._session.get(f"{self._url}{path}") as response:
            return await response.text()

    async def ask(self, call: Call) -> Ending:
        """Send, read to the end (or to the moment the client leaves), and say how it ended. Never raises."""
        ending, sent_s = Ending(call), time.perf_counter()
        try:
            async with asyncio.timeout(call.leave_after_s or self._hung_after_s):
                await self._exchange(call, ending, sent_s)
        except TimeoutError:
            ending.how = "left" if call.leave_after_s is not None else "hung"
        except aiohttp.ClientPayloadError:
            ending.how = "cut"
        except (aiohttp.ClientError, OSError) as error:
            ending.how, ending.code = ("unreached" if ending.status is None else "cut"), repr(error)
        ending.total_s = time.perf_counter() - sent_s
        return ending

    async def _exchange(self, call: Call, ending: Ending, sent_s: float) -> None:
        request = self._session.post(f"{self._url}/v1/chat/completions", json=body(call, self._deadline_s))
        async with request as response:
            try:
                ending.status = response.status
                ending.request_id = response.headers.get("x-calm-request-id")
                ending.model = response.headers.get("x-calm-model")
                ending.retry_after = response.headers.get("retry-after")
                if response.status != 200:
                    ending.code = error_code(await response.read())
                    ending.how = "refused"
                    return
                await self._read_stream(call, ending, response, sent_s)
            finally:
                response.close()  # a client that leaves closes its connection, it does not read on

    async def _read_stream(
        self, call: Call, ending: Ending, response: aiohttp.ClientResponse, sent_s: float
    ) -> None:
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            payload = line[6:].strip()
            if payload == b"[DONE]":
                ending.how = "complete"
                return
            if b'"error"' in payload and (code := error_code(payload)):
                ending.how, ending.code = "broken", code
                return
            ending.events += 1
            note(ending, payload, time.perf_counter() - sent_s)
            if call.leave_after_events is not None and ending.events >= call.leave_after_events:
                ending.how = "left"
                return
        ending.how = "cut"


def note(ending: Ending, payload: bytes, elapsed_s: float) -> None:
    """Model, first token and finish reason, out of one chunk.

    The model's header is missing where a ping had to open the stream before a model was found.
    """
    chunk = json.loads(payload)
    ending.model = chunk.get("model", ending.model)
    for choice in chunk.get("choices", ()):
        if ending.ttft_s is None and choice.get("delta", {}).get("content"):
            ending.ttft_s = elapsed_s
        if choice.get("finish_reason"):
            ending.finish.add(choice["finish_reason"])


def error_code(payload: bytes) -> str | None:
    """`code` of OpenAI's error body; None where the payload is no error."""
    try:
        value = json.loads(payload)
    except ValueError:
        return None
    error = value.get("error") if isinstance(value, dict) else None
    return str(error.get("code") or error.get("type")) if isinstance(error, dict) else None
