"""The files of libcuda and the shim that are in use: their classes, their probes, and reasons for missing probes.

This module runs in the agent's main thread. Worker threads do the work that can block on a tenant's process or file,
and the main thread applies the results. A file that cannot be probed is logged once, and is not tried again before the
next scan. Processes that map such a file get no memory. Files of one cgroup must not delay the probing of other
cgroups' files.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from time import monotonic, sleep

from fgpu_ebpf.driver import attach, shim_store
from fgpu_ebpf.driver.attach import Probes
from fgpu_ebpf.driver.file_budget import MOST_FILES, FileBudget
from fgpu_ebpf.driver.library_class import Role, Stamp, Trust
from fgpu_ebpf.driver.library_files import Target
from fgpu_ebpf.driver.library_worker import Examined, Examiner
from fgpu_ebpf.linux import mapped_files, procfs
from fgpu_ebpf.linux.mapped_files import MappedFile
from fgpu_ebpf.linux.procmaps import File
from fgpu_ebpf.linux.wakeup import Wakeup
from fgpu_ebpf.linux.worker_threads import Workers
from fgpu_ebpf.snapshot import LibraryView

log = logging.getLogger("fgpu.agent")
MOST_NAMED = 1024  # files and cgroups for which a refusal has been logged
MOST_JOBS = 256  # queued jobs of one cgroup: more than the number of files that may be probed for it
THREADS = 4  # started at once; more start only if no thread finishes a job; reading a file takes tenths of a second
NICE = 10  # nice level of the workers, because they work for processes that are not trusted
SETTLE_SECONDS = 5.0

Taken = Callable[[], None]  # applies the result of a job, in the main thread
Job = Callable[[], Taken]


def trusted(shim: Path, store: Path | None, listed: Iterable[str]) -> Trust:
    """Return the files that this host trusts: this shim, shims that are or were in the store, drivers in agent.yaml."""
    files = shim_store.files(store) if store else []
    versions = {mapped_files.as_mapped(str(path)): str(path.resolve()) for path in files}
    return Trust(versions, shim_store.genuine(shim, store), listed)


def _done(job: Job) -> Taken:
    """Do a job, and return its result. A job's error is raised in the main thread, and ends no worker thread."""
    try:
        return job()
    except Exception as error:
        return partial(_fail, error)


def _fail(error: Exception) -> None:
    raise error


