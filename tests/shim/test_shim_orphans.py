"""A request that fits but for memory of exited processes waits for that memory, as long as it may help."""

import subprocess
import time
from collections.abc import Callable

import pytest

from tests.shim.orphans_kit import CONTEXT, GIB, MEMORY, MIB, OBSERVE, OOM, PATIENT, call_while
from tests.shim.pool_kit import POOLS
from tests.shim.shim_kit import DEADLINE, ROOT, Agent, Build

FULL = {"limit": GIB, "used": GIB, "orphaned": GIB // 2, "age_ms": 0}
EMPTY = {"limit": GIB, "used": GIB // 2}


def asked(agent: Agent, kind: int = MEMORY) -> list[bool]:
    """Return for each request of the kind whether it was patient."""
    return [bool(c["flags"] & PATIENT) for c in agent.calls(kind)]


def test_waits_until_the_device_has_released_memory(held: Agent) -> None:
    held.do("limit", **FULL)
    result, ms = call_while(held, "alloc(256 * MiB)", then=lambda: held.do("limit", **EMPTY))
    assert result == 0
    assert 190 <= ms < 1000
    assert held.do("look")["refused"] == 0
    assert 3 <= len(asked(held)) <= 9  # every 50 ms or so
    assert asked(held)[:-1] == [True] * (len(asked(held)) - 1)


@pytest.mark.parametrize("age_ms", [0, 3500, 29_000])
def test_memory_that_the_device_keeps_is_a_refusal_once_the_agent_has_seen_it(held: Agent, age_ms: int) -> None:
    held.do("limit", **{**FULL, "age_ms": age_ms})
    result, ms = call_while(held, "alloc(256 * MiB)", then=lambda: held.do("limit", **FULL, looked_ms=-1000))
    assert result == OOM
    assert 190 <= ms < 300
    assert held.do("look")["refused"] == 1  # counted once, for the last request
    assert asked(held)[-1] is False


def test_a_look_before_the_request_is_not_enough(held: Agent) -> None:
    """The memory may have been released since."""
    held.do("limit", **{**FULL, "age_ms": 200}, looked_ms=100)
    result, ms = call_while(held, "alloc(256 * MiB)", then=lambda: held.do("limit", **EMPTY))
    assert result == 0
    assert 190 <= ms < 1000


HOPELESS = {
    "it would not fit without them": {"used": GIB, "orphaned": 255 * MIB, "age_ms": 0},
    "the device keeps them": {**FULL, "looked_ms": -1000},
    "they are old, and no agent will look": {**FULL, "age_ms": 30_001},
    "nothing is orphaned": {"used": GIB, "age_ms": 0},
    "they are said to be of no time": {"used": GIB, "orphaned": GIB // 2},
}


@pytest.mark.parametrize("why", HOPELESS)
def test_does_not_wait_where_it_cannot_help(held: Agent, why: str) -> None:
    held.do("limit", **{"limit": GIB, **HOPELESS[why]})
    result, ms = call_while(held, "alloc(256 * MiB)")
    assert (result, held.do("look")["refused"]) == (OOM, 1)
    assert ms < 100
    assert len(asked(held)) <= 2


def test_a_level_that_only_observes_is_not_waited_for(held: Agent) -> None:
    held.do("limit", **FULL, flags=OBSERVE)
    assert held.python("out(alloc(256 * MiB))") == [[OOM]]  # counted by this kernel all the same
    assert asked(held) == [False]


def test_the_outer_level_may_be_the_one_that_is_full(held: Agent) -> None:
    held.do("set", levels=2)
    held.do("limit", level=1, **FULL)
    held.do("knobs", outer=1)
    result, ms = call_while(held, "alloc(256 * MiB)", then=lambda: held.do("limit", level=1, **EMPTY))
    assert result == 0
    assert 190 <= ms < 1000


def test_room_that_the_page_shows_and_the_kernel_does_not_give_is_asked_for_twice(held: Agent) -> None:
    held.do("knobs", fixed=1)
    held.do("limit", limit=GIB, used=0, orphaned=0)
    held.do("limit", **{**FULL, "used": GIB // 2, "orphaned": 1})
    result, ms = call_while(held, "alloc(256 * MiB)")
    assert result == OOM
    assert ms < 100
    assert asked(held) == [True, True, False]


def test_a_context_waits_too(held: Agent) -> None:
    held.do("knobs", fixed=1)
    held.do("limit", **FULL)
    call = "L.cuDevicePrimaryCtxRetain(C.byref(C.c_void_p()), 0)"
    result, ms = call_while(held, call, then=lambda: held.do("knobs"))
    assert result == 0
    assert 190 <= ms < 1000
    assert asked(held, CONTEXT)[0]


def test_a_pool_waits_too(held: Agent) -> None:
    held.do("limit", **FULL)
    call = "int(new(256 * MiB) < 1000)"
    result, ms = call_while(held, call, then=lambda: held.do("limit", **EMPTY), setup=POOLS)
    assert result == 0
    assert 190 <= ms < 1000


def test_while_an_agent_is_replaced_it_is_waited_for(held: Agent) -> None:
    held.do("limit", **{**FULL, "age_ms": 29_000})
    result, ms = call_while(held, "alloc(256 * MiB)")
    assert result == OOM
    assert 900 <= ms < 1500


def test_a_pool_that_asks_twice_waits_once(held: Agent) -> None:
    """The pool asks for less if a whole block is refused. Both requests together have the time of one."""
    held.do("limit", **{**FULL, "age_ms": -100_000})
    result, ms = call_while(held, "new(256 * MiB)", setup=POOLS)
    assert result == OOM
    assert 3900 <= ms < 4500
    assert held.do("look")["refused"] >= 1


def test_a_pool_gives_back_before_anything_is_waited_for(held: Agent) -> None:
    held.do("limit", limit=GIB, used=GIB // 2, orphaned=GIB // 2, age_ms=0)
    setup = POOLS + "p = new(448 * MiB); drop(p)\n"
    result, ms = call_while(held, "(L.fake_sync(), alloc(448 * MiB))[1]", setup=setup)
    assert result == 0
    assert ms < 100


def test_signals_and_errno_stay_the_programs(held: Agent) -> None:
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
    result, ms = call_while(held, "call()", then=lambda: held.do("limit", **EMPTY), setup=setup)
    assert result == 0
    assert 190 <= ms < 1000


def test_many_that_wait_share_what_comes(held: Agent) -> None:
    """Eight threads want room for four: those that fit are admitted, and the others are refused in time."""
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


def test_no_page_and_no_kernel_holds_a_call_longer(build: Build, scale: Callable[[int, int, int], int]) -> None:
    flags = (f"-I{ROOT}/shim", f"-I{ROOT}/bpf", "-O2", "-fsanitize=undefined", "-fno-sanitize-recover=all")
    program = build.compile("orphans.c", "orphans", *flags)
    done = subprocess.run(
        [program, str(scale(3000, 30_000, 3_000_000))], capture_output=True, text=True, timeout=DEADLINE
    )
    assert (done.returncode, done.stderr) == (0, ""), done
