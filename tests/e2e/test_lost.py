"""F10: a device is reset, or lost, under agent and programs: it is found again, and the ledger forgets what is gone."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from harness import CONTEXT, MIB, REFUSED, Service, eventually, metrics

LIMIT = CONTEXT + 40 * MIB
AGE = "fgpu_reconcile_age_seconds", frozenset({("gpu", "0")})


def is_seen() -> bool:
    """NVML answers of the device, and has just done so."""
    return metrics()[AGE] < 0.6


def lives_as_ever(one) -> None:
    """A program of the tenant gets its share, and no more."""
    client = one.client()
    client.ok(f"alloc {40 * MIB}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert one.assert_exact(10) == LIMIT
    os.kill(client.pid, 9)
    eventually(lambda: one.memory()["used_bytes"] == 0, 1, "released")
    client.close()


@pytest.mark.timeout(900)
@pytest.mark.places("host")
def test_a_device_that_is_reset_is_found_again(
    service: Service, fault: Callable[[str], None], tenant, scale: Callable[[int, int, int], int]
) -> None:
    one = tenant(LIMIT)
    one.assert_enforced()
    for number in range(scale(2, 5, 100)):
        client = one.client()
        client.ok(f"alloc {20 * MIB}")
        fault("device-reset")
        assert not client.do(f"alloc {2 * MIB}").startswith("ok"), "its device is gone"
        if number % 2:
            client.kill()
        eventually(lambda: one.memory()["used_bytes"] == 0 == one.driver(), 10, "a ledger that has forgotten it")
        eventually(is_seen, 5, "what NVML says")
        assert not one.view()["bypassing"]
        client.close()
        eventually(lambda gone=client: gone.pid not in one.pids(), 5, "its end")  # type: ignore[misc]
        lives_as_ever(one)


@pytest.mark.places("host")
def test_while_a_device_is_lost_limits_stand_and_its_age_is_shown(
    service: Service, fault: Callable[[str], None], tenant
) -> None:
    one = tenant(LIMIT)
    one.assert_enforced()
    client = one.client()
    client.ok(f"alloc {20 * MIB}")
    fault("device-lost")
    assert not client.do(f"alloc {2 * MIB}").startswith("ok")
    eventually(lambda: metrics()[AGE] > 2, 10, "its age")
    assert one.memory()["limit_bytes"] == LIMIT
    assert one.memory()["used_bytes"] == CONTEXT + 20 * MIB, "nobody says that it is gone"
    service.check()
    fault("reset")
    eventually(is_seen, 5, "what NVML says")
    eventually(lambda: one.memory()["used_bytes"] == 0, 10, "a ledger that has forgotten it")
    client.close()
    eventually(lambda: client.pid not in one.pids(), 5, "its end")
    lives_as_ever(one)
