"""Which files of libcuda and the shim are in use, and that all of them are probed.

Owns: the socket at which the gatekeeper names processes that nobody has looked at, and how many files one cgroup may
have probed. Never: answers a shim; lets what one tenant maps keep it from looking at others. On failure: a file that
cannot be probed is named once and stays unknown, so its processes get no memory.
"""

from __future__ import annotations

import json
import logging
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path

from fgpu_ebpf import procfs, roots
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.probes import File, ProbeError, Probes, Target, target_of
from fgpu_ebpf.roots import Roots
from fgpu_ebpf.workloads import Workloads

log = logging.getLogger("fgpu.agent")
MOST_FILES = 32  # that are not the host's own, of one cgroup: each takes two descriptors, and time to end
MOST_FILES_ALL = 2048
MOST_MESSAGE = 65536  # bytes of the gatekeeper's
MOST_PIDS = 1 << 31
MOST_NAMED = 1024  # files and cgroups whose fault has been said


class Discovery:
    """Finds files by who maps them."""

    def __init__(self, probes: Probes, own: Sequence[Path]) -> None:
        self._probes = probes
        self._own = [Target.of(str(path)) for path in own]
        self._own_files = frozenset((target.dev, target.ino) for target in self._own)
        self._looked_at: set[int] = set()
        self._mappers: dict[File, set[int]] = {}  # of strays: who maps them, or may yet
        self._roots = Roots()
        self._root = procfs.cgroup2_root() or Path("/")
        self._whose: dict[File, str] = {}  # strays, and files that could not be probed -> who mapped them first
        self._has = Counter[str]()
        self._refused: set[File] = set()  # until the next look around
        self._named: set[object] = set()
        self._outside: set[int] = set()  # processes that map a file that is not probed
        self._standalone: set[int] = set()  # processes that keep an image's limit among themselves
        self._hopeless = ""
        self.refusals = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def start(self) -> Set[File] | None:
        """Probes the host's own files and all that are mapped now, and drops what nobody maps any more.

        Answers (dev, ino) of all that are mapped; None: that cannot be told of everybody. Raises ProbeError: one of the
        host's own cannot be probed.
        """
        self._attach_own()
        used, unreadable = self._attach_mapped(procfs.pids())
        self._probes.drop_older()
        if unreadable:
            log.info("the mappings of process %s cannot be read: probes of files that are gone stay", unreadable)
            return None
        self._probes.drop_unused(used | self._own_files)
        return used

    def _attach_own(self) -> None:
        for target in self._own:
            self._probes.attach(target)

    def unenforced(self) -> str:
        """Why nothing is enforced: probes of the host's own files are not there any more. Empty: they are."""
        if not self._probes.lost() and self._own_files <= self._probes.known:
            return ""
        return f"probes are gone: somebody unpinned them{self._hopeless}"

    def mend(self) -> None:
        """Attaches again what somebody has taken away; what was allocated meanwhile NVML shows at the next look."""
        lost = self._probes.lost()
        if not lost and self._own_files <= self._probes.known:
            return
        log.warning("probes of %d files are gone: attaching them again", len(lost))
        try:
            self._probes.attach_again(lost)
            self._attach_own()
        except (ProbeError, OSError) as error:
            self._hopeless = f", and they cannot be attached again ({error})"
            log.warning("%s", self.unenforced())
            return
        self._hopeless = ""
        self.look_around()

    def unprobed(self) -> frozenset[int]:
        """Processes that were found to map a libcuda or shim file that is not probed."""
        return frozenset(self._outside)

    def standalone(self) -> frozenset[int]:
        """Processes that were found to keep books of their image's own limit: what they ask nobody answers here."""
        return frozenset(self._standalone)

    def look_at(self, pid: int) -> None:
        """Probes what a process maps."""
        self._attach_mapped([pid])

    def look_at_new(self, pids: Iterable[int], again: Set[int] = frozenset()) -> None:
        """Probes what these processes map: they use a device, NVML says. Those that were not looked at yet.

        `again`: those that hold more than the kernel has seen.
        """
        pids = set(pids)
        new = pids - (self._looked_at - again)
        self._looked_at = pids
        self._attach_mapped(sorted(new))

    def look_around(self) -> None:
        """Probes what anybody maps: for what nothing else has told. What could not be probed is tried once more."""
        for file in self._refused:
            self._forget(file)
        self._refused.clear()
        self._attach_mapped(procfs.pids())

    def look_into(self, pid: int) -> None:
        """Probes what a process that begins may come to map: what its root has, where nobody has looked there yet.

        Said is nothing of what cannot be probed: that is, when somebody maps it.
        """
        root = self._roots.enter(pid)
        if root is None:
            return
        whose = procfs.delegated(self._root, procfs.cgroup_path(pid) or "/")
        for target in roots.libraries(pid):
            file = target.dev, target.ino
            if file in self._own_files or not (file in self._probes.known or self._probe_early(target, whose)):
                continue
            self._mappers.setdefault(file, set()).add(pid)
            self._roots.found(file, root)

    def _probe_early(self, target: Target, whose: str) -> bool:
        if not self._room(whose):
            return False
        try:
            self._probes.attach(target)
        except Exception:  # whatever it is, nobody has used it
            return False
        self._enter((target.dev, target.ino), whose)
        log.info("probed %a for who comes to map it", target.path, extra={"tenant": whose})
        return True

    def let_go(self) -> None:
        """Ends the probes of files that are not the host's own and that nobody maps any more."""
        strays = self._strays()
        self._mappers = {f: {p for p in self._mappers.get(f, ()) if procfs.has_memory(p)} for f in strays}
        self._outside = {pid for pid in self._outside if procfs.has_memory(pid)}
        self._standalone = {pid for pid in self._standalone if procfs.has_memory(pid)}
        left = {file for file, pids in self._mappers.items() if not pids}
        if left:  # perhaps somebody else has come to map them; who cannot be read gets no answer to a hello either
            pids = procfs.pids()
            used, _ = self._attach_mapped(pids)
            kept = self._roots.dwellers(left - used, pids)
            self._mappers |= {file: {pid} for file, pid in kept.items()}
            for file in left - used - kept.keys():
                self._probes.let_go(file)
                self._roots.forget(file)
                self._forget(file)

    def _strays(self) -> frozenset[File]:
        """Files in containers' layers, or anywhere else: a probe keeps their mount busy."""
        return self._probes.known - self._own_files

    def _attach_mapped(self, pids: Sequence[int]) -> tuple[set[File], int]:
        """Answers the files that are mapped, and a process of which that cannot be told."""
        used: set[File] = set()
        unreadable = 0
        for pid in pids:
            mapped = procfs.fgpu_mappings(pid)
            if mapped is None and procfs.has_memory(pid):
                unreadable = pid
            files = {(m.dev, m.ino) for m in mapped or ()}
            used |= files
            self._outside.discard(pid)
            self._standalone.discard(pid)
            if files and procfs.keeps_books(pid):
                self._standalone.add(pid)
            if files and not self._attach_all(pid, mapped or ()):
                self._outside.add(pid)
            for file in files & self._strays() if files else ():
                self._mappers.setdefault(file, set()).add(pid)
        return used, unreadable

    def _attach_all(self, pid: int, mapped: Iterable[procfs.Mapping]) -> bool:
        """Probes what a process maps; all of it is probed now."""
        missing, whose = False, ""
        for one in mapped:
            file = one.dev, one.ino
            if file in self._probes.known and (file in self._whose or file in self._own_files):
                continue
            whose = whose or procfs.delegated(self._root, procfs.cgroup_path(pid) or "/")
            if file in self._probes.known:  # by an agent before this one
                self._enter(file, whose)
            elif file in self._refused:
                missing = True
            elif not self._has_room(whose, pid):
                return False
            else:
                missing |= not self._attach(pid, one, whose)
        return not missing

    def _attach(self, pid: int, mapped: procfs.Mapping, whose: str) -> bool:
        """Whatever a tenant has made of its file, it is no reason to leave the others unprobed."""
        file = mapped.dev, mapped.ino
        try:
            self._probes.attach(target_of(pid, mapped))
        except Exception as error:
            if procfs.has_memory(pid):
                self._refused.add(file)
                self._enter(file, whose)
                self._refuse(file, whose, f"{mapped.path!a} of process {pid}: {error}")
            return False
        self._enter(file, whose)
        log.info("probed %a", mapped.path, extra={"tenant": whose})
        return True

    def _enter(self, file: File, whose: str) -> None:
        self._whose[file] = whose
        self._has[whose] += 1

    def _forget(self, file: File) -> None:
        whose = self._whose.pop(file, None)
        if whose is not None:
            self._has[whose] -= 1
            self._has += Counter()  # those with nothing left

    def _has_room(self, whose: str, pid: int) -> bool:
        """For one more file of this cgroup; of who may make cgroups of its own, of all those together."""
        if self._room(whose):
            return True
        many = f"{self._has[whose]} files of libcuda's or the shim's name in it, {len(self._whose)} in all"
        self._refuse(whose, whose, f"what else processes of {whose!a} map, such as {pid}: {many}")
        return False

    def _room(self, whose: str) -> bool:
        return self._has[whose] < MOST_FILES and len(self._whose) < MOST_FILES_ALL

    def _refuse(self, what: object, whose: str, text: str) -> None:
        """Counted each time, said once."""
        self.refusals += 1
        if what not in self._named and len(self._named) < MOST_NAMED:
            self._named.add(what)
            log.warning("not probed: %s", text, extra={"tenant": whose})

    def sweep(self, ledger: Ledger, workloads: Workloads) -> None:
        """Forgets unmanaged cgroups that are gone, so that the map holds live ones only."""
        decided = set(ledger.unmanaged())
        if decided:
            live = {workloads.cgroup(path) for path in ("", *workloads.walk())}
            for cgroup in decided - live:
                ledger.forget(cgroup)

    # -- the gatekeeper's questions

    def listen(self, path: Path) -> int:
        """Binds; answers a descriptor that is readable when the gatekeeper has named somebody."""
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
