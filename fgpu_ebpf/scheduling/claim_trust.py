"""The time for which other tenants wait for work that a tenant reports to be in flight.

A *claim* is the time that a tenant's work in flight will take, by the tenant's own report. The *bound* is the longest
time for which other tenants wait for this work. At first, the bound is UNPROVEN_NS. The bound rises to MOST_FLIGHT_NS
as soon as work with a claim longer than UNPROVEN_NS has ended as claimed. If other tenants waited and the work did not
end as claimed, the bound is lowered to BUDGET_NS, which is the wait for a tenant without a claim. From there the bound
doubles at regular intervals, which become longer with each further wait in vain. All tenants inside one unit
(`nested_shares`) have the same `Standing`, so that a new cgroup gets no more trust than the previous cgroup.

The module runs in threads of the gatekeeper that hold the time slicer's lock. The module does not charge tenants. Times
are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fgpu_ebpf.abi import BUDGET_NS

MOST_FLIGHT_NS = 1_000_000_000  # the most that a tenant can claim to have in flight
UNPROVEN_NS = 250_000_000  # the cost of a first false claim: an eighth of a device's time in two seconds
MUCH_NS = 2 * BUDGET_NS  # a shorter wait in vain costs other tenants no more than a tenant that claims nothing
PACE_NS, MOST_PACE_NS = 1_000_000_000, 64_000_000_000  # the first and the longest time in which the bound doubles
FORGET_NS = 3600 * 1_000_000_000  # after this time without a wait in vain, the bound doubles in PACE_NS again
_TRUE_PARTS = 4  # work ended as claimed if the delay was at most 1/4 of the claimed length
_MOST_DOUBLINGS = 16


@dataclass(slots=True)
class Standing:
    """The trust in the claims of one tenant, or of all tenants inside one unit."""

    lowered_ns: int = 0
    pace_ns: int = 0  # 0: no wait in vain yet
    proven: bool = False  # work with a claim beyond UNPROVEN_NS has ended as claimed

    def believed_ns(self, now_ns: int) -> int:
        """Return the longest time for which other tenants wait for the tenant's work in flight."""
        most_ns = MOST_FLIGHT_NS if self.proven else UNPROVEN_NS
        if not self.pace_ns:
            return most_ns
        doublings = min(_MOST_DOUBLINGS, max(0, now_ns - self.lowered_ns) // self.pace_ns)
        return min(most_ns, BUDGET_NS << doublings)

    def lower(self, now_ns: int, is_much: bool) -> None:
        """Lower the bound to BUDGET_NS after a wait in vain.

        If the wait was longer than MUCH_NS (`is_much`), each doubling of the bound from now on takes twice as long as
        before, at most MOST_PACE_NS. A doubling takes PACE_NS after the first such wait, and after FORGET_NS without a
        wait in vain.
        """
        if is_much:
            is_new = not self.pace_ns or now_ns - self.lowered_ns > FORGET_NS
            self.pace_ns = PACE_NS if is_new else min(MOST_PACE_NS, 2 * self.pace_ns)
        self.lowered_ns = now_ns


@dataclass(slots=True)
class Trust:
    """The successive claims of one tenant. Several tenants may have the same `standing`."""

    standing: Standing = field(default_factory=Standing)
    _closed_ns: int = 0  # when the gates of the last turn closed
    _claim_ns: int = 0  # the claim at that time
    _before: tuple[int, int] | None = None  # lowered_ns and pace_ns before an overrun whose claim may still prove true
    _overran_ns: int = 0  # the time of that overrun
    _proves_ns: tuple[int, int] = (0, 0)  # a drain of the next turn between these two times still proves that claim

    def believed_ns(self, now_ns: int) -> int:
        """Return the longest time for which other tenants wait for the tenant's work in flight."""
        return self.standing.believed_ns(now_ns)

    def claims(self, now_ns: int, ns: int) -> None:
        """Record that the gates of the tenant's turn close, and that the tenant claims `ns` of work in flight."""
        self._closed_ns, self._claim_ns, self._before = now_ns, ns, None

    def judge(self, overrun: bool, drained: bool, lives: bool, now_ns: int) -> None:
        """Judge the last claim at the end of a turn, after its drain.

        Args:
            overrun: whether the turn has ended with work in flight.
            drained: whether nothing is in flight.
            lives: whether the tenant still has a process that uses a device.
            now_ns: the current time.
        """
        if overrun:
            self.overran(now_ns)
        elif not lives:
            self.lost_process(now_ns)
        elif drained:
            self.drained(now_ns)

    def overran(self, now_ns: int) -> None:
        """Record that other tenants waited for the tenant's work in vain: the work has not ended."""
        is_much, standing = now_ns - self._closed_ns > MUCH_NS, self.standing
        if not is_much and not standing.pace_ns:
            return
        self._before, self._overran_ns = (standing.lowered_ns, standing.pace_ns), now_ns
        standing.lower(now_ns, is_much)

    def lost_process(self, now_ns: int) -> None:
        """Record that a process with a claim has exited while other tenants wait. This claim can never prove true."""
        self.overran(now_ns)
        self.forget_overrun()
        self._closed_ns, self._claim_ns = now_ns, 0  # a later overrun is due to other work, whose wait begins now

    def forget_overrun(self) -> None:
        """Discard an overrun whose claim may still prove true, because a process with this claim has exited."""
        self._before, self._proves_ns = None, (0, 0)

    def ended(self, ended_ns: int, now_ns: int) -> None:
        """Record the end of work that overran, and compare this end with the claim.

        `ended_ns` is the end that the tenant reports. If `ended_ns` is not between the closing of the gates and now,
        `now_ns` is taken as the end.
        """
        at_ns = ended_ns if self._closed_ns < ended_ns < now_ns else now_ns
        first_ns, last_ns = self._proof()
        self.standing.proven |= self._before is not None and first_ns < at_ns <= last_ns
        self._restore(at_ns <= last_ns)

    def drained(self, now_ns: int) -> None:
        """Record that a turn has ended and that no work of the turn or of an earlier turn is in flight."""
        self.standing.proven |= self._proves_ns[0] < now_ns <= self._proves_ns[1]
        self._proves_ns = (0, 0)

    def begins_again(self, until_ns: int, now_ns: int) -> None:
        """Record that the next turn begins while work may be in flight until `until_ns`, by the tenant's report.

        If the claimed end of the last work is still in the future, the claim may prove true, unless the tenant has
        prolonged the claim.
        """
        end_ns = self._closed_ns + self._claim_ns
        may_be_true = now_ns <= end_ns and until_ns <= end_ns + BUDGET_NS
        if self._before and may_be_true:
            self._proves_ns = self._proof()
        self._restore(may_be_true)

    def _proof(self) -> tuple[int, int]:
        """Return (first, last): work that ends after `first` and not after `last` proves the claim.

        An end before `first` proves nothing, because the wait for this end was not longer than for an unproven claim.
        """
        return self._closed_ns + UNPROVEN_NS, self._closed_ns + self._claim_ns + self._claim_ns // _TRUE_PARTS

    def _restore(self, was_true: bool) -> None:
        if self._before and was_true and self.standing.lowered_ns == self._overran_ns:
            self.standing.lowered_ns, self.standing.pace_ns = self._before
        self._before = None
