"""A device that has reported a fatal XID stays marked as failed across agent restarts until it is repaired."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from tests.support.commands import ask, fgpu, metrics
from tests.support.host import RUN_DIR
from tests.support.service import Service
from tests.support.wait import eventually

HEALTHY = "fgpu_device_healthy", frozenset({("gpu", "0")})


def is_healthy() -> bool:
    return metrics().get(HEALTHY) == 1


def recorded() -> set[int]:
    """Return the fatal XIDs that later agents read. The file also has a boot id, with arbitrary digits."""
    file = RUN_DIR / "xids.json"
    return set(json.loads(file.read_text())["fatal"].values()) if file.exists() else set()


@pytest.fixture
def failed(service: Service, fault: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Return a function that has the device report XID 79. Afterwards the device works again."""

    def report() -> None:
        eventually(is_healthy, 5, "a fit device")
        fault("xid=79")
        eventually(lambda: not is_healthy(), 5, "an unfit device")
        eventually(lambda: 79 in recorded(), 5, "a record of the XID")

    yield report
    fgpu("device", "clear", "0")
    eventually(is_healthy, 5, "a fit device")


def restart(service: Service) -> None:
    service.kill_agent()
    service.start_agent()
    eventually(lambda: ask(verb="snapshot")["devices"][0]["xids"] is not None, 5, "the agent's list of XIDs")


def test_a_failed_device_stays_failed_over_a_restart_until_a_command_clears_it(
    service: Service, failed: Callable[[], None]
) -> None:
    failed()
    for _ in range(2):
        restart(service)
        assert not any(is_healthy() for _ in range(40))
        doctor = fgpu("doctor", check=False)
        assert "FAIL  xids: device 0 has reported XID 79" in doctor.stdout
    fgpu("device", "clear", "0")
    eventually(is_healthy, 5, "a fit device after the command")
    eventually(lambda: 79 not in recorded(), 5, "a record without the XID")
    restart(service)
    assert is_healthy()
    unknown = fgpu("device", "clear", "7", check=False)
    assert unknown.returncode == 4
    assert "no device 7" in unknown.stderr


def test_a_reset_that_nvml_reports_clears_the_failure_for_later_agents_too(
    service: Service, failed: Callable[[], None], fault: Callable[[str], None]
) -> None:
    failed()
    restart(service)
    assert not is_healthy()
    fault("device-reset")
    eventually(is_healthy, 10, "a fit device after the reset")
    eventually(lambda: 79 not in recorded(), 5, "a record without the XID")
    restart(service)
    assert is_healthy()


def test_an_agent_ignores_a_failure_recorded_under_another_boot_or_driver_load(
    service: Service, failed: Callable[[], None]
) -> None:
    """The record belongs to an earlier boot or an earlier load of the driver."""
    failed()
    service.kill_agent()
    file = RUN_DIR / "xids.json"
    file.write_text(file.read_text().replace('"of": "', '"of": "0'))
    service.start_agent()
    eventually(is_healthy, 3, "a fit device")
