"""However the server ends, no engine outlives it, and what it knew is there again when it is back."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
from pathlib import Path

import httpx
import pytest
from tests.system.conftest import GEMMA, SMOL, TINY, Launch, Server, alive, eventually

pytestmark = pytest.mark.models

STORY = "Tell me a long story about a dog."


def all_gone(processes: list[tuple[int, float]]) -> None:
    assert processes, "there was nothing to survive"
    eventually("no process of the server's alive", lambda: not any(alive(*process) for process in processes))


def ready(server: Server, *models: str) -> None:
    for model in models:
        eventually(f"{model} resident", lambda model=model: server.model(model)["residency"] == "ready")


def quality(server: Server, model: str) -> float:
    answer = server.chat("Who painted the Mona Lisa?", max_tokens=1)
    record = server.answered(answer)
    return float(record["decision"]["estimates"][model]["quality"]["mean"])


def test_kill_9_leaves_no_engine_and_loses_no_record(launch: Launch) -> None:
    """Killed in the middle of two streams; the next start finds every record and marks the broken ones."""
    server = launch(SMOL, GEMMA)
    ready(server, SMOL, GEMMA)
    finished = server.answered(server.chat("Who painted the Mona Lisa?", SMOL))["request_id"]
    with server.stream(STORY, SMOL) as first, server.stream(STORY, GEMMA) as second:
        running = [r.headers["x-calm-request-id"] for r in (first, second)]
        lines = first.iter_lines()
        next(lines)
        for request_id in running:
            assert server.decision(request_id)["outcome"] is None
        processes = server.descendants()
        assert len(server.engines()) == 2
        server.stop(signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            list(lines)
    all_gone(processes)
    server.start()
    assert server.decision(finished)["outcome"]["status"] == "ok"
    for request_id in running:
        outcome = server.decision(request_id)["outcome"]
        assert (outcome["status"], outcome["error"]) == ("error", "interrupted")
    assert server.chat("Hi", SMOL).status_code == 200


def test_kill_9_during_a_load(launch: Launch) -> None:
    server = launch(TINY, environment={"CALM_MEMORY__PRELOAD": "false"})
    asking = threading.Thread(target=lost_request, args=(server,))
    asking.start()
    eventually("an engine process", server.descendants)
    processes = server.descendants()
    server.stop(signal.SIGKILL)
    asking.join(60)
    all_gone(processes)


def lost_request(server: Server) -> None:
    with pytest.raises(httpx.HTTPError):
        server.chat("Hi", TINY, max_tokens=400, ignore_eos=True)


def test_sigterm_is_clean_and_what_was_learned_stays(launch: Launch) -> None:
    server = launch(SMOL)
    ready(server, SMOL)
    before = quality(server, SMOL)
    for _ in range(4):
        answer = server.chat("Who painted the Mona Lisa?", SMOL, max_tokens=2)
        rating = {"request_id": answer.json()["id"], "rating": 5}
        assert server.request("POST", "/v1/feedback", json=rating).status_code == 200
    learned = quality(server, SMOL)
    assert learned > before
    known = server.get("/calm/v1/knowledge")["stored"]
    processes = server.descendants()
    assert server.stop(signal.SIGTERM) == 0
    assert not any(alive(*process) for process in processes), "stopped while an engine still ran"
    assert not list(server.run_dir.iterdir()), "sockets left behind"
    assert "Traceback" not in server.log

    server.start()
    again = server.get("/calm/v1/knowledge")["stored"]
    assert again["requests"] == known["requests"] == 6
    assert again["feedback"] == known["feedback"] == 4
    assert again["statuses"] == known["statuses"]
    assert quality(server, SMOL) == pytest.approx(learned, abs=0.02)


def test_sigterm_lets_a_running_answer_finish(launch: Launch) -> None:
    server = launch(SMOL)
    ready(server, SMOL)
    with server.stream(STORY, SMOL, max_tokens=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert server.process.wait(60) == 0


def test_sigterm_ends_an_endless_answer_after_the_grace(launch: Launch) -> None:
    server = launch(SMOL, environment={"CALM_SERVER__SHUTDOWN_GRACE_S": "0.5"})
    ready(server, SMOL)
    with server.stream(STORY, SMOL) as response:
        lines = response.iter_lines()
        next(lines)
        processes = server.descendants()
        os.kill(server.engine(SMOL).pid, signal.SIGSTOP)  # it would end by itself on a fast machine
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1].startswith('data: {"error"')
    assert "[DONE]" not in "".join(rest)
    assert server.process.wait(60) == 0
    all_gone(processes)


def test_a_corrupt_knowledge_file_is_moved_aside(launch: Launch) -> None:
    server = launch(SMOL, start=False)
    server.state.mkdir(parents=True)
    broken = server.state / "knowledge.sqlite3"
    broken.write_bytes(b"this was never a database\n" * 400)
    server.start()
    answer = server.chat("Who painted the Mona Lisa?", SMOL)
    assert answer.status_code == 200
    assert server.answered(answer)["outcome"]["status"] == "ok"
    aside = [file for file in server.state.iterdir() if is_the_broken_one(file)]
    assert len(aside) == 1
    assert aside[0].name in server.log, "the operator is told where it went"
    with sqlite3.connect(broken) as fresh:
        assert fresh.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    fresh.close()


def is_the_broken_one(file: Path) -> bool:
    return file.is_file() and file.read_bytes().startswith(b"this was never a database")


def test_a_truncated_knowledge_file_is_survived(launch: Launch) -> None:
    """A real database cut in half, as a full disk or a bad copy leaves it."""
    server = launch(SMOL)
    for _ in range(3):
        server.answered(server.chat("Hi", SMOL, max_tokens=1))
    assert server.stop() == 0
    file = server.state / "knowledge.sqlite3"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2 + 100])
    server.start()
    answer = server.chat("Hi", SMOL, max_tokens=1)
    assert answer.status_code == 200
    assert server.answered(answer)["outcome"]["status"] == "ok"


def test_two_servers_do_not_share_one_state(launch: Launch) -> None:
    first = launch(SMOL)
    second = launch(SMOL, environment={"CALM_STATE_DIR": str(first.state)}, start=False)
    second.start(until_ready=False)
    assert second.process.wait(60) != 0
    assert "another CALM" in second.log
    assert "Traceback" not in second.log
    assert first.chat("Hi", SMOL, max_tokens=1).status_code == 200
