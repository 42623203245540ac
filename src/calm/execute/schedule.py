"""One round over the queue: who is granted, what is loaded, and what has to leave for it.

A round runs whenever something was freed, aged or changed. In the order of the queue, each model's first
waiter is attended to:

    1. its deadline passed                       -> refuse it
    2. its engine is up                          -> grant, if the model's cap and the core tokens allow, and
                                                   the engine is not busy with another adapter of its own;
       no tokens, and waiting since bypass_s     -> reserve tokens: the fewest active models yield, that is
                                                   take nobody who stands behind this waiter
    3. its model is cold and fits                -> start the load
       fits once what is leaving is gone         -> claim that memory, wait
       fits without some idle models             -> evict them, claim their memory
       waiting since bypass_s                    -> no load behind it starts; busy models that had their
                                                   minimum residence and their turn drain, that is take nobody
                                                   who stands behind this waiter, and are evicted when idle
    4. loading or unloading                      -> wait

Drains and yields are found anew in every round (those already draining are taken first), so one whose reason
went away (a cancel, another model became idle) heals by itself: no state can keep a model closed for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from heapq import heappop, heappush

import msgspec

from calm.errors import DeadlineExceeded
from calm.execute.entry import Entry
from calm.execute.eviction import choose_victims
from calm.execute.state import State
from calm.execute.waiting import Key, Waiter

BEFORE_ALL: Key = (float("-inf"), 0)


class Round(msgspec.Struct):
    """What earlier waiters of this round laid hands on."""

    at_s: float
    was_draining: Mapping[str, Key]
    was_yielding: Mapping[str, Key]
    claimed_bytes: int = 0
    claimed_places: int = 0
    barred: bool = False
    """A waiter past bypass_s waits for memory: nobody behind it may load."""
    reserved_cores: int = 0


class Gap(msgspec.Struct, frozen=True):
    """What is missing for a load; nothing missing is <= 0."""

    bytes: int
    places: int

    @property
    def closed(self) -> bool:
        return self.bytes <= 0 and self.places <= 0


def run_round(state: State, at_s: float, *, evict_for_wishes: bool = False) -> None:
    """Attend to every model's first waiter, in order; then to the planner's wishes."""
    this = Round(at_s=at_s, was_draining=state.drains, was_yielding=state.yields)
    state.drains, state.yields = {}, {}
    _shed_excess(state, this)
    _serve_queue(state, this)
    _grant_wishes(state, this, evict_for_wishes)
    for name in this.was_draining.keys() - state.drains.keys():
        _heal(state, name, at_s)


def _heal(state: State, name: str, at_s: float) -> None:
    entry = state.entries.get(name)
    if entry is not None and entry.residency == "draining" and not entry.leaving:
        state.move(entry, "ready", at_s, "no longer has to make room")


def _serve_queue(state: State, this: Round) -> None:
    heap = state.queue.heads()
    while heap:
        _, model = heappop(heap)
        waiter = state.queue.head(model)
        if waiter is None or not _attend(state, this, waiter):
            continue
        following = state.queue.head(model)
        if following is not None:
            heappush(heap, (following.key, model))


def _attend(state: State, this: Round, waiter: Waiter) -> bool:
    """True when the waiter left the queue."""
    entry = state.entries[waiter.model]
    if waiter.hopeless(this.at_s):
        state.refuse(waiter.ticket, too_late(waiter, this.at_s))
        state.abandon(entry, this.at_s)
        return True
    if entry.serving:
        return _admit(state, this, entry, waiter)
    if entry.residency == "cold" and not this.barred:
        _make_way(state, this, entry, waiter)
    return False


def too_late(waiter: Waiter, at_s: float) -> DeadlineExceeded:
    if waiter.expired(at_s):
        return deadline_passed(waiter.wanted, at_s - waiter.arrived_s)
    left_s = (waiter.deadline_at_s or at_s) - at_s
    return DeadlineExceeded(
        f"{waiter.wanted}: after {at_s - waiter.arrived_s:.1f} s in the queue {left_s:.1f} s are left of the "
        f"deadline, and the answer takes about {waiter.expected_s:.1f} s"
    )


def deadline_passed(model: str, waited_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"{model}: the deadline passed after {waited_s:.1f} s in the queue")


def _aged(state: State, this: Round, waiter: Waiter) -> bool:
    return this.at_s >= waiter.arrived_s + state.limits.bypass_s


# --- engines that are up: the cap and the core tokens ---------------------------------------------


def _admit(state: State, this: Round, entry: Entry, waiter: Waiter) -> bool:
    if not waiter.sends:
        state.finish(waiter.ticket)
        return True
    full = len(entry.leases) >= entry.cap or entry.closed_to(waiter.wanted)
    if full or _held_back(state, entry, waiter):
        return False
    cores = state.cores_for(entry)
    if cores and cores > state.limits.cores - state.cores_in_use - this.reserved_cores:
        if _aged(state, this, waiter):
            _reserve_cores(state, this, cores, waiter.key)
        return False
    state.unqueue(waiter.ticket)
    state.grant(entry, waiter.ticket, waiter.wanted, this.at_s)
    return True


def _held_back(state: State, entry: Entry, waiter: Waiter) -> bool:
    drain, yielding = state.drains.get(entry.name), state.yields.get(entry.name)
    return (drain is not None and waiter.key > drain) or (yielding is not None and waiter.key > yielding)


def _reserve_cores(state: State, this: Round, cores: int, key: Key) -> None:
    this.reserved_cores += cores
    free = state.limits.cores - state.cores_in_use
    short = this.reserved_cores - free - sum(state.entries[name].threads for name in state.yields)
    active = [e for e in state.resident.values() if e.leases and e.name not in state.yields]
    active.sort(key=lambda e: (e.name not in this.was_yielding, len(e.leases), e.name))
    for entry in active:
        if short <= 0:
            return
        state.yields[entry.name] = key
        short -= entry.threads


# --- memory ---------------------------------------------------------------------------------------


def _coming(state: State) -> list[Entry]:
    """Models whose memory will come free by itself."""
    return [
        e
        for e in state.resident.values()
        if e.residency == "unloading" or e.leaving or e.name in state.drains
    ]


def _gap(state: State, this: Round, need_bytes: int) -> Gap:
    """What a load lacks even when all that is leaving has left and earlier waiters got theirs."""
    coming = _coming(state)
    room = state.free_bytes + sum(e.charge for e in coming) - this.claimed_bytes
    most = state.eviction.max_resident
    if most is None:
        return Gap(need_bytes - room, 0)
    return Gap(need_bytes - room, 1 + this.claimed_places + len(state.resident) - len(coming) - most)


def _fits_now(state: State, need_bytes: int) -> bool:
    most = state.eviction.max_resident
    return need_bytes <= state.free_bytes and (most is None or len(state.resident) < most)


def _make_way(state: State, this: Round, entry: Entry, waiter: Waiter) -> None:
    gap = _gap(state, this, entry.size_bytes)
    if gap.closed and _fits_now(state, entry.size_bytes):
        state.start_load(entry, this.at_s, f"wanted by {waiter.request_id or 'the operator'}")
        entry.asked = any(not other.sends for other in state.queue.of(entry.name))
        return
    victims: tuple[str, ...] | None = ()
    if not gap.closed:
        victims = _find_victims(state, this, waiter, gap)
    if victims is None:
        this.barred = _aged(state, this, waiter)
        return
    _evict(state, this, victims, waiter.key, f"makes room for {entry.name}")
    this.claimed_bytes += entry.size_bytes
    this.claimed_places += 1


def _find_victims(state: State, this: Round, waiter: Waiter, gap: Gap) -> tuple[str, ...] | None:
    """The gentlest set that is enough: idle and rested; once aged any idle; then also busy ones."""
    movable = _movable(state)
    unwaited = [e for e in movable if e.idle and not state.queue.count(e.name)]
    rested = [e for e in unwaited if e.residency == "loading" or this.at_s >= e.stays_until_s(state.limits)]
    found = _choose(state, this, rested, gap)
    if found is not None or not _aged(state, this, waiter):
        return found
    found = _choose(state, this, unwaited, gap)
    if found is not None:
        return found
    used = [e for e in movable if e not in unwaited and this.at_s >= _turn_ends_s(state, this, e, waiter)]
    return _choose(state, this, [*unwaited, *(e for e in used if _behind(state, e, waiter))], gap)


def _turn_ends_s(state: State, this: Round, entry: Entry, waiter: Waiter) -> float:
    """When a busy model has to make room: after its minimum residence, and after its turn if it is waited for.

    A turn's end needs no alarm: a model that has a turn serves, and each release starts a round.
    """
    turn_s = (
        state.eviction.turn_share * (this.at_s - waiter.arrived_s) if state.queue.count(entry.name) else 0.0
    )
    return max(entry.stays_until_s(state.limits), entry.ready_at_s + turn_s)


def _movable(state: State) -> list[Entry]:
    """Models that are not pinned and not on their way out: up, or loading with nobody waiting."""
    return [
        e
        for e in state.resident.values()
        if not (e.pinned or e.leaving or e.name in state.drains)
        and (e.up or (e.residency == "loading" and not e.asked and not state.queue.count(e.name)))
    ]


def _behind(state: State, entry: Entry, waiter: Waiter) -> bool:
    """True when nobody who stands before the waiter wants this model (a full one serves them first)."""
    head = state.queue.head(entry.name)
    return head is None or head.key > waiter.key


def _choose(state: State, this: Round, among: Iterable[Entry], gap: Gap) -> tuple[str, ...] | None:
    return choose_victims(
        state.eviction,
        [e.standing(state.value(e.name)) for e in among],
        this.at_s,
        short_bytes=gap.bytes,
        short_count=gap.places,
        first=frozenset(this.was_draining),
    )


def _evict(state: State, this: Round, victims: Iterable[str], key: Key, detail: str) -> None:
    for name in victims:
        entry = state.entries[name]
        if entry.residency == "loading":
            state.cancel_load(entry, this.at_s, detail)
        elif entry.idle:
            state.start_unload(entry, this.at_s, detail)
        else:
            state.drains[name] = key
            state.drain(entry, this.at_s, detail)


def _shed_excess(state: State, this: Round) -> None:
    """A load turned out larger than believed, or the budget or the cap shrank: evict the difference."""
    gap = _excess(state)
    if gap.closed:
        return
    movable = _movable(state)
    unwaited = [e for e in movable if not state.queue.count(e.name)]
    idle = [e for e in unwaited if e.idle]
    for among in (idle, unwaited, movable):
        victims = _choose(state, this, among, gap)
        if victims is not None:
            break
    else:
        victims = tuple(e.name for e in movable)
    _evict(state, this, victims, BEFORE_ALL, "memory is over its budget")


def _excess(state: State) -> Gap:
    if not over_limit(state):
        return Gap(0, 0)
    coming, most = _coming(state), state.eviction.max_resident
    places = 0 if most is None else len(state.resident) - len(coming) - most
    return Gap(-state.free_bytes - sum(e.charge for e in coming), places)


def over_limit(state: State) -> bool:
    """More in memory than the budget or the policy's cap allows."""
    most = state.eviction.max_resident
    return state.free_bytes < 0 or (most is not None and len(state.resident) > most)


