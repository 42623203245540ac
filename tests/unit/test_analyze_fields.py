"""Fields: a specialist's own questions told from everyday ones, with the embedder that is served."""

from __future__ import annotations

import base64
from collections.abc import Callable
from itertools import product

import msgspec
import numpy as np
import pytest

from calm.analyze.fields import FieldSpace, encoded, sense_of
from calm.analyze.fitting import FEWEST, elsewhere, fit, learn_field, logits
from calm.analyze.quality import Quality
from calm.monitor.embed import StaticEmbedder
from calm.monitor.form import form_of
from calm.records import FieldSpec, ModelCard, PriorSpec, Vector

EMBEDDER = StaticEmbedder()
PLANTS = ("tomato", "rose", "basil", "fern", "orchid", "cactus", "lettuce", "tulip")
ILLS = ("yellow leaves", "brown spots", "white mould", "drooping stems", "holes in its leaves")
QUESTIONS = tuple(f"My {plant} has {ill}, which disease is it?" for plant, ill in product(PLANTS, ILLS))
OURS, UNSEEN = QUESTIONS[:-10], QUESTIONS[-10:]


def sense(question: str) -> Vector:
    return sense_of(EMBEDDER.embed(question), form_of(question))


@pytest.fixture(scope="module")
def plants() -> FieldSpec:
    found = learn_field(OURS, UNSEEN, sense)
    assert found is not None
    return FieldSpec(embedder=EMBEDDER.name, weights=encoded(found.line), untrained=0.05)


def space(*cards: dict[str, FieldSpec]) -> FieldSpace:
    made = FieldSpace(EMBEDDER.name, EMBEDDER.dimensions)
    made.learn(cards)
    return made


def test_a_field_knows_its_questions_and_leaves_everyday_ones_alone() -> None:
    found = learn_field(OURS, UNSEEN, sense)
    assert found is not None
    assert found.recognised == 1.0
    assert found.captured < 0.05


def test_too_few_questions_are_no_field() -> None:
    assert learn_field(QUESTIONS[: FEWEST - 1], (), sense) is None
    found = learn_field(QUESTIONS[:FEWEST], (), sense)
    assert found is not None
    assert found.recognised is None


def test_the_stock_is_varied_and_without_doubles() -> None:
    stock = elsewhere()
    assert len(stock) > 400
    assert len(set(stock)) == len(stock)


def test_the_fit_is_the_minimum_of_the_balanced_loss() -> None:
    """Its gradient is zero there, though one side has ten times the rows of the other."""
    draw = np.random.default_rng(3)
    ours, others = draw.normal(0.4, 1.0, (300, 5)), draw.normal(-0.4, 1.0, (30, 5))
    line = fit(ours, others)
    x = np.concatenate([ours, others])
    wrong = 1 / (1 + np.exp(-logits(line, x))) - np.r_[np.ones(300), np.zeros(30)]
    weight = np.r_[np.full(300, 0.5 / 300), np.full(30, 0.5 / 30)]
    assert np.abs(x.T @ (weight * wrong) + 2e-4 * line[:-1]).max() < 1e-5
    assert abs((weight * wrong).sum()) < 1e-5


def test_the_fit_ends_on_sides_that_a_line_parts() -> None:
    line = fit(np.full((20, 2), 1.0), np.full((20, 2), -1.0))
    assert np.isfinite(line).all()
    assert (logits(line, np.array([[1.0, 1.0], [-1.0, -1.0]])) > 0).tolist() == [True, False]


def test_shares_add_up_to_one_with_everything_else(plants: FieldSpec) -> None:
    both = space({"plants": plants}, {"more": plants})
    at_home = both.shares(sense(UNSEEN[0]))
    assert both.names == ("more", "plants")
    assert at_home[0] == at_home[1]
    assert 0.8 < at_home.sum() < 1.0
    assert both.shares(sense("What is the capital of France?")).sum() < 0.1


