"""What users of other servers complain about, as stories the residency machine has to get right."""

from __future__ import annotations

import pytest

from calm.errors import BadInput, LoadFailed, NeverFits, QueueFull, Unavailable, UnknownModel
from calm.execute import events as ev
from calm.execute.eviction import parse_eviction
from calm.execute.residency import Machine
from calm.execute.sizing import size_fleet
from calm.records import EngineSpec, ModelCard, PlacementPlan


def card(name: str, size: int = 40, slots: int = 2, threads: int = 1, **more: object) -> ModelCard:
    return ModelCard(
        name=name,
        description=name,
        memory_hint_bytes=size,
        engine=EngineSpec(slots=slots, threads=threads),
        **more,
    )


class Story:
    """A machine with a clock one can set, and loads and stops that end when the story says."""

    def __init__(
        self, *cards: ModelCard, eviction: str = "lru", queue: str = "fifo", **limits: object
    ) -> None:
        given = {"cores": 2, "budget_bytes": 100} | limits
        self.machine = Machine(ev.Limits(**given), parse_eviction(eviction), queue)
        self.at_s = 0.0
        self.tickets = 0
        self.said: list[ev.Command] = []
        self.fleet(*cards)

    def fleet(self, *cards: ModelCard) -> None:
        self.feed(ev.FleetChanged(self.at_s, size_fleet({c.name: c for c in cards}, 2)))

    def feed(self, event: ev.Event) -> list[ev.Command]:
        commands = [c for c in self.machine.step(event) if not isinstance(c, ev.Moved)]
        self.said += commands
        return commands

    def want(self, model: str, expected_s: float = 1.0, deadline_at_s: float | None = None) -> int:
        self.tickets += 1
        self.feed(ev.Want(self.at_s, self.tickets, f"req-{self.tickets}", model, expected_s, deadline_at_s))
        return self.tickets

    def cancel(self, ticket: int) -> list[ev.Command]:
        return self.feed(ev.Cancel(self.at_s, ticket))

    def release(self, ticket: int) -> list[ev.Command]:
        return self.feed(ev.Release(self.at_s, ticket))

    def loaded(self, model: str, size: int | None = None, load_s: float = 1.0) -> list[ev.Command]:
        return self.feed(ev.Loaded(self.at_s, model, size, load_s))

    def unloaded(self, model: str) -> list[ev.Command]:
        return self.feed(ev.Unloaded(self.at_s, model))

    def resident(self, *models: str) -> None:
        for model in models:
            ticket = self.want(model)
            self.loaded(model)
            self.release(ticket)

    def later(self, seconds: float) -> list[ev.Command]:
        self.at_s += seconds
        return self.feed(ev.Tick(self.at_s))

    def granted(self, ticket: int) -> bool:
        return ev.Grant(ticket) in self.said

    def refusal(self, ticket: int) -> Exception | None:
        return next((c.error for c in self.said if isinstance(c, ev.Refuse) and c.ticket == ticket), None)

    def residency(self, model: str) -> str:
        return self.machine.models()[model].residency


# --- eviction -------------------------------------------------------------------------------------


def test_a_generating_model_is_never_evicted() -> None:
    s = Story(card("a", 60), card("b", 60))
    lease = s.want("a")
    s.loaded("a")
    waiting = s.want("b")
    assert s.later(1.9) == []
    s.later(100.0)
    assert s.residency("a") == "draining"
    assert s.release(lease) == [ev.StartUnload("a")]
    assert s.unloaded("a") == [ev.StartLoad("b", 1)]
    s.loaded("b")
    assert s.granted(waiting)


def test_nothing_is_evicted_while_memory_is_free() -> None:
    s = Story(card("a"), card("b", 60))
    s.resident("a")
    s.later(1000.0)
    s.want("b")
    assert s.residency("a") == "ready"
    assert s.residency("b") == "loading"


def test_victims_are_chosen_by_size_not_only_by_age() -> None:
    s = Story(card("old", 10), card("big", 60), card("new", 60))
    s.resident("old")
    s.at_s = 10.0
    s.resident("big")
    s.at_s = 50.0
    s.want("new")
    assert s.said[-1] == ev.StartUnload("big")
    assert s.residency("old") == "ready"


