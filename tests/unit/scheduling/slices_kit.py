"""Tenants on simulated devices, with the scheduler's turns. Simulated time advances by events, not ticks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from fgpu_ebpf import abi
from fgpu_ebpf.scheduling.fair_queue import Share
from fgpu_ebpf.scheduling.reports import Seen
from fgpu_ebpf.scheduling.state import NEVER_NS
from fgpu_ebpf.scheduling.turns import Turns

US, MS, S = 1_000, 1_000_000, 1_000_000_000
REST_NS = 100 * US  # a shorter rest is not reported
BELL_NS = 200 * US  # until the gatekeeper has processed a wake-up
WAKE_NS = 150 * US  # until a thread at a gate has read that the gate is open
BUDGET_NS = 2 * MS
OPEN = int(abi.Gate.OPEN)  # an operator of an enumeration takes longer than the simulated step


@dataclass(eq=False)
class Steps:
    """A fixed amount of work at regular intervals. Missed steps are skipped, not caught up."""

    work_ns: int
    period_ns: int
    next_ns: int = 0
    owed: int = 0

    def wants_ns(self, now_ns: int, kernel_ns: int) -> int:
        """Return the time of the next launch; 0 is now."""
        if not self.owed and now_ns >= self.next_ns:
            self.owed, self.next_ns = max(1, self.work_ns // kernel_ns), max(now_ns, self.next_ns + self.period_ns)
        return 0 if self.owed else self.next_ns


@dataclass(eq=False)
class Loop:
    """A program that launches `kernels`, waits until they are done, computes on the host, and repeats.

    `thinks`: returns the nanoseconds from the end of the work to the next launch, with the wake-up of the thread.
    `guesses`: returns the length of the work that the shim reports, as a multiple of its true length.
    """

    kernels: int
    thinks: Callable[[], int]
    guesses: Callable[[], float] = lambda: 1.0
    owed: int = 0
    next_ns: int = 0
    doubt_ns: int = 0  # error of the estimate of the work in flight; below 0: too short

    def wants_ns(self, now_ns: int, kernel_ns: int) -> int:
        """Return the time of the next launch: 0 means now, NEVER_NS means not before the work in flight is done."""
        if not self.owed and now_ns >= self.next_ns:
            self.owed, self.next_ns = self.kernels, NEVER_NS
            self.doubt_ns = round((self.guesses() - 1.0) * self.kernels * kernel_ns)
        return 0 if self.owed else self.next_ns

    def ended(self, now_ns: int) -> None:
        """Record that nothing is in flight any more."""
        if not self.owed:
            self.next_ns = now_ns + self.thinks()


@dataclass(eq=False)
class Tenant:
    """A program that launches kernels while it has work and its gate is open.

    The amount of its work in flight is bounded.
    """

    key: int
    share: Share = field(default_factory=Share)
    kernel_ns: int = 200 * US
    devices: frozenset[int] = frozenset({0})
    steps: Steps | Loop | None = None  # None: it always has work
    doubt_ns: int = 0  # by how much the estimate of the work in flight is too long
    silent: bool = False  # whether it never reports that it has drained
    unaware: bool = False  # whether it never synchronises, so that it observes the end of its work at its next launch
    lies: bool = False  # whether it reports that its turns begin late and end at once
    restless: bool = False  # whether it reports that it has rested all the time
    stopped: bool = False
    dead: bool = False
    flights: list[int] = field(default_factory=list)  # the ends of the kernels, in ascending order
    launches: int = 0
    done_ns: int = 0
    waiting: bool = False
    waited_from: int | None = None
    wakes_ns: int = 0
    wanted_ns: int = 0
    begun_ns: int = 0
    ended_ns: int = 0
    closed_ns: int = 0
    rested_ns: int = 0  # since the scheduler's last step
    said: tuple[Any, ...] = ()
    longest_wait_ns: int = 0
    waits_ns: list[int] = field(default_factory=list)

    def rests_ns(self, now_ns: int) -> int:
        """Return the time of the next launch; 0 is now."""
        if self.stopped:
            return NEVER_NS
        return self.steps.wants_ns(now_ns, self.kernel_ns) if self.steps else 0

    def tell(self) -> None:
        if not self.stopped:  # otherwise its page does not change
            span = (2**62, self.closed_ns) if self.lies else (self.begun_ns, self.ended_ns)
            doubt_ns = self.steps.doubt_ns if isinstance(self.steps, Loop) else self.doubt_ns
            flights = self.flights
            if self.unaware and not self.waiting:
                flights = flights or [self.ended_ns]
            until_ns = max(flights, default=0) + doubt_ns
            self.said = (self.waiting, self.launches, len(flights), until_ns)
            self.said += (not flights, self.wanted_ns, *span)

    def seen(self) -> Seen:
        self.tell()
        rested, self.rested_ns = 10 * S if self.restless else self.rested_ns, 0
        return Seen(self.devices, *self.said, rested)


@dataclass(eq=False)
class Hog(Tenant):
    """A program that launches nothing, and always reports that work of `claim_ns` is in flight.

    `cunning`: it claims the work only in turns that begin while the scheduler accepts the claim. In other turns it
    reports at once that it has drained.
    """

    claim_ns: int = 990 * MS
    cunning: bool = False
    lies: bool = True

    def act(self, now_ns: int, is_open: bool, believed_ns: int) -> None:
        """Update what the program reports at `now_ns`."""
        if is_open:
            self.launches += 1
            self.lies = not self.cunning or believed_ns >= self.claim_ns
        until_ns = now_ns + self.claim_ns if self.lies else 0
        self.said = (self.waiting, self.launches, int(self.lies), until_ns, not self.lies, now_ns, 0, 0)

    def tell(self) -> None:
        """Do nothing: `act` has recorded what the program reports."""


class World:
    """Devices that run the kernels of all tenants one after another."""

    def __init__(
        self, *tenants: Tenant, outer: dict[int, Share] | None = None, inside: dict[int, list[int]] | None = None,
        slice_ns: int = 0, crowded: float = 1.0, parallel: float = 0.0, concurrent: Collection[int] = (),
    ) -> None:  # fmt: skip
        """Initialize the devices.

        `outer` are levels without programs of their own. `inside` has the levels around a tenant, innermost first.
        `slice_ns`: how long a launch delays the kernels that other tenants have in flight on the same device.
        `crowded`: how many times as long kernels take while the gates of several tenants are open.
        `parallel`: the device runs the kernels of different tenants at the same time, as with MPS, and they take this
        many times as long while another tenant has work; 0: it runs them one after another.
        """
        self.tenants = {tenant.key: tenant for tenant in tenants}
        self.turns = Turns()
        self.now = 1 * S
        self.turns.share_out({t.key: t.share for t in tenants} | (outer or {}), self.now, concurrent)
        for key, levels in (inside or {}).items():
            self.turns.nest(key, levels, self.now)
        self.free_at: dict[tuple[int, int], int] = {}
        self.slice_ns, self.crowded, self.parallel = slice_ns, crowded, parallel
        self.bell: int | None = self.now
        self.rung = set(self.tenants)
        self.nvml = dict.fromkeys(self.tenants, 0)
        self.steps = 0

    def is_open(self, tenant: Tenant) -> bool:
        place = self.turns.places[tenant.key]
        return all(place.gate(device) & OPEN for device in tenant.devices)

    def run(self, seconds: float) -> World:
        end = self.now + round(seconds * S)
        due = self.now
        while self.now < end:
            if due <= self.now or (self.bell is not None and self.bell <= self.now):
                self.bell = None
                due = self.step()
            asked = [self._ask(t) for t in self.tenants.values() if not t.dead]  # this may send a wake-up
            self.now = max(self.now + 1, min(due, self.bell or NEVER_NS, end, *asked))
            for tenant in self.tenants.values():
                if tenant.flights and tenant.flights[0] <= self.now:
                    self._complete(tenant)
        for tenant in self.tenants.values():
            tenant.tell()
        return self

    def step(self) -> int:
        """Step the scheduler until it requests no further step at once. Return the time of the next step.

        The scheduler requests a step at once after it has closed a gate with nothing in flight.
        """
        is_new = True
        while is_new:
            self.steps += 1
            told, self.rung = self.rung.union(self.turns.in_question()), set()
            for tenant in self.tenants.values():
                if tenant.dead:
                    self.turns.leave(tenant.key, self.now)
            seen = {t.key: t.seen() for t in self.tenants.values() if t.key in told and not t.dead}
            self.turns.step(seen, self.now)
            self.check()
            for key, tenant in self.tenants.items():
                turn = self.turns.places[key].turn
                tenant.closed_ns = (turn and turn.closing_ns) or tenant.closed_ns
            is_new = self.turns.look_again()
        for tenant in self.tenants.values():
            if tenant.waiting and self.is_open(tenant):
                tenant.waiting, tenant.wakes_ns = False, self.now + WAKE_NS
        return self.turns.due_ns(self.now)

    def run_observed(self, seconds: int, error: Callable[[int], float] = lambda _: 0.0) -> World:
        """Run as `run` does, and read NVML once a second. `error(second)` is NVML's error, as a part of that second."""
        for second in range(seconds):
            before = {key: tenant.done_ns for key, tenant in self.tenants.items()}
            self.run(1.0)
            for key, tenant in self.tenants.items():
                part = (tenant.done_ns - before[key]) / S + error(second)
                self.nvml[key] += int(min(1.0, max(0.0, part)) * S)
                for device in tenant.devices:
                    self.turns.observed(key, device, self.nvml[key], self.now)
        return self

    def check(self) -> None:
        """Check that a device has at most one owner, except draining tenants, and a gang all of its devices or none."""
        turns = [place.turn for place in self.turns.places.values() if place.turn]
        owned = [device for turn in turns if not turn.handed_ns for device in turn.devices]
        assert len(owned) == len(set(owned))
        assert all(turn.closing_ns for turn in turns if turn.handed_ns)
        for place in self.turns.places.values():
            assert not (place.turn and place.lent)
            if place.turn and not place.turn.closing_ns:
                assert place.turn.devices == place.seen.devices

    def _ask(self, tenant: Tenant) -> int:
        return self._act_hog(tenant) if isinstance(tenant, Hog) else self._act(tenant)

    def _act_hog(self, hog: Hog) -> int:
        is_open, trust = self.is_open(hog), self.turns.places[hog.key].trust
        before = hog.said[4:5]
        hog.waiting = not is_open
        hog.act(self.now, is_open, trust.believed_ns(self.now))
        if not is_open and (hog.waited_from is None or before != hog.said[4:5]):
            self._begin_to_wait(hog)
        if is_open:
            hog.waited_from = None
        return self.now + MS // 2

    def _act(self, tenant: Tenant) -> int:
        """Launch as much work as the tenant may launch. Return the time of the next call."""
        if (later := tenant.rests_ns(self.now)) > self.now:
            return min([later, *tenant.flights])
        if not self.is_open(tenant):
            if not tenant.waiting:
                self._begin_to_wait(tenant)
            tenant.longest_wait_ns = max(tenant.longest_wait_ns, self.now - (tenant.waited_from or 0))
            return min(tenant.flights, default=NEVER_NS)
        if tenant.wakes_ns > self.now:
            return min([tenant.wakes_ns, *tenant.flights])
        if tenant.waited_from is not None:
            tenant.waits_ns.append(self.now - tenant.waited_from)
            tenant.waited_from, tenant.begun_ns, tenant.wanted_ns = None, self.now, self.now
        while not tenant.flights or len(tenant.flights) * tenant.kernel_ns < BUDGET_NS:
            if tenant.steps:
                if not tenant.steps.owed:
                    break
                tenant.steps.owed -= 1
            lanes = [(device, tenant.key if self.parallel else 0) for device in tenant.devices]
            start = max([self.now, *(self.free_at.get(lane, 0) for lane in lanes)])
            self._delay_others(tenant)
            kernel_ns = round(tenant.kernel_ns * self._slower(tenant))
            for lane in lanes:
                self.free_at[lane] = start + kernel_ns
            tenant.flights.append(start + kernel_ns)
            tenant.launches += 1
            rest_ns = self.now - tenant.ended_ns if tenant.ended_ns > tenant.wanted_ns else 0
            tenant.rested_ns += rest_ns if rest_ns >= REST_NS else 0
            tenant.wanted_ns = self.now
        return min(tenant.flights, default=self.now + 1)

    def _slower(self, tenant: Tenant) -> float:
        """Return how many times as long as alone a kernel takes that the tenant launches now."""
        if self.parallel:
            others = sum(bool(other.flights) for other in self.tenants.values() if other is not tenant)
            return 1 + others * (self.parallel - 1)
        return self.crowded if sum(map(self.is_open, self.tenants.values())) > 1 else 1

    def _delay_others(self, tenant: Tenant) -> None:
        for other in self.tenants.values() if self.slice_ns else ():
            if other is not tenant and not other.devices.isdisjoint(tenant.devices):
                other.flights = [end + self.slice_ns for end in other.flights]

    def _begin_to_wait(self, tenant: Tenant) -> None:
        tenant.waiting, tenant.waited_from, tenant.wanted_ns = True, self.now, self.now
        if tenant.unaware and not tenant.flights:
            tenant.ended_ns = self.now  # the thread at the gate observes the end
        if not tenant.flights:  # with work in flight, it sends a single wake-up later, when it has drained
            self._ring(tenant)

    def _complete(self, tenant: Tenant) -> None:
        left = [end for end in tenant.flights if end > self.now]
        tenant.done_ns += (len(tenant.flights) - len(left)) * tenant.kernel_ns
        tenant.flights = left
        if left or tenant.silent:
            return
        place = self.turns.places.get(tenant.key)
        if isinstance(tenant.steps, Loop):
            tenant.steps.ended(self.now)
        tenant.ended_ns = self.now
        if place and not tenant.unaware and (place.late_ns or (place.turn and place.turn.closing_ns)):
            self._ring(tenant)

    def _ring(self, tenant: Tenant | None = None) -> None:
        """Send a wake-up for this tenant, or for all.

        The next step processes it. The gatekeeper is woken if the wake-up cannot wait.
        """
        self.rung |= {tenant.key} if tenant else set(self.tenants)
        if self.bell is None and not (tenant and tenant.key in self.turns.without_wakeups()):
            self.bell = self.now + BELL_NS

    def counted(self) -> int:
        """Return the number of turns so far."""
        return sum(counts.switches for place in self.turns.places.values() for counts in place.counts.values())

    def shares(self) -> dict[int, float]:
        total = sum(t.done_ns for t in self.tenants.values())
        return {key: t.done_ns / total for key, t in self.tenants.items()}
