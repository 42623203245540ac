"""Stands between CALM and one engine so that nothing survives CALM, not even after kill -9.

Run as a script, `python -I -S guard.py NICE CLEANUP COMMAND...`, by `calm.backends.process`; it imports the
standard library only and stays below ten milliseconds. Its standard input is a pipe whose other end CALM
holds. Whatever ends CALM closes that pipe, and end of file makes the guard kill every descendant of the
engine: no cooperation of the engine is needed, so a load that holds Python's GIL, a stopped process or a
grandchild in a session of its own (the guard is their subreaper, prctl(2)) cannot escape.

SIGTERM is passed on to all descendants once: the orderly stop. When the engine ends, for any reason, what it
left behind is killed and the guard exits with the engine's code (128 + N after signal N). The engine dies
with the guard too: PR_SET_PDEATHSIG is sound here because the guard has a single thread.

CLEANUP is the engine's private directory, removed at the end; `-` for none.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CANNOT_RUN = 127


def main(arguments: list[str]) -> int:
    nice, cleanup, command = int(arguments[0]), arguments[1], arguments[2:]
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake = _signals_as_bytes()
    engine = _spawn(command, nice)
    status = _watch(engine, wake)
    _kill_descendants()
    _remove(cleanup)
    return 0 if status is None else _exit_code(status)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _signals_as_bytes() -> int:
    """Signals arrive as bytes in a pipe; handlers do nothing. Returns the end to read."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return read_end


def _spawn(command: list[str], nice: int) -> int:
    guard = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        _become_engine(command, nice, guard)
    except OSError as error:
        os.write(2, f"cannot run {command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(CANNOT_RUN)


def _become_engine(command: list[str], nice: int, guard: int) -> None:
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:
        os._exit(CANNOT_RUN)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if nice:
        os.nice(nice)
    os.execvp(command[0], command)


def _watch(engine: int, wake: int) -> int | None:
    """The engine's wait status, or None when CALM closed the pipe first."""
    while True:
        readable, _, _ = select.select([0, wake], [], [])
        if 0 in readable and not os.read(0, 4096):
            return None
        if wake in readable and signal.SIGTERM in os.read(wake, 4096):
            _signal_descendants(signal.SIGTERM)
        status = _reap(engine)
        if status is not None:
            return status


def _reap(engine: int) -> int | None:
    """Collect every dead child; the engine's status if it was among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == engine:
            found = status


def _kill_descendants() -> None:
    """Orphans of the killed become the guard's own children, so the loop ends when there are none left."""
    while True:
        _signal_descendants(signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _signal_descendants(number: int) -> None:
    for pid in _descendants(os.getpid()):
        try:
            os.kill(pid, number)
        except OSError:
            continue


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid in _all_pids():
        children.setdefault(_parent(pid), []).append(pid)
    found = list(children.get(root, []))
    for pid in found:
        found.extend(children.get(pid, []))
    return found


def _all_pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
    except OSError:
        listing = os.popen("ps -A -o pid=").read().split()
        return [int(pid) for pid in listing]


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return -1


def _remove(directory: str) -> None:
    if directory == "-":
        return
    for folder, folders, files in os.walk(directory, topdown=False):
        for name in files:
            _quietly(os.unlink, os.path.join(folder, name))  # noqa: PTH118
        for name in folders:
            _quietly(os.rmdir, os.path.join(folder, name))  # noqa: PTH118
    _quietly(os.rmdir, directory)


def _quietly(remove: Callable[[str], None], path: str) -> None:
    try:
        remove(path)
    except OSError:
        return


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
