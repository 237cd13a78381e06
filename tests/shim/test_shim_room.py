"""A request for which the driver has no memory waits while the agent makes room, and is repeated; or it fails."""

import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.shim.orphans_kit import GIB, MEMORY, MIB, OOM, Call, call_while, in_time
from tests.shim.pool_kit import POOLS
from tests.shim.shim_kit import DEADLINE, ROOT, Agent, Build
from tests.support.wait import eventually

pytestmark = pytest.mark.timed

WAITS, HELLO, LACKS = 8, 3, 0x8000
ASKS = "alloc(256 * MiB)"
FULL = "L.fake_result(2)\n"  # CUDA_ERROR_OUT_OF_MEMORY
ROOM_MS = 4800  # a decision of 5 s or more does not count
MOST_LATE_MS = 200  # a program waits 0.5 s for the first decision


class Device:
    """A device without room for a program, until the test frees memory.

    Attributes:
        full: the program's statements that fill the device, and free it at the test's order.
    """

    def __init__(self, order: Path, function: str) -> None:
        self._order = order
        self.full = f"""
L.{function}(2)
def free():
    while not os.path.exists("{order}"): time.sleep(0.005)
    L.{function}(0); os.unlink("{order}")
threading.Thread(target=free, daemon=True).start()
"""

    def free(self) -> None:
        """Free memory, and wait until that has happened."""
        self._order.touch()
        eventually(lambda: not self._order.exists(), DEADLINE, "free memory")


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path / "free", "fake_result")


@pytest.fixture
def waiting(held: Agent) -> Agent:
    """Return the agent with a tenant for which room may be made."""
    let_wait(held)
    return held


def let_wait(agent: Agent) -> None:
    agent.do("limit", limit=GIB, flags=WAITS)


def anew(agent: Agent) -> None:
    """Return the agent to the state of the fixture."""
    agent.do("reset")
    agent.do("start")
    let_wait(agent)


def reports(agent: Agent) -> list[tuple[int, int]]:
    """Return device and bytes of each report of a request that lacks room."""
    return [(c["device"], c["bytes"]) for c in agent.calls(HELLO) if c["flags"] & LACKS]


def make_room(agent: Agent, device: Device) -> float:
    """Have requests wait for 0.4 s or longer, and repeated then.

    Return the moment of the first decision, or a far later one if that decision has expired before the second.
    """
    agent.do("room", ms=ROOM_MS)
    decided = time.monotonic()
    time.sleep(0.4)
    device.free()
    agent.do("room", ms=0)
    return decided if time.monotonic() < decided + ROOM_MS / 1000 - 0.5 else decided + ROOM_MS


def call_in_time(agent: Agent, device: Device, call: str, then: Callable[[], float] | None = None) -> Call:
    """Return a call for which room is made."""

    def trial() -> Call:
        anew(agent)
        return call_while(agent, call, then=then or (lambda: make_room(agent, device)), setup=device.full)

    return in_time(trial, MOST_LATE_MS)


def test_a_request_waits_while_room_is_made_and_is_repeated_then(waiting: Agent, device: Device) -> None:
    result, ms, own_ms, _ = call_in_time(waiting, device, ASKS)
    assert result == 0
    assert ms >= 590
    assert own_ms < 1000
    assert len(waiting.calls(MEMORY)) == 2
    assert {*reports(waiting)} == {(3, 256 * MIB)}
    assert 2 <= len(reports(waiting)) <= 2 + (ms - 400) / 50  # each 50 ms until there is a decision


def test_a_request_fails_if_no_room_will_be_made(waiting: Agent) -> None:
    result, ms, own_ms, _ = call_while(waiting, ASKS, then=lambda: waiting.do("room", ms=0, none=True), setup=FULL)
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
    result, ms, own_ms, _ = call_while(waiting, ASKS, setup=FULL)
    assert (result, len(waiting.calls(MEMORY))) == (OOM, 1)
    assert ms >= 490
    assert own_ms < 600


def test_a_request_fails_after_the_last_decision_of_an_agent_that_has_ended(waiting: Agent) -> None:
    def trial() -> Call:
        anew(waiting)
        return call_while(waiting, ASKS, then=lambda: waiting.do("room", ms=1000), setup=FULL)

    result, ms, own_ms, _ = in_time(trial, MOST_LATE_MS)
    assert (result, len(waiting.calls(MEMORY))) == (OOM, 2)
    assert ms >= 1690
    assert own_ms < 2000


def test_a_program_that_waits_reports_its_request_once_a_second(waiting: Agent, device: Device) -> None:
    """A program without a processor reports less often."""

    def has_three() -> bool:
        waiting.do("room", ms=ROOM_MS)
        return len(reports(waiting)) >= 3

    def free_later() -> None:
        eventually(has_three, 10, "three reports")
        device.free()
        waiting.do("room", ms=0)

    first = partial(waiting.do, "room", ms=ROOM_MS)
    result, ms, *_ = call_while(waiting, ASKS, first=first, then=free_later, setup=device.full)
    assert result == 0
    assert ms >= 1900
    assert 3 <= len(reports(waiting)) <= 2 + ms / 1000


@pytest.mark.parametrize("flags", [0, ~WAITS & 7])
def test_a_request_of_another_tenant_fails_at_once(held: Agent, flags: int) -> None:
    held.do("limit", limit=GIB, flags=flags)
    held.do("room", ms=4000)
    result, _, own_ms, _ = call_while(held, ASKS, setup=FULL)
    assert (result, len(held.calls(MEMORY)), reports(held)) == (OOM, 1, [])
    assert own_ms < 100


def test_a_failure_for_another_reason_is_returned_at_once(waiting: Agent) -> None:
    result, _, own_ms, _ = call_while(waiting, ASKS, setup="L.fake_result(700)\n")
    assert (result, reports(waiting)) == (700, [])
    assert own_ms < 100


def test_a_request_that_is_repeated_needs_an_admission_again(waiting: Agent, device: Device) -> None:
    """Other threads of the tenant may have used its limit meanwhile."""

    def fill_the_limit() -> float:
        waiting.do("limit", limit=GIB, used=GIB, flags=WAITS)
        return make_room(waiting, device)

    assert call_in_time(waiting, device, ASKS, fill_the_limit).result == OOM
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
def test_each_plain_request_is_repeated(waiting: Agent, device: Device, name: str) -> None:
    call = call_in_time(waiting, device, CALLS[name])
    assert call.result == 0
    assert call.ms >= 590
    assert reports(waiting)


def test_a_request_from_a_pool_is_repeated(waiting: Agent, tmp_path: Path) -> None:
    device = Device(tmp_path / "free", "fake_pool_result")
    device.full = POOLS + device.full
    call = call_in_time(waiting, device, "int(new(256 * MiB) < 1000)")
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
