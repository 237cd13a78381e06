"""The process of one job. The parker, which never loads a library of the driver, forks this process.

A call of the driver that hangs blocks only this process. The process continues after the parker and the client have
exited.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fgpu_ebpf.linux import capabilities
from fgpu_ebpf.parker import room
from fgpu_ebpf.parker.cuda import Checkpoints, DriverError, Libcuda
from fgpu_ebpf.parker.job import Job
from fgpu_ebpf.parker.processes import Process
from fgpu_ebpf.parker.protocol import UNCHANGED, Outcome, Request, RequestError, line
from fgpu_ebpf.parker.room import Copy

_LAST_INHERITED = 2


class Worker(NamedTuple):
    """A started process of a job. `output`: the pipe with the replies of the job."""

    pid: int
    output: int


def start(
    request: Request, claimed: int, why: str, others: Sequence[Copy], open_driver: Callable[[], Checkpoints]
) -> Worker:
    """Fork the process of a job. Raise OSError on failure.

    Args:
        request: the request of the job.
        claimed: the descriptor with the locks of the processes, or -1.
        why: if not empty, the processes are restored after another job has ended halfway, for this reason.
        others: the copies of jobs that began before.
        open_driver: loads the driver.
    """
    output, end = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
    except OSError:
        os.close(output)
        os.close(end)
        raise
    if pid == 0:
        try:
            _run(request, end, claimed, why, others, open_driver)
        finally:
            os._exit(1)
    os.close(end)
    return Worker(pid, output)


def _run(
    request: Request, end: int, claimed: int, why: str, others: Sequence[Copy], open_driver: Callable[[], Checkpoints]
) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    _close_all_but(end, claimed)

    def say(reply: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the job continues without a parker
            os.write(end, line(reply))

    targets: list[Process] = []
    job: Job | None = None
    try:
        targets += map(Process, request.processes)
        check_room = partial(room.check, Copy([target.pid for target in targets], request.size), others)
        job = Job(request, open_driver(), targets, check_room, say)
        if request.op == "state":
            lacks = [f"CAP_{needed.name}" for needed in capabilities.lacking(capabilities.PARKER)]
            say({"states": job.states(), **({"lacks": lacks} if lacks else {})})
        elif why:
            say(job.recover(why).reply())
        else:
            say((job.park() if request.op == "park" else job.wake()).reply())
    except (RequestError, DriverError, OSError) as error:
        result = "lost" if why else UNCHANGED.get(request.op, "")
        is_unchanged = job is None and not why  # no call was made, and the claim excludes other jobs
        say(Outcome(result, f"{why}; {error}" if why else str(error), is_unchanged).reply())
    os._exit(0)


def _close_all_but(*kept: int) -> None:
    """Close the connections of other jobs, which would otherwise stay open until the end of this job."""
    first = _LAST_INHERITED + 1
    for descriptor in sorted(fd for fd in kept if fd >= first):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


def host_driver(root: Path | None) -> Checkpoints:
    """Load the host's libcuda from the driver root that the agent uses too. Raise DriverError on failure."""
    # Imported here, so that only the processes of jobs need their memory.
    from fgpu_ebpf.agent import host_config
    from fgpu_ebpf.driver.library_files import driver_libraries

    if root is None:
        settings, errors = host_config.read()
        if settings is None:
            raise DriverError(f"the settings of this host have an error: {errors[0].text}", 0)
        root = settings.driver_root
    libraries = driver_libraries(root, "libcuda.so.1")
    if not libraries:
        raise DriverError(f"no libcuda.so.1 under {root}", 0)
    return Libcuda(libraries[0])
