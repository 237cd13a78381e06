"""Tests in simulated time of tenants that change their devices or their priority: no tenant waits for its past."""

from __future__ import annotations

import pytest

from fgpu_ebpf.scheduling.fair_queue import Share
from fgpu_ebpf.scheduling.observed_usage import MOST_BETWEEN_NS, Observed
from tests.unit.scheduling.slices_kit import MS, S, Tenant, World

BOTH = frozenset({0, 1})


def done(it: World, seconds: float) -> dict[int, float]:
    """Run for `seconds`. Return each tenant's part of a device's time in this period, and reset the longest waits."""
    before = {key: tenant.done_ns for key, tenant in it.tenants.items()}
    for tenant in it.tenants.values():
        tenant.longest_wait_ns, tenant.waited_from = 0, it.now if tenant.waiting else None
    it._ring()  # the next step checks every tenant
    it.run(seconds)
    return {key: (tenant.done_ns - before[key]) / (seconds * S) for key, tenant in it.tenants.items()}


def longest_ns(it: World) -> int:
    return max(tenant.longest_wait_ns for tenant in it.tenants.values())


def restart(it: World, tenant: Tenant, devices: frozenset[int]) -> None:
    """End the programs of a tenant. After a second, start them on these devices."""
    tenant.dead, tenant.flights = True, []
    it._ring()
    it.run(1.0)
    tenant.dead, tenant.waiting, tenant.devices = False, False, devices


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("to", "parts"), [({1}, (0.5, 1.0, 0.5)), (BOTH, (0.5, 0.5, 0.5))])
def test_a_tenant_that_changes_its_devices_does_not_wait_for_its_past(
    to: set[int], parts: tuple[float, ...], nested: bool
) -> None:
    tenants = [Tenant(1), Tenant(2), Tenant(3, devices=frozenset({1}))]
    inside = {n: [100] for n in (1, 2, 3)} if nested else {}
    it = World(*tenants, outer={100: Share()}, inside=inside).run(60.0)
    restart(it, tenants[0], frozenset(to))
    got = done(it, 10.0)
    assert tuple(got.values()) == pytest.approx(parts, abs=0.06)
    assert longest_ns(it) < 0.5 * S


class Growing(World):
    """Devices with a tenant that adds a device. Its turn gets the added device when this device is free."""

    def check(self) -> None:
        pass


@pytest.mark.parametrize("nested", [False, True])
def test_a_tenant_that_adds_a_device_in_its_turn_does_not_starve_others(nested: bool) -> None:
    """The other tenant of the added device has used far more time there."""
    tenants = [Tenant(1), Tenant(2, devices=frozenset({1})), Tenant(3, devices=frozenset({1}))]
    inside = {n: [100] for n in (1, 2, 3)} if nested else {}
    it = Growing(*tenants, outer={100: Share()}, inside=inside).run(60.0)
    tenants[0].devices = BOTH
    done(it, 1.0)
    tenants[2].dead = True
    got = done(it, 10.0)
    assert (got[1], got[2]) == pytest.approx((0.5, 0.5), abs=0.06)
    assert longest_ns(it) < 0.5 * S


def test_a_gang_gets_no_credit_on_the_device_with_fewer_tenants() -> None:
    """The gang falls behind the single tenant of one device, because many tenants use the other device."""
    gang, others = Tenant(1, devices=BOTH), [Tenant(n, devices=frozenset({1})) for n in range(3, 9)]
    it = World(gang, Tenant(2), *others).run(20.0)
    for tenant in others:
        tenant.dead = True
    got = done(it, 10.0)
    assert (got[1], got[2]) == pytest.approx((0.5, 0.5), abs=0.06)
    assert longest_ns(it) < 0.5 * S


