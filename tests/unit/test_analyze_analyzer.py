"""The facade: estimates that add up, learning end to end, joining and leaving, checkpoints."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from calm.analyze.analyzer import Analyzer, identity
from calm.analyze.domains import DESCRIPTORS, DomainSpace, canonical
from calm.monitor.features import extract
from calm.records import (
    Ask,
    ChatSpec,
    EngineSpec,
    Estimate,
    Features,
    Kind,
    ModelCard,
    ModelState,
    Outcome,
    PriceSpec,
    PriorSpec,
    Reading,
    Residency,
    Snapshot,
    SourceSpec,
    Vector,
)


class Words:
    """A bag of hashed words: texts that share words are near each other."""

    name = "words"
    dimensions = 128

    def embed(self, text: str) -> Vector:
        vector = np.zeros(self.dimensions, np.float32)
        for word in text.lower().replace(",", " ").replace("?", " ").split():
            digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
            vector += np.random.default_rng(int.from_bytes(digest, "big")).standard_normal(self.dimensions)
        norm = float(np.linalg.norm(vector))
        return vector / norm if norm else vector


WORDS = Words()
MATH = "solve the equation for x, algebra"
LAW = "court, liability and statute of the plaintiff"


def card(name: str, **changes: object) -> ModelCard:
    base = ModelCard(
        name=name,
        description=f"the model {name}",
        context=1000,
        source=SourceSpec(parts=("file:x",), sha256=f"{name:0>64}", bytes=100_000_000),
        priors=PriorSpec(decode_tps=20.0, prefill_tps=100.0, load_s=3.0),
    )
    return msgspec.structs.replace(base, **changes)


FLEET = {name: card(name) for name in ("a", "b", "c")}


def ask(query: str = "hello there", kind: Kind = "chat", **changes: object) -> Ask:
    base = Ask(
        request_id="r",
        kind=kind,
        query=query,
        prompt_chars=400,
        body={},
        requires=frozenset(),
        max_tokens=100,
    )
    return msgspec.structs.replace(base, **changes)


def read(question: Ask) -> Features:
    return extract(question, WORDS, lambda _: "en")


def system(names: Sequence[str] = ("a", "b", "c"), residency: Residency = "ready") -> Snapshot:
    states = {
        name: ModelState(
            model=name,
            residency=residency,
            pinned=False,
            in_flight=0,
            waiting=0,
            slots=4,
            threads=1,
            footprint_bytes=1,
            footprint_measured=True,
            load_s=None,
            last_used_s=None,
            failures=0,
        )
        for name in names
    }
    return Snapshot(
        revision=1,
        at_s=0.0,
        models=states,
        budget_bytes=100,
        used_bytes=3,
        cores=2,
        threads_in_use=0,
        queue_length=0,
        in_flight=0,
    )


def served(model: str, tokens: int = 41, **changes: object) -> Outcome:
    base = Outcome(
        request_id="r",
        model=model,
        status="ok",
        wall_s=0.0,
        ttft_s=0.5,
        total_s=0.5 + 0.01 * (tokens - 1),
        prompt_tokens=150,
        completion_tokens=tokens,
        finish_reason="stop",
        energy=Reading(joules=8.0, meter="t", kind="measured"),
    )
    return msgspec.structs.replace(base, **changes)


def fleet_of(cards: dict[str, ModelCard] = FLEET) -> Analyzer:
    analyzer = Analyzer(WORDS)
    analyzer.sync(cards)
    return analyzer


def estimates(analyzer: Analyzer, question: Ask, snapshot: Snapshot | None = None) -> dict[str, Estimate]:
    return analyzer.estimate_all(question, read(question), snapshot or system(), FLEET)


def teach(analyzer: Analyzer, question: Ask, outcome: Outcome, count: int = 30) -> None:
    for _ in range(count):
        predicted = estimates(analyzer, question).get(outcome.model or "")
        analyzer.learn(question, read(question), predicted, outcome, threads=1)


def test_estimates_add_up_and_are_sane() -> None:
    found = estimates(fleet_of(), ask(), system(residency="cold"))
    assert list(found) == ["a", "b", "c"]
    for name, estimate in found.items():
        assert estimate.model == name
        first = estimate.queue_s.mean + estimate.load_s.mean + estimate.prefill_s.mean
        assert estimate.ttft_s.mean == pytest.approx(first)
        assert estimate.total_s.mean == pytest.approx(first + estimate.decode_s.mean)
        assert 1.0 <= estimate.output_tokens.mean <= 100.0
        assert 0.0 <= estimate.quality.mean <= 1.0
        assert estimate.load_s.mean == pytest.approx(3.0, rel=0.5)
        assert estimate.energy_j is None
        assert estimate.cost_usd == 0.0


def test_nothing_to_estimate() -> None:
    assert fleet_of().estimate_all(ask(), read(ask()), system(), {}) == {}


def test_every_quantity_improves_with_what_is_served() -> None:
    analyzer, question = fleet_of(), ask()
    teach(analyzer, question, served("a"))
    analyzer.loaded("a", 0.4)
    learned = estimates(analyzer, question)["a"]
    assert learned.total_s.mean == pytest.approx(0.9, rel=0.1)
    assert learned.ttft_s.mean == pytest.approx(0.5, rel=0.1)
    assert learned.output_tokens.mean == pytest.approx(41, rel=0.15)
    assert learned.prompt_tokens == pytest.approx(150, rel=0.1)
    assert learned.energy_j is not None
    assert learned.energy_j.mean == pytest.approx(8.0, rel=0.1)
    assert estimates(analyzer, question, system(residency="cold"))["a"].load_s.mean < 2.0
    report = analyzer.calibration()["a"]
    assert report["total_s"].observations == 30
    assert {"ttft_s", "prefill_s", "prompt_tokens", "output_tokens", "energy_j", "load_s"} <= set(report)


def test_unknown_energy_is_none_until_measured() -> None:
    analyzer = fleet_of({**FLEET, "b": card("b", priors=PriorSpec(energy_j_per_token=0.5))})
    teach(analyzer, ask(), served("a"), count=1)
    found = estimates(analyzer, ask())
    assert found["a"].energy_j is not None
    assert found["b"].energy_j is not None
    assert found["c"].energy_j is None


def test_output_is_cut_at_what_the_card_allows() -> None:
    terse = card("b", chat=ChatSpec(answer_tokens=4))
    found = estimates(fleet_of({"a": card("a"), "b": terse}), ask(max_tokens=None))
    assert found["b"].output_tokens.mean <= 4.0 < found["a"].output_tokens.mean
    assert found["b"].decode_s.mean < found["a"].decode_s.mean
    assert estimates(fleet_of({"b": terse}), ask(max_tokens=2))["b"].output_tokens.mean <= 2.0


def test_output_is_cut_at_max_tokens_and_at_the_context() -> None:
    analyzer = fleet_of()
    assert estimates(analyzer, ask(max_tokens=3))["a"].output_tokens.mean <= 3.0
    full = estimates(analyzer, ask(max_tokens=None, prompt_chars=100_000))["a"]
    assert full.output_tokens.mean == pytest.approx(1.0)


def test_samples_multiply_tokens_but_not_time() -> None:
    analyzer = fleet_of()
    one, four = (estimates(analyzer, ask(samples=n))["a"] for n in (1, 4))
    assert four.output_tokens.mean == pytest.approx(4 * one.output_tokens.mean)
    assert one.decode_s.mean < four.decode_s.mean < 4 * one.decode_s.mean


def test_embeddings_decode_nothing() -> None:
    found = estimates(fleet_of(), ask(kind="embeddings"))["a"]
    assert (found.output_tokens.mean, found.decode_s.mean) == (0.0, 0.0)
    assert found.total_s.mean == pytest.approx(found.ttft_s.mean)


def test_prices() -> None:
    remote = EngineSpec(kind="openai", url="http://127.0.0.1:1")
    fleet = {
        "free": card("free"),
        "paid": card("paid", price=PriceSpec(input_usd_per_mtok=1.0, output_usd_per_mtok=2.0)),
        "unknown": card("unknown", placement="remote", engine=remote),
    }
    found = Analyzer(WORDS).estimate_all(ask(), read(ask()), system(), fleet)
    paid = found["paid"]
    assert paid.cost_usd == pytest.approx((paid.prompt_tokens + 2 * paid.output_tokens.mean) / 1e6)
    assert found["free"].cost_usd == 0.0
    assert found["unknown"].cost_usd is None


def test_a_conversation_s_next_turn_finds_its_prefix_cached() -> None:
    analyzer, question = fleet_of(), ask(conversation="talk", prompt_chars=2000)
    analyzer.learn(question, read(question), None, served("b"))
    warm = estimates(analyzer, question)
    assert warm["b"].cached_tokens == pytest.approx(0.9 * (150 + 41))
    assert warm["b"].prefill_s.mean < warm["a"].prefill_s.mean
    assert warm["a"].cached_tokens == 0.0
    assert estimates(analyzer, question, system(residency="cold"))["b"].cached_tokens == 0.0
    analyzer.loaded("b", 1.0)
    assert estimates(analyzer, question)["b"].cached_tokens == 0.0


def test_every_model_that_saw_a_conversation_remembers_it() -> None:
    analyzer, question = fleet_of(), ask(conversation="talk", prompt_chars=2000)
    analyzer.learn(question, read(question), None, served("a"))
    analyzer.learn(question, read(question), None, served("b"))  # it strayed: a still holds the prefix
    warm = estimates(analyzer, question)
    assert warm["a"].cached_tokens > 0
    assert warm["b"].cached_tokens > 0
    analyzer.loaded("b", 1.0)
    warm = estimates(analyzer, question)
    assert warm["a"].cached_tokens > 0
    assert warm["b"].cached_tokens == 0.0


def test_an_engine_that_caches_nothing_is_found_out() -> None:
    analyzer, question = fleet_of(), ask(conversation="talk", prompt_chars=2000)
    teach(analyzer, question, served("b", cached_tokens=0), count=40)
    assert estimates(analyzer, question)["b"].cached_tokens < 10.0


def test_cards_say_which_domain_a_model_is_good_at() -> None:
    fleet = {
        "maths": card("maths", priors=PriorSpec(quality={"mathematics": 0.9, "default": 0.3})),
        "law": card("law", domains=("legal",)),
    }
    analyzer = fleet_of(fleet)
    sums = analyzer.estimate_all(ask(MATH), read(ask(MATH)), system(), fleet)
    court = analyzer.estimate_all(ask(LAW), read(ask(LAW)), system(), fleet)
    assert sums["maths"].quality.mean > sums["law"].quality.mean
    assert court["law"].quality.mean > court["maths"].quality.mean
    assert analyzer.domains_of(read(ask(LAW)))[0][0] == "legal"


def test_ratings_teach_who_is_good_at_what() -> None:
    analyzer = fleet_of()
    start = estimates(analyzer, ask(MATH))
    before = start["a"].quality
    for _ in range(15):
        assert analyzer.rate(read(ask(MATH)), "a", 5)
        assert analyzer.rate(read(ask(LAW)), "a", 1)
    sums, court = (estimates(analyzer, ask(text))["a"].quality for text in (MATH, LAW))
    assert sums.mean > 0.6 > 0.45 > court.mean
    assert sums.sd < before.sd
    assert estimates(analyzer, ask(MATH))["b"].quality == start["b"].quality
    assert analyzer.calibration()["a"]["quality"].observations == 15  # no percentage of a zero


def test_bad_ratings_are_refused() -> None:
    analyzer = fleet_of()
    assert not analyzer.rate(read(ask()), "nobody", 3)
    assert not any(analyzer.rate(read(ask()), "a", rating) for rating in (0, 6, math.nan))


def test_outcomes_without_a_known_model_are_ignored() -> None:
    analyzer = fleet_of()
    before = estimates(analyzer, ask())
    analyzer.learn(ask(), read(ask()), None, served("nobody"))
    analyzer.learn(ask(), read(ask()), None, msgspec.structs.replace(served("a"), model=None))
    analyzer.learn(ask(), read(ask()), None, served("a", status="error"))
    analyzer.loaded("nobody", 1.0)
    assert estimates(analyzer, ask()) == before


def test_garbage_outcomes_leave_finite_predictions() -> None:
    analyzer = fleet_of()
    for bad in (
        served("a", ttft_s=math.nan, total_s=math.inf, prompt_tokens=0, completion_tokens=0),
        served("a", ttft_s=-5.0, total_s=-1.0, prompt_tokens=-3, completion_tokens=-9),
        served("a", energy=Reading(joules=math.inf, meter="t", kind="measured"), queue_s=1e300),
        served("a", concurrency=0, cached_tokens=10**9),
    ):
        analyzer.learn(ask(), read(ask()), None, bad, threads=0)
    found = estimates(analyzer, ask())["a"]
    assert all(
        math.isfinite(b.mean) and b.sd >= 0 for b in (found.total_s, found.quality, found.output_tokens)
    )


def test_checkpoint_predicts_identically_after_a_restart() -> None:
    first, second = fleet_of(), fleet_of()
    teach(first, ask(MATH), served("a"))
    first.loaded("b", 0.7)
    first.rate(read(ask(MATH)), "c", 5)
    assert second.load(first.dump())
    assert estimates(second, ask(MATH)) == estimates(first, ask(MATH))
    late = Analyzer(WORDS)
    assert late.load(first.dump())
    late.sync(FLEET)
    assert estimates(late, ask(MATH)) == estimates(first, ask(MATH))


@pytest.mark.parametrize("cut", [0, 10, 60, -1])
def test_a_damaged_checkpoint_leaves_the_priors(cut: int) -> None:
    first, second = fleet_of(), fleet_of()
    teach(first, ask(), served("a"), count=3)
    before = estimates(second, ask())
    assert not second.load(first.dump()[:cut])
    assert estimates(second, ask()) == before


def test_quality_is_not_carried_over_to_another_embedder() -> None:
    first, blind = fleet_of(), Analyzer(None)
    blind.sync(FLEET)
    first.rate(read(ask()), "a", 5)
    teach(first, ask(), served("a"))
    before = estimates(blind, ask())["a"]
    assert blind.load(first.dump())
    after = estimates(blind, ask())["a"]
    assert after.quality == before.quality
    assert after.total_s != before.total_s


def test_a_reworded_card_keeps_what_was_learned_and_new_weights_do_not() -> None:
    analyzer = fleet_of()
    fresh = estimates(analyzer, ask())["a"].total_s
    teach(analyzer, ask(), served("a"))
    learned = estimates(analyzer, ask())["a"].total_s
    analyzer.changed(card("a", description="other words"))
    assert estimates(analyzer, ask())["a"].total_s == learned
    other = SourceSpec(parts=("file:y",), sha256="f" * 64, bytes=100_000_000)
    analyzer.changed(card("a", source=other))
    assert estimates(analyzer, ask())["a"].total_s == fresh
    assert identity(FLEET["a"]) != identity(card("a", source=other))


def test_a_model_that_leaves_frees_its_row_and_is_remembered() -> None:
    analyzer = fleet_of()
    teach(analyzer, ask(), served("a"))
    analyzer.rate(read(ask()), "a", 5)
    learned, fresh = estimates(analyzer, ask())["a"], estimates(analyzer, ask())["b"]
    rest = {name: FLEET[name] for name in ("b", "c")}
    analyzer.sync(rest)
    analyzer.remove("nobody")
    analyzer.add(card("d"))
    newcomer = analyzer.estimate_all(ask(), read(ask()), system(("d",)), {"d": card("d")})["d"]
    assert newcomer.total_s == fresh.total_s
    assert newcomer.quality.sd == fresh.quality.sd
    analyzer.add(FLEET["a"])
    assert estimates(analyzer, ask())["a"].total_s == learned.total_s
    analyzer.remove("a", forget=True)
    analyzer.add(FLEET["a"])
    assert estimates(analyzer, ask())["a"].total_s == fresh.total_s


def test_many_models_join_at_once() -> None:
    fleet = {f"m{index}": card(f"m{index}", domains=(f"field-{index % 7}",)) for index in range(60)}
    analyzer = fleet_of(fleet)
    found = analyzer.estimate_all(ask(), read(ask()), system(()), fleet)
    assert len(found) == 60
    assert len({estimate.total_s.mean for estimate in found.values()}) == 1


def test_invented_domains_work_by_their_own_name() -> None:
    space = DomainSpace(WORDS, ["Veterinary Surgery", "coding"])
    assert space.names[: len(DESCRIPTORS)] == tuple(DESCRIPTORS)
    assert space.names[-1] == "veterinary_surgery"
    posterior = space.posterior(WORDS.embed("veterinary surgery"))
    assert posterior.sum() == pytest.approx(1.0, abs=1e-5)
    assert space.names[int(posterior.argmax())] == "veterinary_surgery"
    assert canonical(" Creative-Writing ") == "creative_writing"


# --- adapters -------------------------------------------------------------------------------------


def specialist(name: str, of: str, **changes: object) -> ModelCard:
    base = FLEET[of]
    source = SourceSpec(parts=("file:y",), sha256=f"{name:0>64}", bytes=5_000_000)
    return msgspec.structs.replace(base, name=name, adapter_of=of, source=source, **changes)


def test_a_new_specialist_begins_with_the_speed_its_base_has_shown() -> None:
    analyzer, question = Analyzer(WORDS), ask()
    analyzer.sync(FLEET)
    teach(analyzer, question, served("a"))
    analyzer.loaded("a", 9.0)
    fleet = {**FLEET, "x": specialist("x", "a")}
    analyzer.sync(fleet)
    found = analyzer.estimate_all(question, read(question), system(("a", "x"), "cold"), fleet)
    for figure in ("prompt_tokens", "prefill_s", "load_s"):
        assert getattr(found["x"], figure) == getattr(found["a"], figure)
    assert found["x"].load_s.mean > found["b"].load_s.mean


def test_a_specialist_without_priors_is_guessed_from_its_bases_size_not_its_own() -> None:
    unstated = {name: msgspec.structs.replace(found, priors=PriorSpec()) for name, found in FLEET.items()}
    fleet = {**unstated, "x": specialist("x", "a", priors=PriorSpec())}
    analyzer, question = Analyzer(WORDS), ask()
    analyzer.sync(fleet)
    found = analyzer.estimate_all(question, read(question), system(("a", "x"), "cold"), fleet)
    assert found["x"].decode_s == found["a"].decode_s
    assert found["x"].load_s == found["a"].load_s


def test_its_own_measured_speed_counts_more_than_its_bases() -> None:
    analyzer, question = Analyzer(WORDS), ask()
    analyzer.sync(FLEET)
    teach(analyzer, question, served("a"))
    own = PriorSpec(decode_tps=20.0, prefill_tps=10.0, load_s=3.0)
    fleet = {**FLEET, "x": specialist("x", "a", priors=own)}
    analyzer.sync(fleet)
    found = analyzer.estimate_all(question, read(question), system(("a", "x")), fleet)
    assert found["x"].prefill_s.mean > found["a"].prefill_s.mean


def test_a_load_of_the_base_is_the_load_of_its_specialists() -> None:
    fleet = {**FLEET, "x": specialist("x", "a"), "y": specialist("y", "b")}
    analyzer, question = Analyzer(WORDS), ask(conversation="c")
    analyzer.sync(fleet)
    features = read(question)
    analyzer.learn(question, features, None, served("x"))
    assert analyzer._held(features, system(("a", "b", "x", "y")))
    for _ in range(5):
        analyzer.loaded("a", 0.2)
    found = analyzer.estimate_all(question, features, system(("a", "b", "x", "y"), "cold"), fleet)
    assert found["x"].load_s.mean == found["a"].load_s.mean < found["y"].load_s.mean
    assert not analyzer._held(features, system(("a", "b", "x", "y"))), "a fresh engine has nothing cached"


def test_specialists_learn_apart_what_is_their_own() -> None:
    fleet = {**FLEET, "x": specialist("x", "a"), "y": specialist("y", "a")}
    analyzer, question = Analyzer(WORDS), ask(MATH)
    analyzer.sync(fleet)
    features = read(question)
    for _ in range(20):
        assert analyzer.rate(features, "x", 5.0)
        assert analyzer.rate(features, "y", 1.0)
    found = analyzer.estimate_all(question, features, system(("a", "x", "y")), fleet)
    assert found["x"].quality.mean > found["a"].quality.mean > found["y"].quality.mean


def test_what_a_specialist_learned_survives_a_restart_whatever_the_order_of_cards() -> None:
    fleet = {"x": specialist("x", "a"), **FLEET}
    analyzer, question = Analyzer(WORDS), ask()
    analyzer.sync(fleet)
    teach(analyzer, question, served("x"))
    again = Analyzer(WORDS)
    again.sync(fleet)
    assert again.load(analyzer.dump())
    now = system(("a", "x"))
    before = analyzer.estimate_all(question, read(question), now, fleet)["x"]
    assert again.estimate_all(question, read(question), now, fleet)["x"] == before
