"""Finds the files of libcuda and the shim that are in use, by the processes that map them or may come to.

Owns: which process maps which of them, and the socket at which the gatekeeper names processes. Runs in: the agent's
loop; mappings of processes and containers' roots are read by the workers of `libraries`. Never: answers a shim; lets
what one cgroup maps keep it from looking at others.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from time import monotonic

from fgpu_ebpf import procfs, roots
from fgpu_ebpf.bound_owner import owner_of
from fgpu_ebpf.file_budget import MOST_FILES
from fgpu_ebpf.host_scan import HostScan, Scanned
from fgpu_ebpf.libraries import Libraries, Taken, trusted
from fgpu_ebpf.library_class import Role, Trust
from fgpu_ebpf.library_search import Found, Search
from fgpu_ebpf.library_worker import Examined
from fgpu_ebpf.mappings import File
from fgpu_ebpf.pages import Seen
from fgpu_ebpf.probe_plan import ProbeError
from fgpu_ebpf.probes import Probes
from fgpu_ebpf.processes import Process
from fgpu_ebpf.roots import Root, Roots
from fgpu_ebpf.snapshot import LibraryView
from fgpu_ebpf.sockets import make_way

log = logging.getLogger("fgpu.agent")
MOST_MESSAGE = 65536  # bytes of the gatekeeper's
MOST_PIDS = 1 << 31
SEARCH_SECONDS = 5.0  # before a process is searched again


class Discovery:
    """`own`: the host driver's libraries and the published shims; `trust`: whatever else is known to be good."""

    def __init__(
        self, attached: Probes, own: Mapping[Path, Role], trust: Trust | None = None, most_files: int = MOST_FILES
    ) -> None:
        trust = trust or Trust()
        self._probes = attached
        self._libraries = Libraries(attached, own, trust, most_files)
        self._search = Search(lambda file: attached.of(file) is not None)
        self._looked_at: set[int] = set()
        self._searched: dict[int, float] = {}  # processes, and when their mappings were searched
        self._roots = Roots()
        self._root = procfs.cgroup2_root() or Path("/")
        self._standalone: set[int] = set()  # processes that keep an image's limit among themselves
        self._hidden: set[int] = set()  # processes that execute memory of no file, and hold memory that no probe saw
        self._hopeless = ""
        self._scan = HostScan(self._libraries.work, self._cgroup, self._search.by_name, self._see)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.fileno, self.take = self._libraries.fileno, self._libraries.take

    @classmethod
    def of_host(
        cls, attached: Probes, drivers: Iterable[Path], shims: Sequence[Path], store: Path | None,
        listed: Iterable[str], most_files: int,
    ) -> Discovery:  # fmt: skip
        """For these drivers and published shims; the first is of this version. `listed`: digests from agent.yaml."""
        own = dict.fromkeys(shims, Role.SHIM) | dict.fromkeys(drivers, Role.HOST)
        return cls(attached, own, trusted(shims[0], store, listed), most_files)

    def start(self) -> Set[File] | None:
        """Probes the host's own files and all that are mapped now, and drops what no process maps any more.

        Returns (dev, ino) of all that are mapped; None: that cannot be told of every process. Raises ProbeError: one of
        the host's own cannot be probed.
        """
        self._libraries.attach_own()
        scanned: list[Scanned] = []
        self._scan.begin(scanned.append)
        self._libraries.settle(lambda: bool(scanned))
        # Until then the programs of an earlier agent see what these files are called for.
        self._probes.drop_older()
        self._libraries.read_own()
        if not scanned or not scanned[0].is_whole or scanned[0].left_out:
            which = f"process {scanned[0].left_out[0]}" if scanned and scanned[0].left_out else "some processes"
            log.info("the mappings of %s cannot be read: probes of files that are gone stay", which)
            return None
        self._probes.drop_unused(scanned[0].used | self._libraries.own_files)
        return scanned[0].used

    def unenforced(self) -> str:
        """Why nothing is enforced: probes of the host's own files are not there any more. Empty: they are."""
        if not self._probes.lost() and self._libraries.own_files <= self._probes.known:
            return ""
        return f"probes are gone: another process has unpinned them{self._hopeless}"

    def mend(self) -> None:
        """Attaches again what was taken away; what was allocated meanwhile NVML shows at the next look."""
        lost = self._probes.lost()
        if not lost and self._libraries.own_files <= self._probes.known:
            return
        log.warning("probes of %d files are gone: attaching them again", len(lost))
        try:
            self._probes.attach_again(lost)
            self._libraries.attach_own()
        except (ProbeError, OSError) as error:
            self._hopeless = f", and they cannot be attached again ({error})"
            log.warning("%s", self.unenforced())
            return
        self._hopeless = ""
        self.look_around()

    @property
    def refusals(self) -> int:
        """How often a file was found that could not be probed."""
        return self._libraries.refusals

    def unprobed(self) -> frozenset[int]:
        """Processes that map a libcuda or shim file and that its probes do not see."""
        return frozenset(self._libraries.unprobed())

    def reasons(self) -> Mapping[int, str]:
        """Why, for each of these processes."""
        return self._libraries.unprobed()

    def is_shim(self, dev: int, ino: int) -> bool:
        """Whether this file is probed as one of our shims."""
        found = self._probes.of((dev, ino))
        return found is not None and found.role is Role.SHIM

    def hidden(self) -> frozenset[int]:
        """Processes that hold memory that no probe saw taken, and execute memory that no file backs."""
        return frozenset(self._hidden)

    def libraries(self, tenant_of: Callable[[str], str]) -> tuple[LibraryView, ...]:
        """The drivers that processes map and that are not the host's own; `tenant_of` names a cgroup's tenant."""
        return self._libraries.views(tenant_of)

    def standalone(self) -> frozenset[int]:
        """Processes that keep books of their image's own limit: they do not ask the agent."""
        return frozenset(self._standalone)

    # -- processes

    def look_at(self, pid: int) -> None:
        """Probes what a process maps, and sees that the probes are in its memory."""
        self._ask(pid)

    def look_at_holders(
        self, pids: Iterable[int], drift: Mapping[tuple[int, int], int], processes: Mapping[int, Process]
    ) -> None:
        """As look_at_new, of processes that NVML lists; `drift` and `processes` are those of its last look."""
        uncalled = {pid for pid, process in processes.items() if not process.flags & Seen.CALL}
        self.look_at_new(pids, {pid for (pid, _), bytes_ in drift.items() if bytes_ < 0} | uncalled)

    def look_at_new(self, pids: Iterable[int], again: Set[int] = frozenset()) -> None:
        """Probes what these processes map: they use a device, NVML says. Those that were not looked at yet.

        `again`: those that hold more than the kernel has seen. All that they execute is searched for libcuda.
        """
        pids, now = set(pids), monotonic()
        self._looked_at &= pids
        self._searched = {pid: at for pid, at in self._searched.items() if pid in pids}
        for pid in sorted(pids):
            is_due = now - self._searched.get(pid, -SEARCH_SECONDS) >= SEARCH_SECONDS
            if pid in again and is_due and self._ask(pid, search=True):
                self._searched[pid] = now
                self._looked_at.add(pid)
            elif pid not in self._looked_at and self._ask(pid):
                self._looked_at.add(pid)

    def _ask(self, pid: int, search: bool = False) -> bool:
        """Have a worker read what a process maps."""
        cgroup = self._cgroup(pid)
        return self._libraries.work(cgroup, partial(self._read, pid, cgroup, search))

    def _read(self, pid: int, cgroup: str, search: bool) -> Taken:
        found = self._search.by_contents(pid) if search else self._search.by_name(pid)
        return partial(self._take_read, pid, cgroup, found, search)

    def _take_read(self, pid: int, cgroup: str, found: Found, search: bool) -> None:
        if search:
            (self._hidden.add if found.code else self._hidden.discard)(pid)
        self._see(pid, cgroup, found, verify=True)

    def _cgroup(self, pid: int) -> str:
        """The cgroup for which the work counts that this process makes."""
        return owner_of(self._root, procfs.cgroup_path(pid) or "/").path

    def look_around(self) -> None:
        """Probes what any process maps: for what nothing else has told. What could not be probed is tried once more."""
        self._libraries.look_around()
        self._scan.begin(lambda _: None)

    def _see(self, pid: int, cgroup: str, found: Found, verify: bool = False) -> None:
        """A process maps these files. `cgroup`: its own, if known; `verify`: also look at those that are probed."""
        self._standalone.discard(pid)
        if found.books:
            self._standalone.add(pid)
        for one in found.files or ():
            if not self._libraries.knows(pid, one) or verify:
                cgroup = cgroup or self._cgroup(pid)
                self._libraries.want(pid, cgroup, one)

    # -- roots

    def look_into(self, pid: int) -> None:
        """Probes what a process that begins may come to map: what its root has, if none has begun there before.

        Nothing is logged of what cannot be probed there: that is, when a process maps it.
        """
        cgroup = self._cgroup(pid)
        if self._libraries.room(cgroup):
            self._libraries.work(cgroup, partial(self._search_root, pid, cgroup, self._libraries.room(cgroup)))

    def _search_root(self, pid: int, cgroup: str, room: int) -> Taken:
        root = roots.root_of(pid)
        found: dict[File, Examined] = {}
        if root is not None and root not in self._roots:
            for target in roots.libraries(pid):
                file = target.dev, target.ino
                if file not in found and len(found) < room and file not in self._libraries.own_files:
                    found[file] = self._libraries.examiner.found(target)
        return partial(self._take_root, pid, cgroup, root, found.values())

    def _take_root(self, pid: int, cgroup: str, root: Root | None, found: Iterable[Examined]) -> None:
        if root is not None:
            self._roots.enter(root)
        for examined in found:
            if root is not None and not examined.error and not self._libraries.enter(cgroup, examined):
                self._libraries.awaits(examined.file, pid)
                self._roots.found(examined.file, root)

    # -- in every round

    def keep(self) -> None:
        """Sees that what is believed is as it was, and ends the probes of files that no process maps any more."""
        self._libraries.keep()
        self.let_go()

    def let_go(self) -> None:
        """Ends the probes of files that are not the host's own and that no process maps any more."""
        left = self._libraries.unmapped()
        if left:  # perhaps other processes have come to map them
            self._scan.begin(partial(self._let_go, left))
        self._standalone = {pid for pid in self._standalone if procfs.has_memory(pid)}
        self._hidden = {pid for pid in self._hidden if procfs.has_memory(pid)}

    def _let_go(self, left: set[File], scanned: Scanned) -> None:
        """A process that is left out gets no answer to a hello either, so that the files are not kept for it."""
        left = (left & self._libraries.unmapped()) - scanned.used if scanned.is_whole else set()
        kept = self._roots.dwellers(left, scanned.pids)
        for file, pid in kept.items():
            self._libraries.awaits(file, pid)
        for file in left - kept.keys():
            self._libraries.let_go(file)
            self._roots.forget(file)

    # -- the gatekeeper's questions

    def listen(self, path: Path) -> int:
        """Binds; returns a descriptor that is readable when the gatekeeper has named a process."""
        make_way(str(path))
        path.unlink(missing_ok=True)
        self._socket.bind(str(path))
        path.chmod(0o600)
        return self._socket.fileno()

    def named(self) -> Iterator[list[int]]:
        """The processes that the gatekeeper names in one message: one, and `others` that came with it."""
        while True:
            try:
                said = json.loads(self._socket.recv(MOST_MESSAGE))
                tgids = [int(tgid) for tgid in (said["tgid"], *said.get("others", ()))]
            except BlockingIOError:
                return
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                continue
            if all(0 < tgid < MOST_PIDS for tgid in tgids):
                yield tgids
