"""Discovery of the files of libcuda and the shim that processes map or may map later.

This module runs in the agent's main thread. The workers of `libraries` read the mappings of processes and the roots of
containers. The gatekeeper sends the pids of processes to a socket of this module. The files of one cgroup must not
delay the work for other cgroups.
"""

from __future__ import annotations

import json
import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from time import monotonic

from fgpu_ebpf.abi import Seen
from fgpu_ebpf.driver import root_scan
from fgpu_ebpf.driver.attach import Probes
from fgpu_ebpf.driver.bypass_reason import Then, search
from fgpu_ebpf.driver.file_budget import MOST_FILES
from fgpu_ebpf.driver.libraries import Libraries, Taken, trusted
from fgpu_ebpf.driver.library_class import Role, Trust
from fgpu_ebpf.driver.library_search import Found, Search
from fgpu_ebpf.driver.library_worker import Examined
from fgpu_ebpf.driver.probe_plan import ProbeError
from fgpu_ebpf.driver.process_scan import HostScan, Scanned
from fgpu_ebpf.driver.root_scan import Root, Roots
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.linux.clear_path import make_way
from fgpu_ebpf.linux.procmaps import File
from fgpu_ebpf.snapshot import LibraryView
from fgpu_ebpf.workloads.bound_owner import owner_of

log = logging.getLogger("fgpu.agent")
MOST_MESSAGE = 65536  # bytes of one message from the gatekeeper
MOST_PIDS = 1 << 31
SEARCH_SECONDS = 5.0  # between two searches of one process


