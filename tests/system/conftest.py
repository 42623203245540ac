"""A whole CALM per test session: `calm serve` as a process of its own, on real weights, spoken to over HTTP.

Nothing of the server runs in the test's process, so what is tested is what a user starts. Each server gets a
copy of the default fleet, its own state and runtime directories, and a free port. Weights come from the cache
in force (`CALM_CACHE_DIR`, else the user's own) and are never fetched here: without them every test fails
with the command that fetches them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import psutil
import pytest

from calm.registry import load_fleet
from calm.settings import cache_dir
from calm.sources.fetch import cached_path

REPOSITORY = Path(__file__).parents[2]
FLEET = REPOSITORY / "fleet"
CALM = Path(sys.executable).with_name("calm")
PATIENCE_S = 60.0
"""How long anything may take before a test gives up; nothing is ever asserted about how long it took."""

SMOL, GEMMA, TINY = "smollm2-135m", "gemma-3-270m", "tinyllama-1.1b"
CHATTERS = frozenset(name for name, card in load_fleet(FLEET).fleet.items() if "chat" in card.capabilities)
"""Who may answer a plain question: the bases and their specialists."""

T = TypeVar("T")
Json = dict[str, Any]


def eventually(what: str, probe: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """The first truthy value of `probe`; fails naming what was waited for."""
    end_s = time.monotonic() + patience_s
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > end_s:
            raise AssertionError(f"waited {patience_s:g} s in vain: {what}; last seen: {value!r}")
        time.sleep(0.02)


def alive(pid: int, started_s: float) -> bool:
    """Whether that very process still runs; a zombie does not."""
    try:
        process = psutil.Process(pid)
        return process.create_time() == started_s and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Engine:
    """One llama.cpp child of a server: its process and its own HTTP door."""

    def __init__(self, pid: int, plan: Json) -> None:
        self.pid = pid
        self.model: str = plan["set"]["model_alias"]
        self.threads: int = plan["threads"]
        self.socket: str = plan["set"]["hostnames"]

    def counter(self, name: str) -> float:
        """A figure of llama.cpp's own /metrics, e.g. `n_decode_total`."""
        with httpx.Client(transport=httpx.HTTPTransport(uds=self.socket), timeout=PATIENCE_S) as client:
            text = client.get("http://engine/metrics").text
        found = re.search(rf"^llamacpp:{name} (\S+)$", text, re.MULTILINE)
        assert found, f"llama.cpp has no metric {name}:\n{text}"
        return float(found[1])


