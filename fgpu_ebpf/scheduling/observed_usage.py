"""The time of a tenant on a device according to NVML. A tenant with a ceiling is charged at least for this time, and
tenants that use little of their turns may run at the same time (`lending`).

NVML takes samples and reports late, so the comparison allows some difference. The module runs in the gatekeeper's time
slicer thread. Times are in nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

SLACK_PARTS = 10  # 1/10 of the time between two reports of NVML may be used beyond the charged time
MOST_BETWEEN_NS = 2_000_000_000  # the maximum of that time, and of the time that a report adds
MOST_AHEAD_NS = 500_000_000  # the maximum of the charged time that offsets later reports


@dataclass(slots=True)
class Observed:
    """The comparison of NVML's reports with the charges of one tenant on one device."""

    ran_ns: int = -1
    owned_ns: int = 0
    at_ns: int = 0
    from_ns: int = 0  # the beginning of the time that the last report covers
    ahead_ns: int = 0
    use: float | None = None  # the recent part of the time in which the tenant ran; None: unknown

    def short_ns(self, ran_ns: int, owned_ns: int, now_ns: int) -> int:
        """Return the time that the tenant has to be charged in addition.

        Args:
            ran_ns: the total device time of the tenant according to NVML.
            owned_ns: the total time that the tenant was charged.
            now_ns: the current time.
        """
        if ran_ns == self.ran_ns:
            return 0
        ran, owned = min(ran_ns - self.ran_ns, MOST_BETWEEN_NS), owned_ns - self.owned_ns
        between_ns, is_first = min(now_ns - self.at_ns, MOST_BETWEEN_NS), self.ran_ns < 0 or ran < 0 or owned < 0
        self.ran_ns, self.owned_ns, self.from_ns, self.at_ns = ran_ns, owned_ns, self.at_ns, now_ns
        if is_first:
            return 0
        use = ran / max(1, between_ns)
        self.use = use if self.use is None else (self.use + use) / 2
        short = max(0, ran - owned - self.ahead_ns - between_ns // SLACK_PARTS)
        self.ahead_ns = min(MOST_AHEAD_NS, max(0, self.ahead_ns + owned - ran))
        self.owned_ns += short
        return short
