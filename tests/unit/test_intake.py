"""From metadata file to servable model, on real files: fetch before offer, keep the good, say why not."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from pathlib import Path

from calm.clock import ManualClock
from calm.intake import Intake
from calm.journal import Journal
from calm.registry import Fleet
from calm.sources.fetch import cached_path


class Offers:
    """What was offered to the loop, newest last."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[str], dict[str, str]]] = []
        self.changed = asyncio.Event()

    def take(self, fleet: Fleet, unavailable: Mapping[str, str]) -> None:
        self.seen.append((list(fleet), dict(unavailable)))
        self.changed.set()

    async def until(self, names: list[str]) -> dict[str, str]:
        while not self.seen or self.seen[-1][0] != names:
            self.changed.clear()
            await self.changed.wait()
        return self.seen[-1][1]


def put(directory: Path, name: str, weights: Path, sha256: str) -> Path:
    card = directory / f"{name}.toml"
    card.write_text(
        f'name = "{name}"\ndescription = "d"\n[source]\nparts = ["file:{weights}"]\nsha256 = "{sha256}"\n'
    )
    return card


def weights_file(path: Path, content: bytes = b"weights") -> tuple[Path, str]:
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


def make(tmp_path: Path, *, fetch: bool = True) -> tuple[Intake, Offers, Path]:
    fleet = tmp_path / "fleet"
    fleet.mkdir()
    offers = Offers()
    return Intake(fleet, tmp_path / "cache", fetch=fetch, on_fleet=offers.take), offers, fleet


async def test_a_model_is_offered_once_its_weights_are_verified(tmp_path: Path) -> None:
    intake, offers, fleet = make(tmp_path)
    file, sha256 = weights_file(tmp_path / "w.gguf")
    put(fleet, "one", file, sha256)
    await intake.start()
    await offers.until(["one"])
    card = intake.cards["one"]
    assert await intake.weights(card) == file
    assert card.source is not None
    assert cached_path(card.source, tmp_path / "cache", fleet) == file


async def test_without_fetching_the_model_waits_and_says_what_to_do(tmp_path: Path) -> None:
    intake, offers, fleet = make(tmp_path, fetch=False)
    (fleet / "one.toml").write_text(
        'name = "one"\ndescription = "d"\n[source]\nparts = ["https://localhost:1/w"]\n'
        f'sha256 = "{"0" * 64}"\n'
    )
    await intake.start()
    names, unavailable = offers.seen[-1]
    assert names == []
    assert "calm models pull one" in unavailable["one"]


async def test_weights_that_do_not_match_are_never_offered(tmp_path: Path) -> None:
    intake, offers, fleet = make(tmp_path)
    file, _ = weights_file(tmp_path / "w.gguf")
    put(fleet, "one", file, "0" * 64)
    await intake.start()
    while "could not be had" not in offers.seen[-1][1].get("one", ""):
        offers.changed.clear()
        await offers.changed.wait()
    assert offers.seen[-1][0] == []


async def test_the_directory_is_followed(tmp_path: Path) -> None:
    intake, offers, fleet = make(tmp_path)
    file, sha256 = weights_file(tmp_path / "w.gguf")
    one = put(fleet, "one", file, sha256)
    await intake.start()
    task = asyncio.create_task(intake.follow())
    try:
        await offers.until(["one"])
        put(fleet, "two", file, sha256)
        await offers.until(["one", "two"])
        one.write_text("name = 3")  # turned bad: the last good card serves on
        while not intake.problems:
            await asyncio.sleep(0.02)
        assert list(intake.cards) == ["one", "two"]
        assert intake.problems[0].field == "name"
        one.unlink()
        await offers.until(["two"])
        assert intake.problems == ()
    finally:
        task.cancel()
        await asyncio.wait({task})


def test_the_journal_numbers_and_passes_on() -> None:
    class Log:
        def __init__(self) -> None:
            self.kinds: list[tuple[str, str | None]] = []

        def record_event(
            self, kind: str, *, model: str | None = None, detail: Mapping[str, object] | None = None
        ) -> None:
            self.kinds.append((kind, model))

    told: list[tuple[str, str, str]] = []
    log = Log()
    journal = Journal(ManualClock(), log, [lambda model, old, new: told.append((model, old, new))])
    journal.moved("a", "cold", "loading", 0.0, "wanted")
    journal.moved("a", "loading", "ready", 1.0, None)
    assert [entry.seq for entry in journal.since(0, 10)] == [1, 2]
    assert [entry.new for entry in journal.since(1, 10)] == ["ready"]
    assert len(journal.since(0, 1)) == 1
    assert told[-1] == ("a", "loading", "ready")
    assert log.kinds == [("residency", "a")] * 2


# --- adapters -------------------------------------------------------------------------------------


def adapt(directory: Path, name: str, base: str, weights: Path, sha256: str) -> Path:
    card = put(directory, name, weights, sha256)
    card.write_text(f'adapter_of = "{base}"\n{card.read_text()}')
    return card


async def test_an_adapter_waits_for_the_weights_of_its_base(tmp_path: Path) -> None:
    intake, offers, fleet = make(tmp_path, fetch=False)
    file, sha256 = weights_file(tmp_path / "a.gguf")
    (fleet / "base.toml").write_text(
        'name = "base"\ndescription = "d"\n[source]\nparts = ["https://localhost:1/w"]\n'
        f'sha256 = "{"0" * 64}"\n'
    )
    adapt(fleet, "finance", "base", file, sha256)
    await intake.start()
    while not offers.seen[-1][1].get("finance", "").startswith("its base base is not served"):
        offers.changed.clear()
        await offers.changed.wait()
    assert offers.seen[-1][0] == []
    assert "calm models pull base" in offers.seen[-1][1]["finance"]


async def test_adapters_that_come_at_the_same_time_join_together(tmp_path: Path) -> None:
    """Each joining restarts the base: six of them are one restart, and one that cannot be had holds nobody up."""
    intake, offers, fleet = make(tmp_path)
    base, sha256 = weights_file(tmp_path / "base.gguf", b"base")
    put(fleet, "base", base, sha256)
    await intake.start()
    await offers.until(["base"])
    for name in ("finance", "medical"):
        file, sha256 = weights_file(tmp_path / f"{name}.gguf", name.encode())
        adapt(fleet, name, "base", file, sha256)
    adapt(fleet, "odd", "base", tmp_path / "base.gguf", "0" * 64)
    await intake.start()
    unavailable = await offers.until(["base", "finance", "medical"])
    assert "could not be had" in unavailable["odd"]
    assert [names for names, _ in offers.seen if "finance" in names or "medical" in names] == [
        ["base", "finance", "medical"]
    ]
