"""What a tenant with a ceiling has to pay for beyond what it says of itself: what NVML saw it run is the floor.

Owns: what of both was compared so far. Never: charges (`turns` does), or takes the floor for exact: NVML samples, and
tells late. Cannot fail. Times are nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

SLACK_PARTS = 10  # of the time between two words of NVML: so much may be run beyond what was charged
MOST_BETWEEN_NS = 2_000_000_000  # of that time: a tenant that rests saves up nothing
MOST_AHEAD_NS = 500_000_000  # charged already, of what NVML may tell later


@dataclass(slots=True)
class Observed:
    """Of one tenant."""

    ran_ns: int = -1
    owned_ns: int = 0
    at_ns: int = 0
    ahead_ns: int = 0

    def short_ns(self, ran_ns: int, owned_ns: int, now_ns: int) -> int:
        """How much more the tenant has to be charged than `owned_ns`, both as of the beginning of all counting, where
        NVML has seen it run for `ran_ns`."""
        if ran_ns == self.ran_ns:
            return 0
        ran, owned = ran_ns - self.ran_ns, owned_ns - self.owned_ns
        between_ns, is_first = min(now_ns - self.at_ns, MOST_BETWEEN_NS), self.ran_ns < 0 or ran < 0 or owned < 0
        self.ran_ns, self.owned_ns, self.at_ns = ran_ns, owned_ns, now_ns
        if is_first:
            return 0
        short = max(0, ran - owned - self.ahead_ns - between_ns // SLACK_PARTS)
        self.ahead_ns = min(MOST_AHEAD_NS, max(0, self.ahead_ns + owned - ran))
        self.owned_ns += short
        return short