def test_a_leaving_model_counts_until_its_memory_is_back() -> None:
    s = Story(card("a", 60), card("b", 60))
    s.resident("a")
    s.later(30.0)
    s.want("b")
    assert s.machine.used_bytes == 60
    assert s.residency("b") == "cold"
    s.unloaded("a")
    assert s.residency("b") == "loading"


def test_a_pin_holds_against_everything_but_force() -> None:
    s = Story(card("a", 60), card("b", 60))
    s.resident("a")
    s.feed(ev.Pin(s.at_s, "a"))
    s.later(1000.0)
    refused = s.want("b")
    assert isinstance(s.refusal(refused), NeverFits)
    assert "unpin" in str(s.refusal(refused))
    s.feed(ev.AdminUnload(s.at_s, 900, "a"))
    assert isinstance(s.refusal(900), BadInput)
    assert s.residency("a") == "ready"
    s.feed(ev.AdminUnload(s.at_s, 901, "a", force=True))
    assert s.unloaded("a") == [ev.Done(901)]


def test_a_pinned_model_is_loaded_as_soon_as_there_is_room() -> None:
    s = Story(card("a", 60), card("b", 60))
    lease = s.want("a")
    s.loaded("a")
    s.feed(ev.Pin(s.at_s, "b"))
    assert s.residency("b") == "cold"
    s.release(lease)
    s.feed(ev.AdminUnload(s.at_s, 900, "a"))
    s.unloaded("a")
    assert s.residency("b") == "loading"


def test_evict_and_revive_do_not_lock_each_other() -> None:
    s = Story(card("a", 60), card("b", 60))
    s.resident("a")
    s.later(30.0)
    b = s.want("b")
    a = s.want("a")
    assert s.residency("a") == "unloading"
    s.unloaded("a")
    s.loaded("b")
    assert s.granted(b)
    s.release(b)
    s.later(5.0)
    s.unloaded("b")
    s.loaded("a")
    assert s.granted(a)


def test_alternating_asks_share_a_load_instead_of_thrashing() -> None:
    s = Story(card("a", 60, slots=8), card("b", 60, slots=8))
    s.resident("a")
    b = s.want("b")
    assert s.residency("a") == "ready", "it was loaded just now and b did not wait yet"
    busy = [s.want("a") for _ in range(3)]
    assert all(s.granted(t) for t in busy), "asks for the resident model go together"
    s.later(2.0)
    assert not s.granted(s.want("a")), "bypass_s is over: nobody behind b may keep a busy"
    for ticket in busy:
        s.release(ticket)
    s.unloaded("a")
    s.loaded("b")
    assert s.granted(b)


def test_a_drain_ends_when_the_one_it_was_for_goes_away() -> None:
    s = Story(card("a", 60), card("b", 60))
    s.want("a")
    s.loaded("a")
    b = s.want("b")
    s.later(5.0)
    a = s.want("a")
    assert s.residency("a") == "draining"
    assert not s.granted(a)
    s.cancel(b)
    assert s.residency("a") == "ready"
    assert s.granted(a)


def test_a_count_cap_evicts_though_bytes_would_fit() -> None:
    s = Story(card("a", 10), card("b", 10), eviction="lru:1")
    s.resident("a")
    s.later(10.0)
    s.want("b")
    assert s.residency("a") == "unloading"


# --- sizes ----------------------------------------------------------------------------------------


def test_what_can_never_fit_is_refused_at_once_and_evicts_nobody() -> None:
    s = Story(card("a", 40), card("giant", 101))
    s.resident("a")
    s.later(100.0)
    assert isinstance(s.refusal(s.want("giant")), NeverFits)
    assert s.residency("a") == "ready"


def test_a_load_larger_than_believed_evicts_the_excess_and_is_remembered() -> None:
    s = Story(card("a", 40), card("b", 40))
    s.resident("a")
    b = s.want("b")
    assert s.loaded("b", 70) == [ev.StartUnload("a"), ev.Grant(b)]
    s.unloaded("a")
    s.release(b)
    s.feed(ev.AdminUnload(s.at_s, 900, "b"))
    s.unloaded("b")
    assert s.machine.models()["b"].footprint_bytes == 70
    s.feed(ev.SetBudget(s.at_s, 60))
    assert isinstance(s.refusal(s.want("b")), NeverFits)


