"""Answers the hello of shims, and keeps what it told every process that said it up to date.

Owns: the decision about each hello, the loop that all else runs in, `<run>/gatekeeper.json`. Never: believes what a
tenant says (identity is the peer's pidfd and what the kernel says of it), writes a limit, waits for a tenant.
When it fails: it ends, pages stop beating and shims open their gates after the lease; limits stand in the kernel. It
ends by itself where its run folder is no longer the one that it locked, since nobody would find it there.

Run as `python -m fgpu_ebpf.gatekeeper`; one a host, by flock.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import monotonic_ns

from fgpu_ebpf import heap, locks, notify, pages, procfs, wholefile
from fgpu_ebpf.bell import Bell
from fgpu_ebpf.callers import Caller, Callers
from fgpu_ebpf.clients import Client, Clients, Head
from fgpu_ebpf.door import Door
from fgpu_ebpf.events import Events
from fgpu_ebpf.gatekeeper_start import open_ledger, prepare
from fgpu_ebpf.glance import Glance, Lineages, Offer, Standing, standing
from fgpu_ebpf.ledger import PINS, Ledger
from fgpu_ebpf.locks import FileLock
from fgpu_ebpf.log_lines import LogLines
from fgpu_ebpf.pages import Answer, Code, News
from fgpu_ebpf.questions import Questions
from fgpu_ebpf.readers import Readers
from fgpu_ebpf.slicer import Slicer

AGAIN_NS, ROWS_NS, HEARTBEAT_NS, UPKEEP_NS = 10_000_000, 500_000_000, 250_000_000, 1_000_000_000
GIVE_BACK_NS = 30_000_000_000
AHEAD_BYTES = 256 << 10  # of small objects: what the hellos of one moment take
ANSWER_BYTES = ctypes.sizeof(Answer)
COUNTS = (
    *("hello_managed", "hello_unmanaged", "hello_refused", "hello_held", "hello_unanswered", "malformed", "silent"),
    *("gone", "unread", "dropped_tenant", "dropped_total", "dropped_process", "discover_failed", "errors", "processes"),
)


class Gatekeeper:
    """One selector, one thread (and those of Readers); `run` returns after `end`. No peer can raise."""

    def __init__(
        self, lock: FileLock, open_ledger: Callable[[], Ledger | None], root: Path, is_stand_in: bool = False
    ) -> None:
        self._lock, self._open_ledger, self._is_stand_in = lock, open_ledger, is_stand_in
        self._run = lock.path.parent
        self._ledger: Ledger | None = None
        self._questions = Questions(lock.path.parent)
        self._lineages = Lineages(root)
        self._glance: Glance | None = None
        self._ended, self._lost, self._last_word = False, False, "ends"
        self._listed: tuple[int, list[tuple[int, bytes]]] = (-1, [])
        boot = os.urandom(16)
        self._counts = dict.fromkeys(COUNTS, 0)
        self._facts = {"started_ns": monotonic_ns(), "boot": boot.hex()}
        self._written: dict[str, object] = {}
        self._log = LogLines("fgpu gatekeeper")
        self._bell = Bell()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ, self._rung)
        self._callers = Callers(self._selector, self._counts, self._stand, self._look, self._ended_ns)
        self._clients = Clients(self._selector, boot)
        self._readers = Readers(self._bell.ring)
        self._watchdog, self._slicer = notify.Watchdog(), Slicer()
        self._clients.parted = self._slicer.part
        self._door = Door(self._run)
        self._open_door()

    def run(self) -> bool:
        """Serve until `end`; folder and socket file stay. False: it ended because its lock was lost."""
        jobs = {
            self._again: AGAIN_NS, self._show: ROWS_NS, self._beat: HEARTBEAT_NS, self._keep_up: UPKEEP_NS,
            heap.give_back: GIVE_BACK_NS,
        }  # fmt: skip
        due = dict.fromkeys(jobs, 0)
        heap.settle(AHEAD_BYTES)
        while not self._ended:
            now_ns = monotonic_ns()
            for job in [job for job, at_ns in due.items() if at_ns <= now_ns]:
                self._try(job)
                due[job] = monotonic_ns() // jobs[job] * jobs[job] + jobs[job]  # all on the beat: one wake-up
            for key, _ in self._selector.select(self._leisure_ns(due) / 1e9):
                self._try(key.data)
            for step in (self._callers.serve, self._ask_agent, self._readers.go):
                self._try(step)
            self._end_glance()
        self._slicer.end()
        self._door.close()
        self._log.say(self._last_word)
        return not self._lost

    def _leisure_ns(self, due: dict[Callable[[], None], int]) -> int:
        """How long nothing has to be done, unless somebody comes."""
        if self._callers.pending():
            return 0
        waiting = self._callers or self._ledger is None
        idle = {self._again: not waiting, self._show: not self._clients, self._beat: self._forgotten()}
        wakes_ns = [at for job, at in due.items() if not idle.get(job)]
        reading_ns = self._readers.due_ns()
        return max(0, min(wakes_ns if reading_ns is None else [*wakes_ns, reading_ns]) - monotonic_ns())

    def _forgotten(self) -> bool:
        """No process has a page, and none is owed anything."""
        return not self._clients.is_owed_beats() and not self._callers.owing() and not self._questions

    def end(self, *_: object) -> None:
        """Leave `run` at its next turn: a signal handler."""
        self._ended = True
        self._bell.ring()

    def _try(self, job: Callable[[], None]) -> None:
        try:
            job()
        except OSError as error:
            self._counts["errors"] += 1
            self._log.say(f"{getattr(job, '__name__', 'a peer')}: {error}")

    # -- a hello, step by step

    def _open_door(self) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(self._door.listener)
        self._door.open()
        self._selector.register(self._door.listener, selectors.EVENT_READ, self._accept)
        self._log.say(f"listens in {self._run}/shim")

    def _accept(self) -> None:
        self._callers.accept(self._door.listener)

    def _ended_ns(self, pid: int) -> int | None:
        return self._ledger.times.ended_ns(pid) if self._ledger else None

    def _now(self, ledger: Ledger) -> Glance:
        """What the ledger says in this turn."""
        if self._glance is None or self._glance.full():
            self._end_glance()
            epoch = ledger.epoch()
            self._clients.epoch = epoch
            self._glance = Glance(ledger, epoch, self._devices(epoch, ledger), self._lineages)
        return self._glance

    def _end_glance(self) -> None:
        if self._glance:
            self._glance.close()
            self._glance = None

    def _stand(self, pid: int, cgroup: int) -> tuple[int, Standing]:
        if self._ledger is None:
            return -1, standing(None, self._lineages.of(pid, cgroup))
        glance = self._now(self._ledger)
        return glance.epoch, glance.standing(pid, cgroup)

    def _look(self, caller: Caller) -> None:
        """Answer, if all is known; else the caller waits."""
        if self._ledger is None:
            return
        try:
            self._decide(caller, self._now(self._ledger))
        except ProcessLookupError:
            self._callers.drop(caller, "gone")
        except OSError:
            self._callers.drop(caller, "errors")

    def _decide(self, caller: Caller, glance: Glance) -> None:
        if caller.epoch != glance.epoch or caller.standing.managed is None:
            caller.epoch, caller.standing = glance.epoch, glance.standing(*procfs.identity(caller.pidfd))
        if caller.standing.refused:
            self._answer_refused(caller)
        elif caller.standing.managed is False:
            self._answer_unmanaged(caller)
        elif caller.standing.managed is None:
            self._tell(caller)
        elif caller.files is None:
            self._readers.want(caller)
        elif not glance.probed(caller.files):
            caller.files = None  # read again at its next turn: what it maps may be probed by then
            self._tell(caller)
        elif offer := glance.offer(caller.standing.levels):  # else decided, but not in force yet
            self._answer_managed(caller, offer)

    def _tell(self, caller: Caller) -> None:
        """The agent does not know this process yet: it is asked, and the caller waits."""
        self._counts["hello_held"] += not caller.held
        caller.held = True
        self._questions.add(caller)

    def _ask_agent(self) -> None:
        self._counts["discover_failed"] += not self._questions.send()

    def _rung(self) -> None:
        self._bell.hush()
        for caller, took_ns in self._readers.take():
            self._callers.charge(caller.tenant, took_ns)
            self._callers.ready(caller)

    def _devices(self, epoch: int, ledger: Ledger) -> list[tuple[int, bytes]]:
        """The host's devices: read anew when anything was decided, and at every heartbeat."""
        if self._listed[0] != epoch:
            self._listed = (epoch, ledger.devices())
        return self._listed[1]

    def _answer_unmanaged(self, caller: Caller) -> None:
        """With a page that all unmanaged processes share, so that they take no place from a tenant, however many."""
        self._clients.release(caller.pid)
        control = self._clients.page_of_unmanaged(caller.pid)
        self._answer(caller, Code.UNMANAGED, Offer(Head(), ()), [control.descriptor])

    def _answer_refused(self, caller: Caller) -> None:
        """A limit is wanted for it that could not be put in force: it gets no memory."""
        self._clients.release(caller.pid)
        self._answer(caller, Code.REFUSED, Offer(Head(), ()), [])

    def _answer_managed(self, caller: Caller, offer: Offer) -> None:
        client = self._client(caller, offer.head)
        if client and client.status:
            descriptors = [client.control.descriptor, client.status.descriptor, *offer.usage]
            self._answer(caller, Code.MANAGED, offer, descriptors)

    def _answer(self, caller: Caller, code: Code, offer: Offer, fds: Sequence[int]) -> None:
        head, usage = offer.head, offer.usage
        form = (pages.MAGIC, pages.LAYOUT, ANSWER_BYTES, code, len(usage), len(head.devices), head.flags, caller.epoch)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        try:
            caller.sock.sendmsg([bytes(Answer(*form))], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            self._callers.drop(caller, "unread")
            return
        self._callers.drop(caller, f"hello_{code.name.lower()}")

    def _client(self, caller: Caller, head: Head) -> Client | None:
        """The pages of this process, made or made anew where needed; None: it is gone or has no place, and dropped."""
        client = self._clients.get(caller.pid)
        if not procfs.alive(caller.pidfd) or (client and client.has_ended):
            self._callers.drop(caller, "gone")
            return None
        tenant, owner = caller.standing.tenant, caller.standing.owner
        if client is None:
            client = self._clients.enrol(caller.pid, caller.pidfd, tenant, owner, head)
            if client is None:
                self._callers.drop(caller, "dropped_process")
                return None
            caller.pidfd = -1
            self._log.say(f"process {client.pid} of cgroup {tenant}: managed")
        self._clients.settle_in(client, tenant, owner, caller.standing.levels, head)
        if self._ledger and client.levels:
            client.control.page.tag = self._ledger.tag(client.pid, client.levels)
        self._slicer.greet(client)
        return client

    # -- what is done again and again

    def _again(self) -> None:
        if self._ledger is None:
            self._ledger = self._open_ledger()
            if self._ledger:
                self._slicer.ledger, self._readers.check = self._ledger, self._ledger.file_check
                self._listen(self._ledger)
                self._log.say("has the ledger")
                self._beat()
                self._show()
        self._callers.turn()

    def _listen(self, ledger: Ledger) -> None:
        bell = ledger.times.bell()
        if bell:
            self._selector.register(bell, selectors.EVENT_READ, partial(self._hear, bell))
            self._slicer.is_told = True

    def _hear(self, bell: Events) -> None:
        for event in bell.read():
            if event.kind == News.ENDED:
                self._clients.end(event.tgid, event.at_ns)
        self._slicer.heed()

    def _show(self) -> None:
        if self._ledger and self._clients:
            self._clients.show(self._ledger.processes())

    def _beat(self) -> None:
        self._watchdog.ping()
        self._callers.forgive()
        self._questions.forget()
        self._listed = (-1, [])
        if self._ledger:
            self._clients.epoch = self._ledger.epoch()
        self._clients.beat()

    def _keep_up(self) -> None:
        self._log.renew()
        self._lineages.forget()
        if not self._lock.is_held():
            self._ended = self._lost = True
            self._last_word = f"{self._lock.path} is no longer the one that was locked: ends"
            return
        if self._is_stand_in and locks.is_locked(self._run / locks.NEXT):
            self._ended, self._last_word = True, "a service's gatekeeper is here: ends"
            return
        if not self._door.intact():
            self._open_door()
        self._accept()  # there may be nobody: that is known then
        self._slicer.heed()  # whatever was missed
        self._counts["processes"] = len(self._clients)
        said = {**self._counts, **self._facts, "slices": self._slicer.counts()}
        if said != self._written:
            wholefile.write(self._run / "gatekeeper.json", json.dumps(said))
            self._written = said


# -- start ----------------------------------------------------------------------------------------------------------


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fgpu-gatekeeper", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pins", type=Path, default=PINS, help="where the ledger's maps are pinned")
    parser.add_argument("--run-dir", type=Path, default=Path("/run/fgpu"), help="where the socket's folder is made")
    parser.add_argument("--wait", action="store_true", help="where another holds the lock, until it has let go")
    parser.add_argument("--stand-in", action="store_true", help="end as soon as another one waits")
    parser.add_argument("--ready-fd", type=int, help="a descriptor to write 1 to, once listening")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, ledger_factory: Callable[[Path], Ledger] = Ledger) -> int:
    """Serve until SIGTERM; 1 and one line where it cannot, or can no longer."""
    options = _options(argv)
    lock = FileLock(options.run_dir / locks.GATEKEEPER)
    try:
        root = prepare(lock, options.wait)
        gatekeeper = Gatekeeper(lock, partial(open_ledger, options.pins, ledger_factory), root, options.stand_in)
    except OSError as error:
        print(f"fgpu gatekeeper: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, gatekeeper.end)
    signal.signal(signal.SIGINT, gatekeeper.end)
    notify.ready()
    if options.ready_fd is not None:
        os.write(options.ready_fd, b"1")
        os.close(options.ready_fd)
    return 0 if gatekeeper.run() else 1


if __name__ == "__main__":
    sys.exit(main())
