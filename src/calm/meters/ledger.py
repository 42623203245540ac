"""The sole owner of who pays for which joule: splits each engine's energy over its overlapping requests.

A meter knows groups of processes, a user asks about a request. Between two reads of the meter, an engine's
joules are shared equally by the requests in flight on it; joules of an engine without requests are kept
apart as idle. So over any history

    sum of what requests were given + idle == what the meter counted since it first saw the engine

Reads are at most one per `coalesce_s`, except where a request would otherwise end without any: at high rates
a begin or an end counts from the nearest earlier read, which moves at most `coalesce_s` of the engine's power
from one request to another (5 ms at 50 W: 0.25 J). Nothing is lost by it.

Not thread-safe: it belongs to the event loop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from calm.ports import Clock, Meter
from calm.records import Reading, Record

log = logging.getLogger(__name__)


class EngineEnergy(Record, frozen=True, kw_only=True):
    """Joules of one engine since the ledger first saw it."""

    attributed_j: float
    idle_j: float
    in_flight: int


class Account:
    """One engine: its last meter value, its requests in flight and its sums."""

    __slots__ = ("attributed_j", "idle_j", "in_flight", "last_j", "pids", "reads")

    def __init__(self, pids: tuple[int, ...]) -> None:
        self.pids = pids
        self.in_flight: dict[str, Share] = {}
        self.last_j: float | None = None
        self.attributed_j = 0.0
        self.idle_j = 0.0
        self.reads = 0

    def settle(self, now_j: float | None) -> None:
        """Shares out what the meter counted since the last call. A value that fell starts a new baseline."""
        if now_j is None or not math.isfinite(now_j):
            return
        delta_j = 0.0 if self.last_j is None else max(0.0, now_j - self.last_j)
        self.last_j = now_j
        self.reads += 1
        if not self.in_flight:
            self.idle_j += delta_j
            return
        self.attributed_j += delta_j
        part_j = delta_j / len(self.in_flight)
        for share in self.in_flight.values():
            share.joules += part_j


class Share:
    """What one request has been given so far, over all engines that worked on it."""

    __slots__ = ("engine", "joules", "reads_at_begin")

    def __init__(self, engine: str, reads_at_begin: int, joules: float) -> None:
        self.engine = engine
        self.reads_at_begin = reads_at_begin
        self.joules = joules


class EnergyLedger:
    """begin and end for each request, step for each tick."""

    def __init__(self, meter: Meter, clock: Clock, *, coalesce_s: float = 0.005) -> None:
        self._meter = meter
        self._clock = clock
        self._coalesce_s = coalesce_s
        self._accounts: dict[str, Account] = {}
        self._requests: dict[str, Share] = {}
        self._groups: dict[str, tuple[int, ...]] = {}
        self._read_at_s = -math.inf
        self._meter_failed = False

    @property
    def meter(self) -> Meter:
        return self._meter

    def begin(self, request_id: str, engine: str, pids: Sequence[int]) -> None:
        """The request starts work on an engine with these processes; none (a remote engine) is not metered.

        A request that begins again on another engine (failover) keeps what it was given.
        """
        earlier = self._leave(request_id) if request_id in self._requests else None
        if not pids:
            return
        account = self._account(engine, tuple(pids))
        self._settle(force=account.last_j is None)
        share = Share(engine, account.reads, earlier.joules if earlier else 0.0)
        self._requests[request_id] = account.in_flight[request_id] = share

    def end(self, request_id: str) -> Reading | None:
        """The request's joules; None when nothing metered it, or less than the meter can resolve."""
        if request_id not in self._requests:
            return None
        joules = self._leave(request_id).joules
        if joules <= 0.0:
            return None
        return Reading(joules=joules, meter=self._meter.name, kind=self._meter.kind)

    def step(self, engines: Mapping[str, Sequence[int]] | None = None) -> None:
        """The tick. `engines`, the running ones with their processes, makes idle engines count from their

        load on and drops those that stopped from the reads.
        """
        self._settle(force=True)
        if engines is None:
            return
        for name, pids in engines.items():
            if pids:
                self._account(name, tuple(pids))
        stopped = [n for n in self._groups if n not in engines and not self._accounts[n].in_flight]
        for name in stopped:
            del self._groups[name]

    def totals(self) -> dict[str, EngineEnergy]:
        """By engine, for the metrics."""
        return {name: totals_of(account) for name, account in self._accounts.items()}

    def _account(self, engine: str, pids: tuple[int, ...]) -> Account:
        account = self._accounts.get(engine)
        if account is None:
            account = self._accounts[engine] = Account(pids)
        if self._groups.get(engine) != pids:
            if account.in_flight or account.pids != pids:
                self._settle(force=True)  # the last of the old processes' joules
            account.pids = self._groups[engine] = pids
            self._read_at_s = -math.inf  # what starting cost is read before anyone can be charged for it
        return account

    def _leave(self, request_id: str) -> Share:
        """Settles while the request still counts, then takes it off its engine."""
        share = self._requests[request_id]
        account = self._accounts[share.engine]
        self._settle(force=account.reads == share.reads_at_begin)
        del self._requests[request_id], account.in_flight[request_id]
        return share

    def _settle(self, *, force: bool) -> None:
        now_s = self._clock.now()
        if not self._groups or (not force and now_s - self._read_at_s < self._coalesce_s):
            return
        self._read_at_s = now_s
        values = self._read_meter()
        for name in self._groups:
            self._accounts[name].settle(values.get(name))

    def _read_meter(self) -> Mapping[str, float]:
        """A meter that fails costs figures, never requests."""
        try:
            values = self._meter.read(self._groups)
        except Exception as error:
            if not self._meter_failed:
                log.error(
                    "energy meter %s failed, energy is unknown until it recovers: %r", self._meter.name, error
                )
            self._meter_failed = True
            return {}
        self._meter_failed = False
        return values


def totals_of(account: Account) -> EngineEnergy:
    return EngineEnergy(
        attributed_j=account.attributed_j, idle_j=account.idle_j, in_flight=len(account.in_flight)
    )
