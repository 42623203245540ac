"""Tables: what stands in which column, what is said below, and who is compared with whom."""

from __future__ import annotations

import msgspec
import pytest
from tests.unit.report_study import make_study, make_trial, study_of

from calm.errors import BadInput
from calm.report.records import Setup, Study
from calm.report.tables import (
    comparison,
    comparison_table,
    remarks,
    setup_called,
    summarise,
    to_markdown,
    to_table,
)


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study(policies=("calm", "round-robin"), scenarios=("20 min", "40 min"), seeds=3, requests=40)


def test_a_summary_pools_the_seeds_of_a_setup(study: Study) -> None:
    summaries = summarise(study)
    assert [(one.label, one.setup.scenario) for one in summaries] == [
        ("calm / lru", "20 min"), ("round-robin / lru", "20 min"),
        ("calm / lru", "40 min"), ("round-robin / lru", "40 min"),
    ]  # fmt: skip
    assert all(one.seeds == (0, 1, 2) and one.requests == 120 for one in summaries)
    assert all(one.figures["mean_s"].n == 3 for one in summaries)
    assert all(sum(one.model_shares.values()) == pytest.approx(1) for one in summaries)


def test_a_row_has_a_cell_for_every_header_and_units(study: Study) -> None:
    table = to_table(summarise(study))
    assert table.headers == (
        "scenario", "policy / cache", "mean", "p50", "p90", "p95", "p99", "TTFT", "J/request", "quality", "hit rate",
        "loads", "peak memory", "SLO", "n",
    )  # fmt: skip
    assert all(len(line) == len(table.headers) for line in table.rows)
    assert table.right == tuple(range(2, 15))
    assert table.rows[0][2].endswith(" s")
    assert table.rows[0][-1] == "120 / 3"


def test_one_scenario_is_not_named() -> None:
    assert to_table(summarise(make_study(seeds=1, requests=5))).headers[0] == "policy / cache"


def test_wide_cells_carry_their_interval(study: Study) -> None:
    table = to_table(summarise(study), wide=True)
    mean = table.rows[0][table.headers.index("mean")]
    value, bounds = mean.split(" [")
    assert value.endswith(" s")
    assert bounds.count(",") == 1
    assert "decision p99" in table.headers


def test_without_energy_there_is_a_dash() -> None:
    summaries = summarise(make_study(seeds=1, requests=5, energy=False))
    table = to_table(summaries)
    assert table.rows[0][table.headers.index("J/request")] == "-"
    assert "energy: nothing measured it" in remarks(make_study(seeds=1, requests=5, energy=False), summaries)


def test_attributed_energy_stands_in_where_nobody_counted_the_whole() -> None:
    trials = make_study(seeds=1, requests=5).trials
    found = study_of(msgspec.structs.replace(trial, energy_j=None) for trial in trials)
    assert "attributed J/request" in to_table(summarise(found)).headers


def test_failures_are_shown_and_said() -> None:
    study = make_study(policies=("calm",), seeds=3, requests=60, failures=0.3)
    summaries = summarise(study)
    table = to_table(summaries)
    assert table.headers[1] == "done"
    assert table.rows[0][1] != "100.0 %"
    assert any(remark.startswith("not completed: calm / lru") for remark in remarks(study, summaries))


def test_remarks_say_how_sure_intervals_are_and_end_with_the_notes(study: Study) -> None:
    noted = msgspec.structs.replace(study, notes=("two rows were skipped",))
    said = remarks(noted, summarise(noted))
    assert "3 seeds" in said[0]
    assert said[-1] == "two rows were skipped"
    single = make_study(seeds=1, requests=5)
    assert remarks(single, summarise(single))[0].startswith("one seed: no intervals")


def test_simulated_and_real_stand_beside_each_other() -> None:
    simulated = make_trial(Setup(policy="calm", cache="lru"), 0, requests=5)
    summaries = summarise(study_of([simulated, msgspec.structs.replace(simulated, engine="real")]))
    assert [one.label for one in summaries] == ["calm / lru (simulated)", "calm / lru (real)"]


def test_a_study_without_trials_has_an_empty_table() -> None:
    empty = study_of([])
    assert to_table(summarise(empty)).rows == ()
    assert remarks(empty, [])


# --- comparison ----------------------------------------------------------------------------------


def test_a_baseline_is_compared_within_its_scenario(study: Study) -> None:
    found = comparison(study, setup_called(study, "round-robin / lru"))
    assert [(one.label, one.setup.scenario, one.baseline) for one in found] == [
        ("calm / lru", "20 min", "round-robin / lru"), ("calm / lru", "40 min", "round-robin / lru"),
    ]  # fmt: skip
    summaries = {(one.label, one.setup.scenario): one for one in summarise(study)}
    means = [
        summaries[name, "20 min"].figures["mean_s"].value for name in ("calm / lru", "round-robin / lru")
    ]
    assert found[0].ratios["mean_s"].value == pytest.approx(means[0] / means[1])


def test_shares_are_compared_by_difference_and_amounts_by_ratio(study: Study) -> None:
    found = comparison(study, setup_called(study, "round-robin / lru"))[0]
    assert {"quality", "hit_rate", "slo_attainment", "completed"} <= set(found.differences)
    assert {"mean_s", "p99_s", "total_j_per_request", "loads"} <= set(found.ratios)
    assert not set(found.ratios) & set(found.differences)


def test_a_setup_compared_with_its_equal_is_one_and_nothing(study: Study) -> None:
    twins = study_of(
        make_trial(Setup(policy=policy, cache="lru"), seed, requests=20)
        for policy in ("paper:a", "paper:a ")
        for seed in range(3)
    )
    same = [msgspec.structs.replace(trial, rows=twins.trials[trial.seed].rows) for trial in twins.trials]
    found = comparison(study_of(same), setup_called(twins, "paper:a / lru"))[0]
    assert found.ratios["mean_s"].value == found.ratios["mean_s"].high == 1
    assert found.differences["quality"].value == 0


def test_comparisons_read_as_ratios_and_signed_differences(study: Study) -> None:
    table = comparison_table(comparison(study, setup_called(study, "round-robin / lru")))
    cells = dict(zip(table.headers, table.rows[0], strict=True))
    assert float(cells["mean"].split(" [")[0]) > 0
    assert cells["quality"][0] in "+-"
    assert " pp [" in cells["hit rate"]


def test_an_unknown_baseline_is_told_which_there_are(study: Study) -> None:
    with pytest.raises(
        BadInput, match='no setup is called "oracle"; there are "calm / lru", "round-robin / lru"'
    ):
        setup_called(study, "oracle")


# --- Markdown ------------------------------------------------------------------------------------


def test_markdown_is_a_table_with_figures_to_the_right(study: Study) -> None:
    lines = to_markdown(to_table(summarise(study))).splitlines()
    assert len(lines) == 2 + 4
    assert lines[1].startswith("| --- | --- | ---: |")
    assert len({line.count("|") for line in lines}) == 1
