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


@dataclass(slots=True)
class AloneCost:
    """The recent mean cost of a launch. `fresh_launches`, `fresh_ns`: launches and time since the last begin()."""

    fresh_launches: int = 0
    fresh_ns: int = 0
    _launches: float = 0.0
    _ns: float = 0.0

    def begin(self) -> None:
        """Begin a measurement. Earlier measurements count until the new measurement has replaced them."""
        self.fresh_launches = self.fresh_ns = 0

    def renew(self) -> None:
        """End a measurement, discard all earlier measurements, and begin the next measurement."""
        self._launches, self._ns = float(self.fresh_launches), float(self.fresh_ns)
        self.begin()

    def forget(self) -> None:
        """Discard all measurements, because they do not apply to the tenant's present work."""
        self.begin()
        self._launches = self._ns = 0.0

    def learn(self, launches: int, ns: int) -> None:
        """Add the launches of the last `ns`, in which the tenant had the device alone and had work."""
        self.fresh_launches += launches
        self.fresh_ns += ns
        fades = max(0.0, 1 - ns / max(KEPT_NS, KEPT_LAUNCHES * self.of(1)))
        self._launches = self._launches * fades + launches
        self._ns = self._ns * fades + ns

    def of(self, launches: int) -> float:
        """Return the nanoseconds that launches take while the tenant has the device alone; 0: no cost measured yet."""
        return launches * self._ns / self._launches if self.is_known else 0.0

    @property
    def is_known(self) -> bool:
        """True if the cost was measured. One launch is too few: most of the time may precede the launch."""
        return self._launches >= 2
