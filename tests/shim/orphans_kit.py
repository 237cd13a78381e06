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
    late_ms: int  # for how long after 0.2 s the call had no answer from `then`; see in_time()


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

    `then` may return a moment of time.monotonic() at which it had changed what matters to the call; otherwise, that is
    its end.

    `first` is executed immediately before the call. A program may need seconds until then.
    """
    late = changed_late = 0.0
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
            changed = then()
            late = time.monotonic() - due
            changed_late = changed - due if isinstance(changed, float) else late
        result, seconds, waited = json.loads(program.stdout.readline())
        program.communicate(timeout=DEADLINE)
    return Call(result, *(round(1000 * each) for each in (seconds, seconds - waited - late, changed_late)))


def in_time(trial: Callable[[], Call], most_ms: int) -> Call:
    """Return the first call of several trials for which `then` was no later than this.

    If the test has no processor for longer than a program waits, the call shows nothing.
    """
    for _ in range(20):
        call = trial()
        if call.late_ms <= most_ms:
            return call
    raise AssertionError(f"no trial of 20 was in time: {call}")
