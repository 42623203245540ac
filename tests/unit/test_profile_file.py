"""Profile files: what is written can be read, and a mistake is named with its place."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.replay_setting import every, model

from calm.errors import BadInput
from calm.profile import (
    Length,
    MachineProfile,
    ModelProfile,
    Profile,
    problems,
    read_profile,
    write_profile,
)
from calm.records import ModelCard
from calm.replay.house import House, run_trial, whole_fleet_bytes
from calm.report.records import Setup

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "profile.md"
FULL = Profile(
    machine=MachineProfile(
        name="m",
        cores=2,
        contention=(1.0, 1.2),
        loads_block=True,
        measured_at="2026-11-21T12:00:00+00:00",
        versions={"calm": "0"},
        meter="rapl",
        notes=("one", "two"),
    ),
    models={"a-1.5b": model(), "plain": model(quality={}, quality_sd=None)},
)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "profile.toml"
    path.write_text(text, encoding="utf-8")
    return path


def example() -> str:
    found = re.search(r"^```toml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


# --- reading and writing ------------------------------------------------------------------------------


def test_a_written_profile_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "profile.toml"
    write_profile(FULL, path)
    assert read_profile(path) == FULL


POSITIVE = st.floats(1e-3, 1e9)


@settings(max_examples=30)
@given(
    st.builds(
        ModelProfile,
        memory_bytes=st.integers(1, 10**12),
        load_s=POSITIVE,
        batching=st.sampled_from(["continuous", "serial"]),
        prefill_tps=POSITIVE,
        decode_tps=st.fixed_dictionaries({"1": POSITIVE}, optional={"2": POSITIVE, "16": POSITIVE}),
        jitter=st.floats(0.0, 3.0),
        active_w=POSITIVE,
        output_tokens=st.fixed_dictionaries(
            {"default": st.builds(Length, mean=st.floats(1.0, 1e6), sd=st.floats(0.0, 1e6))}
        ),
        quality=st.dictionaries(st.text(min_size=1, max_size=8), st.floats(0.0, 1.0), max_size=3),
        quality_sd=st.none() | st.floats(0.0, 0.5),
    ),
    st.text(min_size=1, max_size=12),
)
def test_any_good_profile_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory, found: ModelProfile, name: str
) -> None:
    profile = Profile(machine=FULL.machine, models={name: found})
    assert list(problems(profile)) == []
    path = tmp_path_factory.mktemp("profile") / "profile.toml"
    write_profile(profile, path)
    assert read_profile(path) == profile


# --- mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"memory_bytes": 0}, "memory_bytes: must be above 0"),
        ({"prefill_tps": 0.0}, "prefill_tps: must be above 0"),
        ({"prefill_tps": float("nan")}, "prefill_tps: must be above 0"),
        ({"tokens_per_char": -1.0}, "tokens_per_char: must be above 0"),
        ({"load_s": -1.0}, "load_s: must be 0 or more"),
        ({"load_s": float("inf")}, "load_s: must be 0 or more"),
        ({"active_w": -5.0}, "active_w: must be 0 or more"),
        ({"jitter": 40.0}, r"jitter: must be 0\.\.3"),
        ({"load_jitter": -0.1}, r"load_jitter: must be 0\.\.3"),
        ({"decode_tps": {"2": 5.0}}, 'decode_tps: the rate of one sequence, "1", is missing'),
        ({"decode_tps": {"1": 5.0, "two": 5.0}}, r"decode_tps\.two"),
        ({"decode_tps": {"1": 5.0, "²": 5.0}}, r"decode_tps\.²"),
        ({"decode_tps": {"1": 0.0}}, r"decode_tps\.1: .*above 0"),
        ({"output_tokens": {"math": Length(mean=5)}}, "output_tokens: default is missing"),
        (
            {"output_tokens": {"default": Length(mean=0.5)}},
            r"output_tokens\.default: needs a mean of at least 1",
        ),
        ({"output_tokens": {"default": Length(mean=float("inf"))}}, r"output_tokens\.default"),
        ({"output_tokens": {"default": Length(mean=9, sd=-1)}}, r"output_tokens\.default"),
        ({"quality": {"math": 1.5}}, r"quality\.math: must be 0\.\.1"),
        ({"quality_sd": 0.9}, r"quality_sd: must be 0\.\.0\.5"),
        ({"quality_sd": float("nan")}, "quality_sd"),
    ],
)
def test_what_the_types_do_not_say_is_a_problem_with_its_place(
    tmp_path: Path, fields: dict[str, Any], place: str
) -> None:
    path = tmp_path / "profile.toml"
    write_profile(Profile(machine=FULL.machine, models={"good": model(), "bad": model(**fields)}), path)
    with pytest.raises(BadInput, match=rf"profile\.toml: models\.bad\.{place}") as refusal:
        read_profile(path)
    assert refusal.value.field == "profile"


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"cores": 0}, "machine.cores: must be at least 1"),
        ({"contention": ()}, "machine.contention"),
        ({"contention": (0.5,)}, "machine.contention"),
    ],
)
def test_the_machine_has_problems_too(fields: dict[str, Any], place: str) -> None:
    machine = msgspec.structs.replace(FULL.machine, **fields)
    [problem] = problems(Profile(machine=machine, models=FULL.models))
    assert problem.startswith(place)


def test_a_profile_without_models_is_a_problem() -> None:
    assert list(problems(Profile(machine=FULL.machine, models={}))) == ["models: needs at least one"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("load_s = 2.5", 'load_s = "2.5"'), r"models\.large: Expected `float`, got `str` - at `\$\.load_s`"),
        (("load_s = 2.5", "loads = 2.5"), r"models\.large: .*`loads?(_s)?`"),
        (("prefill_tps = 120.0\n", ""), r"models\.large: .*`prefill_tps`"),
        (("cores = 2\n", ""), r"`cores` - at `\$\.machine`"),
        (("[machine]", "[machine"), r"line 1"),
        (("[models.small]", "[modles.small]"), r"modles"),
    ],
)
def test_a_malformed_file_is_one_line_with_file_and_place(
    tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    path = written(tmp_path, example().replace(*change))
    with pytest.raises(BadInput, match=rf"profile\.toml: .*{said}") as refusal:
        read_profile(path)
    assert "\n" not in refusal.value.message


def test_what_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"No such file.*`calm profile` measures one"):
        read_profile(tmp_path / "none.toml")
    with pytest.raises(BadInput, match="directory"):
        read_profile(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match=r"bytes\.toml"):
        read_profile(tmp_path / "bytes.toml")


# --- the reference page ---------------------------------------------------------------------------------


def test_the_page_s_example_is_a_profile_that_can_be_replayed(tmp_path: Path) -> None:
    profile = read_profile(written(tmp_path, example()))
    fleet = {name: ModelCard(name=name, description=name) for name in profile.models}
    house = House(fleet=fleet, profile=profile, budget_bytes=0, embed=False)
    house = House(**{**house.__dict__, "budget_bytes": whole_fleet_bytes(house)})
    trial = run_trial(house, every(5.0, 4), Setup(policy="calm", cache="calm"))
    assert {row.status for row in trial.rows} == {"ok"}


def test_the_page_tells_every_field_with_its_default() -> None:
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    tables: dict[str, type[msgspec.Struct]] = {
        "[machine]": MachineProfile,
        "[models.NAME]": ModelProfile,
        "[models.NAME.output_tokens]": Length,
    }
    for title, record in tables.items():
        [section] = [text for text in sections if text.startswith(title + "\n")]
        told = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+)? ?\|", section, re.MULTILINE)
        assert [name for name, _ in told] == list(record.__struct_fields__), title
        needed = [name for name, default in told if default.strip() == "needed"]
        required = [f.name for f in msgspec.structs.fields(record) if f.required]
        assert needed == required, title


def test_the_page_s_example_has_every_field_of_a_model() -> None:
    models = tomllib.loads(example())["models"]
    assert set(models["large"]) | {"batching", "quality_sd"} == set(ModelProfile.__struct_fields__)