def test_a_load_larger_than_the_budget_is_undone_once_not_for_ever() -> None:
    s = Story(card("a", 40))
    a = s.want("a")
    assert s.loaded("a", 170)[-1] == ev.StartUnload("a")
    assert isinstance(s.refusal(a), NeverFits)
    assert s.unloaded("a") == []
    assert isinstance(s.refusal(s.want("a")), NeverFits)


def test_a_smaller_budget_evicts_idle_models_and_lets_leases_end() -> None:
    s = Story(card("a"), card("b"))
    s.resident("b")
    lease = s.want("a")
    s.loaded("a")
    assert s.feed(ev.SetBudget(s.at_s, 45)) == [ev.StartUnload("b")]
    s.feed(ev.SetBudget(s.at_s, 30))
    assert s.residency("a") == "draining"
    assert s.release(lease) == [ev.StartUnload("a")]


# --- loads ----------------------------------------------------------------------------------------


def test_a_model_is_loaded_once_however_many_ask() -> None:
    s = Story(card("a", slots=8))
    tickets = [s.want("a") for _ in range(5)]
    assert s.said.count(ev.StartLoad("a", 1)) == 1
    s.loaded("a")
    assert all(s.granted(t) for t in tickets)


def test_a_load_nobody_waits_for_is_cancelled_unless_wanted_otherwise() -> None:
    s = Story(card("a"), card("b"))
    first, second = s.want("a"), s.want("a")
    assert s.cancel(first) == []
    assert s.cancel(second) == [ev.CancelLoad("a")]
    s.unloaded("a")
    s.feed(ev.AdminLoad(s.at_s, 900, "b"))
    b = s.want("b")
    assert s.cancel(900) == []
    assert s.cancel(b) == []
    s.loaded("b")
    assert s.residency("b") == "ready"


def test_failed_loads_back_off_ever_longer_and_the_operator_may_override() -> None:
    s = Story(card("a"))
    for wait_s in (1.0, 2.0, 4.0):
        ticket = s.want("a")
        s.feed(ev.LoadFailed(s.at_s, "a", "out of memory"))
        assert isinstance(s.refusal(ticket), LoadFailed)
        assert s.machine.models()["a"].retry_at_s == s.at_s + wait_s
        assert isinstance(s.refusal(s.want("a")), LoadFailed)
        s.later(wait_s)
        assert s.residency("a") == "cold"
    s.want("a")
    s.feed(ev.LoadFailed(s.at_s, "a", "out of memory"))
    assert s.feed(ev.AdminLoad(s.at_s, 900, "a")) == [ev.StartLoad("a", 1)]
    assert s.loaded("a") == [ev.Done(900)]


def test_an_engine_that_dies_once_is_revived_and_one_that_keeps_dying_rests() -> None:
    s = Story(card("a", slots=1))
    lease, waiting = s.want("a"), s.want("a")
    s.loaded("a")
    assert s.feed(ev.Died(s.at_s, "a", "signal 9")) == [ev.StartUnload("a")]
    assert s.release(lease) == []
    assert s.unloaded("a") == [ev.StartLoad("a", 1)]
    s.loaded("a")
    assert s.granted(waiting)
    late = s.want("a")
    s.feed(ev.Died(s.at_s, "a", "signal 9"))
    assert "2 times in a row" in str(s.refusal(late))
    s.unloaded("a")
    assert s.residency("a") == "failed"
    s.later(1.0)
    s.resident("a")
    s.later(60.0)
    assert s.machine.models()["a"].failures == 0


def test_idle_models_leave_when_the_operator_says_so() -> None:
    s = Story(card("a"), card("b"), idle_unload_s=30.0)
    s.resident("a", "b")
    s.feed(ev.Pin(s.at_s, "b"))
    assert s.later(29.0) == []
    assert s.later(1.0) == [ev.StartUnload("a")]


