"""The names and labels that engines report for the containers and pods of this host.

The module runs in the agent's main thread, which never waits for an engine. Engine threads send requests to the engines
and store the answers, and `take` returns the cgroups that the answers concern. At most MOST_KNOWN containers and pods
are stored. A container or pod is stored as long as rescans request the container or pod. A container that no engine has
reported has only the labels of its cgroup.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
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
MOST_PATHS = 64  # cgroups of a container to consider immediately; the next rescan considers the other cgroups
FORGOTTEN_RESCANS = 4  # a container that this many rescans have not requested is gone


@dataclass(slots=True)
class _Entry:
    asked_in: int  # the number of rescans at the last call of named() for the subject
    paths: set[str] = field(default_factory=set)
    names: Names | None = None


def api_of(text: str) -> Api:
    """Return the client for a setting such as `docker:/run/docker.sock`. The kinds are docker, podman and cri."""
    kind, _, path = text.partition(":")
    return CriApi(path) if kind == "cri" else DockerApi(Engine(kind), path)


class Engines:
    """The names from all engines of the host.

    `file` stores the names for restarts of the agent. If `file` is None, the names are not stored.
    """

    def __init__(self, apis: Iterable[Api] = (), file: Path | None = None) -> None:
        self._threads = [EngineThread(api, self._answered) for api in apis]
        self._file = file
        self._rescans = 0
        kept = label_cache.read(file) if file else {}
        self._entries = {subject: _Entry(0, names=names) for subject, names in kept.items()}
        self._written: object = None
        self._write_error = ""  # the error of the last attempt to write the file
        self._answers = 0
        self._changed: set[str] = set()
        self._lock = threading.Lock()
        self._wakeup = Wakeup()
        self.left_out = 0  # containers without a request to an engine, because there are too many

    def fileno(self) -> int:
        """Return a descriptor that is readable when take() has paths to return."""
        return self._wakeup.fileno()

    def stop(self) -> None:
        """Stop the engine threads."""
        for thread in self._threads:
            thread.stop()

    def named(self, workload: Workload) -> Workload:
        """Return the workload with the names and labels that are known now.

        If there are no names, an engine thread requests the names, and take() returns the workload's path after the
        answer.
        """
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
        """Return the paths of the cgroups whose names were reported since the last call."""
        self._wakeup.clear()
        with self._lock:
            found, self._changed = self._changed, set()
        return sorted(found)

    def rescanned(self) -> None:
        """Count a rescan of all cgroups, which is the measure of an entry's age, and request changed names.

        Time is no measure of age, because time also passes while the agent is suspended and does not rescan.
        """
        with self._lock:
            self._rescans += 1
            known = [subject for subject, entry in self._entries.items() if entry.names]
            for thread in self._threads:
                if thread.api.can_rename:
                    thread.want_again([subject for subject in known if thread.api.serves(subject)])

    def keep(self) -> None:
        """Remove containers that are gone, write changed names to the file, and retry threads that failed to start.

        The agent calls this method about once a second.
        """
        for thread in self._threads:
            thread.keep()
        with self._lock:
            self._forget_gone()
            known = {subject: entry.names for subject, entry in self._entries.items() if entry.names}
            state = (self._answers, len(known))
        if self._file is None or state == self._written:
            return
        try:
            label_cache.write(self._file, known)
            self._written, self._write_error = state, ""
        except OSError as error:  # the next call tries again
            if str(error) != self._write_error:
                self._write_error = str(error)
                log.warning("labels from engines will not survive a restart of the agent: %s", error)

    def views(self) -> tuple[EngineView, ...]:
        """Return the state of each engine that got a request or has a socket."""
        return tuple(
            view for thread in self._threads if (view := thread.view()).is_there or view.waiting or view.failed
        )

    def missing(self, workload: Workload) -> str:
        """Return why no engine has reported a workload yet, or an empty text if no report is missing."""
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
        if len(self._entries) >= MOST_KNOWN and not (self._forget_gone() or self._forget_gone(1)):
            self.left_out += 1
            return None
        entry = self._entries[subject] = _Entry(self._rescans)
        for thread in threads:
            thread.want(subject)
        return entry

    def _forget_gone(self, rescans: int = FORGOTTEN_RESCANS) -> bool:
        """Remove entries that the last rescans of this number have not requested. Return whether one was removed."""
        before = self._rescans - rescans
        gone = [subject for subject, entry in self._entries.items() if entry.asked_in < before]
        for subject in gone:
            del self._entries[subject]
            for thread in self._threads:
                thread.forget(subject)
        return bool(gone)

    def _answered(self, subject: Subject, names: Names) -> None:
        """Store the names that an engine has reported for a container or pod. An engine thread calls this method."""
        with self._lock:
            entry = self._entries.get(subject)
            known = entry.names if entry else None
            if known:
                names = _renamed(known, names)
            if entry is None or names == known:
                return
            entry.names = names
            self._answers += 1
            self._changed |= entry.paths
        pod = Subject(names.labels.get(POD_UID, ""), Engine.CRI, is_pod=True)
        for thread in self._threads:
            thread.forget(subject)
            thread.ask_now(pod)  # the pod has a container, so the engine has the pod's sandbox now
        self._wakeup.wake()


def _renamed(known: Names, now: Names) -> Names:
    """Return the names of a known container with the present name, which alone may change.

    The container keeps its image, although an engine reports another reference once the image's tag has moved. An image
    that is known by its id only may have a name now.
    """
    image = now.image if (known.image or "").startswith("sha256:") else known.image
    return replace(known, name=now.name or known.name, image=image)