class Server:
    """A running `calm serve` and short ways to look at it."""

    def __init__(self, root: Path, fleet: Path, environment: Mapping[str, str], flags: Iterable[str]) -> None:
        self.root, self.fleet = root, fleet
        self.state = root / "state"
        self.headers: dict[str, str] = {}
        """Sent with everything `get`, `put` and `post` send; for servers with keys."""
        self.run_dir = Path(tempfile.mkdtemp(prefix="calm-test-"))  # short: unix socket paths are
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("CALM_")},
            "CALM_CACHE_DIR": str(cache_dir()),
            "CALM_STATE_DIR": str(self.state),
            "CALM_FLEET__FETCH": "false",
            "XDG_CONFIG_HOME": str(root / "config"),
            "XDG_RUNTIME_DIR": str(self.run_dir),
            **environment,
        }
        self._flags = tuple(flags)
        self._http = httpx.Client(timeout=PATIENCE_S, trust_env=False)
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self.url = ""

    # --- the process --------------------------------------------------------------------------------

    def start(self, *, until_ready: bool = True) -> Server:
        self._starts += 1
        command = [str(CALM), "serve", "--fleet", str(self.fleet), "--port", "0", *self._flags]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self.root,
            )
        if until_ready:
            self.url = eventually("the server's address", self._announced)
        return self

    def _announced(self) -> str | None:
        assert self.process.poll() is None, f"calm serve ended with {self.process.returncode}:\n{self.log}"
        found = re.search(r"CALM serves at (http://\S+)", self._out.read_text(encoding="utf-8"))
        return found[1] if found else None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def _out(self) -> Path:
        return self.root / f"out.{self._starts}"

    @property
    def _err(self) -> Path:
        return self.root / f"err.{self._starts}"

    @property
    def log(self) -> str:
        """Everything it said on both channels, since its last start."""
        return self._out.read_text(encoding="utf-8") + self._err.read_text(encoding="utf-8")

    def descendants(self) -> list[tuple[int, float]]:
        """(pid, start time) of every process under the server now: guards, engines, helpers of theirs."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        found = []
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append((child.pid, child.create_time()))
        return found

    def engines(self) -> dict[str, Engine]:
        """The llama.cpp children by model; the guards around them are left out."""
        found: dict[str, Engine] = {}
        for pid, _ in self.descendants():
            with contextlib.suppress(psutil.NoSuchProcess, OSError, ValueError):
                arguments = psutil.Process(pid).cmdline()
                if any(part.endswith("llamacpp_child.py") for part in arguments[:4]):
                    engine = Engine(pid, json.loads(Path(arguments[-1]).read_text(encoding="utf-8")))
                    found[engine.model] = engine
        return found

    def engine(self, model: str) -> Engine:
        return eventually(f"an engine for {model}", lambda: self.engines().get(model))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit code."""
        if self._process is None or self._process.poll() is not None:
            return self.process.returncode
        self._process.send_signal(number)
        return self._process.wait(PATIENCE_S)

    def close(self) -> None:
        """Nothing of it is left afterwards."""
        left: list[tuple[int, float]] = []
        if self._process is not None and self._process.poll() is None:
            left = self.descendants()
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pid, started_s in left:
            if alive(pid, started_s):
                os.kill(pid, signal.SIGKILL)
        self._http.close()
        shutil.rmtree(self.run_dir, ignore_errors=True)

    # --- its own API --------------------------------------------------------------------------------

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        headers = {**self.headers, **arguments.pop("headers", {})}
        return self._http.request(method, self.url + path, headers=headers, **arguments)

    def get(self, path: str) -> Json:
        response = self.request("GET", path)
        assert response.status_code == 200, response.text
        return response.json()

    def put(self, path: str, body: Json) -> Json:
        response = self.request("PUT", path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def chat(
        self, prompt: str, model: str = "calm", *, headers: Json | None = None, **body: Any
    ) -> httpx.Response:
        """One whole answer, greedy and short unless told otherwise."""
        fields = {"temperature": 0, "max_tokens": 8, **body}
        messages = [{"role": "user", "content": prompt}]
        return self.request(
            "POST",
            "/v1/chat/completions",
            headers=headers or {},
            json={"model": model, "messages": messages, **fields},
        )

    @contextlib.contextmanager
    def stream(self, prompt: str, model: str = "calm", **body: Any) -> Iterator[httpx.Response]:
        """A stream as raw bytes; leaving the block closes the connection.

        It runs to `max_tokens`: the end-of-text tokens are banned, so a test that interrupts it is not too late.
        """
        fields = {"temperature": 0, "max_tokens": 1500, "ignore_eos": True, **body}
        messages = [{"role": "user", "content": prompt}]
        with (
            httpx.Client(timeout=PATIENCE_S, trust_env=False) as client,
            client.stream(
                "POST",
                self.url + "/v1/chat/completions",
                headers=self.headers,
                json={"model": model, "messages": messages, "stream": True, **fields},
            ) as response,
        ):
            yield response

    def snapshot(self) -> Json:
        return self.get("/calm/v1/snapshot")

    def model(self, name: str) -> Json:
        """A model's state; empty when the fleet has no such model."""
        return self.snapshot()["models"].get(name, {})

    def decision(self, request_id: str) -> Json:
        return self.get(f"/calm/v1/decisions/{request_id}")

    def finished(self, request_id: str) -> Json:
        """The stored record, once it has its outcome."""

        def stored() -> Json | None:
            response = self.request("GET", f"/calm/v1/decisions/{request_id}")
            record = response.json() if response.status_code == 200 else {}
            return record if record.get("outcome") else None

        return eventually(f"the outcome of {request_id}", stored)

    def answered(self, response: httpx.Response) -> Json:
        """The stored record of an answer, which has to be a good one."""
        assert response.status_code == 200, response.text
        return self.finished(response.headers["x-calm-request-id"])

    def idle(self) -> None:
        eventually("no request in flight", lambda: self.snapshot()["in_flight"] == 0)

    def load(self, model: str) -> None:
        response = self.request("POST", f"/calm/v1/models/{model}/load")
        assert response.status_code == 200, response.text

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            **{
                "base_url": f"{self.url}/v1",
                "api_key": "none",
                "max_retries": 0,
                "timeout": PATIENCE_S,
                **options,
            }
        )


