"""A tenant at its limit, and the conditions that must hold for it during every fault."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from tests.support.host import CONTEXT, MIB, REFUSED
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually

STEP, ROOM = 2 * MIB, 40 * MIB
LIMIT = CONTEXT + ROOM


@dataclass
class Held:
    """The program that holds the tenant's memory.

    `bytes` is the memory that the driver holds for the tenant, and `last` is the program's last allocation, both by
    device.
    """

    tenant: Tenant
    client: Client
    bytes: dict[int, int] = field(default_factory=lambda: {0: LIMIT})
    last: dict[int, int] = field(default_factory=dict)

    def check(self, lost: int = -1) -> None:
        """Check the exact bytes on each device, except for a lost one, and that a new program gets nothing."""
        left = {device: bytes_ for device, bytes_ in self.bytes.items() if device != lost}
        for device, bytes_ in left.items():
            self._check(device, bytes_)
        new = self.tenant.client()
        assert new.do("context") == REFUSED
        new.close()
        eventually(lambda: self.ledger(lost) == left, 10, "the ledger")

    def _check(self, device: int, bytes_: int) -> None:
        self.client.ok(f"device {device}")
        assert self.client.do(f"alloc {STEP}") == REFUSED
        assert self.tenant.driver_by_device()[device] == bytes_
        self.client.ok(f"free {self.last[device]}")
        (self.last[device],) = self.client.ok(f"alloc {STEP}")
        assert self.client.do(f"alloc {STEP}") == REFUSED
        assert self.tenant.driver_by_device()[device] == bytes_

    def ledger(self, lost: int = -1) -> dict[int, int]:
        """Return the charged bytes by device."""
        return {
            d["gpu"]: d["used_bytes"] for d in self.tenant.view()["devices"] if d["used_bytes"] and d["gpu"] != lost
        }


H = TypeVar("H", bound=Held)


def filled(tenant: Tenant, devices: tuple[int, ...] = (0,), kind: type[H] = Held) -> H:  # type: ignore[assignment]
    """Start a program of the tenant that allocates LIMIT on each device."""
    held = kind(tenant, tenant.client(), dict.fromkeys(devices, LIMIT))
    for device in devices:
        held.client.ok(f"device {device}")
        for _ in range(ROOM // STEP):
            (held.last[device],) = held.client.ok(f"alloc {STEP}")
    return held
