"""Specialists on one base, as stories: the residency machine sees one engine, callers see many models."""

from __future__ import annotations

import msgspec
import pytest

from calm.errors import BadInput, LoadFailed, Unavailable, UnknownModel
from calm.execute import events as ev
from calm.execute.eviction import parse_eviction
from calm.execute.residency import Machine
from calm.execute.sizing import size_fleet
from calm.records import EngineSpec, ModelCard, ModelState, PlacementPlan, SourceSpec

ENGINE = EngineSpec(slots=2, threads=1)


def base(name: str = "base", size: int = 40, **more: object) -> ModelCard:
    return ModelCard(name=name, description=name, memory_hint_bytes=size, engine=ENGINE, **more)


def adapter(name: str, of: str = "base", size: int = 2, digest: str = "a", **more: object) -> ModelCard:
    source = SourceSpec(parts=(f"file:/{name}.gguf",), sha256=digest * 64)
    return ModelCard(
        name=name,
        description=name,
        adapter_of=of,
        memory_hint_bytes=size,
        source=source,
        engine=ENGINE,
        **more,
    )


FAMILY = (base(), adapter("finance"), adapter("medical"))


class Story:
    """A machine with a clock one can set."""

    def __init__(self, *cards: ModelCard, eviction: str = "lru", **limits: object) -> None:
        self.machine = Machine(
            ev.Limits(**{"cores": 2, "budget_bytes": 100} | limits), parse_eviction(eviction)
        )
        self.at_s = 0.0
        self.tickets = 0
        self.said: list[ev.Command] = []
        self.fleet(*(cards or FAMILY))

    def fleet(self, *cards: ModelCard) -> list[ev.Command]:
        return self.feed(ev.FleetChanged(self.at_s, size_fleet({c.name: c for c in cards}, 2)))

    def feed(self, event: ev.Event) -> list[ev.Command]:
        commands = [c for c in self.machine.step(event) if not isinstance(c, ev.Moved)]
        self.said += commands
        return commands

    def want(self, model: str) -> int:
        self.tickets += 1
        self.feed(ev.Want(self.at_s, self.tickets, f"req-{self.tickets}", model, 1.0))
        return self.tickets

    def order(self, kind: type[ev.AdminLoad] | type[ev.AdminUnload], model: str) -> int:
        self.tickets += 1
        self.feed(kind(self.at_s, self.tickets, model))
        return self.tickets

    def loaded(self, model: str = "base", size: int | None = None, **refused: str) -> list[ev.Command]:
        return self.feed(ev.Loaded(self.at_s, model, size, 1.0, refused))

    def unloaded(self, model: str = "base") -> list[ev.Command]:
        return self.feed(ev.Unloaded(self.at_s, model))

    def release(self, ticket: int) -> list[ev.Command]:
        return self.feed(ev.Release(self.at_s, ticket))

    def granted(self, ticket: int) -> bool:
        return ev.Grant(ticket) in self.said

    def refusal(self, ticket: int) -> Exception | None:
        return next((c.error for c in self.said if isinstance(c, ev.Refuse) and c.ticket == ticket), None)

    def state(self, model: str) -> ModelState:
        return self.machine.models()[model]


def up() -> Story:
    s = Story()
    s.want("base")
    s.loaded()
    s.release(1)
    return s


# --- one engine -----------------------------------------------------------------------------------


def test_asking_for_a_specialist_loads_its_base_once() -> None:
    s = Story()
    first, second = s.want("finance"), s.want("medical")
    assert s.said == [ev.StartLoad("base", 1)]
    s.loaded()
    assert s.granted(first)
    assert not s.granted(second)  # the engine applies one adapter at a time
    s.release(first)
    assert s.granted(second)


def test_switching_specialists_on_a_resident_base_is_a_grant_and_nothing_else() -> None:
    s = up()
    ticket = s.want("finance")
    assert s.said[-1] == ev.Grant(ticket)
    s.release(ticket)
    other = s.want("medical")
    assert s.said[-1] == ev.Grant(other)


def test_base_and_specialists_share_the_slots_of_one_engine() -> None:
    s = up()
    held = [s.want("finance"), s.want("finance")]
    waiting = s.want("finance")
    assert all(map(s.granted, held))
    assert not s.granted(waiting)
    s.release(held[0])
    assert s.granted(waiting)


@pytest.mark.parametrize("other", ["medical", "base"])
def test_an_engine_that_applies_one_adapter_at_a_time_takes_the_next_when_it_is_idle(other: str) -> None:
    s = Story(*(msgspec.structs.replace(card, engine=EngineSpec(slots=3, threads=1)) for card in FAMILY))
    s.want("finance")
    s.loaded()
    second = s.want("finance")
    waiting = s.want(other)
    assert s.granted(second)
    assert not s.granted(waiting)
    s.release(1)
    assert not s.granted(waiting)
    s.release(second)
    assert s.granted(waiting)


