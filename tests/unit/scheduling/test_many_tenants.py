"""Twenty tenants on one device in simulated time: each gets its share, and waits no longer than a round of turns."""

from __future__ import annotations

import pytest

from fgpu_ebpf.scheduling.fair_queue import Share
from tests.unit.scheduling.slices_kit import MS, S, Tenant, World

SECONDS, KERNEL_NS = 20.0, 1 * MS
MIXED = (10, 8, 6, 5, 5, 4, 4, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1)


@pytest.mark.parametrize("weights", [(1,) * 20, MIXED], ids=["equal", "mixed"])
def test_twenty_tenants_get_their_shares_and_keep_the_device_busy(weights: tuple[int, ...]) -> None:
    tenants = [Tenant(n + 1, Share(weight=100 * weight), KERNEL_NS) for n, weight in enumerate(weights)]
    it = World(*tenants).run(SECONDS)
    got = it.shares()
    for tenant, weight in zip(tenants, weights, strict=True):
        assert got[tenant.key] == pytest.approx(weight / sum(weights), rel=0.1)
    assert sum(tenant.done_ns for tenant in tenants) / (SECONDS * S) > 0.97


def test_no_tenant_of_twenty_equal_ones_waits_longer_than_a_round() -> None:
    tenants = [Tenant(n + 1, kernel_ns=KERNEL_NS) for n in range(20)]
    World(*tenants).run(SECONDS)
    assert max(tenant.longest_wait_ns for tenant in tenants) <= 20 * (20 + 2 + 2) * MS
