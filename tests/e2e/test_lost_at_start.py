"""One of two devices has fallen off the bus when the agent starts.

Limits hold on the other device. The lost device is named, and used again when it returns.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.commands import ask, fgpu, metrics_page
from tests.support.host import CONTEXT, GPUS, MIB, REFUSED, SIM
from tests.support.service import Service, run_on_devices
from tests.support.tenant import Tenant
from tests.support.wait import eventually

inside = pytest.mark.skipif(GPUS == "1", reason="is run by test_the_file_s_tests_pass_on_two_devices")
LIMIT = CONTEXT + 40 * MIB
FAILED = 'fgpu_check_failed{check="devices"} 1'


@pytest.mark.skipif(GPUS != "1", reason="this run has these devices already")
def test_the_file_s_tests_pass_on_two_devices() -> None:
    run_on_devices(__file__)


@pytest.fixture
def restart(service: Service, fault: Callable[[str], None]) -> Iterator[Callable[..., None]]:
    """Return a function that restarts the agent while a device is lost. `boot`: the agent has no earlier state."""

    def lose_and_start(device: int, boot: bool = False) -> None:
        fault(f"device-lost:{device}")
        if boot:
            service.detach()
        else:
            service.kill_agent()
        service.start_agent()

    yield lose_and_start
    fault("reset")
    eventually(lambda: indexes() == [0, 1], 15, "both devices")


def indexes() -> list[int]:
    return [device["index"] for device in ask(verb="snapshot")["devices"]]


def missing() -> dict[str, Any] | None:
    """Return what `fgpu doctor` reports about devices that do not answer."""
    said = json.loads(fgpu("doctor", "--driver-root", SIM, "--json", check=False).stdout)
    return next((check for check in said if check["name"] == "devices"), None)


def assert_held(one: Tenant, device: int) -> None:
    """Check that a new program gets the tenant's limit on that device, and no more."""
    client = one.client()
    client.ok(f"device {device}")
    client.ok(f"alloc {40 * MIB}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    held = {seen["gpu"]: seen["used_bytes"] for seen in one.view()["devices"]}
    assert held[device] == LIMIT == one.driver_by_device()[device]
    client.kill()
    client.close()
    eventually(lambda: one.driver() == 0, 10, "the driver's free of the program's memory")
    eventually(lambda: not any(seen["used_bytes"] for seen in one.view()["devices"]), 10, "the release of the memory")


@inside
@pytest.mark.places("host")
@pytest.mark.parametrize("lost", [0, 1])
def test_limits_hold_on_the_working_device_if_the_other_is_lost_at_the_agent_s_start(
    service: Service, tenant: Callable[[int], Tenant], restart: Callable[..., None], lost: int
) -> None:
    one, well = tenant(LIMIT), 1 - lost
    assert_held(one, well)
    client = one.client()
    client.ok(f"device {well}")
    client.ok(f"alloc {20 * MIB}")
    assert missing() is None
    assert FAILED not in metrics_page()
    restart(lost)
    assert indexes() == [well], "the working device has another index"
    assert client.do(f"alloc {22 * MIB}") == REFUSED
    client.ok(f"alloc {20 * MIB}")
    assert one.assert_exact(5) == LIMIT
    client.kill()
    client.close()
    eventually(lambda: one.memory()["used_bytes"] == 0, 10, "the release of the memory")
    assert_held(one, well)
    found = missing()
    assert found
    assert not found["ok"]
    assert f"device {lost} of NVML (GPU is lost)" in found["found"]
    assert FAILED in metrics_page()
    assert f"device {lost} of NVML: GPU is lost" in fgpu("events").stdout


@inside
@pytest.mark.places("host")
@pytest.mark.parametrize("boot", [False, True], ids=["restart", "boot"])
def test_the_agent_uses_a_device_that_has_returned(
    service: Service, fault: Callable[[str], None], place: Any, restart: Callable[..., None], boot: bool
) -> None:
    restart(0, boot)
    one = place.tenant(LIMIT)
    one.assert_enforced()
    assert_held(one, 1)
    fault("reset")
    eventually(lambda: indexes() == [0, 1], 15, "the returned device")
    eventually(lambda: missing() is None, 5, "no report about devices by doctor")
    for device in (0, 1):
        assert_held(one, device)
    assert "device found" in fgpu("events").stdout


@inside
@pytest.mark.places("host")
def test_allocations_are_refused_on_a_device_that_the_agent_has_not_initialized(
    service: Service, fault: Callable[[str], None], place: Any, restart: Callable[..., None]
) -> None:
    """Programs may open the returned device before the agent has initialized NVML again."""
    restart(0, True)
    one = place.tenant(LIMIT)
    one.assert_enforced()
    assert service.agent
    os.kill(service.agent.pid, signal.SIGSTOP)
    try:
        fault("reset")
        client = one.client()
        assert client.do("device 0") == REFUSED
        client.kill()
        client.close()
    finally:
        os.kill(service.agent.pid, signal.SIGCONT)