def test_no_specialist_is_starved_by_a_busier_one_on_its_base() -> None:
    s = up()
    running, waiting, behind = s.want("finance"), s.want("medical"), s.want("finance")
    assert not s.granted(behind)  # a slot is free, but medical asked first
    s.release(running)
    assert s.granted(waiting)
    assert not s.granted(behind)
    s.release(waiting)
    assert s.granted(behind)


def test_a_server_that_mixes_adapters_in_a_batch_serves_them_side_by_side() -> None:
    vllm = EngineSpec(kind="command", cmd="serve {port}", slots=2, threads=1)
    s = Story(*(msgspec.structs.replace(card, engine=vllm) for card in FAMILY))
    first = s.want("finance")
    s.loaded()
    second = s.want("medical")
    assert s.granted(first)
    assert s.granted(second)


def test_a_family_is_counted_once_in_bytes_cores_and_queue() -> None:
    s = up()
    assert s.machine.used_bytes == 44
    s.want("finance"), s.want("finance"), s.want("base")
    assert (s.machine.cores_in_use, s.machine.in_flight, s.machine.queue_length) == (1, 2, 1)
    states = s.machine.models()
    own = [state for name, state in states.items() if state.model == name]
    assert len(own) == 1
    assert states["finance"] is states["medical"] is states["base"]
    assert own[0].footprint_bytes == 44
    assert (own[0].in_flight, own[0].waiting, own[0].waiting_work_s) == (2, 1, 1.0)


def test_the_measured_size_replaces_the_hints_of_all() -> None:
    s = Story()
    s.want("finance")
    s.loaded(size=51)
    assert s.machine.used_bytes == 51
    assert s.state("medical").footprint_bytes == 51


def test_a_family_too_large_for_the_budget_is_refused_by_its_whole_size() -> None:
    s = Story(base(size=90), adapter("finance", size=20))
    refusal = s.refusal(s.want("finance"))
    assert "base is expected to take" in str(refusal)


def test_eviction_takes_the_base_with_its_specialists_and_only_when_none_is_used() -> None:
    s = Story(*FAMILY, base("other", 80))
    lease = s.want("finance")
    s.loaded()
    s.want("other")
    assert ev.StartUnload("base") not in s.said
    s.at_s = 20.0
    s.release(lease)
    assert s.said[-1] == ev.StartUnload("base")
    assert s.state("medical").residency == "unloading"


# --- orders ---------------------------------------------------------------------------------------


def test_what_the_operator_asks_of_a_specialist_is_asked_of_its_base() -> None:
    s = Story()
    order = s.order(ev.AdminLoad, "finance")
    assert s.said == [ev.StartLoad("base", 1)]
    s.loaded()
    assert s.said[-1] == ev.Done(order)
    s.feed(ev.Pin(s.at_s, "medical"))
    assert s.state("base").pinned
    assert s.state("finance").pinned
    s.feed(ev.Unpin(s.at_s, "finance"))
    assert not s.state("base").pinned


def test_a_specialist_cannot_be_unloaded_alone() -> None:
    s = up()
    refusal = s.refusal(s.order(ev.AdminUnload, "finance"))
    assert isinstance(refusal, BadInput)
    assert "unload base" in str(refusal)
    assert s.state("base").residency == "ready"


def test_a_plan_that_names_specialists_is_meant_for_their_base() -> None:
    s = Story(*FAMILY, base("other", 80), eviction="calm")
    plan = PlacementPlan(
        revision=s.machine.revision, preload=("finance", "medical"), value={"finance": 1.0, "medical": 2.0}
    )
    assert s.feed(ev.Prefer(s.at_s, plan)) == [ev.StartLoad("base", 1)]


# --- misfits --------------------------------------------------------------------------------------


def test_a_specialist_of_another_shape_fails_alone() -> None:
    s = Story()
    finance, medical = s.want("finance"), s.want("medical")
    s.loaded(finance="its tensors are of another shape")
    assert s.granted(medical)
    assert isinstance(s.refusal(finance), LoadFailed)
    assert "finance cannot run on base: its tensors are of another shape" in str(s.refusal(finance))
    assert s.state("finance").residency == "failed"
    assert s.state("finance").reason == "its tensors are of another shape"
    assert s.state("finance").footprint_bytes == 0
    assert s.state("base").residency == "ready"


def test_a_misfit_is_refused_at_once_and_the_operator_is_told_why() -> None:
    s = up_with_misfit()
    assert "another shape" in str(s.refusal(s.want("finance")))
    assert "another shape" in str(s.refusal(s.order(ev.AdminLoad, "finance")))
    assert s.granted(s.want("medical"))


def test_a_misfit_is_not_loaded_for_again_while_nothing_changed() -> None:
    s = up_with_misfit()
    s.order(ev.AdminUnload, "base")
    s.unloaded()
    assert isinstance(s.refusal(s.want("finance")), LoadFailed)
    assert s.state("base").residency == "cold"
    order = s.order(ev.AdminLoad, "finance")  # the operator insists: the engine is asked again
    assert s.said[-1] == ev.StartLoad("base", 1)
    s.loaded(finance="still of another shape")
    assert "still of another shape" in str(s.refusal(order))


