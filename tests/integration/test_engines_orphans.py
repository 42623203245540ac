"""Nothing survives kill -9 of CALM: not a loading engine, not a generating one, not a stubborn grandchild."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PARENT = """
import asyncio, json, sys
from pathlib import Path
import psutil
from calm.backends.command import CommandBackend
from calm.backends.llamacpp import LlamaCppBackend
from calm.backends.upstream import HttpUpstream
from calm.records import EngineSpec, ModelCard

plan = json.loads(sys.argv[1])
spec = EngineSpec(kind=plan["kind"], cmd=plan.get("cmd"), slots=1)
card = ModelCard(name="m", description="d", context=512, engine=spec)
run_dir = Path(plan["run_dir"])
weights = Path(plan["weights"]) if plan.get("weights") else None
backend = CommandBackend(run_dir) if plan["kind"] == "command" else LlamaCppBackend(run_dir)

def tell():
    print(json.dumps([child.pid for child in psutil.Process().children(recursive=True)]), flush=True)

async def main():
    starting = asyncio.create_task(backend.start(card, weights, 1))
    while len(psutil.Process().children(recursive=True)) < plan["processes"]:
        await asyncio.sleep(0.001)
    if plan["moment"] == "loading":
        await asyncio.sleep(plan.get("delay_s", 0))
        tell()
        await asyncio.sleep(600)
    engine = await starting
    body = json.dumps({"messages": [{"role": "user", "content": "Tell me a story."}], "stream": True,
                       "max_tokens": 500, "ignore_eos": True}).encode()
    async with HttpUpstream() as upstream:
        async with upstream.post(engine.endpoint, "/v1/chat/completions", body) as reply:
            async for _ in reply.chunks():
                tell()
                await asyncio.sleep(600)

asyncio.run(main())
"""

STUBBORN = """
import os, signal, time
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: os.setsid()
time.sleep(600)
"""


def killed_parent(plan: dict[str, object]) -> list[int]:
    """Start a parent as the plan says, kill -9 it at the told moment; the processes it had."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps(plan)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        pids = json.loads(parent.stdout.readline())
        parent.kill()
        parent.wait()
    assert len(pids) >= int(str(plan["processes"]))
    return [int(pid) for pid in pids]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def assert_all_end(pids: list[int], run_dir: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (all(map(gone, pids)) and not list(run_dir.iterdir())):
        time.sleep(0.01)
    assert [pid for pid in pids if not gone(pid)] == []
    assert list(run_dir.iterdir()) == []


def test_a_command_engine_with_a_grandchild_in_its_own_session(tmp_path: Path) -> None:
    script, run_dir = tmp_path / "stubborn.py", tmp_path / "r"
    script.write_text(STUBBORN)
    cmd = f'"{sys.executable}" -I -S "{script}" {{port}}'
    plan = {"kind": "command", "cmd": cmd, "run_dir": str(run_dir), "moment": "loading", "processes": 4}
    assert_all_end(killed_parent(plan), run_dir)


@pytest.mark.models
@pytest.mark.parametrize("moment", ["loading", "loading-late", "generating"])
def test_llamacpp(tmp_path: Path, moment: str, smollm2: Path) -> None:
    run_dir = tmp_path / "r"
    plan = {"kind": "llamacpp", "run_dir": str(run_dir), "weights": str(smollm2), "processes": 2}
    plan |= {"moment": moment.partition("-")[0], "delay_s": 0.15 if moment == "loading-late" else 0}
    assert_all_end(killed_parent(plan), run_dir)


@pytest.fixture
def smollm2() -> Path:
    given = os.environ.get("CALM_TEST_WEIGHTS")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "calm"
    found = Path(given) if given else next(iter(sorted(cache.rglob("SmolLM2-135M*.gguf"))), None)
    if found is None or not found.exists():
        pytest.skip("no SmolLM2 weights: run `calm models pull`, or set CALM_TEST_WEIGHTS to a GGUF file")
    return found
