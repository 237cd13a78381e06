"""The cost of a tenant's launches while the tenant has the device alone.

A tenant has the device alone while all other tenants are held or idle. This time, divided by the number of launches in
this time, is the mean cost of a launch. Thus, a tenant that has the device alone makes launches that cost one second in
one second. The host code of the tenant between two launches is part of the cost. `concurrent` multiplies the number of
launches by this cost to get a tenant's progress. The module runs in threads of the gatekeeper that hold the time
slicer's lock. Times are in nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

KEPT_NS, KEPT_LAUNCHES = 400_000_000, 16  # the mean covers the last KEPT_NS, or the last KEPT_LAUNCHES launches
STEADY_NS = 20_000_000  # a tenant that launches at each observation in this time launches steadily
LONGEST_NS = 300_000_000  # the longest time between two bursts of launches


@dataclass(slots=True)
class AloneCost:
    """The recent mean cost of a launch. `fresh_launches`, `fresh_ns`: launches and time since the last begin().

    Most programs launch in bursts, one in each step. A time that begins or ends within a step has too many or too few
    launches, so a time is counted from the first launches of a burst to the first launches of a later burst. A burst
    begins if there are launches after an observation without launches. For a tenant that launches steadily, time is
    counted from the first observation with launches: the kernel before this observation may have begun beside the
    kernels of other tenants.
    """

    fresh_launches: int = 0
    fresh_ns: int = 0
    _launches: float = 0.0
    _ns: float = 0.0
    _step_launches: int = 0  # since the burst began, or since the tenant is alone
    _step_ns: int = 0
    _is_whole: bool = False  # whether the time began with a burst
    _has_begun: bool = False  # whether there were launches since the tenant is alone
    _has_paused: bool = False  # whether there was an observation without launches
    _steady_ns: int = 0  # the observed time since the last observation without launches

    def begin(self) -> None:
        """Begin a measurement. Earlier measurements count until the new measurement has replaced them."""
        self.fresh_launches = self.fresh_ns = 0

    def renew(self) -> None:
        """End a measurement, discard all earlier measurements, and begin the next measurement."""
        self._launches, self._ns = float(self.fresh_launches), float(self.fresh_ns)
        self.begin()

    def forget(self) -> None:
        """Discard all measurements, because these measurements do not apply to the tenant's present work."""
        self.begin()
        self._launches = self._ns = 0.0

    def interrupt(self, is_idle: bool) -> None:
        """Discard the step that was observed, because the tenant did not have the device alone.

        Args:
            is_idle: whether the tenant had no work at the last observation.
        """
        self._begin_step(0, is_whole=False)
        self._has_begun = False
        self._steady_ns = 0 if is_idle else self._steady_ns

    def observe(self, launches: int, ns: int) -> None:
        """Count the launches of a time in which the tenant had the device alone.

        Args:
            launches: the launches since the last observation.
            ns: the time in which the tenant had work, with the idle time before this work; 0: there was no work.
        """
        self._step_ns += ns
        if launches and self._has_paused:
            if self._is_whole:
                self.learn(self._step_launches, self._step_ns)
            self._begin_step(launches)
            self._has_begun, self._steady_ns = True, 0
            return
        self._step_launches += launches
        self._has_paused |= not launches
        self._steady_ns = 0 if self._has_paused else self._steady_ns + ns
        if launches and not self._has_begun:
            self._begin_step(0, is_whole=False)
            self._has_begun = True
            return
        if self._steady_ns >= STEADY_NS or self._step_ns >= LONGEST_NS:
            self.learn(self._step_launches, self._step_ns)
            self._begin_step(0)

    def _begin_step(self, launches: int, is_whole: bool = True) -> None:
        self._step_launches, self._step_ns = launches, 0
        self._is_whole, self._has_paused = is_whole, False

    def learn(self, launches: int, ns: int) -> None:
        """Add launches, and the time that the launches took while the tenant had the device alone."""
        self.fresh_launches += launches
        self.fresh_ns += ns
        fades = max(0.0, 1 - ns / max(KEPT_NS, KEPT_LAUNCHES * self.of(1)))
        self._launches = self._launches * fades + launches
        self._ns = self._ns * fades + ns

    def of(self, launches: int) -> float:
        """Return the nanoseconds that launches take while the tenant has the device alone; 0: the cost is unknown."""
        return launches * self._ns / self._launches if self.is_known else 0.0

    @property
    def is_known(self) -> bool:
        """True if the cost was measured. One launch is too few: most of the time may precede the launch."""
        return self._launches >= 2