class Discovery:
    """The discovery of libcuda and shim files, which requests the probes of these files.

    Args:
        attached: the probes of all files.
        own: the host driver's libraries and the published shims, each with its role.
        trust: the trusted files that are not the host's own.
        most_files: how many files may be probed for one cgroup.
    """

    def __init__(
        self, attached: Probes, own: Mapping[Path, Role], trust: Trust | None = None, most_files: int = MOST_FILES
    ) -> None:
        trust = trust or Trust()
        self._probes = attached
        self._libraries = Libraries(attached, own, trust, most_files)
        self._search = Search(lambda file: attached.of(file) is not None)
        self._looked_at: set[int] = set()
        self._searched: dict[int, float] = {}  # by process: time of the last search by contents
        self._unrecorded: dict[int, int] = {}  # by process: the bytes without a recorded allocation at that time
        self._roots = Roots()
        self._root = procfs.cgroup2_root() or Path("/")
        self._standalone: set[int] = set()  # the processes that standalone() returns
        self._hidden: set[int] = set()  # the processes that hidden() returns
        self._attach_error = ""
        self._scan = HostScan(self._libraries.work, self._owner, self._search.by_name, self._see)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.fileno, self.take = self._libraries.fileno, self._libraries.take

    @classmethod
    def of_host(
        cls, attached: Probes, drivers: Iterable[Path], shims: Sequence[Path], store: Path | None,
        listed: Iterable[str], most_files: int,
    ) -> Discovery:  # fmt: skip
        """Return the discovery of a host.

        Args:
            attached: the probes of all files.
            drivers: the libraries of the host's driver.
            shims: the published shims, the agent's own first.
            store: the store of shims, if there is one.
            listed: digests of drivers that are trusted.
            most_files: how many files may be probed for one cgroup.
        """
        own = dict.fromkeys(shims, Role.SHIM) | dict.fromkeys(drivers, Role.HOST)
        return cls(attached, own, trusted(shims[0], store, listed), most_files)

    def start(self) -> Set[File] | None:
        """Probe the host's own libcuda and shim files, and all such files that processes map.

        This method also removes the probes of files that no process maps any longer. The result is (dev, ino) of all
        mapped libcuda and shim files; None: the mappings of some processes cannot be read. Raise ProbeError if one of
        the host's own files cannot be probed.
        """
        self._libraries.attach_own()
        scanned: list[Scanned] = []
        self._scan.begin(scanned.append)
        self._libraries.settle(lambda: bool(scanned))
        # Until this call, the programs of an earlier agent record the calls into these files.
        self._probes.drop_older()
        self._libraries.read_own()
        if not scanned or not scanned[0].is_whole or scanned[0].left_out:
            which = f"process {scanned[0].left_out[0]}" if scanned and scanned[0].left_out else "some processes"
            log.info("the mappings of %s cannot be read: probes of removed files are kept", which)
            return None
        self._probes.drop_unused(scanned[0].used | self._libraries.own_files)
        return scanned[0].used

    def unenforced(self) -> str:
        """Return why limits do not hold: links of probes or process events were removed. Empty: no link is missing."""
        if not self._probes.lost() and self._libraries.own_files <= self._probes.known:
            return ""
        return f"probes are missing: another process has removed their links{self._attach_error}"

    def reattach(self) -> None:
        """Attach lost probes again. The next reconciliation charges the memory that was allocated without probes."""
        lost = self._probes.lost()
        if not lost and self._libraries.own_files <= self._probes.known:
            self._attach_error = ""
            return
        before = self._attach_error
        if not before:
            log.warning("probes are missing: the agent attaches them again")
        try:
            self._probes.attach_again(lost)
            self._libraries.attach_own()
        except (ProbeError, OSError) as error:
            self._attach_error = f", and the probes cannot be attached again ({error})"
            if self._attach_error != before:  # reattach() is called every second
                log.warning("%s", self.unenforced())
            return
        self._attach_error = ""
        self.look_around()

    @property
    def opens_fault(self) -> str:
        """The reason why no program decides about opens of device nodes; an empty text if a program decides."""
        return self._probes.opens_fault

    @property
    def refusals(self) -> int:
        """The number of times that a file could not be probed, since the agent's start."""
        return self._libraries.refusals

    def unprobed(self) -> frozenset[int]:
        """Return the processes that map a libcuda or shim file whose calls no probe records."""
        return frozenset(self._libraries.unprobed())

    def reasons(self) -> Mapping[int, str]:
        """Return the reason for each process in unprobed()."""
        return self._libraries.unprobed()

    def is_shim(self, dev: int, ino: int) -> bool:
        """Return whether this file is probed as a shim of this host."""
        found = self._probes.of((dev, ino))
        return found is not None and found.role is Role.SHIM

    def explain(self, pid: int, then: Then) -> bool:
        """Let a worker find the reason why a process has no shim. The main thread calls `then` with the result.

        Return False if the job was not queued: the process's cgroup has used its time.
        """
        return self._libraries.work(self._cgroup(pid), lambda: partial(then, *search(pid, self.is_shim)))

    def hidden(self) -> frozenset[int]:
        """Return the processes that execute memory without a file.

        Only the processes that look_at_new() searches for libcuda are examined.
        """
        return frozenset(self._hidden)

    def libraries(self, tenant_of: Callable[[str], str]) -> tuple[LibraryView, ...]:
        """Return the drivers that processes map, except the host's. `tenant_of` returns the tenant of a cgroup path."""
        return self._libraries.views(tenant_of)

    def standalone(self) -> frozenset[int]:
        """Return the processes under their image's own limit, which do not register with the gatekeeper."""
        return frozenset(self._standalone)

    # -- processes

    def look_at(self, pid: int) -> None:
        """Probe the files that a process maps, and check the breakpoints in its memory."""
        self._ask(pid)

    def look_at_holders(
        self, pids: Iterable[int], drift: Mapping[tuple[int, int], int], processes: Mapping[int, Process]
    ) -> None:
        """Probe the files that processes in NVML's lists map, as look_at_new() does.

        The files of a process are searched for libcuda again in two cases: NVML shows more memory of the process
        without a recorded allocation than at the last search, or no probe has recorded a call of the process.

        Args:
            pids: the processes.
            drift: ledger minus NVML in bytes by (pid, device), at the last reconciliation.
            processes: the ledger's processes at that time.
        """
        unrecorded = Counter({pid: sum(process.overhead) for pid, process in processes.items()})
        for (pid, _), bytes_ in drift.items():
            unrecorded[pid] -= min(0, bytes_)
        again = {pid for pid, bytes_ in unrecorded.items() if bytes_ > self._unrecorded.get(pid, 0)}
        again |= {pid for pid, process in processes.items() if not process.flags & Seen.CALL}
        pids = set(pids)
        searched = self.look_at_new(pids, again)
        self._unrecorded |= {pid: unrecorded[pid] for pid in searched}
        self._unrecorded = {pid: bytes_ for pid, bytes_ in self._unrecorded.items() if pid in pids}

    def look_at_new(self, pids: Iterable[int], again: Set[int] = frozenset()) -> set[int]:
        """Probe the files that processes in NVML's lists map, unless these files were probed before.

        Args:
            pids: the processes.
            again: processes with more memory than probes have recorded, or without a recorded call. All files that
                these processes execute are searched for libcuda, at most every SEARCH_SECONDS.

        Returns:
            The processes that are searched now.
        """
        pids, now, searched = set(pids), monotonic(), set[int]()
        self._looked_at &= pids
        self._searched = {pid: at for pid, at in self._searched.items() if pid in pids}
        for pid in sorted(pids):
            is_due = now - self._searched.get(pid, -SEARCH_SECONDS) >= SEARCH_SECONDS
            if pid in again and is_due and self._ask(pid, search=True):
                self._searched[pid] = now
                self._looked_at.add(pid)
                searched.add(pid)
            elif pid not in self._looked_at and self._ask(pid):
                self._looked_at.add(pid)
        return searched

    def _ask(self, pid: int, search: bool = False) -> bool:
        """Let a worker read the mappings of a process. Return False if the job was not queued."""
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
        """Return the cgroup to which work for this process is charged."""
        return self._owner(procfs.cgroup_path(pid) or "/")

    def _owner(self, path: str) -> str:
        return owner_of(self._root, path).path

    def look_around(self) -> None:
        """Probe the files that all processes map, and retry refused files.

        This scan finds processes that neither the gatekeeper nor NVML has reported.
        """
        self._libraries.look_around()
        self._scan.begin(lambda _: None)

    def _see(self, pid: int, cgroup: str, found: Found, verify: bool = False) -> None:
        """Request probes for the files that a process maps.

        Args:
            pid: the process.
            cgroup: the cgroup to which the work of probing is charged; empty: the cgroup is unknown.
            found: the files.
            verify: also check files that are already probed.
        """
        self._standalone.discard(pid)
        if found.books:
            self._standalone.add(pid)
        for one in found.files or ():
            if not self._libraries.knows(pid, one) or verify:
                cgroup = cgroup or self._cgroup(pid)
                self._libraries.want(pid, cgroup, one)

    # -- roots

    def look_into(self, pid: int) -> None:
        """Probe the libraries in the root of a process that starts, if no process has started in that root before.

        A file that cannot be probed is logged only when a process maps the file.
        """
        cgroup = self._cgroup(pid)
        if not procfs.is_outside(cgroup) and self._libraries.room(cgroup):
            self._libraries.work(cgroup, partial(self._search_root, pid, cgroup, self._libraries.room(cgroup)))

    def _search_root(self, pid: int, cgroup: str, room: int) -> Taken:
        root = root_scan.root_of(pid)
        found: dict[File, Examined] = {}
        if root is not None and root not in self._roots:
            for target in root_scan.libraries(pid):
                file = target.dev, target.ino
                if file not in found and len(found) < room and file not in self._libraries.own_files:
                    found[file] = self._libraries.examiner.found(target)
        return partial(self._take_root, pid, cgroup, root, found.values())

    def _take_root(self, pid: int, cgroup: str, root: Root | None, found: Iterable[Examined]) -> None:
        if root is not None:
            self._roots.enter(root)
        for examined in found:
            if root is not None and not examined.error and not self._libraries.enter(cgroup, examined):
                self._libraries.expect_mapping(examined.file, pid)
                self._roots.found(examined.file, root)

    # -- periodic work

    def keep(self) -> None:
        """Check that trusted files are unchanged, and remove the probes of files that no process maps any longer."""
        self._libraries.keep()
        self.let_go()

    def let_go(self) -> None:
        """Remove the probes of all files that no process maps any longer, except the host's own files."""
        left = self._libraries.unmapped()
        if left:  # another process may have mapped one of these files: scan before removing
            self._scan.begin(partial(self._let_go, left))
        self._standalone = {pid for pid in self._standalone if procfs.has_memory(pid)}
        self._hidden = {pid for pid in self._hidden if procfs.has_memory(pid)}

    def _let_go(self, left: set[File], scanned: Scanned) -> None:
        """Remove the probes of the files in `left` that the scan found in no process and in no process's root.

        The files that a process in `scanned.left_out` maps are unknown. These files lose their probes if no other
        process maps the files, and a process in `scanned.left_out` then gets no answer to its hello.
        """
        left = (left & self._libraries.unmapped()) - scanned.used if scanned.is_whole else set()
        kept = self._roots.processes_inside(left, scanned.pids)
        for file, pid in kept.items():
            self._libraries.expect_mapping(file, pid)
        for file in left - kept.keys():
            self._libraries.let_go(file)
            self._roots.forget(file)

    # -- messages of the gatekeeper

    def listen(self, path: Path) -> int:
        """Bind the socket, and return its descriptor, which is readable after a message from the gatekeeper."""
        make_way(str(path))
        path.unlink(missing_ok=True)
        self._socket.bind(str(path))
        path.chmod(0o600)
        return self._socket.fileno()

    def named(self) -> Iterator[list[int]]:
        """Yield the pids in the fields `tgid` and `others` of each message from the gatekeeper."""
        while True:
            try:
                message = json.loads(self._socket.recv(MOST_MESSAGE))
                tgids = [int(tgid) for tgid in (message["tgid"], *message.get("others", ()))]
            except BlockingIOError:
                return
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                continue
            if all(0 < tgid < MOST_PIDS for tgid in tgids):
                yield tgids