def test_who_waited_too_long_to_finish_in_time_makes_room_for_who_can() -> None:
    s = Story(card("a", slots=1))
    s.resident("a")
    first = s.want("a")
    late = s.want("a", expected_s=4.0, deadline_at_s=s.at_s + 6.0)
    fine = s.want("a", expected_s=4.0, deadline_at_s=s.at_s + 60.0)
    s.later(5.0)
    s.release(first)
    assert "the answer takes about 4.0 s" in str(s.refusal(late))
    assert s.granted(fine)


# --- the planner ----------------------------------------------------------------------------------


def everything(s: Story) -> PlacementPlan:
    """A plan that wants both models resident."""
    return PlacementPlan(revision=s.machine.revision, preload=("a", "b"), value={"a": 2.0, "b": 1.0})


def test_what_the_operator_unloaded_stays_cold_until_someone_asks() -> None:
    s = Story(card("a", 20), card("b", 20))
    s.resident("a", "b")
    s.feed(ev.AdminUnload(s.at_s, 900, "a", False))
    s.unloaded("a")
    assert s.feed(ev.Prefer(s.at_s, everything(s))) == [], "a forecast is no reason"
    s.want("a")
    assert s.said[-1] == ev.StartLoad("a", 1)


def test_an_idle_model_is_not_warmed_again_at_once() -> None:
    s = Story(card("a", 20), card("b", 20), idle_unload_s=30.0)
    s.resident("a", "b")
    s.feed(ev.Pin(s.at_s, "b"))
    s.feed(ev.Prefer(s.at_s, everything(s)))
    assert s.later(30.0) == [ev.StartUnload("a")], "the plan does not keep what the operator limits"
    s.unloaded("a")
    assert s.feed(ev.Prefer(s.at_s, everything(s))) == []


def test_preloads_take_free_memory_and_yield_to_asks() -> None:
    s = Story(card("a", 60), card("b", 60))
    plan = PlacementPlan(revision=s.machine.revision, preload=("a", "b"), value={"a": 2.0, "b": 1.0})
    assert s.feed(ev.Prefer(s.at_s, plan)) == [ev.StartLoad("a", 1)]
    s.want("b")
    assert s.said[-1] == ev.CancelLoad("a"), "nobody waits for a yet"
    assert s.unloaded("a") == [ev.StartLoad("b", 1)]


def test_a_preload_evicts_only_what_is_idle_rested_and_worth_less() -> None:
    s = Story(card("a", 60), card("b", 60))
    s.resident("a")

    def propose(value_b: float) -> list[ev.Command]:
        values = {"a": 1.0, "b": value_b}
        return s.feed(
            ev.Prefer(s.at_s, PlacementPlan(revision=s.machine.revision, preload=("b",), value=values))
        )

    assert propose(9.0) == [], "a is within its minimum residence"
    s.later(10.0)
    assert propose(0.5) == []
    assert propose(9.0) == [ev.StartUnload("a")]
    assert propose(9.0) == []
    assert s.unloaded("a") == [ev.StartLoad("b", 1)]


def test_a_stale_plan_is_ignored() -> None:
    s = Story(card("a"), card("b"))
    old = s.machine.revision
    s.resident("a")
    assert s.feed(ev.Prefer(s.at_s, PlacementPlan(revision=old, preload=("b",), value={}))) == []


# --- queue, cores, caps ---------------------------------------------------------------------------


def test_active_threads_stay_within_the_cores() -> None:
    s = Story(card("a", 20, threads=2), card("b", 20, threads=2), card("c", 20, threads=1))
    s.resident("a", "b", "c")
    a = s.want("a")
    assert s.granted(a)
    assert s.machine.cores_in_use == 2
    b, a2 = s.want("b"), s.want("a")
    assert not s.granted(b)
    assert s.granted(a2), "an engine that runs takes more without more threads"
    s.release(a)
    s.release(a2)
    assert s.granted(b)


