"""Private copies of libcuda: the agent finds and probes each copy, names its processes, and releases it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import metrics
from tests.support.host import CONTEXT, MIB, SIM
from tests.support.kernel import is_probed
from tests.support.outside import outside
from tests.support.place import Container
from tests.support.service import Service
from tests.support.wait import eventually


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Path]:
    """Return the driver's libraries on a separate file system, as in a container's layer."""
    place = tmp_path / "layer"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "layer", place], check=True)
    for library in (SIM / "lib").iterdir():
        shutil.copy(library, place / library.name, follow_symlinks=True)
    yield place
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def image(place: Container) -> str:
    """Create containers whose image has a libcuda and no shim. Return the start of a program that uses this libcuda."""
    place.image = {"libcuda.so.1": (SIM / "lib/libcuda.so.1").resolve()}
    (place.work / "ld.so.preload").write_text("")
    return f"env LD_LIBRARY_PATH=/.:{SIM}/lib"


@pytest.mark.places("runc")
def test_a_copy_in_a_container_is_witnessed_from_the_first_call(tenant, image: str, place: Container) -> None:
    """The agent finds the copy by its first program, which has sent no hello and has no row in NVML yet."""
    one = tenant(CONTEXT + 400 * MIB)
    one.assert_enforced()
    client = one.client(before=image)
    own = place.work / f"{one.name}.bundle/rootfs/libcuda.so.1"
    eventually(lambda: is_probed(own), 10, "the probes of the copy")
    assert " /libcuda.so.1\n" in Path(f"/proc/{client.pid}/maps").read_text()
    client.ok(f"alloc {100 * MIB}")
    assert one.memory()["witnessed_bytes"] == 100 * MIB
    assert metrics()["fgpu_bypassing_processes", frozenset({("tenant", one.name), ("how", "no_admission")})] == 1
    assert one.assert_exact() == CONTEXT + 100 * MIB
    client.kill()
    client.close()
    again = one.client(before=image)
    assert is_probed(own), "the probes were removed although the container has processes"
    again.ok(f"alloc {50 * MIB}")
    assert one.memory()["witnessed_bytes"] == 150 * MIB
    again.kill()
    again.close()
    place.close()
    eventually(lambda: not is_probed(own), 10, "the removal of the probes")


@pytest.mark.timed
@pytest.mark.places("host")
def test_a_private_copy_is_named_within_a_second_and_witnessed_afterwards(tenant, copy: Path) -> None:
    one = tenant(CONTEXT + 400 * MIB)
    one.assert_enforced()
    client = outside(one, "private", copy)
    client.ok(f"alloc {100 * MIB}")
    named = [("fgpu_bypassing_processes", frozenset({("tenant", one.name), ("how", how)})) for how in
             ("unwitnessed", "no_admission", "no_shim")]  # fmt: skip
    eventually(lambda: any(metrics().get(key) for key in named), 1, "the process in fgpu_bypassing_processes")
    assert one.assert_exact() == CONTEXT + 100 * MIB
    eventually(lambda: is_probed(copy / "libcuda.so.1"), 5, "the probes of its libcuda")
    client.ok(f"alloc {50 * MIB}")
    eventually(lambda: metrics().get(named[1]) == 1, 2, "the way of the bypass")
    assert one.assert_exact() == CONTEXT + 150 * MIB
    client.kill()
    client.close()
    eventually(lambda: one.memory()["used_bytes"] == 0, 2, "the release of the memory")


@pytest.mark.places("host")
def test_the_agent_releases_a_layer_after_its_last_process_exits(service: Service, tenant, copy: Path) -> None:
    one = tenant(CONTEXT + 400 * MIB)
    one.assert_enforced()
    clients = [outside(one, f"private{n}", copy) for n in range(2)]
    for client in clients:
        client.ok(f"alloc {10 * MIB}")
    eventually(lambda: "layer/libcuda" in service.log.read_text(), 3, "the probes of the copy")
    assert subprocess.run(["umount", copy], capture_output=True, check=False).returncode
    clients[0].kill()
    time.sleep(1.5)
    clients[1].ok(f"alloc {10 * MIB}")
    assert one.assert_exact() == CONTEXT + 20 * MIB
    clients[1].kill()
    eventually(lambda: not subprocess.run(["umount", copy], capture_output=True, check=False).returncode, 3, "umount")
    for client in clients:
        client.close()