@pytest.mark.parametrize(
    "cards",
    [
        (base(), adapter("finance", digest="b"), adapter("medical")),
        (base(context=4096), adapter("finance"), adapter("medical")),
    ],
)
def test_a_misfit_is_tried_again_when_its_card_or_its_bases_changes(cards: tuple[ModelCard, ...]) -> None:
    s = up_with_misfit()
    s.fleet(*cards)
    s.unloaded()
    waiting = s.want("finance")
    s.loaded()
    assert s.granted(waiting)
    assert s.state("finance").residency == "ready"


def up_with_misfit() -> Story:
    s = Story()
    ticket = s.want("base")
    s.loaded(finance="another shape")
    s.release(ticket)
    return s


# --- changes of the fleet -------------------------------------------------------------------------


def test_a_new_specialist_restarts_its_base_after_the_last_lease() -> None:
    s = Story(base(), adapter("finance"))
    lease = s.want("finance")
    s.loaded()
    assert s.fleet(*FAMILY) == []
    waiting = s.want("medical")
    assert s.release(lease) == [ev.StartUnload("base")]
    assert s.unloaded() == [ev.StartLoad("base", 1)]
    s.loaded()
    assert s.granted(waiting)


@pytest.mark.parametrize(
    "cards",
    [
        (base(), adapter("finance", digest="b"), adapter("medical")),
        (base(), adapter("medical")),
        (base(), adapter("finance"), msgspec.structs.replace(adapter("medical"), name="health")),
    ],
)
def test_a_changed_or_removed_specialist_restarts_an_idle_base_at_once(cards: tuple[ModelCard, ...]) -> None:
    s = up()
    assert s.fleet(*cards) == [ev.StartUnload("base")]
    s.unloaded()
    assert s.machine.used_bytes == 0
    assert set(s.machine.models()) == {card.name for card in cards}


def test_a_misfit_that_is_removed_restarts_nothing_and_is_tried_anew_when_it_comes_back() -> None:
    s = up_with_misfit()
    assert s.fleet(base(), adapter("medical")) == []
    assert set(s.machine.models()) == {"base", "medical"}
    assert s.fleet(*FAMILY) == [ev.StartUnload("base")]


def test_words_and_priors_of_a_specialist_restart_nothing() -> None:
    s = up()
    reworded = msgspec.structs.replace(
        adapter("finance"), description="about money", domains=("finance",), memory_hint_bytes=3
    )
    assert s.fleet(base(), reworded, adapter("medical")) == []
    assert s.state("finance").residency == "ready"


def test_who_waits_for_a_specialist_that_is_removed_is_told() -> None:
    s = Story()
    gone, stays = s.want("finance"), s.want("medical")
    s.fleet(base(), adapter("medical"))
    assert isinstance(s.refusal(gone), UnknownModel)
    assert s.refusal(stays) is None


def test_who_waits_for_a_specialist_that_moves_to_another_base_is_sent_on() -> None:
    s = Story(base(), base("other"), adapter("finance"))
    waiting = s.want("finance")
    s.fleet(base(), base("other"), adapter("finance", of="other"))
    assert isinstance(s.refusal(waiting), Unavailable)
    again = s.want("finance")
    s.loaded("other")
    assert s.granted(again)


def test_a_model_may_become_a_specialist_and_a_model_again() -> None:
    s = Story(base(), base("finance"))
    ticket = s.want("finance")
    s.loaded("finance")
    s.release(ticket)
    assert s.fleet(base(), adapter("finance")) == [ev.StartUnload("finance")]
    assert s.state("finance").model == "base"
    s.unloaded("finance")
    assert s.machine.used_bytes == 0
    s.fleet(base(), base("finance"))
    assert s.state("finance").model == "finance"
    s.want("finance")
    assert s.said[-1] == ev.StartLoad("finance", 1)


def test_a_specialist_without_its_base_is_unknown_and_joins_when_the_base_appears() -> None:
    s = Story(adapter("finance"))
    assert isinstance(s.refusal(s.want("finance")), UnknownModel)
    assert s.machine.models() == {}
    s.fleet(*FAMILY)
    s.want("finance")
    assert s.said[-1] == ev.StartLoad("base", 1)


def test_a_death_ends_the_leases_of_all_specialists_and_is_forgiven_once() -> None:
    s = up()
    s.want("finance"), s.want("finance")
    s.feed(ev.Died(s.at_s, "base", "killed"))
    assert s.machine.in_flight == 0
    waiting = s.want("finance")
    assert s.unloaded() == [ev.StartLoad("base", 1)]
    s.loaded()
    assert s.granted(waiting)


def test_specialists_of_a_remote_base_share_its_cap_and_its_misfits() -> None:
    far = EngineSpec(kind="openai", url="http://far.test", slots=1)
    cards = [msgspec.structs.replace(card, engine=far) for card in FAMILY]
    s = Story(*cards)
    first = s.want("finance")
    assert s.granted(first)
    waiting = s.want("medical")
    s.loaded("base", medical="unknown there")
    assert isinstance(s.refusal(waiting), LoadFailed)
    assert s.state("medical").residency == "failed"
    assert s.state("finance").residency == "remote"
