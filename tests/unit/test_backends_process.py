"""Guarded processes: what they see, what is kept of their words, and that all of them end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from calm.backends.engine import SOCKET_PATH_BYTES, make_home
from calm.backends.process import Child, clean_environment, describe_exit, resident_bytes

ENVIRONMENT = {"PATH": os.environ.get("PATH", "/bin:/usr/bin")}


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)


async def until_says(child: Child, word: str) -> None:
    async with asyncio.timeout(30):
        while word not in child.last_words():
            await asyncio.sleep(0.005)


def test_engines_see_no_secrets() -> None:
    inherited = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "OMP_NUM_THREADS": "2",
        "CUDA_VISIBLE_DEVICES": "0",
        "OPENAI_API_KEY": "x",
        "HF_TOKEN": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "CUDA_LICENCE_KEY": "x",
        "DATABASE_URL": "x",
    }
    kept = clean_environment(inherited, {"MINE": "1"})
    assert set(kept) == {"PATH", "LC_ALL", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "MINE"}


@pytest.mark.parametrize(
    ("code", "text"),
    [(0, "exit code 0"), (3, "exit code 3"), (139, "killed by SIGSEGV"), (255, "exit code 255")],
)
def test_exit_codes_in_words(code: int, text: str) -> None:
    assert describe_exit(code) == text


def test_a_sigkill_suggests_memory() -> None:
    assert "out of memory" in describe_exit(137)


async def test_exit_code_and_last_words() -> None:
    child = await Child.spawn(python("print('first'); print('last'); raise SystemExit(7)"), ENVIRONMENT)
    assert await child.wait() == 7
    assert child.last_words() == "first\nlast"
    assert child.last_words(1) == "last"
    assert child.pids() == ()


async def test_the_signal_that_killed_it_is_known() -> None:
    child = await Child.spawn(python("import os; os.kill(os.getpid(), 11)"), ENVIRONMENT)
    assert describe_exit(await child.wait()) == "killed by SIGSEGV"


async def test_a_command_that_does_not_exist() -> None:
    child = await Child.spawn(["/nonexistent/engine"], ENVIRONMENT)
    assert await child.wait() == 127
    assert "cannot run /nonexistent/engine: No such file" in child.last_words()


async def test_stop_is_gentle_first(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('good night', flush=True)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    child = await Child.spawn(python(code), ENVIRONMENT)
    await until_says(child, "ready")
    await child.stop(30)
    await child.stop(30)
    assert "good night" in child.last_words()
    assert await child.wait() == 0


async def test_stop_ends_what_will_not_listen_and_all_it_started() -> None:
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0: print('grandchild', flush=True)\n"
        "time.sleep(600)"
    )
    child = await Child.spawn(python(code), ENVIRONMENT)
    await until_says(child, "grandchild")
    pids = child.pids()
    assert len(pids) == 4
    await child.stop(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_orphans_of_an_engine_that_ended_are_killed() -> None:
    code = (
        "import os, time\n"
        "told, tell = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.setsid(); print(os.getpid(), flush=True); os.write(tell, b'x'); time.sleep(600)\n"
        "os.read(told, 1)"
    )
    child = await Child.spawn(python(code), ENVIRONMENT)
    await child.wait()
    assert not lives(int(child.last_words()))


async def test_a_killed_guard_takes_its_engine_along() -> None:
    child = await Child.spawn(python("print('ready', flush=True)\nimport time; time.sleep(600)"), ENVIRONMENT)
    await until_says(child, "ready")
    guard, engine = child.pids()
    os.kill(guard, signal.SIGKILL)
    assert await child.wait() == 137
    async with asyncio.timeout(30):
        while lives(engine):
            await asyncio.sleep(0.005)


async def test_the_private_directory_goes_with_the_group(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "deep").mkdir(parents=True)
    (home / "deep" / "file").write_text("x")
    child = await Child.spawn(python("pass"), ENVIRONMENT, cleanup=home)
    await child.wait()
    assert not home.exists()


async def test_niceness(tmp_path: Path) -> None:
    child = await Child.spawn(python("import os; print(os.nice(0))"), ENVIRONMENT, nice=3)
    await child.wait()
    assert child.last_words() == str(os.nice(0) + 3)


async def test_endless_lines_are_cut() -> None:
    child = await Child.spawn(python("print('x' * 100_000); print('end')"), ENVIRONMENT)
    await child.wait()
    assert child.last_words().endswith("end")
    assert len(child.last_words()) < 10_000


def test_memory_of_a_process_is_measured() -> None:
    assert resident_bytes([os.getpid()]) > 1 << 20
    assert resident_bytes([2**22 + 1]) == 0


def test_homes_are_private_and_short_enough_for_a_socket(tmp_path: Path) -> None:
    home = make_home(tmp_path / "r")
    assert home.stat().st_mode & 0o777 == 0o700
    long = make_home(tmp_path / ("d" * 120))
    assert len(bytes(long / "e.sock")) <= SOCKET_PATH_BYTES
    long.rmdir()
