"""`onBypass: deny`: a program without the shim gets no device, whatever way around the shim it takes.

The simulated driver opens a device node at its initialisation, as the real one does. No driver is behind the node here.
So an open that is allowed fails with ENXIO, and the simulated driver then goes on.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.bypass_kit import Bypass
from tests.e2e.parking_kit import Holder, Parker, becomes
from tests.e2e.policies_kit import Write
from tests.e2e.test_bypasses import HELD, WAYS
from tests.support.commands import events, fgpu, metrics
from tests.support.host import CONTEXT, ENVIRONMENT, MIB, SIM
from tests.support.place import Container, Place
from tests.support.service import Service
from tests.support.tenant import Program, Tenant
from tests.support.wait import eventually

LIMIT = CONTEXT + 400 * MIB
NO_DEVICE = "CUDA_ERROR_100"  # what the real cuInit returns if it may not open a node
DENY = f"memory: {{limit: {LIMIT >> 20}MiB}}\n  onBypass: deny"
NODE = Path("/run/fgpu-sim/nvidiactl")
# "raw" speaks to the simulated driver itself, and opens no node. "registers" gets a device, and is named.
OTHERS = {"raw", "registers"}

Make = Callable[[int | None], Tenant]


@pytest.fixture(autouse=True)
def node(service: Service) -> Iterator[None]:
    """Replace the simulated driver's file by a device node with the number of nvidiactl."""
    aside = NODE.with_name("file")
    NODE.rename(aside)
    os.mknod(NODE, stat.S_IFCHR | 0o666, os.makedev(195, 255))
    NODE.chmod(0o666)
    yield
    aside.rename(NODE)


def opens(tenant: Tenant, decision: str) -> float:
    labels = frozenset({("tenant", tenant.name), ("decision", decision)})
    return metrics().get(("fgpu_device_opens_without_shim_total", labels), 0)


@pytest.fixture
def deny(write: Write, place: Place) -> Callable[[str], None]:
    """Return a function that puts a policy for all tenants of the place in force."""
    return lambda rest: write(rest, selector=f'{{cgroup: ["{place.group.lstrip("/")}/*"]}}')


@pytest.fixture
def enforced(deny: Callable[[str], None], tenant: Make) -> Callable[[str], Tenant]:
    """Return a function that makes a tenant under a policy, once the policy is in force for it."""

    def make(rest: str = DENY) -> Tenant:
        deny(rest)
        one = tenant(None)
        one.assert_enforced()
        return one

    return make


@pytest.mark.places("cgroups")
@pytest.mark.parametrize("way", sorted(WAYS.keys() - OTHERS))
def test_a_program_around_the_shim_gets_no_device(enforced, tmp_path: Path, way: str) -> None:
    one = enforced()
    tmp_path.chmod(0o755)
    client = Bypass(one, "bypass", WAYS[way](tmp_path))
    if way in HELD:
        assert client.do(f"alloc {100 * MIB}").startswith("ok")
        assert opens(one, "denied") == 0
        return
    for _ in range(2):
        assert client.do(f"alloc {100 * MIB}") == NO_DEVICE
    assert (one.driver(), one.memory()["used_bytes"]) == (0, 2 if way == "lies" else 0)  # it asks for a byte each time
    assert opens(one, "denied") > 0
    told = eventually(lambda: [event for event in events("denied") if event["pid"] == client.pid], 5, "the event")
    assert {(event["tenant"], "may not open nvidiactl" in event["text"]) for event in told} == {(one.name, True)}
    assert "opens of device nodes refused" in fgpu("explain", one.path).stdout
    word = "counted" if way == "lies" else "kernel"
    eventually(lambda: one.view()["enforcement"] == word, 5, f"the tenant as {word}")


@pytest.mark.places("cgroups")
def test_a_program_that_opens_a_node_itself_is_refused(enforced) -> None:
    one = enforced()
    assert Bypass(one, "bypass", WAYS["unset"](Path())).do(f"open {NODE}") == str(errno.EPERM)
    assert opens(one, "denied") == 1


@pytest.mark.places("cgroups")
def test_a_program_that_registers_by_the_shim_s_code_and_does_not_use_the_shim_is_named(enforced) -> None:
    one = enforced()
    assert Bypass(one, "bypass", WAYS["registers"](Path())).do(f"alloc {100 * MIB}") == "ok"
    eventually(lambda: one.view()["bypassing"], 5, "the process in the snapshot")


@pytest.mark.places("host", "cgroups", "runc")
def test_programs_with_the_shim_have_their_limit(deny, tenant: Make, place: Place) -> None:
    deny(DENY)
    _allow_nodes(place)
    one = tenant(LIMIT)
    one.assert_enforced()
    client = one.client()
    with one.growing():
        client.ok(f"alloc {300 * MIB}")
    assert client.do(f"alloc {200 * MIB}") == "CUDA_ERROR_OUT_OF_MEMORY"
    assert one.assert_exact() == CONTEXT + 300 * MIB
    assert f"{LIMIT >> 20}MiB" in one.run("nvidia-smi")
    assert (opens(one, "denied"), opens(one, "would_deny")) == (0, 0)


def _allow_nodes(place: Place) -> None:
    if isinstance(place, Container):
        place.devices.append({"allow": True, "type": "c", "major": 195, "access": "rw"})


