"""How long others wait for work that a tenant says it has in flight: as long as it says, until that was not true.

Owns: when others waited for a tenant in vain, and how slowly it is believed again. At first it is believed as little as
a tenant that says nothing; this doubles, at a pace that is slower after each further time. Never: charges a tenant.
Cannot fail. Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from fgpu_ebpf.pages import BUDGET_NS

MOST_FLIGHT_NS = 1_000_000_000  # of what a tenant says is in flight
MUCH_NS = 2 * BUDGET_NS  # a shorter wait in vain costs others no more than a tenant that says nothing
PACE_NS, MOST_PACE_NS = 1_000_000_000, 64_000_000_000  # in which what is believed doubles
FORGET_NS = 3600 * 1_000_000_000  # after so long without a wait in vain the pace is the first again
_TRUE_PARTS = 4  # work that ends later by such a part of its claimed length ended as claimed
_MOST_DOUBLINGS = 16


@dataclass(slots=True)
class Trust:
    """Of one tenant."""

    fallen_ns: int = 0
    pace_ns: int = 0  # 0: it was never waited for in vain
    _closed_ns: int = 0
    _claim_ns: int = 0  # of the turn that closed then
    _before: tuple[int, int] | None = None  # `fallen_ns` and `pace_ns` before an overrun that may still prove true

    def believed_ns(self, now_ns: int) -> int:
        """The most that is waited for its work in flight."""
        if not self.pace_ns:
            return MOST_FLIGHT_NS
        doublings = min(_MOST_DOUBLINGS, max(0, now_ns - self.fallen_ns) // self.pace_ns)
        return min(MOST_FLIGHT_NS, BUDGET_NS << doublings)

    def claims(self, now_ns: int, ns: int) -> None:
        """Its turn closes now, and it says that its work takes so much longer."""
        self._closed_ns, self._claim_ns, self._before = now_ns, ns, None

    def overran(self, now_ns: int) -> None:
        """It was waited for, and its work has not ended."""
        is_much = now_ns - self._closed_ns > MUCH_NS
        if not is_much and not self.pace_ns:
            return
        self._before = self.fallen_ns, self.pace_ns
        if is_much:
            is_new = not self.pace_ns or now_ns - self.fallen_ns > FORGET_NS
            self.pace_ns = PACE_NS if is_new else min(MOST_PACE_NS, 2 * self.pace_ns)
        self.fallen_ns = now_ns

    def ended(self, ended_ns: int, now_ns: int) -> None:
        """The work that overran has ended, at `ended_ns` if it tells: if that was about when it said, it was true."""
        at_ns = ended_ns if self._closed_ns < ended_ns < now_ns else now_ns
        self._restore(at_ns <= self._closed_ns + self._claim_ns + self._claim_ns // _TRUE_PARTS)

    def begins_again(self, until_ns: int, now_ns: int) -> None:
        """Its next turn begins. The time at which its work should have ended may not have come yet: the claim may
        still be true, where it has not been put off to `until_ns`."""
        end_ns = self._closed_ns + self._claim_ns
        self._restore(now_ns <= end_ns and until_ns <= end_ns + BUDGET_NS)

    def _restore(self, was_true: bool) -> None:
        if self._before and was_true:
            self.fallen_ns, self.pace_ns = self._before
        self._before = None
