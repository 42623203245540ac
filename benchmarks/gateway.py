"""What the gateway costs: CALM with routing on, beside LiteLLM's proxy and no gateway at all.

One worker each, the same mock upstream (answers at once), the same load generator, rounds interleaved so that
machine noise hits all alike. Reports medians over rounds with the range, the added p50 against the direct
call of the same round, and resident memory (with and without the embedder).

    make bench-gateway                       # everything; installs LiteLLM in a cache directory of its own
    python benchmarks/gateway.py --no-litellm --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import platformdirs
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.http_tools import Figures, load

LITELLM = "litellm[proxy]==1.106.2"
QUESTIONS = (
    "What is two plus two?",
    "Summarise the causes of the French Revolution in two sentences.",
    "My card was declined abroad, what should I do?",
    "Write a SQL query that counts the orders of each customer.",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env={**os.environ, **(env or {})}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_ready(url: str, process: subprocess.Popen[bytes], timeout_s: float = 180) -> float:
    started = time.perf_counter()
    while time.perf_counter() - started < timeout_s:
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} ended with {process.returncode} before it was ready")
        try:
            with urllib.request.urlopen(url, timeout=1):
                return time.perf_counter() - started
        except urllib.error.HTTPError:
            return time.perf_counter() - started
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"{url} was not ready within {timeout_s} s")


def write_fleet(directory: Path, upstream_port: int) -> None:
    for name, what in (
        ("general", "General chat and everyday questions"),
        ("finance", "Banking, cards, payments and financial news"),
        ("code", "SQL, Python and other programming"),
    ):
        (directory / f"{name}.toml").write_text(
            f'name = "{name}"\ndescription = "{what}"\nplacement = "local"\ncontext = 8192\n'
            f'max_in_flight = 64\n[engine]\nkind = "openai"\n'
            f'url = "http://127.0.0.1:{upstream_port}"\n'
        )


@contextmanager
def calm(root: Path, upstream_port: int, embedder: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    fleet = root / f"fleet-{embedder}"
    fleet.mkdir()
    write_fleet(fleet, upstream_port)
    port = free_port()
    env = {
        "CALM_STATE_DIR": str(root / f"state-{embedder}"),
        "CALM_CACHE_DIR": str(root / "cache"),
        "CALM_POLICY__EMBEDDER": embedder,
    }
    command = [str(Path(sys.executable).parent / "calm"), "serve", "--fleet", str(fleet), "--port", str(port)]
    with running(command, env) as process:
        wait_ready(f"http://127.0.0.1:{port}/readyz", process)
        yield port, process


def litellm_python() -> Path:
    """LiteLLM's proxy in an environment of its own, outside the tree; installed once."""
    venv = platformdirs.user_cache_path("calm") / "bench" / LITELLM.replace("[proxy]==", "-")
    python = venv / "bin" / "python"
    if not (venv / ".installed").exists():
        print(f"installing {LITELLM} (once) ...", file=sys.stderr)
        shutil.rmtree(venv, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", LITELLM], check=True)
        (venv / ".installed").touch()
    return python


@contextmanager
def litellm(root: Path, upstream_port: int) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    config = root / "litellm.yaml"
    config.write_text(
        json.dumps(
            {
                "model_list": [
                    {
                        "model_name": "calm",
                        "litellm_params": {
                            "model": "openai/mock",
                            "api_base": f"http://127.0.0.1:{upstream_port}/v1",
                            "api_key": "sk-bench",
                        },
                    }
                ]
            }
        )
    )
    port = free_port()
    program = litellm_python().parent / "litellm"
    command = [str(program), "--config", str(config), "--port", str(port), "--host", "127.0.0.1"]
    env = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
    env["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"  # no keys on either side
    with running(command, env) as process:
        wait_ready(f"http://127.0.0.1:{port}/health/liveliness", process)
        yield port, process


def resident_mb(process: subprocess.Popen[bytes]) -> float:
    root = psutil.Process(process.pid)
    family = [root, *root.children(recursive=True)]
    return float(sum(one.memory_info().rss for one in family)) / 1e6


def bodies() -> list[bytes]:
    return [
        json.dumps(
            {"model": "calm", "messages": [{"role": "user", "content": text}], "max_tokens": 16}
        ).encode()
        for text in QUESTIONS
    ]


def measure(
    ports: dict[str, int], rounds: int, seconds: float, levels: tuple[int, ...]
) -> dict[tuple[str, int], list[Figures]]:
    found: dict[tuple[str, int], list[Figures]] = {}
    import uvloop

    for port in ports.values():  # warm up
        uvloop.run(load(port, bodies(), concurrency=4, seconds=1.0))
    for number in range(rounds):
        for concurrency in levels:
            for name, port in ports.items():
                figures = uvloop.run(load(port, bodies(), concurrency=concurrency, seconds=seconds))
                found.setdefault((name, concurrency), []).append(figures)
        print(f"round {number + 1}/{rounds} done", file=sys.stderr)
    return found


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def report(
    found: dict[tuple[str, int], list[Figures]], memory: dict[str, float], levels: tuple[int, ...]
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    print(f"\n{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("medians over rounds (range)\n")
    print(
        f"{'gateway':18} {'conc.':>5} {'p50 ms':>22} {'added p50 ms':>22} {'p99 ms':>22} {'req/s':>24} {'fail':>5}"
    )
    for (name, concurrency), rounds in found.items():
        direct = found[("direct", concurrency)]
        added = [mine.p50_ms - base.p50_ms for mine, base in zip(rounds, direct, strict=True)]
        failures = sum(one.failures for one in rounds)
        print(
            f"{name:18} {concurrency:5} {spread([r.p50_ms for r in rounds]):>22} {spread(added):>22} "
            f"{spread([r.p99_ms for r in rounds]):>22} {spread([r.rps for r in rounds], 0):>24} {failures:5}"
        )
        rows.append(
            {
                "gateway": name,
                "concurrency": concurrency,
                "p50_ms": statistics.median(r.p50_ms for r in rounds),
                "added_p50_ms": statistics.median(added),
                "p99_ms": statistics.median(r.p99_ms for r in rounds),
                "rps": statistics.median(r.rps for r in rounds),
                "failures": failures,
            }
        )
    print("\nresident memory after the load, all processes of the gateway:")
    for name, megabytes in memory.items():
        print(f"  {name:18} {megabytes:7.1f} MB")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one round of one gateway")
    parser.add_argument("--no-litellm", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    levels = (1, 16)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="calm-bench-")))
        upstream = free_port()
        mock = stack.enter_context(running([sys.executable, "-m", "benchmarks.mock_upstream", str(upstream)]))
        wait_ready(f"http://127.0.0.1:{upstream}/", mock)
        ports, processes = {"direct": upstream}, {}
        ports["calm"], processes["calm"] = stack.enter_context(calm(root, upstream, "static"))
        ports["calm, no embedder"], processes["calm, no embedder"] = stack.enter_context(
            calm(root, upstream, "none")
        )
        if not args.no_litellm:
            ports["litellm"], processes["litellm"] = stack.enter_context(litellm(root, upstream))
        found = measure(ports, args.rounds, args.seconds, levels)
        memory = {name: resident_mb(process) for name, process in processes.items()}
    rows = report(found, memory, levels)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "memory_mb": memory}, indent=2))


if __name__ == "__main__":
    main()
