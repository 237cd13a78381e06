"""Idle tenants are parked and woken with their data, and the ledger agrees with the driver at each moment."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.parking_kit import (
    HELD,
    Holder,
    Parker,
    becomes,
    device_bytes,
    parked_bytes,
    refusal,
    state,
)
from tests.support.commands import events, fgpu, metrics, output
from tests.support.host import CONTEXT, GIB, MIB, REFUSED
from tests.support.place import Cgroups, Place
from tests.support.service import Service
from tests.support.tenant import Tenant
from tests.support.wait import eventually, steadily

LIMIT = 2 * GIB
OUT_OF_MEMORY = 2
BYTES = CONTEXT + HELD


@pytest.fixture
def host(parker: Parker, unharmed: None, tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.close()


@pytest.fixture
def one(host: Place) -> Tenant:
    return host.tenant(LIMIT)


def holder(tenant: Tenant, name: str = "h1") -> Holder:
    made = Holder(tenant, name)
    tenant._programs.append(made)
    tenant.assert_exact()
    tenant.assert_enforced()
    return made


def assert_parked(tenant: Tenant, bytes_: int = BYTES) -> None:
    """Check that the tenant stays parked, its charge is kept apart, and the driver holds nothing of it."""
    steadily(lambda: state(tenant) == "parked", 1.2, what=f"{tenant.name} parked")
    eventually(lambda: tenant.memory()["drift_bytes"] == 0, 5, "a comparison with the driver")
    memory = tenant.memory()
    assert (memory["used_bytes"], memory["parked_bytes"]) == (0, bytes_), memory
    assert tenant.driver() == 0


def assert_running(tenant: Tenant, bytes_: int = BYTES) -> None:
    becomes(tenant, "running")
    assert tenant.assert_exact() == bytes_
    assert parked_bytes(tenant) == 0


def test_a_tenant_is_parked_and_woken_by_hand_with_its_data(one: Tenant) -> None:
    program = holder(one)
    eventually(lambda: device_bytes() >= BYTES, 5, "a device that holds the tenant")
    said = fgpu("park", one.name).stdout
    assert said.startswith(f"{one.name}: parked, 582MiB in "), said
    assert_parked(one)
    eventually(lambda: device_bytes() < BYTES, 5, "a device that holds nothing of the tenant")
    assert "parked, for" in fgpu("status").stdout
    assert "parking: parked" in fgpu("explain", one.name).stdout
    said = fgpu("wake", one.name).stdout
    assert said.startswith(f"{one.name}: woken, 582MiB in "), said
    assert_running(one)
    assert program.is_intact()
    assert program.do(f"free({program.pointer})") == 0
    assert one.assert_exact() == CONTEXT
    counts, own = metrics(), frozenset({("tenant", one.name)})
    assert [counts[f"fgpu_tenant_{what}_total", own] for what in ("parks", "wakes")] == [1.0, 1.0]
    assert [e["tenant"] for e in events("parked")][-1:] == [e["tenant"] for e in events("woken")][-1:] == [one.name]


@pytest.mark.parametrize("call", ["synchronise()", f"alloc({MIB * 2})[0]", "write(pointer, 4096)", "free(pointer)"])
def test_a_call_wakes_a_parked_tenant(one: Tenant, call: str) -> None:
    program = holder(one)
    fgpu("park", one.name)
    assert_parked(one)
    assert program.do(call.replace("pointer", str(program.pointer))) == 0
    becomes(one, "running")
    one.assert_exact()
    if "free" not in call:
        assert program.is_intact()


def test_a_new_process_of_the_tenant_cannot_take_the_room_of_a_parked_one(service: Service, one: Tenant) -> None:
    """The agent is stopped meanwhile, because a call of the new process may wake the tenant."""
    program = holder(one)
    fgpu("park", one.name)
    assert_parked(one)
    assert service.agent
    service.agent.send_signal(signal.SIGSTOP)
    try:
        new = one.client()
        assert new.do(f"alloc {LIMIT - BYTES - CONTEXT + 2 * MIB}") == REFUSED
        new.ok(f"alloc {LIMIT - BYTES - CONTEXT}")
        assert new.do(f"alloc {2 * MIB}") == REFUSED
    finally:
        service.agent.send_signal(signal.SIGCONT)
    assert program.is_intact()
    assert_running(one, LIMIT)


def test_a_call_of_a_new_process_wakes_the_tenant_if_the_shim_holds_it_back(one: Tenant) -> None:
    program = holder(one)
    fgpu("park", one.name)
    assert_parked(one)
    assert holder(one, "h2").do("synchronise()") == 0
    assert_running(one, 2 * BYTES)
    assert program.is_intact()


def test_both_processes_of_a_tenant_are_parked_together(one: Tenant) -> None:
    first, second = holder(one), holder(one, "h2")
    fgpu("park", one.name)
    assert_parked(one, 2 * BYTES)
    assert second.is_intact()
    assert_running(one, 2 * BYTES)
    assert first.is_intact()


def test_a_tenant_waits_for_room_in_its_group(parker: Parker, unharmed: None, tmp_path: Path) -> None:
    place = Cgroups(tmp_path)
    try:
        one, other = place.tenant(LIMIT), place.tenant(LIMIT)
        fgpu("set", place.group, "--memory", f"{BYTES + CONTEXT}B")
        program = holder(one)
        fgpu("park", one.path)
        assert_parked(one)
        rival = other.client()
        rival.ok(f"alloc {HELD}")
        program.send("synchronise()")
        becomes(one, "waiting")
        said = fgpu("explain", one.path).stdout
        assert f"group {os.path.basename(place.group)} has 582MiB of" in said, said
        assert parked_bytes(one) == BYTES
        rival.kill()
        assert program.receive(20) == "0"
        assert_running(one)
        assert program.is_intact()
    finally:
        place.close()


def test_a_tenant_waits_for_room_on_the_device_if_the_limits_exceed_it(host: Place, one: Tenant) -> None:
    """The driver may not be able to restore a process after a restore without room."""
    program, other = holder(one), host.tenant(64 * GIB)
    fgpu("park", one.path)
    assert_parked(one)
    rival = other.client()
    rival.ok("context")
    eventually(lambda: device_bytes() >= CONTEXT, 5, "the context in NVML's figure")
    rival.ok(f"alloc {16 * GIB - device_bytes() - 32 * MIB}")
    program.send("synchronise()")
    becomes(one, "waiting")
    steadily(lambda: state(one) == "waiting", 1.5, what="no attempt to restore")
    assert re.search(r"gpu 0 has \d+(\.\d)?MiB free, and 582MiB are needed", fgpu("explain", one.path).stdout)
    assert [e["tenant"] for e in events("wake waits")].count(one.name) == 1
    assert not [e for e in events("wake failed") if e["tenant"] == one.name]
    rival.kill()
    assert program.receive(20) == "0"
    assert_running(one)
    assert program.is_intact()


@pytest.mark.parametrize("how", ["kill", "execute()"])
def test_a_parked_process_that_ends_leaves_nothing(one: Tenant, how: str) -> None:
    program = holder(one)
    fgpu("park", one.name)
    assert_parked(one)
    if how == "kill":
        os.kill(program.pid, signal.SIGKILL)
    else:
        program.send(how)
    becomes(one, "running")
    kinds = ("used_bytes", "parked_bytes", "orphaned_bytes")
    eventually(lambda: not any(one.memory()[kind] for kind in kinds), 10, "a tenant without a charge")
    assert one.driver() == 0


def test_a_child_of_a_parked_process_changes_nothing(one: Tenant) -> None:
    program = holder(one)
    fgpu("park", one.name)
    child = program.do("fork()")
    assert_parked(one)
    os.kill(child, signal.SIGKILL)
    assert program.is_intact()
    assert_running(one)


def test_an_agent_that_starts_knows_parked_tenants(service: Service, one: Tenant) -> None:
    program = holder(one)
    fgpu("park", one.name)
    service.kill_agent()
    service.start_agent()
    becomes(one, "parked")
    assert_parked(one)
    service.kill_agent()
    program.send("synchronise()")
    service.start_agent()
    assert program.receive(20) == "0"
    assert_running(one)
    assert program.is_intact()


def test_a_tenant_that_loses_its_limit_keeps_its_level_until_it_runs(
    service: Service, parker: Parker, host: Place, one: Tenant
) -> None:
    """The shim needs its level to hold back the calls that end a parked process."""
    program = holder(one)
    fgpu("park", one.path)
    assert_parked(one)
    parker.kill()
    fgpu("unset", one.path)
    becomes(one, "waiting")
    assert parked_bytes(one) == BYTES
    program.send("query()")
    steadily(lambda: state(one) == "waiting", 1.2, what="a call that waits")
    parker.start()
    assert program.receive(20) == "0"
    assert program.is_intact()
    eventually(lambda: one.path not in [t["path"] for t in output("status")["tenants"]], 10, "the end of the limit")


def test_a_tenant_waits_for_the_parker(parker: Parker, one: Tenant) -> None:
    program = holder(one)
    fgpu("park", one.name)
    parker.kill()
    try:
        program.send("synchronise()")
        becomes(one, "waiting")
        assert "the parker does not run" in fgpu("explain", one.name).stdout
        assert parked_bytes(one) == BYTES
    finally:
        parker.start()
    assert program.receive(20) == "0"
    assert_running(one)
    assert program.is_intact()


def test_refusals_name_their_reason(one: Tenant) -> None:
    one.view()
    assert "no process of the tenant holds device memory" in refusal("park", one.name)
    assert f"{one.name} is not parked" in refusal("wake", one.name)
    program = holder(one)
    assert program.do(f"managed({MIB * 2})") == 0
    assert "has managed memory" in refusal("park", one.name)
    assert "cannot be parked now" in fgpu("explain", one.name).stdout
    assert fgpu("park", "no-such-tenant", check=False).returncode == 4


def test_all_parked_tenants_are_woken_by_one_command(host: Place, one: Tenant) -> None:
    other = host.tenant(LIMIT)
    programs = [holder(one), holder(other)]
    for tenant in (one, other):
        fgpu("park", tenant.name)
        assert_parked(tenant)
    done = fgpu("wake", "--all")
    assert done.stdout == "no tenant is parked\n"
    assert sorted(done.stderr.split("\n")[:2]) == sorted(f"fgpu: waking {tenant.name}" for tenant in (one, other))
    for tenant in (one, other):
        assert_running(tenant)
    assert all(program.is_intact() for program in programs)
    assert fgpu("wake", "--all").stderr == ""


@pytest.mark.parametrize("has_agent", [True, False])
def test_detach_wakes_parked_tenants(service: Service, parker: Parker, one: Tenant, has_agent: bool) -> None:
    program = holder(one)
    fgpu("park", one.name)
    assert_parked(one)
    if not has_agent:
        service.kill_agent()
    try:
        assert fgpu("detach").stdout.startswith("detached: ")
        assert one.driver() == BYTES, "nothing would wake the tenant"
        assert program.is_intact()
    finally:
        parker.kill()  # its socket was removed
        parker.start()
        service.kill_agent()
        service.start_agent()


def test_without_an_agent_a_command_wakes_a_tenant_and_charges_it(service: Service, one: Tenant) -> None:
    program = holder(one)
    free = program.do("free_bytes()")
    fgpu("park", one.name)
    service.kill_agent()
    try:
        assert fgpu("wake", "--all").stdout == "no tenant is parked\n"
        assert one.driver() == BYTES
        assert program.is_intact()
        assert program.do("free_bytes()") == free, "the limit holds before an agent starts"
        assert program.do(f"alloc({LIMIT - BYTES + 2 * MIB})[0]") == OUT_OF_MEMORY
    finally:
        service.start_agent()
    assert_running(one)


@pytest.mark.parametrize("has_agent", [True, False])
def test_detach_removes_nothing_while_a_tenant_cannot_be_woken(
    service: Service, parker: Parker, one: Tenant, has_agent: bool
) -> None:
    program = holder(one)
    fgpu("park", one.name)
    assert_parked(one)
    if not has_agent:
        service.kill_agent()
    parker.kill()
    try:
        for command in (["detach"], ["wake", "--all"]):
            done = fgpu(*command, check=False)
            assert (done.returncode, done.stdout) == (5, ""), done
            assert "the parker does not run" in done.stderr
    finally:
        parker.start()
        service.stand()
    assert program.is_intact()
    assert_running(one)


def test_parking_is_off_unless_it_is_turned_on(service: Service, one: Tenant) -> None:
    program = holder(one)
    fgpu("park", one.name)
    said = service.config.read_text()
    service.config.write_text(said.replace("parking: on", "parking: off"))
    service.kill_agent()
    service.start_agent()
    try:
        assert_running(one)
        assert "parking is off" in refusal("park", one.name)
    finally:
        service.config.write_text(said)
        service.kill_agent()
        service.start_agent()
    assert program.is_intact()
