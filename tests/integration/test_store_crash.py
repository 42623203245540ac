"""kill -9 in the middle of writing: the file stays whole and at most the last second is gone."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calm.clock import SystemClock
from calm.stores.sqlite import SqliteStore

# Writes as fast as it can and prints the number and time of each tenth record after it was accepted.
VICTIM = """
import sys, time
from pathlib import Path
from calm.clock import SystemClock
from calm.records import Ask, Candidate, Decision, Features, Outcome, Weights
from calm.stores.sqlite import SqliteStore

store = SqliteStore(Path(sys.argv[1]), retention_days=None, max_requests=None, clock=SystemClock(),
                    queue_records=10**6)
features = Features(prompt_chars=1, prompt_tokens=1.0, language="en", embedding=None, embedder=None, turns=1,
                    max_tokens=None, samples=1, conversation=None, wants_json=False, wants_tools=False)
for number in range(10**7):
    name = f"r{number}"
    ask = Ask(request_id=name, kind="chat", query="q", prompt_chars=1, body={}, requires=frozenset())
    store.record_decision(ask, features, Decision(
        request_id=name, policy="calm", goal=None, weights=Weights(),
        ranked=(Candidate(model="small", score=0.1, terms=()),), refused=(), estimates={},
        snapshot_revision=1, decision_s=0.0, wall_s=time.time()))
    if number % 10:
        store.record_outcome(Outcome(request_id=name, model="small", status="ok", wall_s=time.time()))
    else:
        print(number, time.time(), flush=True)
    if number % 50 == 0:
        time.sleep(0.005)  # several thousand a second: full speed would only measure the queue's length
"""


def kill_in_the_middle(path: Path, run_s: float) -> list[tuple[int, float]]:
    """Acknowledged records as (number, Unix time), and the time of death as the last one's."""
    process = subprocess.Popen([sys.executable, "-c", VICTIM, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = process.stdout.readline()
    time.sleep(run_s)
    os.kill(process.pid, signal.SIGKILL)
    rest, _ = process.communicate()
    lines = [line.split() for line in [first, *rest.splitlines(keepends=True)] if line.endswith("\n")]
    return [(int(number), float(wall_s)) for number, wall_s in lines if number]


@pytest.mark.parametrize("run_s", [1.2, 1.7])
def test_sigkill_loses_at_most_the_last_second(tmp_path: Path, run_s: float) -> None:
    path = tmp_path / "k.sqlite3"
    acknowledged = kill_in_the_middle(path, run_s)
    died_at_s = acknowledged[-1][1]
    must_be_there = {f"r{number}" for number, wall_s in acknowledged if wall_s < died_at_s - 1.0}

    store = SqliteStore(path, retention_days=None, max_requests=None, clock=SystemClock())
    store.close()

    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    stored = {name for (name,) in connection.execute("SELECT id FROM requests")}
    open_ones = "SELECT count(*) FROM requests WHERE id NOT IN (SELECT request_id FROM outcomes)"
    assert connection.execute(open_ones).fetchone() == (0,)
    marked = connection.execute("SELECT request_id FROM outcomes WHERE error = 'interrupted'").fetchall()
    connection.close()
    assert must_be_there <= stored
    assert stored
    assert {f"r{number}" for number, _ in acknowledged} & stored <= {name for (name,) in marked}
    # Nothing is missing in between: what is lost is the end.
    assert stored == {f"r{number}" for number in range(len(stored))}
    assert not list(tmp_path.glob("*.corrupt-*"))