# --- what nobody waits for but the planner or a pin wants -----------------------------------------


def _grant_wishes(state: State, this: Round, evict: bool) -> None:
    if this.barred or this.claimed_places or not state.wishes:
        return
    for name in tuple(state.wishes):
        entry = state.entries.get(name)
        if entry is None or entry.residency != "cold" or entry.resting(this.at_s):
            continue
        if state.never_fits(entry) is None:
            _grant_wish(state, this, entry, evict)


def _grant_wish(state: State, this: Round, entry: Entry, evict: bool) -> None:
    gap = _gap(state, this, entry.size_bytes)
    if gap.closed and _fits_now(state, entry.size_bytes):
        state.start_load(entry, this.at_s, "pinned" if entry.pinned else "expected to be wanted")
        entry.preloading = not entry.pinned
        state.wishes.remove(entry.name)
        return
    if not gap.closed:
        victims = _choose(state, this, _worth_less(state, this, entry), gap) if evict else None
        if victims is None:
            return
        _evict(state, this, victims, BEFORE_ALL, f"makes room for {entry.name}, expected to be wanted")
    this.claimed_bytes += entry.size_bytes
    this.claimed_places += 1


def _worth_less(state: State, this: Round, entry: Entry) -> list[Entry]:
    """Idle, rested models that the plan does not want to keep and values below this one."""
    worth = float("inf") if entry.pinned else state.value(entry.name) or 0.0
    return [
        e
        for e in _movable(state)
        if e.up
        and e.idle
        and not state.queue.count(e.name)
        and not state.preferred(e.name)
        and (state.value(e.name) or 0.0) < worth
        and this.at_s >= e.stays_until_s(state.limits)
    ]