def test_a_field_of_two_cards_is_the_mean_of_their_lines(plants: FieldSpec) -> None:
    other = learn_field(OURS[:20], (), sense)
    assert other is not None
    second = FieldSpec(embedder=EMBEDDER.name, weights=encoded(other.line), untrained=0.15)
    shared = space({"plants": plants}, {"plants": second})
    alone = [space({"plants": one}).shares(sense(UNSEEN[0]))[0] for one in (plants, second)]
    assert shared.names == ("plants",)
    assert min(alone) <= shared.shares(sense(UNSEEN[0]))[0] <= max(alone)
    assert shared.untrained["plants"] == pytest.approx(0.1)


def test_without_fields_nothing_is_claimed() -> None:
    assert space().shares(sense("anything")).shape == (0,)


@pytest.mark.parametrize(
    "change", [{"embedder": "another"}, {"weights": base64.b64encode(b"\0\0" * 9).decode()}]
)
def test_a_field_of_another_embedder_or_size_says_nothing(plants: FieldSpec, change: dict[str, str]) -> None:
    assert space({"plants": msgspec.structs.replace(plants, **change)}).names == ()


@pytest.mark.parametrize("weights", ["", "!", "AAA=", base64.b64encode(b"\0\x7c\0\0").decode()])
def test_numbers_that_are_none_are_refused(weights: str) -> None:
    with pytest.raises(ValueError, match=r"base64|padding"):
        FieldSpec(embedder="e", weights=weights).numbers()


def card(name: str, **more: object) -> ModelCard:
    return ModelCard(name=name, description="answers", **more)  # type: ignore[arg-type]


def test_a_specialist_is_expected_to_be_good_in_its_field_alone(plants: FieldSpec) -> None:
    quality = Quality(EMBEDDER)
    quality.add(0, card("base", priors=PriorSpec(quality={"default": 0.4})))
    own = PriorSpec(quality={"plants": 0.9, "default": 0.1})
    quality.add(
        1,
        card("gardener", adapter_of="base", domains=("agriculture",), fields={"plants": plants}, priors=own),
    )
    rows = np.arange(2)
    at_home, _ = quality.predict(rows, sense(UNSEEN[3]))
    elsewhere_, _ = quality.predict(rows, sense("crops, soil and harvest in the middle ages"))
    assert at_home[1] > 0.8
    assert at_home[0] < 0.15  # what the field says of the untrained
    assert elsewhere_[0] > 0.3
    assert elsewhere_[1] < 0.2
    assert quality.domains_of(sense(UNSEEN[3]))[0][0] == "plants"


def test_a_field_leaves_with_its_card(plants: FieldSpec) -> None:
    quality = Quality(EMBEDDER)
    quality.add(0, card("base", priors=PriorSpec(quality={"default": 0.4})))
    quality.add(1, card("gardener", fields={"plants": plants}, priors=PriorSpec(quality={"plants": 0.9})))
    question = sense(UNSEEN[0])
    assert quality.predict(np.arange(1), question)[0][0] < 0.15
    quality.forget(1)
    assert quality.predict(np.arange(1), question)[0][0] > 0.3


RIVERS = tuple(f"Which river flows through {city}?" for city in (
    "Vienna", "Paris", "London", "Cairo", "Prague", "Rome", "Lisbon", "Berlin", "Dresden", "Cologne", "Basel", "Lyon",
    "Turin", "Seville", "Porto", "Warsaw", "Bonn", "Graz", "Linz", "Bern", "Budapest", "Belgrade", "Hamburg", "Florence",
))  # fmt: skip


@pytest.fixture(scope="module")
def rivers() -> FieldSpec:
    found = learn_field(RIVERS[:-4], RIVERS[-4:], sense)
    assert found is not None
    return FieldSpec(embedder=EMBEDDER.name, weights=encoded(found.line), untrained=0.05)


