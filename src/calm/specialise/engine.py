"""The engine that will serve the specialist, asked while it is made: for tokens before, for answers after.

Tokens and chat template come from llama.cpp itself, so there is no second tokenizer that could disagree with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from calm.backends.llamacpp import LlamaCppBackend
from calm.backends.upstream import HttpUpstream
from calm.errors import BadInput, EngineLost
from calm.ports import RunningEngine
from calm.records import AdapterFile, Endpoint, ModelCard
from calm.specialise.batches import Tokens
from calm.specialise.examples import Example, Message

AT_ONCE = 4
Advance = Callable[[], None]


class Engine:
    """One running base, perhaps with an adapter."""

    def __init__(self, card: ModelCard, running: RunningEngine, upstream: HttpUpstream) -> None:
        self.card = card
        self.running = running
        self._upstream = upstream
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def tokens(self, rows: Sequence[Example], advance: Advance) -> list[Tokens]:
        """Each row as the engine would read prompt and answer, the ending token included."""
        end = await self.end_token()

        async def one(row: Example) -> Tokens:
            prompt = await self.prompt(row.messages)
            answer = await self._tokenise(
                f" {row.answer}" if self.card.chat.trim else row.answer, begin=False
            )
            advance()
            return Tokens(tuple(prompt), (*answer, end))

        return await asyncio.gather(*(one(row) for row in rows))

    async def prompt(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as the engine reads it, ready for the answer."""
        stated = [{"role": message.role, "content": message.content} for message in messages]
        said = await self._post("/apply-template", {"messages": stated})
        return await self._tokenise(str(said["prompt"]), begin=True)

    async def end_token(self) -> int:
        """The token with which the base ends an answer. Raises BadInput where its GGUF names none."""
        async with self._upstream.get(self.running.endpoint, "/props") as reply:
            properties = msgspec.json.decode(await reply.read(), type=dict[str, object])
        tokens = await self._tokenise(str(properties.get("eos_token") or ""), begin=False)
        if len(tokens) != 1:
            raise BadInput(
                f"{self.card.name}: its GGUF does not say which token ends an answer", field="base"
            )
        return tokens[0]

    async def answered(self, row: Example, max_tokens: int, *, specialist: str | None = None) -> Tokens:
        """The row with the engine's greedy answer in place of the right one."""
        prompt = await self.prompt(row.messages)
        said = await self._complete(prompt, max_tokens, specialist)
        return Tokens(tuple(prompt), tuple(msgspec.convert(said.get("tokens", []), list[int])))

    async def reply(self, row: Example, max_tokens: int, *, specialist: str | None = None) -> str:
        """The greedy answer in words."""
        said = await self._complete(await self.prompt(row.messages), max_tokens, specialist)
        return str(said["content"]).strip()

    async def _complete(
        self, prompt: Sequence[int], max_tokens: int, specialist: str | None
    ) -> dict[str, object]:
        number = self._endpoint(specialist).adapter
        body: dict[str, object] = {
            "prompt": prompt,
            "n_predict": max_tokens,
            "temperature": 0.0,
            "lora": [] if number is None else [{"id": number, "scale": 1.0}],
            "return_tokens": True,
            "stop": list(self.card.chat.stop),
        }
        return await self._post("/completion", body)

    def _endpoint(self, specialist: str | None) -> Endpoint:
        return self.running.endpoint if specialist is None else self.running.adapters()[specialist]

    async def _tokenise(self, text: str, *, begin: bool) -> list[int]:
        said = await self._post("/tokenize", {"content": text, "add_special": begin, "parse_special": True})
        return msgspec.convert(said["tokens"], list[int])

    async def _post(self, path: str, body: dict[str, object]) -> dict[str, object]:
        async with (
            self._turn,
            self._upstream.post(self.running.endpoint, path, msgspec.json.encode(body)) as reply,
        ):
            said = await reply.read()
            if reply.status != 200:
                raise EngineLost(f"{self.card.name} answered {reply.status} to {path}: {said[:200]!r}")
            return msgspec.json.decode(said, type=dict[str, object])


@asynccontextmanager
async def engine_of(
    card: ModelCard, weights: Path, threads: int, run_dir: Path, adapters: Sequence[AdapterFile] = ()
) -> AsyncIterator[Engine]:
    """The base on the real engine. Raises LoadFailed."""
    running = await LlamaCppBackend(run_dir).start(card, weights, threads, adapters)
    try:
        async with HttpUpstream() as upstream:
            yield Engine(card, running, upstream)
    finally:
        await running.stop()
