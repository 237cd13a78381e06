"""Calls that wait for orphaned memory, with the time that they take."""

import time
from collections.abc import Callable
from typing import Any

from tests.shim.shim_kit import DEADLINE, Agent

MEMORY, POOL, CONTEXT, PATIENT, OBSERVE, OOM = 0, 1, 2, 0x400, 1, 2
MIB, GIB = 1 << 20, 1 << 30
# Prints how long the call took, in ms.
TIMED = """
L.cuInit(0); alloc(0); out("ready"); sys.stdin.readline()
def timed(call):
    began = time.monotonic(); result = call(); return result, round(1000 * (time.monotonic() - began))
out(*timed(lambda: {call}))
"""


def call_while(agent: Agent, call: str, *, then: Callable[[], Any] = lambda: None, setup: str = "") -> tuple[int, int]:
    """Return the result of a program's call and its duration in ms.

    `then` is executed 0.2 s after the call has begun.
    """
    with agent.start_python(setup + TIMED.format(call=call)) as program:
        assert program.stdout.readline() == '["ready"]\n'
        program.stdin.write("\n")
        program.stdin.flush()
        time.sleep(0.2)
        then()
        said, _ = program.communicate(timeout=DEADLINE)
    result, ms = said.strip(" []\n").split(", ")
    return int(result), int(ms)