@pytest.mark.places("cgroups")
def test_programs_of_cgroups_that_the_agent_has_not_decided_about_get_their_device(deny, tenant: Make) -> None:
    """A policy for the cgroup may come into force while the driver opens its nodes."""
    deny(DENY)
    for _ in range(8):
        client = tenant(None).client()
        client.ok(f"alloc {100 * MIB}")
        client.kill()


LATE = """
import ctypes, sys
nvml, cuda = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.CDLL("libcuda.so.1")
for line in sys.stdin:
    print(nvml.nvmlInit_v2() if line == "nvml\\n" else cuda.cuInit(0), flush=True)
"""


@pytest.mark.places("cgroups")
def test_a_program_that_used_nvml_before_it_was_a_tenant_gets_its_device(deny, tenant: Make, tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    tmp_path.chmod(0o755)
    one = tenant(None)
    program = Program(one, "late", f"/usr/bin/python3 {tmp_path}/late.py")
    program.send("nvml")
    assert program.receive() == "0"
    deny(DENY)
    one.assert_enforced()
    program.send("cuda")
    assert program.receive() == "0"
    assert opens(one, "denied") == 0
    assert program.rest() == ""


@pytest.mark.places("cgroups")
def test_a_program_that_began_before_a_detach_and_a_new_start_gets_its_device(
    service: Service, enforced, tenant: Make, tmp_path: Path
) -> None:
    """The next agent's kernel side knows no announcement of it, and its pages still look valid for two seconds."""
    (tmp_path / "late.py").write_text(LATE)
    tmp_path.chmod(0o755)
    one = enforced()
    program = Program(one, "late", f"/usr/bin/python3 {tmp_path}/late.py")
    program.send("nvml")
    assert program.receive() == "0"
    service.detach()
    service.start_agent()
    one.assert_enforced()
    program.send("cuda")
    assert program.receive() == "0"
    assert opens(one, "denied") == 0


@pytest.mark.places("cgroups")
def test_nvml_without_the_shim_is_refused(enforced) -> None:
    one = enforced()
    assert "Unknown Error" in one.run("env -u LD_PRELOAD nvidia-smi")
    assert opens(one, "denied") > 0


@pytest.mark.places("cgroups")
def test_without_the_policy_opens_are_only_counted(deny, enforced, tenant: Make) -> None:
    one = enforced(DENY.replace("deny", "report"))
    client = Bypass(one, "bypass", WAYS["unset"](Path()))
    assert client.do(f"alloc {100 * MIB}") == "ok"
    assert (opens(one, "denied"), opens(one, "would_deny")) == (0, 1)
    checks = {check["name"]: check for check in json.loads(fgpu("doctor", "--json", check=False).stdout)}
    assert f"would have refused the device in {one.name}" in checks["shim"]["found"]
    deny(f"{DENY}\n  mode: observe")
    other = tenant(None)
    other.view()  # once the agent knows the cgroup: opens of unknown cgroups are not counted
    assert Bypass(other, "bypass", WAYS["unset"](Path())).do(f"alloc {100 * MIB}") == "ok"
    assert (opens(other, "denied"), opens(other, "would_deny")) == (0, 1)


@pytest.mark.places("cgroups")
def test_a_program_that_holds_a_device_already_keeps_it(deny, enforced) -> None:
    one = enforced(DENY.replace("deny", "report"))
    client = Bypass(one, "bypass", WAYS["unset"](Path()))
    assert client.do(f"alloc {100 * MIB}") == "ok"
    one.assert_exact(5)
    deny(DENY)
    assert Bypass(one, "later", WAYS["unset"](Path())).do(f"alloc {100 * MIB}") == NO_DEVICE
    eventually(lambda: client.do(f"open {NODE}") == str(errno.ENXIO), 5, "an exemption, which NVML causes")


@pytest.mark.places("cgroups")
def test_opens_stay_refused_without_an_agent_until_fgpu_is_detached(service: Service, enforced) -> None:
    one = enforced()
    service.kill_agent()
    service.kill_gatekeeper()
    client = Bypass(one, "bypass", WAYS["unset"](Path()))
    assert client.do(f"alloc {100 * MIB}") == NO_DEVICE
    broken = service.policies / "zz.yaml"
    broken.write_text("x: [")
    service.start_agent()
    assert client.do(f"alloc {100 * MIB}") == NO_DEVICE  # the last good policies stay in force
    broken.unlink()
    service.detach()
    assert client.do(f"alloc {100 * MIB}") == "ok"
    service.start_agent()


@pytest.mark.places("cgroups")
def test_processes_outside_tenants_may_open_nodes(enforced) -> None:
    enforced()
    assert f"{SIM}" in ENVIRONMENT["PATH"]
    done = subprocess.run(["nvidia-smi", "-L"], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.places("cgroups")
def test_a_parked_program_may_open_its_device_again(parker: Parker, enforced) -> None:
    """The driver's restore thread, which opens the node, runs in the program itself, which has the shim."""
    one = enforced()
    program = Holder(one, "holder")
    one._programs.append(program)
    one.assert_exact()
    fgpu("park", one.path)
    becomes(one, "parked")
    assert program.is_intact()
    becomes(one, "running")
    one.assert_exact()
    assert opens(one, "denied") == 0