def two_specialists(plants: FieldSpec, rivers: FieldSpec) -> Quality:
    quality = Quality(EMBEDDER)
    quality.add(
        0,
        card(
            "gardener", fields={"plants": plants}, priors=PriorSpec(quality={"plants": 0.6, "default": 0.1})
        ),
    )
    quality.add(
        1,
        card("boatman", fields={"rivers": rivers}, priors=PriorSpec(quality={"rivers": 0.2, "default": 0.1})),
    )
    return quality


def test_what_ratings_teach_in_one_field_says_nothing_of_another(
    plants: FieldSpec, rivers: FieldSpec
) -> None:
    quality, both = two_specialists(plants, rivers), np.arange(2)
    before = quality.predict(both, sense(RIVERS[-1]))
    for question in OURS[:10]:
        quality.learn_one(0, sense(question), 1.0)
    at_home, _ = quality.predict(both, sense(UNSEEN[0]))
    assert at_home[0] > 0.85
    for now, then in zip(quality.predict(both, sense(RIVERS[-1])), before, strict=True):
        assert now == pytest.approx(then)
    assert quality.predict(both, sense("Who wrote Hamlet?"))[0][0] < 0.2


def test_ratings_are_remembered_by_field(plants: FieldSpec, rivers: FieldSpec) -> None:
    quality, again, both = two_specialists(plants, rivers), two_specialists(plants, rivers), np.arange(2)
    for question, rating in ((OURS[0], 1.0), (RIVERS[0], 0.0), ("Who wrote Hamlet?", 0.7)):
        quality.learn_one(0, sense(question), rating)
    states = quality.states(0)
    assert set(states) == {"quality", "quality/plants", "quality/rivers"}
    again.restore(0, states)
    for question in (UNSEEN[0], RIVERS[-1], "Who painted Guernica?"):
        for ours, theirs in zip(
            quality.predict(both, sense(question)), again.predict(both, sense(question)), strict=True
        ):
            assert ours == pytest.approx(theirs)
    again.forget(0)
    assert again.states(0) == {}
    fresh = two_specialists(plants, rivers).predict(both, sense(RIVERS[-1]))[0]
    assert again.predict(np.arange(1, 2), sense(RIVERS[-1]))[0][0] == pytest.approx(fresh[1])


def test_a_slot_given_back_is_given_out_again(plants: FieldSpec, rivers: FieldSpec) -> None:
    quality = two_specialists(plants, rivers)
    for _ in range(3):
        quality.learn_one(1, sense(OURS[0]), 0.0)
        quality.learn_one(1, sense(RIVERS[0]), 1.0)
        quality.learn_one(0, sense(OURS[0]), 1.0)
        quality.forget(1)
        assert quality.states(1) == {}
        assert set(quality.states(0)) == {"quality/plants"}
        quality.add(1, card("boatman", fields={"rivers": rivers}, priors=PriorSpec(quality={"rivers": 0.2})))
        assert quality.predict(np.arange(1, 2), sense(RIVERS[-1]))[0][0] == pytest.approx(0.2, abs=0.05)


def of_another_form(field: FieldSpec) -> FieldSpec:
    """As a CALM that saw fewer numbers of the form learned it."""
    return msgspec.structs.replace(field, weights=encoded(np.delete(field.numbers(), -2)))


@pytest.mark.parametrize(
    "unread", [lambda field: msgspec.structs.replace(field, embedder="another"), of_another_form]
)
def test_where_a_field_cannot_be_read_the_specialists_domains_have_its_quality(
    plants: FieldSpec, unread: Callable[[FieldSpec], FieldSpec]
) -> None:
    quality = Quality(EMBEDDER)
    quality.add(0, card("base", priors=PriorSpec(quality={"default": 0.4})))
    own = PriorSpec(quality={"plants": 0.9, "default": 0.1})
    gardener = card("gardener", domains=("agriculture",), fields={"plants": unread(plants)}, priors=own)
    quality.add(1, gardener)
    found, _ = quality.predict(np.arange(2), sense("crops, soil, irrigation, livestock, farmer, harvest"))
    assert found[1] > found[0]
