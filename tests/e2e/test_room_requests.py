"""A request for memory that finds the device full waits while idle tenants are parked (`overcommit: park`), or fails.

The tests of this file run on a device of 2 GiB.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.e2e.making_room_kit import BYTES, DEVICE, PATIENCE, STAY, entered, inside, parks, started, texts
from tests.e2e.parking_kit import HELD, Holder, Parker, state
from tests.support.host import CONTEXT, MEMORY, MIB
from tests.support.place import Cgroups
from tests.support.service import Service, run_on_devices
from tests.support.tenant import Tenant
from tests.support.wait import Deadline, eventually

MORE = 512 * MIB  # fits in a limit, and not on the device beside BYTES and a context
OUT_OF_MEMORY = 2


@pytest.mark.skipif(MEMORY == DEVICE, reason="this run has this device already")
def test_the_file_s_tests_pass_on_a_small_device() -> None:
    run_on_devices(__file__, 1, DEVICE, 200)


@pytest.fixture
def pair(turns: Cgroups) -> tuple[tuple[Tenant, Holder], tuple[Tenant, Holder]]:
    """Return alice with BYTES, and bob with a context and HELD: both fit on the device."""
    bob = entered(turns, "bob")
    return started(turns, "alice"), bob


def asks(program: Holder, line: str = f"alloc({MORE})[0]", seconds: float = 40) -> tuple[int, float]:
    """Return the result of a request for memory, and how long it took."""
    begun = time.monotonic()
    return program.do(line, seconds), time.monotonic() - begun


@inside
@pytest.mark.parametrize("call", ["alloc", "from_pool", "create"])
def test_a_request_waits_while_an_idle_tenant_is_parked_for_it(
    pair: tuple[tuple[Tenant, Holder], ...], call: str
) -> None:
    (alice, held), (bob, program) = pair
    time.sleep(STAY + 2)
    assert asks(program, f"{call}({MORE})[0]")[0] == 0
    assert (bob.assert_exact(), alice.driver(), state(alice)) == (CONTEXT + HELD + MORE, 0, "parked")
    assert f"to make room for {bob.name}" in texts("parked", alice)[-1]
    assert texts("memory waits", bob)
    assert program.is_intact()
    assert held.is_intact()
    assert alice.assert_exact() == BYTES


@inside
def test_a_request_fails_within_a_second_if_no_tenant_can_be_parked(pair: tuple[tuple[Tenant, Holder], ...]) -> None:
    (alice, held), (bob, program) = pair
    assert held.do("synchronise()") == 0
    deadline = Deadline(1)
    assert asks(program)[0] == OUT_OF_MEMORY
    assert not deadline.is_over()
    assert f"{alice.name} (busy in the last 10 s)" in texts("no room made", bob)[-1]
    assert (state(alice), parks(alice), bob.assert_exact()) == ("running", 0, CONTEXT + HELD)


@inside
def test_a_request_fails_soon_after_the_end_of_the_agent_that_made_room_for_it(
    service: Service, room_parker: Parker, pair: tuple[tuple[Tenant, Holder], ...]
) -> None:
    (_, held), (bob, program) = pair
    time.sleep(STAY + 2)
    with room_parker.stopped():
        program.send(f"alloc({MORE})[0]")
        eventually(lambda: texts("memory waits", bob), 5, "a request that waits")
        service.kill_agent()
        deadline = Deadline(6.5)
        assert program.receive(60) == str(OUT_OF_MEMORY)
        assert not deadline.is_over()
    service.start_agent()
    assert held.is_intact()
    assert program.is_intact()


@inside
def test_a_request_waits_while_the_agent_makes_room(
    room_parker: Parker, pair: tuple[tuple[Tenant, Holder], ...]
) -> None:
    """Longer than a decision of the agent is in force."""
    program = pair[1][1]
    time.sleep(STAY + 2)
    with room_parker.stopped():
        program.send(f"alloc({MORE})[0]")
        time.sleep(8)
    assert program.receive(20) == "0"


@inside
def test_a_request_waits_no_longer_than_its_policy_permits(turns: Cgroups, room_parker: Parker) -> None:
    carol, program = entered(turns, "carol")
    started(turns, "alice")
    time.sleep(STAY + 2)
    with room_parker.stopped():
        deadline = Deadline(PATIENCE + 2)
        result, seconds = asks(program)
    assert (result, seconds >= PATIENCE, deadline.is_over()) == (OUT_OF_MEMORY, True, False)
    assert "memory.park.deadline has passed: " in texts("no room made", carol)[-1]


@pytest.fixture
def allowing(service: Service) -> Iterator[None]:
    """Have the agent run with `overcommit: allow`."""
    said = service.config.read_text()
    service.config.write_text(said.replace("overcommit: park", "overcommit: allow"))
    service.kill_agent()
    service.start_agent()
    yield
    service.config.write_text(said)
    service.kill_agent()
    service.start_agent()


@inside
def test_a_request_fails_at_once_where_idle_tenants_are_not_parked_for_others(
    pair: tuple[tuple[Tenant, Holder], ...], allowing: None
) -> None:
    (alice, _), (bob, program) = pair
    time.sleep(STAY + 2)
    times = []
    for _ in range(5):
        result, seconds = asks(program)
        assert result == OUT_OF_MEMORY
        times.append(seconds)
    assert min(times) < 0.1
    assert (parks(alice), texts("memory waits", bob), texts("no room made", bob)) == (0, [], [])
