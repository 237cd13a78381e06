"""The accounts of a tenant or unit, by device: virtual time, and the time in hand of a ceiling.

Virtual times of different devices, priorities or units cannot be compared, because each of these has a clock of its
own. Therefore each device has a separate account. On each device, a tenant starts at the device's clock (`fair_queue`)
when the tenant begins to use the device or requests a turn. After a change of the priority or the unit, all accounts
start at the new clock.

The module runs in threads of the gatekeeper that hold the time slicer's lock. Times are in nanoseconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from fgpu_ebpf.scheduling.fair_queue import STAYED, Account, Leave, Share, opening


class Accounts:
    """The accounts of a tenant or unit with this share. A device without an entry has not been used.

    `left`: by device, the end of the last turn.
    """

    def __init__(self, share: Share, now_ns: int) -> None:
        self.share, self.left = share, dict[int, Leave]()
        self._first = opening(share, now_ns)
        self._accounts: dict[int, Account] = {}

    def of(self, device: int) -> Account:
        """Return the account of a device."""
        return self._accounts.get(device, self._first)

    def copy(self, accounts: Accounts) -> None:
        """Start with the used time of other accounts. Their share must have the same ceiling and weight."""
        self._accounts = dict(accounts._accounts)

    def change(self, share: Share, now_ns: int, is_elsewhere: bool = False) -> bool:
        """Replace the share from now on. Return whether virtual times restart. The time in hand is kept.

        Virtual times restart after a change of the priority, and if the unit has changed (`is_elsewhere`).
        """
        more, restarts = share.limited and not self.share.limited, is_elsewhere or share.rank != self.share.rank
        for device, account in self._accounts.items():
            account = account.at(now_ns, self.share)._replace(at_ns=now_ns)
            account = account._replace(in_hand_ns=share.ample_ns) if more else account
            self._accounts[device] = account._replace(virtual_ns=0) if restarts else account
        self.left = {} if restarts else self.left
        self._first = self._first if share == self.share else opening(share, now_ns)
        self.share = share
        return restarts

    def count_up(self, devices: Iterable[int], now_ns: int) -> None:
        """Add the time that the limit has allowed since the last call."""
        for device in devices if self.share.limited else ():
            self._accounts[device] = self.of(device).at(now_ns, self.share)

    def join(self, clocks: Mapping[int, int], now_ns: int) -> None:
        """Record a request for a turn on the devices in `clocks`, which has each device's clock.

        The account starts at the clock, less the credit of the last turn on the device. Idle time gives no credit.
        """
        for device, clock_ns in clocks.items():
            credit_ns = self.left.get(device, STAYED).credit_ns(now_ns, self.share)
            self._accounts[device] = self.of(device).rested(now_ns, self.share).joining(clock_ns - credit_ns)

    def move_up(self, device: int, virtual_ns: int) -> None:
        """Set the virtual time on a device, unless this virtual time is later already."""
        self._accounts[device] = self.of(device).joining(virtual_ns)

    def leave(self, clocks: Mapping[int, int], now_ns: int) -> None:
        """Record the end of a turn on the devices in `clocks`, which has each device's clock."""
        for device, clock_ns in clocks.items():
            self.left[device] = Leave(now_ns, max(0, clock_ns - self.of(device).virtual_ns))

    def charge(self, devices: Collection[int], ns: int) -> None:
        """Charge `ns` of the time of each of these devices."""
        for device in devices:
            self._accounts[device] = self.of(device).charged(ns, self.share)

    def virtual_ns(self, devices: Iterable[int], ahead_ns: int = 0) -> dict[int, int]:
        """Return the virtual time on each of these devices, as if `ahead_ns` more device time had been used."""
        if not ahead_ns:
            return {device: self.of(device).virtual_ns for device in devices}
        return {device: self.of(device).charged(ahead_ns, self.share).virtual_ns for device in devices}

    def ready_ns(self, devices: Iterable[int]) -> int:
        """Return when the limit allows a turn to begin."""
        if not self.share.limited:
            return 0
        return max((self.of(device).ready_ns(self.share) for device in devices), default=0)

    def spent_ns(self, devices: Iterable[int]) -> int:
        """Return when a turn that continues will have used up the time in hand. The share must have a ceiling."""
        return min((self.of(device).spent_ns(self.share) for device in devices), default=0)

    def is_spent(self, devices: Iterable[int]) -> bool:
        """Return whether the limit leaves no time in hand."""
        return self.share.limited and any(self.of(device).in_hand_ns <= 0 for device in devices)