def test_nobody_starves_for_cores() -> None:
    s = Story(card("a", 20, threads=2, slots=2), card("b", 20, threads=2))
    s.resident("a", "b")
    held = s.want("a")
    b = s.want("b")
    for _ in range(30):  # one request always overlaps the next
        s.later(0.3)
        following = s.want("a")
        s.release(held)
        if s.granted(b):
            break
        held = following
    assert s.granted(b)
    assert s.at_s <= 3.0


def test_nobody_starves_for_memory() -> None:
    s = Story(card("a", 60, slots=2), card("b", 60))
    held = s.want("a")
    s.loaded("a", load_s=20.0)
    b = s.want("b")
    while s.residency("a") == "ready" and s.at_s < 60.0:  # one request always overlaps the next
        s.later(0.5)
        following = s.want("a")
        assert s.granted(following) == (s.residency("a") == "ready")
        s.release(held)
        held = following
    assert s.at_s == 10.0, "the longest minimum residence, which outlasts bypass_s"
    assert s.residency("a") == "unloading"
    s.unloaded("a")
    s.loaded("b")
    assert s.granted(b)


def busy_and_waited_for(eviction: str) -> tuple[Story, int, int]:
    """`a` serves and has someone waiting behind an ask for `b`, which has waited 20 s for its memory."""
    s = Story(card("a", 60, slots=1), card("b", 60), eviction=eviction, cores=1)
    first = s.want("a")
    s.loaded("a", load_s=0.1)
    s.later(80.0)
    s.want("b")
    behind = s.want("a")
    s.later(20.0)
    return s, first, behind


@pytest.mark.parametrize("rule", ["lru", "fifo"])
def test_a_strict_queue_gives_its_head_the_memory_at_once(rule: str) -> None:
    s, running, behind = busy_and_waited_for(rule)
    s.release(running)
    assert not s.granted(behind)
    assert s.residency("a") == "unloading"


def test_a_busy_model_keeps_its_turn_for_a_share_of_the_wait_and_not_longer() -> None:
    s = Story(card("a", 60, slots=1), card("b", 60), eviction="calm", cores=1)
    running = s.want("a")
    s.loaded("a", load_s=0.1)
    s.want("b")
    waiting = [s.want("a") for _ in range(9)]
    served = 0
    while s.residency("a") in ("ready", "draining") and waiting:
        s.later(1.0)
        s.release(running)
        if s.granted(waiting[0]):
            running = waiting.pop(0)
            served += 1
    assert s.residency("a") == "unloading"
    assert 1 <= served <= 4  # past bypass_s and its turn, a fifth of the wait: long before all nine


@pytest.mark.parametrize("load_s", [0.5, 20.0])
def test_memory_an_aged_ask_waits_for_is_not_taken_from_it(load_s: float) -> None:
    s = Story(card("a", 50), card("b", 80), card("c", 30), card("d", 30))
    lease = s.want("a")
    s.loaded("a", load_s=load_s)
    b = s.want("b")
    c = s.want("c")
    assert s.residency("c") == "loading", "within bypass_s a later ask may use what is free"
    s.loaded("c")
    s.release(c)
    s.later(3.0)
    s.want("d")
    assert s.residency("d") == "cold"
    s.later(10.0)
    s.unloaded("c")
    assert s.residency("d") == "cold"
    s.release(lease)
    s.unloaded("a")
    s.loaded("b")
    assert s.granted(b)


def test_nobody_loads_behind_an_aged_ask_that_cannot_be_helped_yet() -> None:
    s = Story(card("a", 50), card("b", 80), card("c", 10), card("d", 10))
    s.want("a")
    s.loaded("a", load_s=20.0)
    s.want("b")
    s.want("c")
    assert s.residency("c") == "loading"
    s.later(3.0)
    assert s.residency("a") == "ready", "still within its minimum residence"
    s.want("d")
    assert s.residency("d") == "cold"


def test_only_as_many_engines_yield_as_are_needed() -> None:
    s = Story(card("a", 20), card("b", 20), card("c", 20))
    s.resident("a", "b", "c")
    a, b = s.want("a"), s.want("b")
    c = s.want("c")
    s.later(2.0)
    more_a, more_b = s.want("a"), s.want("b")
    assert [s.granted(more_a), s.granted(more_b)].count(True) == 1
    s.release(a)
    s.release(b)
    assert s.granted(c)


