"""Released devices: no process of fgpu has them open, limits hold, and the agent opens the devices again afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.commands import ask, fgpu
from tests.support.host import CONTEXT, MIB, REFUSED, SIM
from tests.support.service import Service
from tests.support.wait import eventually

LIMIT = CONTEXT + 40 * MIB


def open_devices(service: Service) -> list[str]:
    """Return the device files that agent and gatekeeper have open or mapped."""
    found = []
    assert service.agent
    for pid in (service.agent.pid, *service.gatekeepers()):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since
                found.append(os.readlink(entry))
        found += [line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return [path for path in found if Path(path).name.startswith("nvidia")]


def findings() -> dict[str, dict[str, str]]:
    """Return the failed checks of `fgpu doctor`, by name."""
    said = json.loads(fgpu("doctor", "--driver-root", SIM, "--json", check=False).stdout)
    return {check["name"]: check for check in said if not check["ok"]}


def nvml_age() -> float:
    (device,) = ask(verb="snapshot")["devices"]
    return float(device["reconcile_age_seconds"])


@pytest.fixture
def released(service: Service, unharmed: None) -> Iterator[None]:
    """Release the devices."""
    assert open_devices(service)
    fgpu("device", "release", "--for", "5min")
    yield
    fgpu("device", "take")
    eventually(lambda: nvml_age() < 0.6, 5, "an answer of NVML")
    assert open_devices(service)


@pytest.mark.places("host")
def test_no_process_of_fgpu_has_a_released_device_open_and_limits_hold(
    service: Service, tenant, request: pytest.FixtureRequest
) -> None:
    one = tenant(LIMIT)
    one.assert_enforced()
    client = one.client()
    client.ok("context")
    (pointer,) = client.ok(f"alloc {20 * MIB}")
    client.ok(f"alloc {20 * MIB}")
    request.getfixturevalue("released")
    assert open_devices(service) == []
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert one.client().do("context") == REFUSED
    client.ok(f"free {pointer}")
    client.ok(f"alloc {20 * MIB}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert one.memory()["used_bytes"] == LIMIT
    found = findings()
    assert found["released devices"]["found"].startswith("since ")
    assert found["released devices"]["fix"] == "fgpu device take"
    assert not found.keys() & {"reconcile", "driver"}
    assert "Released devices: since " in fgpu("status").stdout
    assert open_devices(service) == []
    fgpu("device", "take")
    assert "released devices" not in findings()
    eventually(lambda: nvml_age() < 0.6, 5, "an answer of NVML")
    assert one.assert_exact() == LIMIT
    assert client.do(f"alloc {2 * MIB}") == REFUSED


@pytest.mark.places("host")
def test_a_release_ends_after_its_time_without_a_command(service: Service, tenant) -> None:
    one = tenant(LIMIT)
    one.assert_enforced()
    fgpu("device", "release", "--for", "0.2s")
    eventually(lambda: open_devices(service), 5, "the device is open again")
    eventually(lambda: "released devices" not in findings(), 5, "the end of the release in doctor's report")
    one.assert_holds(40 * MIB)
    wrong = fgpu("device", "release", "--for", "soon", check=False)
    assert (wrong.returncode, "not a length of time" in wrong.stderr) == (2, True)


@pytest.mark.places("host")
def test_the_agent_uses_a_device_again_that_was_reset_during_its_release(
    service: Service, tenant, fault: Callable[[str], None], request: pytest.FixtureRequest
) -> None:
    one = tenant(LIMIT)
    one.assert_enforced()
    client = one.client()
    client.ok(f"alloc {20 * MIB}")
    request.getfixturevalue("released")
    fault("device-reset")
    client.kill()
    assert one.memory()["used_bytes"] == CONTEXT + 20 * MIB, "memory was released before NVML answered again"
    fgpu("device", "take")
    eventually(lambda: one.memory()["used_bytes"] == 0, 5, "the release of the lost memory")
    one.assert_holds(40 * MIB)


@pytest.fixture
def replaced(service: Service, unharmed: None, tmp_path: Path) -> Iterator[Path]:
    """Put another file in the place of the driver's NVML library, for the processes of this mount namespace."""
    library = (SIM / "lib/libnvidia-ml.so.1").resolve()
    subprocess.run(["mount", "--bind", shutil.copy(library, tmp_path), library], check=True)
    yield SIM / "lib/libnvidia-ml.so.1"
    service.kill_agent()
    subprocess.run(["umount", "--lazy", library], check=True)
    service.start_agent()


@pytest.mark.places("host")
def test_doctor_names_a_replaced_driver_and_the_agent_exits_for_a_restart_after_a_release(
    service: Service, tenant, replaced: Path
) -> None:
    one = tenant(LIMIT)
    one.assert_enforced()
    eventually(lambda: str(replaced) in findings().get("driver files", {}).get("found", ""), 3, "the replaced file")
    eventually(lambda: "driver replaced" in fgpu("events").stdout, 5, "the event of the replaced file")
    fgpu("device", "release")
    fgpu("device", "take")
    assert service.agent
    assert service.agent.wait(30) == 1
    assert "to be restarted with the new driver" in service.log.read_text()
    service.start_agent()
    assert not findings().keys() & {"driver files", "released devices"}
    one.assert_holds(40 * MIB)
