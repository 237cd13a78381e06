"""Kill agent or gatekeeper in the middle of a change, at a named point, with SIGKILL.

Each point is a place in agent or gatekeeper at which a change is half done. Neither the programs nor a package contain
the points: this module adds them before the program begins. If the place of a point no longer exists, the module exits
at once and prints what is missing. A program that is started in any other way has no points.

usage: python tests/failpoints.py

This process imports the code of agent and gatekeeper once, and then forks them. This saves each start most of its
time. The process reads one line of JSON at a time, and answers it with one line:

    ["POINT", "agent"|"gatekeeper", ARGUMENT…]   start the program with this point ("": none); the answer is its pid
    PID                                          the answer is the exit status of the program, or null while it runs

When stdin ends, the process kills the programs that still run, and exits.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

Judge = Callable[..., bool]


def die() -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(holder: Any, name: str, wanted: Judge = lambda *_, **__: True) -> None:
    """Kill the process before the first matching call. Raise AttributeError if there is no such function."""
    function = getattr(holder, name)

    @functools.wraps(function)
    def call(*arguments: Any, **more: Any) -> Any:
        if wanted(*arguments):
            die()
        return function(*arguments, **more)

    setattr(holder, name, call)


def after(holder: Any, name: str) -> None:
    """Kill the process when the function has returned for the first time. Raises AttributeError if there is none."""
    function = getattr(holder, name)

    @functools.wraps(function)
    def call(*arguments: Any, **more: Any) -> Any:
        function(*arguments, **more)
        die()

    setattr(holder, name, call)


def later(wanted: Judge) -> Judge:
    """Match the second call instead of the first."""
    seen = itertools.count()
    return lambda *arguments: wanted(*arguments) and next(seen) == 1


def named(name: str) -> Judge:
    """Match calls with this file name, of a function whose first argument is a path."""
    return lambda path, *_, **__: str(path).endswith(name)


# -- the agent


def publishes(_: object, what: int = 0, *__: int) -> bool:
    """Match calls of Ledger._run that are about to publish the limits of a level."""
    from fgpu_ebpf import abi

    return what == abi.Adjust.PUBLISH


def limit_unpublished() -> None:
    """A level's new limit is not yet on its page: only the agent has it."""
    from fgpu_ebpf.ledger.ledger import Ledger

    before(Ledger, "_run", publishes)


def policy_half() -> None:
    """A policy changes several levels, and one of them has its new limit."""
    from fgpu_ebpf.ledger.ledger import Ledger

    before(Ledger, "_run", later(publishes))


def page_unannounced() -> None:
    """A new level has its page, and is not yet recorded as managed."""
    from fgpu_ebpf.ledger.usage_page_table import UsagePageTable

    after(UsagePageTable, "make")


def charges_behind() -> None:
    """A new level is in force, without the charges of the processes that are already in it."""
    from fgpu_ebpf.tenancy.moves import Moves

    before(Moves, "take_over")


def level_half_gone() -> None:
    """A level that is no longer managed has no limits any more, and still has its page."""
    from fgpu_ebpf.ledger.usage_page_table import UsagePageTable

    before(UsagePageTable, "take_away")


def state_unrenamed() -> None:
    """A limit of `fgpu set` is in force. Its file is written and not yet renamed."""
    from fgpu_ebpf.linux import atomic_file

    before(atomic_file.os, "replace", named(".overrides.json.new"))


def programs_half() -> None:
    """One program is replaced, another is pinned beside its place, and the rest are old."""
    from fgpu_ebpf.driver import image

    before(image.os, "rename", later(named("-new")))


def links_half() -> None:
    """A driver's links of return probes are pinned, those of entry probes are not yet."""
    from fgpu_ebpf.driver import attach, probe_plan

    before(attach.Probes, "_pin", lambda _, program, *__: program == probe_plan.DRIVER_PROGRAMS[1])


def detach_half() -> None:
    """The pins are removed, and everything else still exists."""
    from fgpu_ebpf.driver import attach

    after(attach, "detach")


# -- the agent, while it parks and wakes tenants


def asks_for(goal: str) -> Judge:
    """Match calls of Parking._ask that are about to send this request to the parker."""
    return lambda _, __, ___, op: op == goal


def park_unasked() -> None:
    """A tenant is recorded as about to be parked, and the parker knows nothing of it."""
    from fgpu_ebpf.agent.parking import Parking

    before(Parking, "_ask", asks_for("park"))


def park_uncharged() -> None:
    """The device holds nothing of a tenant any more, and all of it is charged."""
    from fgpu_ebpf.ledger.parked import ParkedMap

    before(ParkedMap, "park")


def wake_unasked() -> None:
    """A parked tenant is charged again, and the parker knows nothing of it."""
    from fgpu_ebpf.agent.parking import Parking

    before(Parking, "_ask", asks_for("wake"))


def wake_unended() -> None:
    """A tenant runs again, and is still recorded as parked."""
    from fgpu_ebpf.ledger.parked import ParkedMap

    before(ParkedMap, "end")


# -- the gatekeeper


def socket_unrenamed() -> None:
    """The socket is bound and listens, beside the path that shims use."""
    from fgpu_ebpf.gatekeeper import listener

    before(listener.os, "rename", named(".shim.sock"))


def hello_unanswered() -> None:
    """A process has its pages, and has no answer yet."""
    from fgpu_ebpf.gatekeeper.time_slicer import TimeSlicer

    after(TimeSlicer, "register")


AGENT = (limit_unpublished, policy_half, page_unannounced, charges_behind, level_half_gone, state_unrenamed)
AGENT += (programs_half, links_half, detach_half)
AGENT += (park_unasked, park_uncharged, wake_unasked, wake_unended)
GATEKEEPER = (socket_unrenamed, hello_unanswered)


def become(point: str, program: str, words: list[str]) -> int:
    """Run agent or gatekeeper, with this point."""
    from fgpu_ebpf.cli import main as cli
    from fgpu_ebpf.gatekeeper import main as gatekeeper

    if point:
        {made.__name__: made for made in (*AGENT, *GATEKEEPER)}[point]()
    if program == "agent":
        return int(cli.main(["agent", *words]) or 0)
    return gatekeeper.main(words)


def bear() -> int:
    """Fork a child that keeps only the imports and the log of this process. Return its pid, or 0 in the child."""
    if pid := os.fork():
        return pid
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return 0


def end_of(pid: int) -> int | None:
    """Return the exit status of a child, or None while it runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def nurse() -> int:
    """Answer requests until stdin ends."""
    importlib.import_module("fgpu_ebpf.daemon")  # this imports everything that an agent uses

    living: set[int] = set()
    for line in sys.stdin:
        match json.loads(line):
            case [point, program, *words]:
                answer: int | None = bear()
                if not answer:
                    return become(point, program, words)
                living.add(answer)
            case pid:
                answer = end_of(pid)
                living -= {pid} if answer is not None else set()
        print(json.dumps(answer), flush=True)
    for pid in living:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return 0


if __name__ == "__main__":
    sys.exit(nurse())