def test_stcf_serves_the_shortest_first_but_waiting_counts() -> None:
    s = Story(card("a", slots=1), queue="stcf")
    held = s.want("a")
    s.loaded("a")
    long, short = s.want("a", 10.0), s.want("a", 1.0)
    s.release(held)
    assert s.granted(short)
    s.at_s = 100.0
    late = s.want("a", 1.0)
    s.release(short)
    assert s.granted(long), "90 s of waiting outweigh 9 s of expected time"
    s.release(long)
    assert s.granted(late)


def test_changing_the_discipline_reorders_who_waits() -> None:
    s = Story(card("a", slots=1))
    held = s.want("a")
    s.loaded("a")
    long, short = s.want("a", 10.0), s.want("a", 1.0)
    s.feed(ev.SetPolicy(s.at_s, queue="stcf"))
    s.release(held)
    assert s.granted(short)
    assert not s.granted(long)


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    s = Story(card("a", slots=1), max_queue=3)
    s.want("a")
    s.loaded("a")
    for _ in range(3):
        s.want("a", 4.0)
    error = s.refusal(s.want("a", 4.0))
    assert isinstance(error, QueueFull)
    assert error.retry_after_s == pytest.approx(12.0)
    assert s.machine.models()["a"].waiting_work_s == pytest.approx(12.0)


def test_a_full_queue_does_not_close_a_free_engine() -> None:
    far = ModelCard(name="far", description="", engine=EngineSpec(kind="openai", url="http://far.test"))
    s = Story(card("a", slots=1), far, max_queue=1)
    s.want("a")
    s.loaded("a")
    s.want("a")
    assert isinstance(s.refusal(s.want("a")), QueueFull)
    assert s.granted(s.want("far"))


def test_a_remote_model_costs_nothing_but_has_a_cap() -> None:
    far = ModelCard(
        name="far", description="", engine=EngineSpec(kind="openai", url="http://far.test"), max_in_flight=2
    )
    s = Story(far)
    first, second, third = (s.want("far") for _ in range(3))
    assert [s.granted(t) for t in (first, second, third)] == [True, True, False]
    assert s.machine.used_bytes == s.machine.cores_in_use == 0
    s.release(first)
    assert s.granted(third)


# --- the fleet while it runs ----------------------------------------------------------------------


def test_a_removed_card_refuses_who_waits_and_lets_who_runs_finish() -> None:
    s = Story(card("a", slots=1), card("b"))
    lease, waiting = s.want("a"), s.want("a")
    s.loaded("a")
    s.fleet(card("b"))
    assert isinstance(s.refusal(waiting), UnknownModel)
    assert isinstance(s.refusal(s.want("a")), UnknownModel)
    assert s.release(lease) == [ev.StartUnload("a")]
    s.unloaded("a")
    assert "a" not in s.machine.models()


def test_a_new_description_changes_nothing_and_a_new_engine_reloads_on_demand() -> None:
    s = Story(card("a"))
    lease = s.want("a")
    s.loaded("a", 55)
    s.fleet(
        ModelCard(name="a", description="other", memory_hint_bytes=40, engine=EngineSpec(slots=2, threads=1))
    )
    assert s.residency("a") == "ready"
    s.fleet(card("a", slots=4))
    waiting = s.want("a")
    assert s.residency("a") == "draining"
    s.release(lease)
    assert s.unloaded("a") == [ev.StartLoad("a", 1)]
    assert s.machine.models()["a"].footprint_bytes == 40, "measured under another engine"
    s.loaded("a")
    assert s.granted(waiting)


def test_an_operators_unload_does_not_take_a_load_from_those_who_wait() -> None:
    s = Story(card("a"))
    waiting = s.want("a")
    s.feed(ev.AdminUnload(s.at_s, 900, "a"))
    assert isinstance(s.refusal(900), Unavailable)
    s.feed(ev.AdminUnload(s.at_s, 901, "a", force=True))
    assert isinstance(s.refusal(waiting), Unavailable)
    assert s.unloaded("a") == [ev.Done(901)]
