"""A request that fits only without orphaned memory waits for the release of that memory, as long as this may help."""

import subprocess
import time
from collections.abc import Callable
from functools import partial

import pytest

from tests.shim.orphans_kit import CONTEXT, GIB, MEMORY, MIB, OBSERVE, OOM, PATIENT, call_while
from tests.shim.pool_kit import POOLS
from tests.shim.shim_kit import DEADLINE, ROOT, Agent, Build

pytestmark = pytest.mark.timed

FULL = {"limit": GIB, "used": GIB, "orphaned": GIB // 2, "age_ms": 0}
EMPTY = {"limit": GIB, "used": GIB // 2}


def asked(agent: Agent, kind: int = MEMORY) -> list[bool]:
    """Return for each request of the kind whether it was patient."""
    return [bool(c["flags"] & PATIENT) for c in agent.calls(kind)]


def test_a_request_waits_until_the_device_has_released_memory(held: Agent) -> None:
    held.do("limit", **FULL)
    result, ms, own_ms, _ = call_while(held, "alloc(256 * MiB)", then=lambda: held.do("limit", **EMPTY))
    assert result == 0
    assert ms >= 190
    assert own_ms < 1000
    assert held.do("look")["refused"] == 0
    assert 2 <= len(asked(held)) <= 5 + ms / 50  # about every 50 ms, or later without a processor
    assert asked(held)[:-1] == [True] * (len(asked(held)) - 1)


@pytest.mark.parametrize("age_ms", [0, 3500, 15_000])
def test_a_request_is_refused_once_a_comparison_shows_that_the_device_keeps_the_memory(
    held: Agent, age_ms: int
) -> None:
    first = partial(held.do, "limit", **{**FULL, "age_ms": age_ms})
    then = partial(held.do, "limit", **FULL, looked_ms=-1000)
    result, ms, own_ms, _ = call_while(held, "alloc(256 * MiB)", first=first, then=then)
    assert result == OOM
    assert ms >= 190
    assert own_ms < 300
    assert held.do("look")["refused"] == 1  # counted once, for the last request
    assert asked(held)[-1] is False


def test_a_comparison_before_the_request_does_not_end_the_wait(held: Agent) -> None:
    """The device may have released the memory since."""
    held.do("limit", **{**FULL, "age_ms": 200}, looked_ms=100)
    result, ms, own_ms, _ = call_while(held, "alloc(256 * MiB)", then=lambda: held.do("limit", **EMPTY))
    assert result == 0
    assert ms >= 190
    assert own_ms < 1000


HOPELESS = {
    "it would not fit without them": {"used": GIB, "orphaned": 255 * MIB, "age_ms": 0},
    "the device keeps them": {**FULL, "looked_ms": -1000},
    "they are old, and no agent will look": {**FULL, "age_ms": 30_001},
    "nothing is orphaned": {"used": GIB, "age_ms": 0},
    "they have no age": {"used": GIB, "orphaned": GIB // 2},
}


@pytest.mark.parametrize("why", HOPELESS)
def test_a_request_does_not_wait_if_waiting_cannot_help(held: Agent, why: str) -> None:
    first = partial(held.do, "limit", **{"limit": GIB, **HOPELESS[why]})
    result, _, own_ms, _ = call_while(held, "alloc(256 * MiB)", first=first)
    assert (result, held.do("look")["refused"]) == (OOM, 1)
    assert own_ms < 100
    assert len(asked(held)) <= 2


def test_a_request_does_not_wait_for_an_observing_level(held: Agent) -> None:
    held.do("limit", **FULL, flags=OBSERVE)
    assert held.python("out(alloc(256 * MiB))") == [[OOM]]  # this kernel side counts it nevertheless
    assert asked(held) == [False]


def test_a_request_waits_if_only_the_outer_level_is_full(held: Agent) -> None:
    held.do("set", levels=2)
    held.do("limit", level=1, **FULL)
    held.do("knobs", outer=1)
    result, ms, own_ms, _ = call_while(held, "alloc(256 * MiB)", then=lambda: held.do("limit", level=1, **EMPTY))
    assert result == 0
    assert ms >= 190
    assert own_ms < 1000


def test_a_request_is_made_three_times_if_the_kernel_refuses_room_that_the_page_shows(held: Agent) -> None:
    held.do("knobs", fixed=1)
    held.do("limit", limit=GIB, used=0, orphaned=0)
    held.do("limit", **{**FULL, "used": GIB // 2, "orphaned": 1})
    result, _, own_ms, _ = call_while(held, "alloc(256 * MiB)")
    assert result == OOM
    assert own_ms < 100
    assert asked(held) == [True, True, False]


def test_a_context_waits_for_orphaned_memory(held: Agent) -> None:
    held.do("knobs", fixed=1)
    held.do("limit", **FULL)
    call = "L.cuDevicePrimaryCtxRetain(C.byref(C.c_void_p()), 0)"
    result, ms, own_ms, _ = call_while(held, call, then=lambda: held.do("knobs"))
    assert result == 0
    assert ms >= 190
    assert own_ms < 1000
    assert asked(held, CONTEXT)[0]


def test_a_pool_waits_for_orphaned_memory(held: Agent) -> None:
    held.do("limit", **FULL)
    call = "int(new(256 * MiB) < 1000)"
    result, ms, own_ms, _ = call_while(held, call, then=lambda: held.do("limit", **EMPTY), setup=POOLS)
    assert result == 0
    assert ms >= 190
    assert own_ms < 1000


def test_a_request_waits_without_comparisons_until_the_orphaned_memory_is_30_s_old(held: Agent) -> None:
    set_at = time.monotonic()
    held.do("limit", **{**FULL, "age_ms": 29_000})
    result, _, own_ms, _ = call_while(held, "alloc(256 * MiB)")
    assert time.monotonic() - set_at >= 1
    assert result == OOM
    assert own_ms < 1500


def test_a_request_waits_for_a_second_after_any_program_of_the_level_has_freed_memory_unseen(held: Agent) -> None:
    set_at = time.monotonic()
    held.do("limit", limit=GIB, used=GIB, freed_ms=0)
    result, _, own_ms, _ = call_while(held, "alloc(256 * MiB)")
    assert time.monotonic() - set_at >= 1
    assert result == OOM
    assert own_ms < 1500


@pytest.mark.parametrize("ahead_ms", [2000, 100_000])
def test_a_request_does_not_wait_for_a_free_in_the_future(held: Agent, ahead_ms: int) -> None:
    """The page has the time by another clock if the process is in a time namespace."""
    first = partial(held.do, "limit", limit=GIB, used=GIB, freed_ms=-ahead_ms)
    result, _, own_ms, _ = call_while(held, "alloc(256 * MiB)", first=first)
    assert result == OOM
    assert own_ms < 300


def test_a_pool_with_two_requests_waits_once(held: Agent) -> None:
    """The pool requests less if a whole block is refused. Both requests together wait as long as one."""
    held.do("limit", **{**FULL, "age_ms": -100_000})
    result, ms, own_ms, _ = call_while(held, "new(256 * MiB)", setup=POOLS)
    assert result == OOM
    assert ms >= 3900
    assert own_ms < 4500
    assert held.do("look")["refused"] >= 1


def test_unused_pool_memory_is_released_before_a_request_waits(held: Agent) -> None:
    held.do("limit", limit=GIB, used=GIB // 2, orphaned=GIB // 2, age_ms=0)
    setup = POOLS + "p = new(448 * MiB); drop(p)\n"
    result, _, own_ms, _ = call_while(held, "(L.fake_sync(), alloc(448 * MiB))[1]", setup=setup)
    assert result == 0
    assert own_ms < 100


def test_signals_do_not_end_a_wait_for_orphaned_memory_and_errno_is_kept(held: Agent) -> None:
    held.do("limit", **FULL)
    setup = """
import signal
seen = []
signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
def call():
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01); C.set_errno(77)
    r = alloc(256 * MiB); e = C.get_errno()
    signal.setitimer(signal.ITIMER_REAL, 0)
    return r or (0 if e == 77 and seen else 1000)
"""
    result, ms, own_ms, _ = call_while(held, "call()", then=lambda: held.do("limit", **EMPTY), setup=setup)
    assert result == 0
    assert ms >= 190
    assert own_ms < 1000


def test_waiting_threads_share_the_released_memory(held: Agent) -> None:
    """Eight threads request room, and four of them fit. Those are admitted, and the others are refused in time."""
    held.do("limit", **{**FULL, "age_ms": 3000})
    script = """
got = []
def work(): got.append(alloc(128 * MiB))
ts = [threading.Thread(target=work) for _ in range(8)]
out("ready"); [t.start() for t in ts]; [t.join() for t in ts]; out(sorted(got))
"""
    with held.start_python(script) as program:
        assert program.stdout.readline() == '["ready"]\n'
        time.sleep(0.2)
        held.do("limit", **EMPTY)
        assert program.communicate(timeout=DEADLINE)[0] == f"[[0, 0, 0, 0, {', '.join([str(OOM)] * 4)}]]\n"


def test_requests_keep_the_rules_of_waiting_with_any_pages_and_verdicts(
    build: Build, scale: Callable[[int, int, int], int]
) -> None:
    flags = (f"-I{ROOT}/shim", f"-I{ROOT}/bpf", "-O2", "-fsanitize=undefined", "-fno-sanitize-recover=all")
    program = build.compile("orphans.c", "orphans", *flags)
    done = subprocess.run(
        [program, str(scale(3000, 30_000, 3_000_000))], capture_output=True, text=True, timeout=DEADLINE
    )
    assert (done.returncode, done.stderr) == (0, ""), done
