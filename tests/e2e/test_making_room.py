"""Tenants with limits that exceed the device use it in turn (`overcommit: park`): idle tenants are parked for others.

The tests of this file run on a device of 2 GiB, which holds one of their tenants at a time.
"""

from __future__ import annotations

import threading
import time

import pytest

from tests.e2e.making_room_kit import BYTES, DEVICE, STAY, inside, parks, started, texts
from tests.e2e.parking_kit import becomes, state
from tests.support.commands import events, fgpu
from tests.support.host import GIB, MEMORY
from tests.support.place import Cgroups
from tests.support.service import Service, run_on_devices
from tests.support.wait import steadily


@pytest.mark.skipif(MEMORY == DEVICE, reason="this run has this device already")
def test_the_file_s_tests_pass_on_a_small_device() -> None:
    run_on_devices(__file__, 1, DEVICE, 280)


@inside
def test_two_tenants_that_do_not_fit_together_use_the_device_in_turn(turns: Cgroups) -> None:
    alice = started(turns, "alice")
    fgpu("park", alice[0].path)
    worked = time.monotonic()
    pair = [alice, started(turns, "bob")]
    for turn in range(4):
        (tenant, program), (other, _) = pair
        assert program.is_intact()
        before, worked = worked, time.monotonic()
        assert worked - before > STAY - 2, "the other one had not been idle for long enough"
        becomes(tenant, "running")
        assert (tenant.assert_exact(), other.driver(), state(other)) == (BYTES, 0, "parked"), turn
        assert f"to make room for {tenant.name}" in texts("parked", other)[-1]
        pair.reverse()
    assert not [event for what in ("wake failed", "park failed", "parking lost") for event in events(what)]


@inside
@pytest.mark.parametrize("how", ["is idle", "ends"])
def test_a_tenant_waits_for_a_busy_one_until_it_is_idle_or_ends(turns: Cgroups, how: str) -> None:
    alice, program = started(turns, "alice")
    fgpu("park", alice.path)
    bob, rival = started(turns, "bob")
    end = threading.Event()

    def work() -> None:
        while not end.wait(0.5):
            assert rival.do("synchronise()") == 0

    thread = threading.Thread(target=work)
    thread.start()
    try:
        program.send("synchronise()")
        becomes(alice, "waiting")
        steadily(lambda: (state(alice), state(bob)) == ("waiting", "running"), STAY + 2, 30, "a tenant that waits")
        said = f"held by {bob.name} (busy in the last 10 s)"
        assert said in fgpu("explain", alice.path).stdout
        assert said in fgpu("status").stdout
        assert said in texts("wake waits", alice)[-1]
        assert parks(bob) == 0
    finally:
        end.set()
        thread.join()
    if how == "ends":
        rival.close()
    assert program.receive(30) == "0"
    assert program.is_intact()
    assert alice.assert_exact() == BYTES
    assert parks(bob) == (how != "ends")


@inside
def test_a_tenant_whose_policy_does_not_park_it_stays(turns: Cgroups) -> None:
    alice, program = started(turns, "alice")
    fgpu("park", alice.path)
    fixed, holder = started(turns, "fixed")
    program.send("synchronise()")
    becomes(alice, "waiting")
    steadily(lambda: state(alice) == "waiting", STAY + 2, 30, "a tenant that waits")
    assert f"held by {fixed.name} (the policy does not park the tenant)" in fgpu("explain", alice.path).stdout
    assert (parks(fixed), fixed.assert_exact()) == (0, BYTES)
    assert holder.is_intact()
    holder.close()
    assert program.receive(30) == "0"
    assert program.is_intact()


@inside
def test_an_agent_that_starts_makes_room_for_a_tenant_that_waits(turns: Cgroups, service: Service) -> None:
    alice, program = started(turns, "alice")
    fgpu("park", alice.path)
    bob, _ = started(turns, "bob")
    program.send("synchronise()")
    becomes(alice, "waiting")
    service.kill_agent()
    service.start_agent()
    assert program.receive(40) == "0"
    assert program.is_intact()
    assert (alice.assert_exact(), bob.driver(), state(bob)) == (BYTES, 0, "parked")
    assert 2 * BYTES > 2 * GIB
