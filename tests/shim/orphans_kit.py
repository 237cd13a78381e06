"""Calls that wait for orphaned memory, with the time that they take."""

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.shim.shim_kit import DEADLINE, Agent

MEMORY, POOL, CONTEXT, PATIENT, OBSERVE, OOM = 0, 1, 2, 0x400, 1, 2
MIB, GIB = 1 << 20, 1 << 30
# Prints when the call begins, and then its result, its time, and for how long it waited for a processor, in seconds.
TIMED = """
def delay(): return int(open("/proc/thread-self/schedstat").read().split()[1]) / 1e9
L.cuInit(0); alloc(0); {wait}; waited = delay(); began = time.monotonic(); out(began)
result = {call}
out(result, time.monotonic() - began, delay() - waited)
"""


class Call(NamedTuple):
    """A program's call, with its time in ms."""

    result: int
    ms: int
    own_ms: int  # without the time in which the program waited for a processor, or the test was late


WAIT = 'out("ready"); sys.stdin.readline()'


def call_while(
    agent: Agent,
    call: str,
    *,
    first: Callable[[], Any] | None = None,
    then: Callable[[], Any] | None = None,
    setup: str = "",
) -> Call:
    """Return a program's call. `then` is executed 0.2 s after the call has begun.

    `first` is executed immediately before the call. A program may need seconds until then.
    """
    late = 0.0
    with agent.start_python(setup + TIMED.format(call=call, wait=WAIT if first else "pass")) as program:
        if first:
            assert program.stdout.readline() == '["ready"]\n'
            first()
            program.stdin.write("\n")
            program.stdin.flush()
        (began,) = json.loads(program.stdout.readline())
        if then:
            due = began + 0.2
            time.sleep(max(0.0, due - time.monotonic()))
            then()
            late = time.monotonic() - due
        result, seconds, waited = json.loads(program.stdout.readline())
        program.communicate(timeout=DEADLINE)
    return Call(result, round(1000 * seconds), round(1000 * (seconds - waited - late)))