def test_a_debt_stays_on_its_device() -> None:
    """A tenant uses another device for a moment after each of its long kernels."""
    long, other, third = Tenant(1, kernel_ns=400 * MS), Tenant(2), Tenant(3, devices=frozenset({1}))
    it = World(long, other, third)
    for _ in range(20):
        done(it, 0.5)
        restart(it, long, frozenset({1}))
        it.run(0.05)
        restart(it, long, frozenset({0}))
    assert longest_ns(it) < 1.0 * S
    assert long.done_ns <= other.done_ns


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (1, 0), (0, 1)])
@pytest.mark.parametrize("nested", [False, True])
def test_a_changed_priority_starves_no_tenant(before: int, after: int, nested: bool) -> None:
    shares = {1: Share(rank=before), 2: Share(rank=after), 3: Share(rank=after)}
    outer = {100: Share(rank=before)} if nested else {}
    inside = {1: [100]} if nested else {}
    it = World(*(Tenant(key, share) for key, share in shares.items()), outer=outer, inside=inside).run(60.0)
    same = {key: Share(rank=after) for key in (*shares, *outer)}
    it.turns.share_out(same, it.now)
    got = done(it, 10.0)
    assert tuple(got.values()) == pytest.approx((1 / 3,) * 3, abs=0.03)
    assert longest_ns(it) < 0.5 * S


@pytest.mark.parametrize(("before", "after", "inner"), [(1, 0, 1), (0, 1, 1), (0, 1, 2)])
def test_a_changed_priority_of_a_unit_starves_no_tenant_outside(before: int, after: int, inner: int) -> None:
    """The priority of the tenant inside stays the same, because its own share has a lower priority."""
    share = Share(rank=inner)
    it = World(Tenant(1, share), Tenant(2, share), outer={100: Share(rank=before)}, inside={1: [100]}).run(20.0)
    it.turns.share_out({1: share, 2: share, 100: Share(rank=after)}, it.now)
    got = done(it, 5.0)
    assert (got[1], got[2]) == pytest.approx((0.5, 0.5), abs=0.03)
    assert longest_ns(it) < 0.5 * S


def test_a_stall_of_the_gatekeeper_is_charged_to_no_tenant_beyond_the_lease() -> None:
    """All gates are open after the lease, so the tenant with the turn did not have the device alone."""
    it = World(Tenant(1), Tenant(2)).run(1.0)
    owner = next(it.tenants[place.tenant] for place in it.turns.places.values() if place.turn)
    it.now += 8 * S
    done(it, 4.0)
    assert owner.longest_wait_ns < 2.5 * S


def test_the_pause_of_a_stopped_program_does_not_delay_the_next_program_of_its_tenant() -> None:
    tenant = Tenant(1)
    it = World(tenant, Tenant(2)).run(1.0)
    while not (tenant.waiting and tenant.flights):
        it.run(0.0001)
    tenant.stopped = True
    it.run(2.0)
    assert it.turns.places[1].pause_until_ns > it.now + 5 * S
    tenant.stopped, tenant.launches = False, 0
    restart(it, tenant, frozenset({0}))
    assert done(it, 3.0)[1] == pytest.approx(0.5, abs=0.06)
    assert tenant.longest_wait_ns < 0.5 * S


def test_a_ceiling_counts_from_its_own_device() -> None:
    """NVML's totals of two devices differ by hours. The tenant uses one device after the other."""
    tenant, other = Tenant(1, Share(limit_millionths=500_000)), Tenant(2, devices=BOTH)
    it = World(tenant, other)
    totals = {0: 5 * S, 1: 5000 * S}
    for devices in ({0}, {1}, {0}, {0, 1}):
        restart(it, tenant, frozenset(devices))
        for _ in range(5):
            before = tenant.done_ns
            done(it, 1.0)
            for device in devices:
                totals[device] += tenant.done_ns - before
                it.turns.observed(1, device, totals[device], it.now)
        assert tenant.longest_wait_ns < 0.5 * S


def test_a_wrong_total_of_nvml_costs_two_seconds_at_most() -> None:
    tenant = Tenant(1, Share(limit_millionths=500_000))
    it = World(tenant).run_observed(3)
    it.turns.observed(1, 0, it.nvml[1] + 3600 * S, it.now)
    assert done(it, 10.0)[1] > 0.25


def test_a_report_of_nvml_adds_at_most_the_time_between_two_reports() -> None:
    """A total may jump, for example after the tenant returns to a device."""
    observed = Observed()
    assert observed.short_ns(0, 0, S) == 0
    assert 0 < observed.short_ns(1800 * S, 0, 2 * S) <= MOST_BETWEEN_NS
