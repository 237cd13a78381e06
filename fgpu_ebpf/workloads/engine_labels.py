"""The names and labels that engines report of the containers and pods of this host.

The agent's main thread uses this module and never waits for an engine: engine threads ask and store the answers, and
`take` returns the cgroups that they concern. At most MOST_KNOWN containers and pods are stored, each for as long as
rescans ask for it. A container that no engine has reported has the labels of its cgroup only.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fgpu_ebpf.linux.wakeup import Wakeup
from fgpu_ebpf.snapshot import EngineView
from fgpu_ebpf.workloads import label_cache
from fgpu_ebpf.workloads.cgroup_names import Engine
from fgpu_ebpf.workloads.cri import CriApi
from fgpu_ebpf.workloads.docker import DockerApi
from fgpu_ebpf.workloads.engine_answers import POD_UID
from fgpu_ebpf.workloads.engine_thread import Api, EngineThread
from fgpu_ebpf.workloads.workload import Names, Subject, Workload, named

log = logging.getLogger("fgpu.engines")
MOST_KNOWN = 4096
MOST_PATHS = 64  # cgroups of one container that are reconsidered at once; the others are at the next rescan
FORGOTTEN_RESCANS = 4  # each asks for every cgroup that still exists; a frozen agent does none


@dataclass(slots=True)
class _Entry:
    asked_in: int  # the number of rescans at the last request for it
    paths: set[str] = field(default_factory=set)
    names: Names | None = None


def api_of(text: str) -> Api:
    """Return the client for a setting such as `docker:/run/docker.sock`. The kinds are docker, podman and cri."""
    kind, _, path = text.partition(":")
    return CriApi(path) if kind == "cri" else DockerApi(Engine(kind), path)


class Engines:
    """All engines of the host. `fileno` is readable when `take` has something to return.

    `file` stores what is known over restarts of the agent; None: it is not stored.
    """

    def __init__(self, apis: Iterable[Api] = (), file: Path | None = None) -> None:
        self._threads = [EngineThread(api, self._answered) for api in apis]
        self._file = file
        self._rescans = 0
        kept = label_cache.read(file) if file else {}
        self._entries = {subject: _Entry(0, names=names) for subject, names in kept.items()}
        self._written: object = None
        self._write_error = ""  # of the last try to write the file
        self._answers = 0
        self._changed: set[str] = set()
        self._lock = threading.Lock()
        self._wakeup = Wakeup()
        self.left_out = 0  # containers that no engine was asked about, because there are too many

    def fileno(self) -> int:
        """Return a descriptor that is readable when cgroups have got names."""
        return self._wakeup.fileno()

    def stop(self) -> None:
        """Stop the engine threads."""
        for thread in self._threads:
            thread.stop()

    def named(self, workload: Workload) -> Workload:
        """Return the workload with what is known of it now; the rest is asked, and `take` returns its path then."""
        subject = workload.subject
        if subject is None:
            return workload
        with self._lock:
            entry = self._entries.get(subject)
            if entry is None:
                entry = self._enter(subject)
            if entry is None:
                return workload
            entry.asked_in = self._rescans
            if len(entry.paths) < MOST_PATHS:
                entry.paths.add(workload.path)
            names = entry.names
        return workload if names is None else named(workload, names)

    def take(self) -> list[str]:
        """Return the cgroups whose names were resolved since the last call."""
        self._wakeup.clear()
        with self._lock:
            found, self._changed = self._changed, set()
        return sorted(found)

    def rescanned(self) -> None:
        """Count a rescan of all cgroups. Elapsed time is no substitute: a suspended agent does not rescan."""
        with self._lock:
            self._rescans += 1

    def keep(self) -> None:
        """Forget containers that are gone, and write the file if it has changed; to be called about once a second."""
        with self._lock:
            self._forget_gone()
            known = {subject: entry.names for subject, entry in self._entries.items() if entry.names}
            state = (self._answers, len(known))
        if self._file is None or state == self._written:
            return
        try:
            label_cache.write(self._file, known)
            self._written, self._write_error = state, ""
        except OSError as error:  # tried again at the next call
            if str(error) != self._write_error:
                self._write_error = str(error)
                log.warning("labels from engines will not survive a restart of the agent: %s", error)

    def views(self) -> tuple[EngineView, ...]:
        """Return the state of each engine that was asked or can be."""
        return tuple(
            view for thread in self._threads if (view := thread.view()).is_there or view.waiting or view.failed
        )

    def missing(self, workload: Workload) -> str:
        """Return why no engine has reported a workload yet; empty if one has, or none can."""
        subject = workload.subject
        threads = [thread for thread in self._threads if subject and thread.api.serves(subject)]
        with self._lock:
            entry = self._entries.get(subject) if subject else None
            if not threads or (entry and entry.names):
                return ""
        states = [thread.state_of(subject) for thread in threads if subject]
        return f"labels, image and namespace are not known: {'; '.join(states)}"

    # -- entries

    def _enter(self, subject: Subject) -> _Entry | None:
        threads = [thread for thread in self._threads if thread.api.serves(subject)]
        if not threads:
            return None
        if len(self._entries) >= MOST_KNOWN and not self._forget_gone():
            self.left_out += 1
            return None
        entry = self._entries[subject] = _Entry(self._rescans)
        for thread in threads:
            thread.want(subject)
        return entry

    def _forget_gone(self) -> bool:
        """Drop entries that the last rescans have not asked for; return whether there were any."""
        before = self._rescans - FORGOTTEN_RESCANS
        gone = [subject for subject, entry in self._entries.items() if entry.asked_in < before]
        for subject in gone:
            del self._entries[subject]
            for thread in self._threads:
                thread.forget(subject)
        return bool(gone)

    def _answered(self, subject: Subject, names: Names) -> None:
        """Store an answer; called in an engine thread."""
        with self._lock:
            entry = self._entries.get(subject)
            if entry is None:
                return
            entry.names = names
            self._answers += 1
            self._changed |= entry.paths
        pod = Subject(names.labels.get(POD_UID, ""), Engine.CRI, is_pod=True)
        for thread in self._threads:
            thread.forget(subject)
            thread.ask_now(pod)  # it has a container now, so it has a sandbox
        self._wakeup.wake()
