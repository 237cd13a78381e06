"""A request for which the driver has no memory waits while the agent makes room, and is repeated; or it fails."""

import subprocess
import time
from collections.abc import Callable

import pytest

from tests.shim.orphans_kit import GIB, MEMORY, MIB, OOM, call_while
from tests.shim.pool_kit import POOLS
from tests.shim.shim_kit import DEADLINE, ROOT, Agent, Build

pytestmark = pytest.mark.timed

WAITS, HELLO, LACKS = 8, 3, 0x8000
ASKS = "alloc(256 * MiB)"
FULL = "L.fake_result(2)\n"  # CUDA_ERROR_OUT_OF_MEMORY
# The same, until 0.35 s have passed. The program's own start of the time is earlier than that of the test.
FREED_SOON = f"{FULL}threading.Timer(0.35, L.fake_result, (0,)).start()\n"


@pytest.fixture
def waiting(held: Agent) -> Agent:
    """Return the agent with a tenant for which room may be made."""
    held.do("limit", limit=GIB, flags=WAITS)
    return held


def reports(agent: Agent) -> list[tuple[int, int]]:
    """Return device and bytes of each report of a request that lacks room."""
    return [(c["device"], c["bytes"]) for c in agent.calls(HELLO) if c["flags"] & LACKS]


def make_room(agent: Agent) -> None:
    """Have requests wait for 0.4 s, and repeated then."""
    agent.do("room", ms=4000)
    time.sleep(0.4)
    agent.do("room", ms=0)


def test_a_request_waits_while_room_is_made_and_is_repeated_then(waiting: Agent) -> None:
    result, ms, own_ms = call_while(waiting, ASKS, then=lambda: make_room(waiting), setup=FREED_SOON)
    assert result == 0
    assert ms >= 590
    assert own_ms < 1000
    assert len(waiting.calls(MEMORY)) == 2
    assert {*reports(waiting)} == {(3, 256 * MIB)}
    assert 2 <= len(reports(waiting)) <= 2 + (ms - 400) / 50  # each 50 ms until there is a decision


def test_a_request_fails_if_no_room_will_be_made(waiting: Agent) -> None:
    result, ms, own_ms = call_while(waiting, ASKS, then=lambda: waiting.do("room", ms=0, none=True), setup=FULL)
    assert (result, len(waiting.calls(MEMORY))) == (OOM, 1)
    assert ms >= 190
    assert own_ms < 300


DECISIONS: dict[str, Callable[[Agent], object]] = {
    "none": lambda _: None,
    "an earlier one": lambda agent: agent.do("room", ms=-10),
    "an earlier one that no room will be made": lambda agent: agent.do("room", ms=-10, none=True),
    "one by another clock": lambda agent: agent.do("room", ms=100_000),
}


@pytest.mark.parametrize("decision", DECISIONS)
def test_a_request_fails_after_half_a_second_without_a_decision(waiting: Agent, decision: str) -> None:
    DECISIONS[decision](waiting)
    result, ms, own_ms = call_while(waiting, ASKS, setup=FULL)
    assert (result, len(waiting.calls(MEMORY))) == (OOM, 1)
    assert ms >= 490
    assert own_ms < 600


def test_a_request_fails_after_the_last_decision_of_an_agent_that_has_ended(waiting: Agent) -> None:
    result, ms, own_ms = call_while(waiting, ASKS, then=lambda: waiting.do("room", ms=1000), setup=FULL)
    assert (result, len(waiting.calls(MEMORY))) == (OOM, 2)
    assert ms >= 1690
    assert own_ms < 2000


def test_a_program_that_waits_reports_its_request_once_a_second(waiting: Agent) -> None:
    setup = f"{FULL}threading.Timer(2, L.fake_result, (0,)).start()\n"
    result, ms, _ = call_while(waiting, ASKS, first=lambda: waiting.do("room", ms=3500), setup=setup)
    assert result == 0
    assert ms >= 3000
    assert 3 <= len(reports(waiting)) <= 5