class Libraries:
    """The libcuda and shim files in use.

    Args:
        attached: the probes of all files.
        own: the host driver's files and the published shims, each with its role.
        trust: the trusted files; the host's own files are added to this set.
        most_files: how many files may be probed for one cgroup.
    """

    def __init__(self, attached: Probes, own: Mapping[Path, Role], trust: Trust, most_files: int = MOST_FILES) -> None:
        self._probes, self._trust = attached, trust
        self._own = [(Target.of(str(path)), role) for path, role in own.items()]
        self.own_files = frozenset((target.dev, target.ino) for target, _ in self._own)
        for target, role in self._own:
            trust.trust_file((target.dev, target.ino), role)
        self.examiner, self._budget, self._wakeup = Examiner(attached, trust), FileBudget(most_files), Wakeup()
        self._workers: Workers[str, Job, Taken] = Workers(
            _done, lambda _: True, self._wakeup.wake, MOST_JOBS, NICE, THREADS
        )
        self._results: deque[Taken] = deque()
        self._examining: dict[tuple[File, str], dict[int, MappedFile]] = {}  # processes that wait for the result
        self._coming = Counter[str]()  # by cgroup: number of its files that are being examined
        self._reading: set[File] = set()  # files whose contents are being read
        # By file of a tenant: the processes that map the file, with the mapping; None: the process may map the file
        # later.
        self._mappers: dict[File, dict[int, MappedFile | None]] = {}
        self._refused: dict[File, str] = {}  # files that cannot be probed, and the reason; until the next look_around()
        self._unprobed: dict[int, dict[File, str]] = {}  # by process: files whose probes miss calls -> reason
        self._named: set[object] = set()
        self.refusals = 0

    # -- the host's own files

    def attach_own(self) -> None:
        """Probe the host's own files. Raise ProbeError if one of these files cannot be probed."""
        for target, role in self._own:
            self._probes.attach(target, role)

    def read_own(self) -> None:
        """Let workers read the contents of the host's drivers, so that copies of these files are trusted."""
        for target, role in self._own:
            if role is Role.HOST:
                self.work("", partial(self._read_own, target))

    def _read_own(self, target: Target) -> Taken:
        return partial(self._take_own, self.examiner.read_own(target))

    def _take_own(self, digest: str) -> None:
        if digest:
            self._trust.trust_contents(digest)
            for file in self.tenant_files():
                self._change(file)

    # -- worker threads

    def fileno(self) -> int:
        """Return a descriptor that is readable when take() has work."""
        return self._wakeup.fileno()

    def work(self, cgroup: str, job: Job) -> bool:
        """Queue a job for a cgroup, or for the host if `cgroup` is empty.

        Return False if the cgroup's queue is full or the cgroup's processor time is used up.
        """
        if cgroup and not self._budget.has_time(cgroup):
            return False
        queued = self._workers.want(cgroup, job)
        self._go()
        return queued

    def _go(self) -> None:
        """Start threads for the queued jobs. In a shortage of threads the jobs stay queued, and keep() tries again."""
        with contextlib.suppress(OSError):
            self._workers.go()

    def take(self) -> None:
        """Apply the results of the worker threads."""
        self._wakeup.clear()
        for done in self._workers.take():
            self._budget.charge(done.owner, done.took_ns)
            self._results.append(done.result)
        self._go()
        try:
            while self._results:
                self._results.popleft()()
        finally:
            if self._results:
                self._wakeup.wake()

    def settle(self, is_ready: Callable[[], bool]) -> None:
        """Wait until `is_ready` returns True and all requested files are examined, for at most SETTLE_SECONDS."""
        end = monotonic() + SETTLE_SECONDS
        while (self._examining or not is_ready()) and monotonic() < end:
            sleep(0.001)
            self.take()

    def keep(self) -> None:
        """Check that files trusted by their contents are unchanged. The main loop calls this method in every round.

        Raise OSError in a shortage of threads.
        """
        self._budget.refill()
        for file in self.tenant_files():
            now = self._probes.of(file)
            if now and now.role in (Role.SHIM, Role.LISTED) and self._trust.role(file) is not now.role:
                self._look_again(file)
        self._workers.go()

    # -- files that processes map

    def tenant_files(self) -> frozenset[File]:
        """Return all probed files except the host's own.

        Many of these files lie in layers of containers. The mounts of a layer stay busy while its files have probes.
        """
        return self._probes.known - self.own_files

    def knows(self, pid: int, one: MappedFile) -> bool:
        """Record that a process maps a file. Return whether the file is already probed and needs no further work."""
        file = one.dev, one.ino
        now = self._probes.of(file)
        if not now or file in self.own_files:
            return now is not None
        self._mappers.setdefault(file, {})[pid] = one
        self._read(file)
        return now.stamp is not None and file in self._budget

    def want(self, pid: int, cgroup: str, one: MappedFile) -> None:
        """Let a worker probe a file that a process of this cgroup maps, and check the breakpoint in its mapping."""
        file = one.dev, one.ino
        if self._probes.of(file) or file in self.own_files:
            if file not in self.own_files:
                self._budget.enter(file, cgroup)
            self._examine(pid, cgroup, one)
        elif file in self._refused:
            self._note_unprobed(pid, file, self._refused[file])
        elif self._has_room(file, cgroup, pid):
            self._examine(pid, cgroup, one)

    def _examine(self, pid: int, cgroup: str, one: MappedFile) -> None:
        key = (one.dev, one.ino), cgroup
        if key in self._examining:
            self._examining[key].setdefault(pid, one)
        elif self.work(cgroup, partial(self._examined, pid, cgroup, one)):
            self._examining[key] = {}
            self._coming[cgroup] += 1
        elif not self._probes.of(key[0]):
            self._note_unprobed(pid, key[0], "too many files of the cgroup wait to be examined")

    def _examined(self, pid: int, cgroup: str, one: MappedFile) -> Taken:
        return partial(self._take, pid, cgroup, one, self.examiner.mapped(pid, one))

    def _take(self, pid: int, cgroup: str, one: MappedFile, examined: Examined) -> None:
        waiting = self._examining.pop((examined.file, cgroup), {})
        self._coming[cgroup] -= 1
        self._coming += Counter()  # drops cgroups without files
        error = examined.error or self.enter(cgroup, examined)
        if error:
            self._fail(pid, cgroup, one, error, examined.is_file_s)
        else:
            self._succeed(pid, one)
        for other, its in waiting.items():
            self.want(other, cgroup, its)

    def enter(self, cgroup: str, examined: Examined) -> str:
        """Take over the probes that a worker has attached. Return the reason for a failure, or an empty text."""
        file = examined.file
        if self._probes.of(file) is not examined.before:  # the result of another worker came first
            attach.drop(examined.links)
            return ""
        if file not in self.own_files and not (file in self._budget or self._budget.room(cgroup)):
            attach.drop(examined.links)
            return self._bound_text(cgroup)
        if examined.plan and examined.target:
            try:
                self._probes.enter(examined.target, examined.plan, examined.links, examined.stamp, examined.beside)
            except OSError as error:
                return f"cannot be probed ({error})"
            log.info("probed %a as %s", examined.target.path, examined.plan.role.name, extra={"tenant": cgroup})
        elif examined.before and examined.stamp:
            examined.before.stamp = examined.stamp
        if file not in self.own_files:
            self._budget.enter(file, cgroup)
        return ""

    def _succeed(self, pid: int, one: MappedFile) -> None:
        file = one.dev, one.ino
        self._refused.pop(file, None)
        self._unprobed.get(pid, {}).pop(file, None)
        if file not in self.own_files:
            self._mappers.setdefault(file, {})[pid] = one
            self._read(file)
            self._change(file)

    def _fail(self, pid: int, cgroup: str, one: MappedFile, error: str, is_file_s: bool) -> None:
        if not procfs.has_memory(pid):
            return
        file = one.dev, one.ino
        if is_file_s and not self._probes.of(file):
            self._refused[file] = error
            self._budget.enter(file, cgroup)
        self._note_unprobed(pid, file, error)
        self._refuse(file, cgroup, f"{one.path!a} of process {pid}: {error}")

    # -- classes of files

    def _mapped(self, file: File) -> tuple[int, MappedFile] | None:
        """Return one process that maps a tenant's file, with its mapping; None: no process maps the file."""
        return next(((pid, one) for pid, one in self._mappers.get(file, {}).items() if one), None)

    def _read(self, file: File) -> None:
        """Let a worker read a tenant's driver once. The digest, shown by `fgpu doctor`, may make the file trusted."""
        now, mapped = self._probes.of(file), self._mapped(file)
        if not now or not mapped or not now.role.is_driver or file in self._reading:
            return
        unread = self._trust.digest(file, now.stamp) is None
        if unread and self.work(self._budget.cgroup_of(file), partial(self._contents, file, *mapped)):
            self._reading.add(file)

    def _contents(self, file: File, pid: int, one: MappedFile) -> Taken:
        self.examiner.read(pid, one)
        return partial(self._take_contents, file)

    def _take_contents(self, file: File) -> None:
        self._reading.discard(file)
        self._change(file)

    def _change(self, file: File) -> None:
        """Let a worker probe a file again if its role has changed."""
        now, mapped = self._probes.of(file), self._mapped(file)
        if now and mapped and self._trust.role(file, now.stamp) is not now.role is not Role.NONE:
            self._examine(mapped[0], self._budget.cgroup_of(file), mapped[1])

    def _look_again(self, file: File) -> None:
        """Let a worker check whether a file's size and times have changed.

        Any process may have unmapped the file, so the worker opens the file through the first process that maps it.
        """
        its = [(pid, one) for pid, one in self._mappers.get(file, {}).items() if one]
        if its:
            self.work(self._budget.cgroup_of(file), partial(self._stamped, file, its))

    def _stamped(self, file: File, its: list[tuple[int, MappedFile]]) -> Taken:
        found = ((pid, stamp) for pid, one in its if (stamp := self.examiner.stamp(pid, one)))
        return partial(self._take_stamp, file, *next(found, (0, None)))

    def _take_stamp(self, file: File, pid: int, stamp: Stamp | None) -> None:
        now, its = self._probes.of(file), self._mappers.get(file, {})
        if now and stamp and (one := its.get(pid)):
            self._mappers[file] = {pid: its[pid]} | its  # _mapped() returns this process, which still maps the file
            if stamp != now.stamp:
                self._examine(pid, self._budget.cgroup_of(file), one)

    def views(self, tenant_of: Callable[[str], str]) -> tuple[LibraryView, ...]:
        """Return the drivers that processes map, except the host's. `tenant_of` returns the tenant of a cgroup path."""
        return tuple(self._views(tenant_of))

    def _views(self, tenant_of: Callable[[str], str]) -> Iterator[LibraryView]:
        for file in sorted(self.tenant_files()):
            now, mapped = self._probes.of(file), self._mapped(file)
            if now and mapped and now.role.is_driver:
                digest = self._trust.digest(file, now.stamp) or ""
                pids = tuple(sorted(pid for pid, one in self._mappers[file].items() if one))
                tenant = tenant_of(procfs.cgroup_path(mapped[0]) or "/")
                yield LibraryView(mapped[1].path, digest, now.role.name.lower(), tenant, pids)

    # -- removal of files, and refusals

    def look_around(self) -> None:
        """Discard refusals, so that the refused files are tried again, and let workers check all tenants' files."""
        for file in self._refused:
            self._budget.forget(file)
        self._refused.clear()
        for file in self.tenant_files():
            self._look_again(file)
            self._read(file)

    def unmapped(self) -> set[File]:
        """Return the tenants' files that no process can use any longer."""
        mappers = {file: self._mappers.get(file, {}) for file in self.tenant_files()}
        self._mappers = {f: {p: one for p, one in its.items() if procfs.has_memory(p)} for f, its in mappers.items()}
        self._unprobed = {pid: why for pid, why in self._unprobed.items() if why and procfs.has_memory(pid)}
        return {file for file, pids in self._mappers.items() if not pids}

    def expect_mapping(self, file: File, pid: int) -> None:
        """Record that a process may map a tenant's file later."""
        self._mappers.setdefault(file, {}).setdefault(pid, None)

    def let_go(self, file: File) -> None:
        """Remove the probes of a tenant's file."""
        self._probes.let_go(file)
        self._trust.forget(file)
        self._budget.forget(file)
        self._mappers.pop(file, None)

    def unprobed(self) -> Mapping[int, str]:
        """Return, by process, the reasons why probes miss calls of the process."""
        return {pid: "; ".join(why.values()) for pid, why in self._unprobed.items() if why}

    def room(self, cgroup: str) -> int:
        """Return how many more files of this cgroup may be probed."""
        return self._budget.room(cgroup)

    def _has_room(self, file: File, cgroup: str, pid: int) -> bool:
        if self._budget.room(cgroup) > self._coming[cgroup]:
            return True
        self._note_unprobed(pid, file, self._bound_text(cgroup))
        self._refuse(
            cgroup,
            cgroup,
            f"other files that processes of {cgroup!a} map, for example process {pid}: {self._bound_text(cgroup)}",
        )
        return False

    def _bound_text(self, cgroup: str) -> str:
        its, all_ = self._budget.has(cgroup)
        return (
            f"the workload has {its} of at most {self._budget.most} files with libcuda's or the shim's name, all "
            f"workloads have {all_} (bounds.files in agent.yaml)"
        )

    def _note_unprobed(self, pid: int, file: File, why: str) -> None:
        self._unprobed.setdefault(pid, {})[file] = why

    def _refuse(self, what: object, cgroup: str, text: str) -> None:
        """Count a refusal. Log a refusal that is new."""
        self.refusals += 1
        if what not in self._named and len(self._named) < MOST_NAMED:
            self._named.add(what)
            log.warning("not probed: %s", text, extra={"tenant": cgroup})
