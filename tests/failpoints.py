"""Ends agent or gatekeeper in the middle of a change, at a named point: kill -9, as by no accident.

Owns: the points, each a place in agent or gatekeeper where something is half changed. Nothing of them is in
the programs themselves, nor in a package: they are put in from here before the program begins, and a point whose place
is no longer there ends this at once, with what is missing. A program that is started in any other way has none.

usage: python tests/failpoints.py

A nursery has imported what agent and gatekeeper do, and forks them, which spares each start most of its time. It takes
and answers one line of JSON at a time: ["POINT", "agent"|"gatekeeper", ARGUMENT…], "" for no point, is answered by the
pid, and that by null, or by how it has ended. Whoever still lives ends with it.
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
    """Here it ends."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(holder: Any, name: str, wanted: Judge = lambda *_, **__: True) -> None:
    """Ends the process in front of the first call that is wanted. AttributeError: there is no such function."""
    function = getattr(holder, name)

    @functools.wraps(function)
    def call(*arguments: Any, **more: Any) -> Any:
        if wanted(*arguments):
            die()
        return function(*arguments, **more)

    setattr(holder, name, call)


def after(holder: Any, name: str) -> None:
    """Ends the process behind the first call. AttributeError: there is no such function."""
    function = getattr(holder, name)

    @functools.wraps(function)
    def call(*arguments: Any, **more: Any) -> Any:
        function(*arguments, **more)
        die()

    setattr(holder, name, call)


def later(wanted: Judge) -> Judge:
    """Not the first that is wanted, but the second."""
    seen = itertools.count()
    return lambda *arguments: wanted(*arguments) and next(seen) == 1


def named(name: str) -> Judge:
    """Of a function whose first argument is a path."""
    return lambda path, *_, **__: str(path).endswith(name)


# -- the agent


def publishes(_: object, what: int = 0, *__: int) -> bool:
    """Of Ledger._run: the limits of a level are about to be seen."""
    from fgpu_ebpf import abi

    return what == abi.Adjust.PUBLISH


def limit_unpublished() -> None:
    """The agent alone knows a level's new limit: its page still has the one before."""
    from fgpu_ebpf.ledger.ledger import Ledger

    before(Ledger, "_run", publishes)


def policy_half() -> None:
    """Of the levels that a policy changes one has its new limit."""
    from fgpu_ebpf.ledger.ledger import Ledger

    before(Ledger, "_run", later(publishes))


def page_unannounced() -> None:
    """A new level has its page, and nobody knows that it is managed."""
    from fgpu_ebpf.ledger.usage_page_table import UsagePageTable

    after(UsagePageTable, "make")


def charges_behind() -> None:
    """A new level is in force, without the charges of who is in it already."""
    from fgpu_ebpf.tenancy.enforcer import Enforcer

    before(Enforcer, "_take_over")


def level_half_gone() -> None:
    """A level that is managed no longer has lost its limits and keeps its page."""
    from fgpu_ebpf.ledger.usage_page_table import UsagePageTable

    before(UsagePageTable, "take_away")


def state_unrenamed() -> None:
    """What was set by hand is in force, and written beside its file."""
    from fgpu_ebpf.linux import atomic_file

    before(atomic_file.os, "replace", named(".overrides.json.new"))


def programs_half() -> None:
    """One program is the new one, another is pinned beside its place, the others are those before."""
    from fgpu_ebpf.driver import image

    before(image.os, "rename", later(named("-new")))


def links_half() -> None:
    """Of a driver's links those of the returns are pinned, those of the entries not yet."""
    from fgpu_ebpf.driver import attach, probe_plan

    before(attach.Probes, "_pin", lambda _, program, *__: program == probe_plan.DRIVER_PROGRAMS[1])


def detach_half() -> None:
    """What was pinned is gone, all else is there."""
    from fgpu_ebpf.driver import attach

    after(attach, "detach")


# -- the gatekeeper


def socket_unrenamed() -> None:
    """Its socket is bound and listens, beside the place where shims look for it."""
    from fgpu_ebpf.gatekeeper import listener

    before(listener.os, "rename", named(".shim.sock"))


def hello_unanswered() -> None:
    """A process has its pages, and was not told."""
    from fgpu_ebpf.gatekeeper.time_slicer import TimeSlicer

    after(TimeSlicer, "register")


AGENT = (limit_unpublished, policy_half, page_unannounced, charges_behind, level_half_gone, state_unrenamed)
AGENT += (programs_half, links_half, detach_half)
GATEKEEPER = (socket_unrenamed, hello_unanswered)


def become(point: str, program: str, words: list[str]) -> int:
    """Agent or gatekeeper, with the point in it."""
    from fgpu_ebpf.cli import main as cli
    from fgpu_ebpf.gatekeeper import main as gatekeeper

    if point:
        {made.__name__: made for made in (*AGENT, *GATEKEEPER)}[point]()
    if program == "agent":
        return int(cli.main(["agent", *words]) or 0)
    return gatekeeper.main(words)


def bear() -> int:
    """A child that has nothing of the nursery's but what is imported and the log; its pid, 0 in itself."""
    if pid := os.fork():
        return pid
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return 0


def end_of(pid: int) -> int | None:
    """How a child has ended; None: it lives."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def nurse() -> int:
    """Answers until its stdin ends."""
    importlib.import_module("fgpu_ebpf.daemon")  # with it comes all that an agent is made of

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
