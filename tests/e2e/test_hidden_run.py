"""A mount hides /run from a program that has the shim: the program has its limit or no memory, never more."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.commands import fgpu
from tests.support.host import CONTEXT, MIB, REFUSED, SIM
from tests.support.place import Container, Place
from tests.support.service import Service
from tests.support.tenant import Client, Tenant

ROOM = 40 * MIB
LIMIT = CONTEXT + ROOM
SAID = "fgpu: /run/fgpu/shim is hidden from this program: device memory is refused"


def mounted(source: str, target: str) -> dict[str, Any]:
    return {"destination": target, "type": "bind", "source": source, "options": ["rbind", "ro"]}


SIMULATOR, BESIDE = mounted("/run/fgpu-sim", "/run/fgpu-sim"), mounted("/run/fgpu/shim", "/var/lib/fgpu/run")
OVER_RUN = [{"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}, SIMULATOR]
# The simulated driver is under /run too.
SANDBOX = """
mkdir sim
mount --bind /run/fgpu-sim sim
mount -t tmpfs none /run
mkdir /run/fgpu-sim
mount --move sim /run/fgpu-sim
exec "$@"
"""


def assert_refused_and_named(service: Service, one: Tenant, client: Client) -> None:
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert client.do("context") == REFUSED
    assert one.driver() == 0
    assert client.complaints() == f"{SAID}\n"
    service.kill_agent()
    service.start_agent()  # it scans at its start, and then every half minute
    said = json.loads(fgpu("doctor", "--json", "--driver-root", SIM, check=False).stdout)
    (found,) = [check for check in said if check["name"] == "mounts"]
    assert not found["ok"]
    said = "programs that start in such a container get no memory"
    assert found["found"] == f"a mount hides /run/fgpu/shim in {one.name}: {said}"
    assert "create the container again" in found["fix"]
    client.kill()
    client.close()


@pytest.mark.places("runc")
def test_a_container_whose_shim_folder_is_hidden_under_run_gets_no_memory(
    service: Service, place: Container, tenant: Callable[[int], Tenant]
) -> None:
    place.mounts = OVER_RUN
    one = tenant(LIMIT)
    assert_refused_and_named(service, one, one.client())
    place.mounts = [*OVER_RUN, BESIDE]
    tenant(LIMIT).assert_holds(ROOM)


@pytest.mark.places("runc")
def test_a_container_that_mounts_the_folder_beside_the_shim_is_limited_before_and_after_a_detach(
    service: Service, place: Container, tenant: Callable[[int], Tenant]
) -> None:
    place.mounts = [*OVER_RUN, BESIDE]
    one = tenant(LIMIT)
    one.assert_holds(ROOM)
    service.detach()
    client = one.client()
    client.ok(f"alloc {100 * MIB}")  # nothing is enforced, and the request waits for nothing
    client.kill()
    client.close()
    service.start_agent()
    fgpu("set", one.path, "--memory", f"{LIMIT}B")
    one.assert_holds(ROOM)


@pytest.mark.places("host")
def test_a_sandbox_on_the_host_that_hides_run_gets_no_memory_and_doctor_names_the_mount(
    service: Service, place: Place, tenant: Callable[[int], Tenant]
) -> None:
    one = tenant(LIMIT)
    (one.folder / "sandbox").write_text(SANDBOX)
    assert_refused_and_named(service, one, one.client(before=f"unshare -m sh -e {one.folder}/sandbox"))
    one.assert_holds(ROOM)
