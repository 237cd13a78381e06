"""Tenants are moved to another device of the same model: their data, charges and limits follow.

The tests need a driver with two devices and their own agent, so they run themselves in a separate mount namespace.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.parking_kit import HELD, SCRIPT, Holder, Parker, parking, refusal, state
from tests.support import host as host_
from tests.support.commands import events, fgpu
from tests.support.host import CONTEXT, GIB, GPUS, MIB, SIM
from tests.support.place import Cgroups, Place
from tests.support.service import Service, run_on_devices
from tests.support.tenant import Tenant
from tests.support.wait import eventually, steadily

inside = pytest.mark.skipif(GPUS == "1", reason="is run by test_the_file_s_tests_pass_on_two_devices")
LIMIT = 2 * GIB
BYTES = CONTEXT + HELD
OUT_OF_MEMORY = 2
FILLS = """
begin(1)
while not alloc(128 << 20)[0]: pass
print("full", flush=True)
time.sleep(1000)
"""


@pytest.mark.skipif(GPUS != "1", reason="this run has these devices already")
def test_the_file_s_tests_pass_on_two_devices() -> None:
    run_on_devices(__file__)


@pytest.fixture(scope="module")
def parker(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parker]:
    with parking(service, tmp_path_factory.mktemp("parker"), "forbid") as made:
        yield made


@pytest.fixture
def host(parker: Parker, unharmed: None, tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.close()


def holder(tenant: Tenant, name: str = "h1", device: int = 0, before: str = "") -> Holder:
    made = Holder(tenant, name, device, before)
    tenant._programs.append(made)
    tenant.assert_enforced()
    return made


def order(fault: str) -> None:
    subprocess.run([SIM / "fgpu-simd", "--fault", fault], check=True, timeout=10)


def books(tenant: Tenant) -> list[tuple[int, int, int, int]]:
    """Return what is charged, parked and different from NVML, and what the driver has, by device."""
    held = tenant.driver_by_device()
    return [
        (row["used_bytes"], row["parked_bytes"], row["drift_bytes"], held[device])
        for device, row in enumerate(tenant.view()["devices"])
    ]


def is_on(tenant: Tenant, device: int, bytes_: int = BYTES) -> None:
    wanted = [(0, 0, 0, 0), (0, 0, 0, 0)]
    wanted[device] = bytes_, 0, 0, bytes_
    eventually(lambda: books(tenant) == wanted, 5, f"{wanted}: {books(tenant)}")
    steadily(lambda: books(tenant) == wanted, 1.2, what=f"{wanted}: {books(tenant)}")


@inside
def test_a_running_tenant_is_moved_with_its_data_and_its_charges_and_back(host: Place) -> None:
    one = host.tenant(LIMIT)
    program = holder(one)
    is_on(one, 0)
    for device in (1, 0):
        said = fgpu("move", one.name, "--device", str(device)).stdout
        assert said.startswith(f"{one.name}: moved to device {device}, 582MiB in "), said
        assert state(one) == "running"
        is_on(one, device)
        assert program.is_intact()
        error, more = program.do(f"alloc({GIB})")
        assert error == 0
        is_on(one, device, BYTES + GIB)
        assert program.do(f"alloc({GIB})")[0] == OUT_OF_MEMORY, "its limit holds there"
        assert program.do(f"free({more})") == 0
        is_on(one, device)
    assert program.do(f"free({program.pointer})") == 0
    is_on(one, 0, CONTEXT)
    assert [(e["tenant"], e["gpu"]) for e in events("moved")][-2:] == [(one.name, 1), (one.name, 0)]


@inside
def test_memory_from_before_the_move_is_released_on_the_new_device(host: Place) -> None:
    one = host.tenant(LIMIT)
    program = holder(one)
    pool, handle = program.do(f"from_pool({64 * MIB})"), program.do(f"create({64 * MIB})")
    assert (pool[0], handle[0]) == (0, 0)
    one.assert_exact()
    held = books(one)[0][0]
    fgpu("move", one.name, "--device", "1")
    is_on(one, 1, held)
    assert program.do(f"L.cuMemRelease(C.c_uint64({handle[1]}))") == 0
    is_on(one, 1, held - 64 * MIB)
    assert program.do(f"free({program.pointer})") == 0
    is_on(one, 1, held - 64 * MIB - HELD)
    assert program.do(f"from_pool({64 * MIB})")[0] == 0
    assert books(one)[0] == (0, 0, 0, 0)


@inside
def test_a_parked_tenant_is_moved_and_runs(host: Place) -> None:
    one = host.tenant(LIMIT)
    first, second = holder(one), holder(one, "h2")
    fgpu("park", one.name)
    fgpu("move", one.name, "--device", "1")
    is_on(one, 1, 2 * BYTES)
    assert (first.is_intact(), second.is_intact()) == (True, True)
    fgpu("park", one.name)
    assert first.is_intact()
    is_on(one, 1, 2 * BYTES)


@inside
def test_a_move_that_is_not_possible_is_refused_and_changes_nothing(host: Place) -> None:
    one = host.tenant(LIMIT)
    one.assert_enforced()
    assert "no process of the tenant holds device memory" in refusal("move", one.name, "--device", "1")
    program = holder(one)
    assert "it is on gpu 0 already" in refusal("move", one.name, "--device", "0")
    assert "no device 7" in fgpu("move", one.name, "--device", "7", check=False).stderr
    assert "can be moved to gpu 1" in fgpu("explain", one.name).stdout
    assert program.is_intact()
    is_on(one, 0)


@inside
def test_a_device_without_room_leaves_the_tenant_where_it_is(host: Place) -> None:
    one = host.tenant(LIMIT)
    program = holder(one)
    with subprocess.Popen(
        [sys.executable, "-c", f"{SCRIPT.partition('print(')[0]}{FILLS}"], env=host_.ENVIRONMENT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as full:  # fmt: skip
        assert full.stdout
        assert full.stdout.readline() == b"full\n"
        said = refusal("move", one.name, "--device", "1")
        full.kill()
    assert f"{one.name} cannot be moved: gpu 1 has " in said, said
    eventually(lambda: state(one) == "running", 5, "running")
    is_on(one, 0)
    assert program.is_intact()


@inside
def test_a_limit_that_does_not_fit_on_the_other_device_refuses_the_move(host: Place) -> None:
    one, other = host.tenant(6 * GIB), host.tenant(12 * GIB)
    program, rival = holder(one), holder(other, "h1", device=1)
    said = refusal("move", one.name, "--device", "1")
    assert f"6GiB for {one.name} do not fit on device 1: 12GiB of " in said, said
    assert "cannot be moved to gpu 1: 6GiB for" in fgpu("explain", one.name).stdout
    is_on(one, 0)
    assert (program.is_intact(), rival.is_intact()) == (True, True)


@inside
def test_a_tenant_without_the_node_of_the_other_device_is_not_moved(host: Place) -> None:
    one = host.tenant(LIMIT)
    nodes = one.folder / "nodes.sh"
    nodes.write_text('mount -t tmpfs none /dev && touch /dev/null /dev/nvidia0 && exec "$@"\n')
    program = holder(one, before=f"unshare -m sh {nodes}")
    is_on(one, 0)
    assert "has no /dev/nvidia1: " in refusal("move", one.name, "--device", "1")
    assert "cannot be moved to gpu 1: pid " in fgpu("explain", one.name).stdout
    is_on(one, 0)
    assert program.is_intact()


@inside
def test_a_failure_of_the_driver_leaves_the_tenant_where_it_is(host: Place) -> None:
    one = host.tenant(LIMIT)
    program = holder(one)
    fgpu("park", one.name)
    order("call-fails:restore")
    said = refusal("move", one.name, "--device", "1")
    order("reset")
    assert "cuCheckpointProcessRestore" in said, said
    eventually(lambda: state(one) == "running", 10, "running")
    is_on(one, 0)
    assert program.is_intact()
    assert [e["tenant"] for e in events("move failed")][-1:] == [one.name]


@inside
def test_the_group_around_a_tenant_holds_on_the_new_device(parker: Parker, unharmed: None, tmp_path: Path) -> None:
    place = Cgroups(tmp_path)
    try:
        one = place.tenant(LIMIT)
        fgpu("set", place.group, "--memory", f"{BYTES + 8 * MIB}B")
        program = holder(one)
        fgpu("move", one.path, "--device", "1")
        is_on(one, 1)
        assert program.do(f"alloc({16 * MIB})")[0] == OUT_OF_MEMORY
        assert program.is_intact()
    finally:
        place.close()
