"""Child processes that cannot outlive CALM, and what they cost in memory.

Every local engine runs under a guard (`guard.py`) in a session of its own, with a clean environment and its
last output lines kept for error messages. Footprints are proportional set size (PSS): each resident page
divided by the number of processes that map it. Memory-mapped weights count, since they are what a model
occupies; two engines on the same file split it instead of counting it twice. PSS is what comes back when the
group is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

GUARD = Path(__file__).with_name("guard.py")
KILL_TIMEOUT_S = 10.0
TAIL_LINES = 60
LINE_BYTES = 2000
KEPT_NAMES = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "HF_HOME"),
        *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR"),
        *("XDG_CACHE_HOME", "XDG_RUNTIME_DIR"),
    )
)
KEPT_PREFIXES = (
    *("LC_", "OMP_", "GOMP_", "KMP_", "MKL_", "GGML_"),
    *("CUDA_", "NVIDIA_", "HIP_", "ROCR_", "ROCM_"),
)
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")

log = logging.getLogger(__name__)


def clean_environment(inherited: Mapping[str, str], extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What an engine may see of our environment: paths, locale and the tuning of threads and devices.

    Never anything that looks like a secret. `extra` is added as it stands.
    """
    kept = {name: value for name, value in inherited.items() if _harmless(name)}
    return {**kept, **(extra or {})}


def _harmless(name: str) -> bool:
    if any(word in name.upper() for word in SECRET_WORDS):
        return False
    return name in KEPT_NAMES or name.startswith(KEPT_PREFIXES)


class Child:
    """A guarded process group: started by `spawn`, gone when `stop` or `kill` returns."""

    def __init__(self, process: asyncio.subprocess.Process, lifeline: int) -> None:
        self._process = process
        self._lifeline: int | None = lifeline
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._reader = asyncio.create_task(self._read_output())
        self._exit = asyncio.create_task(self._wait())

    @classmethod
    async def spawn(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        nice: int = 0,
        cleanup: Path | None = None,
    ) -> Child:
        """Start `command` without a shell. A command that cannot be run ends at once with code 127."""
        read_end, lifeline = os.pipe()
        guard = (sys.executable, "-I", "-S", str(GUARD), str(nice), str(cleanup or "-"))
        try:
            process = await asyncio.create_subprocess_exec(
                *guard,
                *command,
                stdin=read_end,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        except BaseException:
            os.close(lifeline)
            raise
        finally:
            os.close(read_end)
        return cls(process, lifeline)

    @property
    def running(self) -> bool:
        return not self._exit.done()

    def pids(self) -> tuple[int, ...]:
        """The guard and all its descendants, or nothing once it has ended."""
        return process_tree(self._process.pid) if self.running else ()

    def last_words(self, lines: int = 12) -> str:
        return "\n".join(list(self._lines)[-lines:])

    async def wait(self) -> int:
        """The engine's exit code, 128 + N after signal N, once the whole group is gone."""
        return await asyncio.shield(self._exit)

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM, then at most `timeout_s` of patience, then SIGKILL. Idempotent."""
        self._signal(signal.SIGTERM)
        if not await self._ended_within(timeout_s):
            await self.kill()

    async def kill(self) -> None:
        """SIGKILL to everything, at once. Returns when it is reaped."""
        self._let_go()
        if not await self._ended_within(KILL_TIMEOUT_S):
            for pid in self.pids():
                _kill(pid)
            await self.wait()

    async def _ended_within(self, timeout_s: float) -> bool:
        done, _ = await asyncio.wait([self._exit], timeout=timeout_s)
        return bool(done)

    async def _wait(self) -> int:
        code = await self._process.wait()
        if code < 0:
            self._kill_group()
        await self._reader
        self._let_go()
        return code if code >= 0 else 128 - code

    def _signal(self, number: int) -> None:
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _kill_group(self) -> None:
        """For a guard that was itself killed and could not clean up."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _let_go(self) -> None:
        lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None:
            os.close(lifeline)

    async def _read_output(self) -> None:
        output = self._process.stdout
        partial = b""
        while output and (data := await output.read(8192)):
            *lines, partial = (partial + data).split(b"\n")
            for line in lines:
                self._note(line)
            partial = partial[-LINE_BYTES:]
        if partial:
            self._note(partial)

    def _note(self, line: bytes) -> None:
        text = line[:LINE_BYTES].decode("utf-8", "replace").rstrip()
        if text:
            self._lines.append(text)
            log.debug("engine %d: %s", self._process.pid, text)


def describe_exit(code: int) -> str:
    """`exit code 3`, or `killed by SIGSEGV` for the shell's 128 + N."""
    if code <= 128:
        return f"exit code {code}"
    try:
        name = signal.Signals(code - 128).name
    except ValueError:
        return f"exit code {code}"
    hint = " (often: out of memory)" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"


def process_tree(root: int) -> tuple[int, ...]:
    """`root` and its living descendants."""
    try:
        process = psutil.Process(root)
        return (root, *(child.pid for child in process.children(recursive=True)))
    except psutil.Error:
        return ()


def resident_bytes(pids: Iterable[int]) -> int:
    """Sum of proportional set sizes; resident set size where the kernel does not tell PSS."""
    return sum(_pss_bytes(pid) for pid in pids)


def _pss_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return _rss_bytes(pid)
    return _rss_bytes(pid)


def _rss_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