@pytest.mark.parametrize("flags", [0, ~WAITS & 7])
def test_a_request_of_another_tenant_fails_at_once(held: Agent, flags: int) -> None:
    held.do("limit", limit=GIB, flags=flags)
    held.do("room", ms=4000)
    result, _, own_ms = call_while(held, ASKS, setup=FULL)
    assert (result, len(held.calls(MEMORY)), reports(held)) == (OOM, 1, [])
    assert own_ms < 100


def test_a_failure_for_another_reason_is_returned_at_once(waiting: Agent) -> None:
    result, _, own_ms = call_while(waiting, ASKS, setup="L.fake_result(700)\n")
    assert (result, reports(waiting)) == (700, [])
    assert own_ms < 100


def test_a_request_that_is_repeated_needs_an_admission_again(waiting: Agent) -> None:
    """Other threads of the tenant may have used its limit meanwhile."""

    def fill_the_limit() -> None:
        waiting.do("limit", limit=GIB, used=GIB, flags=WAITS)
        make_room(waiting)

    assert call_while(waiting, ASKS, then=fill_the_limit, setup=FREED_SOON).result == OOM
    assert waiting.do("look")["refused"] == 1


WORD = "C.byref(C.c_uint64())"
DESCRIPTION = "(C.c_uint64 * 8)(64, 64, 1 << 32 | 32)"  # 64 x 64, one channel of 32 bits
CALLS = {
    "cuMemAlloc": f"L.cuMemAlloc({WORD}, 1 << 20)",
    "cuMemAllocPitch_v2": f"L.cuMemAllocPitch_v2({WORD}, {WORD}, C.c_size_t(1024), C.c_size_t(1024), 4)",
    "cuMemAllocPitch": f"L.cuMemAllocPitch({WORD}, {WORD}, 1024, 1024, 4)",
    "cuMemCreate": f"L.cuMemCreate({WORD}, C.c_size_t(2 << 20), (C.c_uint32 * 8)(1, 0, 1, 0), C.c_uint64(0))",
    "cuArrayCreate_v2": f"L.cuArrayCreate_v2({WORD}, {DESCRIPTION})",
}


@pytest.mark.parametrize("name", CALLS)
def test_each_plain_request_is_repeated(waiting: Agent, name: str) -> None:
    call = call_while(waiting, CALLS[name], then=lambda: make_room(waiting), setup=FREED_SOON)
    assert call.result == 0
    assert call.ms >= 590
    assert reports(waiting)


def test_a_request_from_a_pool_is_repeated(waiting: Agent) -> None:
    setup = f"{POOLS}L.fake_pool_result(2)\nthreading.Timer(0.35, L.fake_pool_result, (0,)).start()\n"
    call = call_while(waiting, "int(new(256 * MiB) < 1000)", then=lambda: make_room(waiting), setup=setup)
    assert call.result == 0
    assert call.ms >= 590
    assert {*reports(waiting)} == {(3, 256 * MIB)}


def test_managed_memory_is_not_waited_for(waiting: Agent) -> None:
    """It is not bound by the device."""
    call = call_while(waiting, f"L.cuMemAllocManaged({WORD}, C.c_size_t(1 << 20), 1)", setup=FULL)
    assert (call.result, reports(waiting)) == (OOM, [])
    assert call.own_ms < 100


def test_requests_keep_the_rules_of_waiting_with_any_pages(build: Build, scale: Callable[[int, int, int], int]) -> None:
    flags = (f"-I{ROOT}/shim", f"-I{ROOT}/bpf", "-O2", "-fsanitize=undefined", "-fno-sanitize-recover=all")
    program = build.compile("room.c", "room", *flags)
    done = subprocess.run(
        [program, str(scale(3000, 30_000, 300_000))], capture_output=True, text=True, timeout=DEADLINE
    )
    assert (done.returncode, done.stderr) == (0, ""), done
