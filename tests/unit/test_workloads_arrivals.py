"""Arrivals: any two of requests, duration and rate say the third, shapes survive scaling, faults name the line."""

from __future__ import annotations

import gzip
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.errors import BadInput
from calm.workloads.arrivals import MAX_REQUESTS, fit, make_arrivals
from calm.workloads.records import WorkloadSpec


def spec(arrivals: str = "poisson", **load: Any) -> WorkloadSpec:
    return WorkloadSpec(arrivals=arrivals, queries="domains:any", **load)


def refused(arrivals: str, seed: int = 0, **load: Any) -> BadInput:
    with pytest.raises(BadInput) as caught:
        make_arrivals(spec(arrivals, **load), seed)
    assert "\n" not in caught.value.message
    return caught.value


def pack(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Small made-up traces in the format of the real ones."""
    traces = tmp_path / "data" / "traces"
    pack(traces / "worldcup98_day53.txt.gz", "0.5\n" * 100)
    azure = "\n".join(f"{i * i},374,44" for i in range(50))
    pack(traces / "azure2023_conv.csv.gz", f"t_s,input_tokens,output_tokens\n{azure}\n")
    mooncake = "\n".join(json.dumps({"t_s": i // 2, "input_tokens": 1, "hash_ids": [0]}) for i in range(40))
    pack(traces / "mooncake_synthetic.jsonl.gz", mooncake)
    windows = "".join(f"small,{600 * i},{rate},20,1.5\n" for i, rate in enumerate((0.1, 0.9, 0.1, 0.1)))
    empty = "big,0,0.0,0,\nbig,600,0.5,3,2.0\n"
    header = "model,t_s,rate_rps,active_clients,rate_weighted_iat_cv\n"
    pack(traces / "servegen_rate_600s.csv.gz", header + windows + empty)
    return str(tmp_path / "data")


# --- laws -------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 1e9), min_size=2, max_size=50)
    .map(sorted)
    .filter(lambda times: times[-1] > times[0]),
    st.floats(1e-3, 1e9),
)
def test_fitting_keeps_the_order_and_hits_the_duration(times: list[float], duration_s: float) -> None:
    fitted = fit(np.asarray(times), duration_s).tolist()
    assert fitted[0] == 0.0
    assert fitted[-1] == duration_s
    assert all(a <= b for a, b in pairwise(fitted))


@given(
    st.sampled_from(("poisson", "constant")), st.integers(2, 400), st.floats(1e-2, 1e6), st.integers(0, 2**31)
)
def test_synthetic_arrivals_are_as_many_and_as_long_as_asked(
    name: str, requests: int, duration_s: float, seed: int
) -> None:
    asked = spec(name, requests=requests, duration_s=duration_s)
    times = make_arrivals(asked, seed)
    assert len(times) == requests
    assert (times[0], times[-1]) == (0.0, duration_s)
    assert all(a <= b for a, b in pairwise(times))
    assert times == make_arrivals(asked, seed)


@pytest.fixture(scope="module")
def curved(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("trace") / "curved.csv"
    path.write_text("\n".join(str(i**1.5) for i in range(60)))
    return f"csv:{path}"


@given(requests=st.integers(2, 60), duration_s=st.floats(0.5, 1e5), seed=st.integers(0, 1000))
def test_a_trace_keeps_its_shape_whatever_the_duration(
    curved: str, requests: int, duration_s: float, seed: int
) -> None:
    times = np.asarray(make_arrivals(spec(curved, requests=requests, duration_s=duration_s), seed))
    own = np.asarray(make_arrivals(spec(curved, requests=requests), seed))
    assert times[-1] == duration_s
    np.testing.assert_allclose(times / times[-1], own / own[-1], atol=1e-9)


# --- what the load means ----------------------------------------------------------------------------


def test_any_two_say_the_third() -> None:
    by_duration = make_arrivals(spec("constant", requests=11, duration_s=5.0), 0)
    by_rate = make_arrivals(spec("constant", requests=11, rate_rps=2.0), 0)
    by_both = make_arrivals(spec("constant", duration_s=5.0, rate_rps=2.0), 0)
    assert by_duration == by_rate == by_both == tuple(i / 2 for i in range(11))


def test_other_seeds_give_other_arrivals_of_the_same_load() -> None:
    first, second = (make_arrivals(spec(requests=50, duration_s=60.0), seed) for seed in (0, 1))
    assert first != second
    assert len(first) == len(second)


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(make_arrivals(spec(requests=20_000, rate_rps=2.0), 0))
    assert gaps.mean() == pytest.approx(0.5, rel=1e-6)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.03)
    assert np.mean(gaps > 0.5) == pytest.approx(math.exp(-1), abs=0.02)


def test_one_request_arrives_at_once() -> None:
    assert make_arrivals(spec(requests=1, duration_s=60.0), 0) == (0.0,)


@pytest.mark.parametrize("name", ["poisson", "constant"])
@pytest.mark.parametrize("load", [{"requests": 5}, {"duration_s": 5.0}, {"rate_rps": 5.0}])
def test_synthetic_arrivals_need_two(name: str, load: dict[str, Any]) -> None:
    assert "two of --requests, --duration and --rate" in refused(name, **load).message


@pytest.mark.parametrize("name", ["poisson", "worldcup", "servegen"])
def test_a_load_that_is_not_said_or_said_thrice_is_refused(name: str, data: str) -> None:
    assert "say how much" in refused(name, data=data).message
    assert "they say the third" in refused(name, data=data, requests=2, duration_s=1.0, rate_rps=1.0).message


@pytest.mark.parametrize(
    ("load", "field"),
    [
        ({"requests": 0, "duration_s": 1.0}, "requests"),
        ({"requests": 5, "duration_s": math.inf}, "duration"),
        ({"requests": 5, "rate_rps": -1.0}, "rate"),
        ({"duration_s": 1e300, "rate_rps": 1e300}, "requests"),
        ({"requests": MAX_REQUESTS + 1, "rate_rps": 1.0}, "requests"),
    ],
)
def test_loads_out_of_range_are_refused(load: dict[str, Any], field: str) -> None:
    assert refused("poisson", **load).field == field


# --- recorded traces ---------------------------------------------------------------------------------


def test_requests_alone_are_consecutive_arrivals_at_their_own_times(data: str) -> None:
    assert make_arrivals(spec("worldcup", data=data, requests=4), 3) == (0.0, 0.5, 1.0, 1.5)
    times = make_arrivals(spec("azure", data=data, requests=3), 3)
    assert any(times == (0.0, 2.0 * i + 1, 4.0 * i + 4) for i in range(48))


def test_a_duration_alone_is_that_much_of_the_trace(data: str) -> None:
    times = make_arrivals(spec("worldcup", data=data, duration_s=10.0), 5)
    assert times == tuple(i / 2 for i in range(21))


def test_a_rate_alone_is_the_whole_trace_at_that_rate(data: str) -> None:
    times = make_arrivals(spec("azure", data=data, rate_rps=2.0), 5)
    assert len(times) == 50
    assert times[-1] == 24.5


def test_seeds_choose_the_window(data: str) -> None:
    windows = {make_arrivals(spec("azure", data=data, requests=5), seed) for seed in range(20)}
    assert len(windows) > 5


def test_arrivals_at_one_moment_are_kept_but_never_a_whole_window(data: str) -> None:
    for seed in range(10):
        times = make_arrivals(spec("mooncake", data=data, requests=2, duration_s=3.0), seed)
        assert times == (0.0, 3.0)


def test_more_than_the_trace_has_is_refused_with_what_it_has(data: str) -> None:
    assert "the trace has 50 arrivals" in refused("azure", data=data, requests=51).message
    assert "covers 2401 s" in refused("azure", data=data, duration_s=2402.0).message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("t_s\n3\n4\n6\n", (0.0, 1.0, 3.0)),
        ("user,t_s\nx,3\ny,4\nz,6\n", (0.0, 1.0, 3.0)),
        ("3\n\n4\n6", (0.0, 1.0, 3.0)),
        ("\ufefft_s\r\n3\r\n4\r\n6\r\n", (0.0, 1.0, 3.0)),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_a_csv_of_ones_own(tmp_path: Path, text: str, expected: tuple[float, ...], suffix: str) -> None:
    path = pack(tmp_path / f"own{suffix}", text)
    assert make_arrivals(spec(f"csv:{path}", requests=3), 0) == expected


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("t_s\n0\n2\n1\n", ":4:", "must ascend"),
        ("t_s\n0\n-2\n", ":3:", "0 or more"),
        ("t_s\n0\nnan\n", ":3:", "0 or more"),
        ("t_s\n0\ninf\n", ":3:", "0 or more"),
        ("t_s\n0\nsoon\n", ":3:", "'soon'"),
        ("user,t_s\nx,0\ny\n", ":3:", "no value"),
        ("time\n0\n", ":1:", "column t_s"),
        ("0,1\n", ":1:", "column t_s"),
        ("", "", "no arrivals"),
        ("t_s\n", "", "no arrivals"),
    ],
)
def test_faults_of_a_csv_are_told_with_file_and_line(
    tmp_path: Path, text: str, place: str, reason: str
) -> None:
    path = pack(tmp_path / "own.csv", text)
    error = refused(f"csv:{path}", requests=2)
    assert f"{path}{place}" in error.message
    assert reason in error.message
    assert error.field == "arrivals"


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"0\n\xff\xfe\n")
    (tmp_path / "b.csv.gz").write_bytes(b"no gzip")
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"0\n1\n" * 100)[:-12])
    for name in ("a.csv", "b.csv.gz", "c.csv.gz", "missing.csv"):
        assert name in refused(f"csv:{tmp_path / name}", requests=2).message
    assert refused(f"csv:{tmp_path}", requests=2).field == "arrivals"


def test_without_data_the_flag_is_named(tmp_path: Path) -> None:
    assert refused("azure", requests=2).message.startswith("give --data DIR or set CALM_DATA; see docs/")
    assert refused("azure", requests=2).field == "data"
    assert "no such directory" in refused("azure", requests=2, data=str(tmp_path / "nowhere")).message
    assert "azure2023_conv.csv.gz" in refused("azure", requests=2, data=str(tmp_path)).message


@pytest.mark.parametrize("name", ["", "uniform", "poisson:2", "csv", "csv:", "azure:x"])
def test_unknown_sources_are_refused_with_those_there_are(name: str) -> None:
    assert "poisson, constant, worldcup, azure, mooncake" in refused(name, requests=2, rate_rps=1.0).message


# --- ServeGen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_servegen_hits_the_load(data: str, seed: int) -> None:
    times = make_arrivals(spec("servegen", data=data, requests=300, duration_s=1800.0), seed)
    assert (len(times), times[0], times[-1]) == (300, 0.0, 1800.0)
    assert all(a <= b for a, b in pairwise(times))


def test_servegen_follows_the_rate_of_its_windows(data: str) -> None:
    times = np.asarray(make_arrivals(spec("servegen:small", data=data, rate_rps=2.0), 0))
    assert len(times) == 4801
    busy = np.mean((times >= 600) & (times < 1200))
    assert busy == pytest.approx(0.9 / 1.2, abs=0.05)


def test_servegen_draws_gaps_of_the_windows_variation(data: str) -> None:
    gaps = np.diff(make_arrivals(spec("servegen:big", data=data, requests=20_000, duration_s=600.0), 0))
    assert gaps.std() / gaps.mean() == pytest.approx(2.0, rel=0.1)


def test_servegen_alone_is_taken_at_its_own_rate(data: str) -> None:
    assert len(make_arrivals(spec("servegen:big", data=data, duration_s=600.0), 0)) == 301
    assert make_arrivals(spec("servegen:big", data=data, requests=101), 0)[-1] == pytest.approx(200.0)
    assert "covers 1200 s and 300 requests" in refused("servegen:big", data=data, requests=400).message


def test_servegen_names_its_models(data: str) -> None:
    assert "there are: small, big" in refused("servegen:huge", data=data, requests=2).message
    assert "covers 2400 s" in refused("servegen", data=data, requests=9, duration_s=2401.0).message


def test_malformed_servegen_windows_are_told_with_line(data: str) -> None:
    path = Path(data) / "traces" / "servegen_rate_600s.csv.gz"
    for text, reason in (("model,t_s\n", "no column rate_rps"), ("", "no column model")):
        pack(path, text)
        _forget()
        assert reason in refused("servegen", data=data, requests=2).message
    pack(path, "model,t_s,rate_rps,rate_weighted_iat_cv\nm,0,x,1\n")
    _forget()
    assert ":2:" in refused("servegen", data=data, requests=2).message


def _forget() -> None:
    from calm.workloads.traces import _read_rates

    _read_rates.cache_clear()


def test_the_whole_trace_thinned_keeps_its_rush(tmp_path: Path) -> None:
    """A quiet hour of one arrival a second, then a rush of ten: a window shows one of them, the whole both."""
    traces = tmp_path / "traces"
    traces.mkdir()
    pack(traces / "worldcup98_day53.txt.gz", "1\n" * 1000 + "0.1\n" * 1000)
    whole = spec("worldcup:whole", data=tmp_path, requests=200, duration_s=100.0)
    times = np.asarray(make_arrivals(whole, 0))
    assert len(times) == 200
    assert (times[0], times[-1]) == (0.0, 100.0)
    assert np.all(np.diff(times) >= 0)
    assert 70 <= np.sum(times > 90.0) <= 130  # the last eleventh of the time holds half of the requests
    assert make_arrivals(whole, 0) == make_arrivals(whole, 0) != make_arrivals(whole, 1)
    assert "need --requests" in refused("worldcup:whole", data=tmp_path, duration_s=10.0).message