class Background:
    """Calls `work` again and again in threads until told to stop; keeps what each call returned or raised."""

    def __init__(self, work: Callable[[], T], threads: int = 1, *, pause_s: float = 0.02) -> None:
        self.results: list[Any] = []
        self.errors: list[BaseException] = []
        self._work = work
        self._pause_s = pause_s
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]

    def __enter__(self) -> Background:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a background request hangs"

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self.results.append(self._work())
            except BaseException as error:
                self.errors.append(error)
                return
            self._over.wait(self._pause_s)

    def grows(self, by: int = 1) -> None:
        """Wait for further results: what is under test happened between finished calls."""
        goal = len(self.results) + by
        eventually(f"{goal} background results", lambda: self.errors or len(self.results) >= goal)
        assert not self.errors, self.errors


# --- fixtures ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def weights() -> Path:
    """The cache, with the weights of the whole default fleet in it."""
    cache = cache_dir()
    cards = load_fleet(FLEET).fleet.values()
    absent = [c.name for c in cards if c.source and cached_path(c.source, cache, FLEET) is None]
    if absent:
        pytest.fail(f"no weights of {', '.join(absent)} in {cache}: run `make weights`", pytrace=False)
    return cache


Launch = Callable[..., Server]


@contextlib.contextmanager
def launcher(directory: Callable[[str], Path]) -> Iterator[Launch]:
    servers: list[Server] = []

    def launch(
        *models: str,
        environment: Mapping[str, str] | None = None,
        flags: Iterable[str] = (),
        start: bool = True,
    ) -> Server:
        """A server over copies of the named default cards, or of all of them."""
        root = directory(f"calm-{len(servers)}")
        fleet = root / "fleet"
        fleet.mkdir()
        (fleet / "adapters").symlink_to(FLEET / "adapters")
        for card in FLEET.glob("*.toml"):
            if not models or card.stem in models:
                shutil.copy(card, fleet)
        server = Server(root, fleet, environment or {}, flags)
        servers.append(server)
        return server.start() if start else server

    try:
        yield launch
    finally:
        for server in servers:
            server.close()


@pytest.fixture(scope="session")
def server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that most tests share, with the whole default fleet resident.

    A test that changes its policy, fleet or processes puts them back.
    """
    with launcher(lambda name: tmp_path_factory.mktemp(name)) as launch:
        shared = launch()
        resident = ("ready",) * len(list(FLEET.glob("*.toml")))
        eventually(
            "every model resident",
            lambda: tuple(m["residency"] for m in shared.snapshot()["models"].values()) == resident,
        )
        yield shared


@pytest.fixture
def launch(weights: Path, tmp_path: Path) -> Iterator[Launch]:
    """Start servers of one's own: `launch(MODEL, ..., environment={...})`; they are gone after the test."""

    def directory(name: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        return path

    with launcher(directory) as start:
        yield start


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


@pytest.fixture
async def aclient(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    ) as client:
        yield client


@pytest.fixture
def policy(server: Server) -> Iterator[Callable[..., Json]]:
    """Change the shared server's policy for one test: `policy(policy="fixed:NAME")`."""
    before = server.get("/calm/v1/policy")
    yield lambda **change: server.put("/calm/v1/policy", change)
    server.put("/calm/v1/policy", {"policy": before["policy"], "goal": before["goal"]})
