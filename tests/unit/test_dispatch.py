"""Dispatch over real HTTP to scripted engines: failover, honest endings, and accounts settled once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest

from calm.backends.fake import FakeBackend, Script
from calm.backends.upstream import HttpUpstream
from calm.clock import SystemClock
from calm.errors import (
    CalmError,
    DeadlineExceeded,
    EngineLost,
    LoadFailed,
    NotReached,
    UpstreamRejected,
)
from calm.execute.dispatch import Dispatcher, Serving
from calm.execute.events import Limits
from calm.execute.executor import Executor
from calm.gateway.relay import encode_for
from calm.ports import Upstream, UpstreamReply
from calm.records import Ask, Candidate, Decision, Endpoint, EngineSpec, ModelCard, Reading, Weights

CLOCK = SystemClock()


def card(name: str) -> ModelCard:
    return ModelCard(name=name, description=name, memory_hint_bytes=1, engine=EngineSpec(threads=1))


@dataclass
class Account:
    """A ledger that notes begins and ends and charges one joule per engine."""

    open: dict[str, str] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)

    def begin(self, request_id: str, engine: str, pids: tuple[int, ...]) -> None:
        self.open[request_id] = engine
        self.begun.append(engine)

    def end(self, request_id: str) -> Reading | None:
        self.open.pop(request_id)
        return Reading(joules=1.0, meter="test", kind="measured")


@dataclass
class Room:
    executor: Executor
    backend: FakeBackend
    dispatcher: Dispatcher
    account: Account

    def serve(
        self, *models: str, stream: bool = False, deadline_s: float = 30.0, max_tokens: int | None = None
    ) -> Serving:
        now_s = CLOCK.now()
        body: dict[str, object] = {"messages": [{"role": "user", "content": "hi"}], "stream": stream}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        ask = Ask(
            request_id="r1",
            kind="chat",
            query="hi",
            prompt_chars=2,
            body=body,
            requires=frozenset({"chat"}),
            stream=stream,
            arrived_s=now_s,
        )
        decision = Decision(
            request_id="r1",
            policy="test",
            goal=None,
            weights=Weights(),
            ranked=tuple(
                Candidate(model=model, score=float(place), terms=()) for place, model in enumerate(models)
            ),
            refused=(),
            estimates={},
            snapshot_revision=0,
            decision_s=0.0,
            wall_s=0.0,
        )
        cards = {model: card(model) for model in models}
        return self.dispatcher.serve(ask, decision, cards, now_s + deadline_s)

    def assert_settled(self) -> None:
        assert self.executor.in_flight == 0
        assert self.account.open == {}


class Nobody:
    """An upstream without anyone behind it."""

    @asynccontextmanager
    async def post(self, endpoint: Endpoint, path: str, body: bytes) -> AsyncIterator[UpstreamReply]:
        raise NotReached(f"{endpoint.base_url} is lost: nobody answers there")
        yield


@dataclass
class LateNews:
    """An upstream whose caller learns of a failed connect last: `told` has run to its end by then."""

    upstream: Upstream
    told: Callable[[], Awaitable[None]]
    failed: int = 0

    @asynccontextmanager
    async def post(self, endpoint: Endpoint, path: str, body: bytes) -> AsyncIterator[UpstreamReply]:
        try:
            async with self.upstream.post(endpoint, path, body) as reply:
                yield reply
        except NotReached:
            self.failed += 1
            await self.told()
            raise


@pytest.fixture
async def make_room() -> AsyncIterator[Callable[..., Room]]:
    closing: list[Callable[[], object]] = []

    def make(**scripts: Script) -> Room:
        backend = FakeBackend(scripts)
        cards = {name: card(name) for name in scripts}

        async def no_weights(_: ModelCard) -> None:
            return None

        executor = Executor(
            cards,
            {"llamacpp": backend, "openai": backend},
            no_weights,
            CLOCK,
            Limits(cores=4, budget_bytes=1 << 40),
        )
        upstream = HttpUpstream()
        account = Account()
        dispatcher = Dispatcher(
            executor=executor, upstream=upstream, ledger=account, clock=CLOCK, encode=encode_for, attempts=3
        )
        closing.extend((upstream.close, lambda: executor.close(0.1)))
        return Room(executor, backend, dispatcher, account)

    yield make
    for close in closing:
        await close()  # type: ignore[misc]


async def text_of(serving: Serving) -> list[bytes]:
    return [payload async for payload in serving.events()]


async def test_a_whole_answer_is_observed_and_settled(make_room: Callable[..., Room]) -> None:
    room = make_room(a=Script(prompt_tokens=9))
    async with room.serve("a") as reply:
        body = await reply.body()
        assert b"fake engine" in body
        assert reply.outcome is not None  # known before the block is left: the receipt needs it
    outcome = reply.outcome
    assert (outcome.status, outcome.model, outcome.prompt_tokens) == ("ok", "a", 9)
    assert outcome.energy == Reading(joules=1.0, meter="test", kind="measured")
    room.assert_settled()


async def test_a_stream_passes_every_payload_and_sees_the_first_token(make_room: Callable[..., Room]) -> None:
    room = make_room(a=Script(answer=("x", "y", "z")))
    async with room.serve("a", stream=True) as reply:
        payloads = await text_of(reply)
    assert sum(b'"content"' in payload for payload in payloads) >= 3
    assert reply.outcome is not None
    assert reply.outcome.status == "ok"
    assert reply.outcome.finish_reason == "stop"
    assert reply.outcome.completion_tokens == 3
    assert reply.outcome.ttft_s is not None
    assert 0 <= reply.outcome.ttft_s <= reply.outcome.total_s
    room.assert_settled()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "broken",
    [Script(refuse="no memory"), Script(error_status=500), Script(die_after=0), Script(error_status=429)],
    ids=["load fails", "500", "dies before a byte", "429"],
)
async def test_failover_before_the_first_byte(
    make_room: Callable[..., Room], broken: Script, stream: bool
) -> None:
    room = make_room(a=broken, b=Script(answer=("from", " b")))
    async with room.serve("a", "b", stream=stream) as reply:
        if stream:
            await text_of(reply)
        else:
            await reply.body()
    assert reply.model == "b"
    assert reply.outcome is not None
    assert (reply.outcome.status, reply.outcome.attempts) == ("ok", 2)
    room.assert_settled()


async def test_joules_of_a_failed_attempt_are_charged_to_the_request(make_room: Callable[..., Room]) -> None:
    room = make_room(a=Script(error_status=500), b=Script())
    async with room.serve("a", "b") as reply:
        await reply.body()
    assert room.account.begun == ["a", "b"]
    assert reply.outcome is not None
    assert reply.outcome.energy is not None
    assert reply.outcome.energy.joules == 2.0


async def test_a_stream_that_breaks_is_an_error_not_a_success(make_room: Callable[..., Room]) -> None:
    room = make_room(a=Script(answer=("1", "2", "3", "4"), die_after=2), b=Script())
    with pytest.raises(EngineLost):
        async with room.serve("a", "b", stream=True) as reply:
            await text_of(reply)
    assert reply.model == "a"  # bytes were out: no second model may go on with the answer
    assert reply.outcome is not None
    assert reply.outcome.status == "error"
    assert reply.outcome.completion_tokens == 2
    room.assert_settled()


async def test_the_engines_refusal_is_passed_on_and_not_retried(make_room: Callable[..., Room]) -> None:
    room = make_room(a=Script(error_status=400), b=Script())
    serving = room.serve("a", "b")
    with pytest.raises(UpstreamRejected) as caught:
        async with serving:
            pass
    assert caught.value.status == 400
    assert b"error" in caught.value.body
    assert serving.outcome is not None
    assert serving.outcome.status == "rejected"
    assert "b" not in room.backend.running
    room.assert_settled()


async def test_nobody_serves(make_room: Callable[..., Room]) -> None:
    room = make_room(a=Script(refuse="broken file"))
    serving = room.serve("a")
    with pytest.raises(LoadFailed, match="broken file"):
        async with serving:
            pass
    assert serving.outcome is not None
    assert serving.outcome.status == "error"
    room.assert_settled()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_leaves_stops_the_engine(make_room: Callable[..., Room], stream: bool) -> None:
    room = make_room(a=Script(answer=("1", "2", "3"), hang_after=1 if stream else 0))
    entered = asyncio.Event()
    serving = room.serve("a", stream=stream)

    async def caller() -> None:
        async with serving as reply:
            entered.set()
            if stream:
                async for _ in reply.events():
                    pass
            await reply.body()

    task = asyncio.create_task(caller())
    while "a" not in room.backend.running or not room.backend.running["a"].server.in_flight:  # type: ignore[union-attr]
        await asyncio.sleep(0.005)
    if stream:
        await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    server = room.backend.running["a"].server
    assert server is not None
    while server.in_flight:  # the engine notices
        await asyncio.sleep(0.005)
    assert server.cancelled == 1
    assert serving.outcome is not None
    assert serving.outcome.status == "cancelled"
    room.assert_settled()


async def test_leaving_the_block_early_counts_as_leaving(make_room: Callable[..., Room]) -> None:
    room = make_room(a=Script(answer=tuple("abcdef")))
    async with room.serve("a", stream=True) as reply:
        async for _ in reply.events():
            break
    assert reply.outcome is not None
    assert reply.outcome.status == "cancelled"
    room.assert_settled()


@pytest.mark.parametrize("where", ["before the first token", "in the middle"])
async def test_a_deadline_that_passes_is_a_timeout(make_room: Callable[..., Room], where: str) -> None:
    hang_after = 0 if where == "before the first token" else 1
    room = make_room(a=Script(answer=("1", "2"), hang_after=hang_after))
    serving = room.serve("a", stream=True, deadline_s=0.3)
    with pytest.raises(DeadlineExceeded):
        async with serving as reply:
            await text_of(reply)
    assert serving.outcome is not None
    assert serving.outcome.status == "timeout"
    room.assert_settled()


async def test_an_engine_that_crashes_mid_stream(make_room: Callable[..., Room]) -> None:
    room = make_room(a=Script(answer=tuple("abcd"), hang_after=2))
    seen = 0
    with pytest.raises(CalmError):
        async with room.serve("a", stream=True) as reply:
            async for _ in reply.events():
                seen += 1
                if seen == 2:
                    await room.backend.running["a"].crash()
    assert reply.outcome is not None
    assert reply.outcome.status == "error"
    room.assert_settled()


async def test_a_request_right_after_a_crash_is_served_by_the_next_engine(
    make_room: Callable[..., Room],
) -> None:
    room = make_room(a=Script(pids=(1,)))
    async with room.serve("a") as reply:
        await reply.body()
    first = room.backend.running["a"]
    assert first.server is not None
    await first.server.stop()  # its socket is silent, and its owner has not been told yet

    async def reap() -> None:
        await asyncio.sleep(0.05)
        await first.crash()

    reaping = asyncio.create_task(reap())
    async with room.serve("a") as again:
        await again.body()
    await reaping
    assert again.outcome is not None
    assert again.outcome.status == "ok"
    assert room.backend.running["a"] is not first
    room.assert_settled()


async def test_a_crash_noticed_before_the_failed_connect_is_looked_at_is_retried_too(
    make_room: Callable[..., Room],
) -> None:
    room = make_room(a=Script(pids=(1,)))
    async with room.serve("a") as reply:
        await reply.body()
    first = room.backend.running["a"]
    assert first.server is not None
    await first.server.stop()

    async def reaped() -> None:
        await first.crash()
        while room.executor.engine("a") is not None:
            await asyncio.sleep(0)

    news = room.dispatcher.upstream = LateNews(room.dispatcher.upstream, reaped)
    async with room.serve("a") as again:
        await again.body()
    assert news.failed == 1
    assert again.outcome is not None
    assert (again.outcome.status, again.outcome.attempts) == ("ok", 2)
    assert room.backend.running["a"] is not first
    room.assert_settled()


async def test_a_remote_engine_that_was_given_up_is_tried_once_more_and_not_for_ever(
    make_room: Callable[..., Room],
) -> None:
    """Its card changes whenever a connect has failed, so that its engine is never there to be looked at."""
    room = make_room(a=Script())
    remote = msgspec.structs.replace(card("a"), engine=EngineSpec(kind="openai", url="http://far.invalid"))

    async def changed() -> None:
        reworded = msgspec.structs.replace(remote, description=f"after {news.failed} failures")
        room.executor.update_fleet({"a": reworded})
        assert room.executor.engine("a") is None

    news = room.dispatcher.upstream = LateNews(Nobody(), changed)
    room.executor.update_fleet({"a": remote})
    serving = room.serve("a")
    with pytest.raises(NotReached):
        async with serving:
            pass
    assert news.failed == 2
    assert serving.outcome is not None
    assert (serving.outcome.status, serving.outcome.attempts) == ("error", 2)
    room.assert_settled()
