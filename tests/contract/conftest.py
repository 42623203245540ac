"""The engines the contract runs on: every EngineBackend with a card it can start and a way to look inside."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from calm.backends.command import CommandBackend
from calm.backends.fake import FakeBackend, FakeEngine, FakeEngineServer, Script
from calm.backends.llamacpp import LlamaCppBackend
from calm.backends.remote import RemoteBackend
from calm.backends.upstream import HttpUpstream
from calm.ports import EngineBackend, RunningEngine
from calm.records import EngineSpec, ModelCard

SERVER = '''
"""A small model server of the standard library alone: what a user's own command might be."""
import json, os, socket, socketserver, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

busy = 0
lock = threading.Lock()

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *words): pass
    def address_string(self): return "local"
    def reply(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        self.reply({"status": "ok", "busy": busy})
    def do_POST(self):
        global busy
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with lock: busy += 1
        try:
            message = {"role": "assistant", "content": "ok"}
            choices = [{"index": 0, "finish_reason": "stop", "message": message}]
            self.stream(body) if body.get("stream") else self.reply({"choices": choices})
        except OSError:
            self.close_connection = True
        finally:
            with lock: busy -= 1
    def chunk(self, data):
        self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(data), data))
        self.wfile.flush()
    def stream(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for i in range(body.get("max_tokens", 3)):
            event = {"choices": [{"index": 0, "delta": {"content": "x"}}]}
            self.chunk(b"data: " + json.dumps(event).encode() + b"\\n\\n")
            time.sleep(0.002)
        self.chunk(b"data: [DONE]\\n\\n")
        self.wfile.write(b"0\\r\\n\\r\\n")

class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

print("serving", sys.argv[1], flush=True)
if sys.argv[1].isdigit():
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
else:
    UnixServer(sys.argv[1], Handler).serve_forever()
'''

Busy = Callable[[RunningEngine], Awaitable[int]]


@dataclass(frozen=True)
class Kit:
    """One backend under contract. `crash` kills the engine from outside; None where it is not ours."""

    name: str
    backend: EngineBackend
    card: ModelCard
    weights: Path | None
    run_dir: Path
    busy: Busy
    crash: Callable[[RunningEngine], Awaitable[None]] | None
    broken: ModelCard
    slow: ModelCard
    """A card whose start takes long enough to be cancelled."""
    slow_weights: Path | None = None
    local: bool = True


def card(name: str, **engine: object) -> ModelCard:
    return ModelCard(
        name=name,
        description="a test engine",
        context=512,
        engine=msgspec.convert({"slots": 2, "start_timeout_s": 60.0, **engine}, EngineSpec),
    )


async def kill_hard(engine: RunningEngine) -> None:
    os.kill(engine.pids()[-1], signal.SIGKILL)


async def _busy_by_health(engine: RunningEngine) -> int:
    async with HttpUpstream() as upstream, upstream.get(engine.endpoint, "/health") as reply:
        return int(msgspec.json.decode(await reply.read())["busy"])


async def _busy_by_slots(engine: RunningEngine) -> int:
    async with HttpUpstream() as upstream, upstream.get(engine.endpoint, "/slots") as reply:
        return (await reply.read()).count(b'"is_processing":true')


async def _fake_busy(engine: RunningEngine) -> int:
    assert isinstance(engine, FakeEngine)
    assert engine.server is not None
    return engine.server.in_flight


async def _fake_crash(engine: RunningEngine) -> None:
    assert isinstance(engine, FakeEngine)
    await engine.crash("scripted crash")


def _long_script() -> Script:
    return Script(answer=("x",) * 3000, tpot_s=0.002)


def _fake_kit(run_dir: Path) -> Kit:
    scripts = {"broken": Script(refuse="scripted"), "slow": Script(load_gate=asyncio.Event())}
    return Kit(
        name="fake",
        backend=FakeBackend(scripts, default=_long_script()),
        card=card("engine"),
        weights=None,
        run_dir=run_dir,
        busy=_fake_busy,
        crash=_fake_crash,
        broken=card("broken"),
        slow=card("slow"),
    )


def _command_kit(run_dir: Path, script: Path, place: str) -> Kit:
    script.write_text(SERVER)
    python = f'"{sys.executable}" -I -S'
    return Kit(
        name=f"command-{place}",
        backend=CommandBackend(run_dir),
        card=card("engine", kind="command", cmd=f'{python} "{script}" {{{place}}}'),
        weights=None,
        run_dir=run_dir,
        busy=_busy_by_health,
        crash=kill_hard,
        broken=card("broken", kind="command", cmd=f'{python} "{script}.missing" {{{place}}}'),
        slow=card("slow", kind="command", cmd=f'{python} -c "import time; time.sleep(600)" {{{place}}}'),
    )


def _remote_kit(run_dir: Path, server: FakeEngineServer) -> Kit:
    async def busy(engine: RunningEngine) -> int:
        return server.in_flight

    return Kit(
        name="remote",
        backend=RemoteBackend(),
        card=card("engine", kind="openai", url=f"{server.base_url}/v1", upstream_model="fake"),
        weights=None,
        run_dir=run_dir,
        busy=busy,
        crash=None,
        broken=card("broken", kind="openai", url="http://127.0.0.1:1"),
        slow=card("slow", kind="openai", url=server.base_url, health="/never"),
        local=False,
    )


def _llamacpp_kit(run_dir: Path, weights: Path) -> Kit:
    return Kit(
        name="llamacpp",
        backend=LlamaCppBackend(run_dir),
        card=card("engine"),
        weights=weights,
        run_dir=run_dir,
        busy=_busy_by_slots,
        crash=kill_hard,
        broken=card("broken", options={"n_nonsense": 1}),
        slow=card("slow"),
        slow_weights=weights,
    )


def find_weights() -> Path | None:
    """SmolLM2's file: CALM_TEST_WEIGHTS, else whatever `calm models pull` put into the cache."""
    given = os.environ.get("CALM_TEST_WEIGHTS")
    if given:
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "calm"
    return next(iter(sorted(cache.rglob("SmolLM2-135M*.gguf"))), None)


KITS = (
    "fake",
    "command-port",
    "command-socket",
    "remote",
    pytest.param("llamacpp", marks=pytest.mark.models),
)


@pytest.fixture(params=KITS)
async def kit(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Kit]:
    run_dir = tmp_path / "r"
    run_dir.mkdir()
    if request.param == "fake":
        yield _fake_kit(run_dir)
    elif request.param == "remote":
        async with FakeEngineServer(_long_script()) as server:
            yield _remote_kit(run_dir, server)
    elif request.param == "llamacpp":
        weights = find_weights()
        if weights is None or not weights.exists():
            pytest.skip("no SmolLM2 weights: run `calm models pull`, or set CALM_TEST_WEIGHTS to a GGUF file")
        yield _llamacpp_kit(run_dir, weights)
    else:
        yield _command_kit(run_dir, tmp_path / "server.py", request.param.removeprefix("command-"))
