"""Containers run across `fgpu detach`, a purge or the removal of /run/fgpu/shim.

Once an agent enforces limits again, programs that start in these containers have their limit or no memory, never more.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.commands import fgpu
from tests.support.host import CONTEXT, MIB, REFUSED, ROOT, RUN_DIR, SIM
from tests.support.place import Place
from tests.support.service import Service
from tests.support.tenant import Tenant
from tests.support.wait import eventually

ROOM = 40 * MIB
LIMIT = CONTEXT + ROOM
SHIM_FOLDER = RUN_DIR / "shim"


@pytest.fixture
def again(service: Service, unharmed: None) -> Iterator[Service]:
    """Return the service. Afterwards a service without any earlier state runs."""
    yield service
    service.detach()
    shutil.rmtree(SHIM_FOLDER, ignore_errors=True)
    service.start_agent()


def assert_held(one: Tenant) -> None:
    """Check that a program that starts now gets exactly the limit."""
    one.assert_enforced()
    one.assert_holds(ROOM)


def limit(one: Tenant) -> None:
    """Set the limit again after a detach, which has removed all limits of `fgpu set`."""
    fgpu("set", one.path, "--memory", f"{LIMIT}B")


@pytest.mark.places("runc")
def test_programs_of_a_container_that_ran_across_a_detach_are_limited_by_the_next_agent(
    again: Service, place: Place, tenant: Callable[[int], Tenant]
) -> None:
    one = tenant(LIMIT)
    one.assert_enforced()
    before = SHIM_FOLDER.stat().st_ino
    again.detach()
    assert sorted(path.name for path in RUN_DIR.iterdir()) == ["shim"], "a mounted folder was removed"
    assert not list(SHIM_FOLDER.iterdir())
    client = one.client()
    client.ok(f"alloc {100 * MIB}")  # nothing is enforced, and the request waits for nothing
    client.kill()
    client.close()
    again.start_agent()
    assert SHIM_FOLDER.stat().st_ino == before
    assert stat.S_IMODE(SHIM_FOLDER.stat().st_mode) == 0o755
    limit(one)
    assert_held(one)
    place.close()


@pytest.mark.places("runc")
def test_a_detach_without_running_containers_removes_the_shim_folder(again: Service, place: Place) -> None:
    again.detach()
    assert not SHIM_FOLDER.exists()


@pytest.mark.places("runc")
def test_programs_under_a_removed_folder_get_no_memory_and_the_container_is_named(
    again: Service, place: Place, tenant: Callable[[int], Tenant]
) -> None:
    one = tenant(LIMIT)
    one.assert_enforced()
    inode = SHIM_FOLDER.stat().st_ino
    shutil.rmtree(SHIM_FOLDER)
    eventually(lambda: SHIM_FOLDER.exists() and SHIM_FOLDER.stat().st_ino != inode, 5, "another folder")
    client = one.client()
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert one.driver() == 0
    client.kill()
    client.close()
    again.kill_agent()
    again.start_agent()  # it scans at its start, and then every half minute
    said = json.loads(fgpu("doctor", "--json", "--driver-root", SIM, check=False).stdout)
    (found,) = [check for check in said if check["name"] == "mounts"]
    assert one.name in found["found"]
    assert "restart the container" in found["fix"]
    later = tenant(LIMIT)
    assert_held(later)
    place.close()


@pytest.mark.places("runc")
def test_a_purge_keeps_the_folder_that_a_container_has_mounted(
    again: Service, place: Place, tenant: Callable[[int], Tenant], tmp_path: Path
) -> None:
    """The test runs the part of the package's script that removes the folder, because fgpu is not installed here."""
    one = tenant(LIMIT)
    one.assert_enforced()
    before = SHIM_FOLDER.stat().st_ino
    again.detach()
    text = (ROOT / "deploy/debian/postrm").read_text()
    part = text[text.index("device=") : text.index("while read -r _ place")]
    (tmp_path / "part").write_text(f"set -e\n{part}")
    assert os.system(f"sh {tmp_path}/part") == 0
    again.start_agent()
    assert SHIM_FOLDER.stat().st_ino == before
    limit(one)
    assert_held(one)
    place.close()
