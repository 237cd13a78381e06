"""What engines know of the containers and pods of this host: asked aside, kept, and told when it arrives.

Owns: what was answered, at most MOST_KNOWN, each for as long as somebody asks for it. Never: waits for an engine, in
whatever state that is. On failure: nothing is known of a container, and it is what its cgroup says.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fgpu_ebpf import namesfile
from fgpu_ebpf.answers import POD_UID
from fgpu_ebpf.asker import Api, Asker
from fgpu_ebpf.bell import Bell
from fgpu_ebpf.cgroupnames import Engine
from fgpu_ebpf.criapi import CriApi
from fgpu_ebpf.dockerapi import DockerApi
from fgpu_ebpf.identity import Names, Subject, Workload, named
from fgpu_ebpf.snapshot import EngineView

log = logging.getLogger("fgpu.engines")
MOST_KNOWN = 4096
MOST_PATHS = 64  # cgroups of one container that are looked at anew at once; the others at the next rescan
FORGOTTEN_RESCANS = 4  # every cgroup that still exists has been asked for in each; a frozen agent does none


@dataclass(slots=True)
class _Entry:
    asked_in: int  # the rescan in or before which it was asked for last
    paths: set[str] = field(default_factory=set)
    names: Names | None = None


def api_of(text: str) -> Api:
    """`docker:/run/docker.sock` -> how it is asked. The kinds are docker, podman and cri."""
    kind, _, path = text.partition(":")
    return CriApi(path) if kind == "cri" else DockerApi(Engine(kind), path)


class Engines:
    """All engines of the host. `fileno` is readable when there is something for `take`.

    `file` is where what is known outlives the agent; None: it does not.
    """

    def __init__(self, apis: Iterable[Api] = (), file: Path | None = None) -> None:
        self._askers = [Asker(api, self._answered) for api in apis]
        self._file = file
        self._rescans = 0
        kept = namesfile.read(file) if file else {}
        self._entries = {subject: _Entry(0, names=names) for subject, names in kept.items()}
        self._written: object = None
        self._unwritten = ""  # why the file could not be written, when last tried
        self._answers = 0
        self._changed: set[str] = set()
        self._lock = threading.Lock()
        self._bell = Bell()
        self.left_out = 0  # containers that nobody was asked about, because there are too many

    def fileno(self) -> int:
        """Readable when cgroups have been named."""
        return self._bell.fileno()

    def stop(self) -> None:
        """Nobody is asked any more."""
        for asker in self._askers:
            asker.stop()

    def named(self, workload: Workload) -> Workload:
        """The workload with what is known of it now; what is not will be asked, and `take` answers its path then."""
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
        """The cgroups that were named since."""
        self._bell.hush()
        with self._lock:
            found, self._changed = self._changed, set()
        return sorted(found)

    def rescanned(self) -> None:
        """Every cgroup of the host has just been asked for. Seconds would not do: a frozen agent asks for none."""
        with self._lock:
            self._rescans += 1

    def keep(self) -> None:
        """Forgets who is gone, and writes down what has changed; once a second is enough."""
        with self._lock:
            self._forget_the_gone()
            known = {subject: entry.names for subject, entry in self._entries.items() if entry.names}
            state = (self._answers, len(known))
        if self._file is None or state == self._written:
            return
        try:
            namesfile.write(self._file, known)
            self._written, self._unwritten = state, ""
        except OSError as error:  # tried again at the next call
            if str(error) != self._unwritten:
                self._unwritten = str(error)
                log.warning("what engines have said will not outlive the agent: %s", error)

    def views(self) -> tuple[EngineView, ...]:
        """How each engine stands: those that were asked, or could be."""
        return tuple(view for asker in self._askers if (view := asker.view()).is_there or view.waiting or view.failed)

    def missing(self, workload: Workload) -> str:
        """Why an engine has not said yet who this is; empty: it has, or none could."""
        subject = workload.subject
        askers = [asker for asker in self._askers if subject and asker.api.serves(subject)]
        with self._lock:
            entry = self._entries.get(subject) if subject else None
            if not askers or (entry and entry.names):
                return ""
        said = [asker.state_of(subject) for asker in askers if subject]
        return f"labels, image and namespace are not known: {'; '.join(said)}"

    # -- what is kept

    def _enter(self, subject: Subject) -> _Entry | None:
        askers = [asker for asker in self._askers if asker.api.serves(subject)]
        if not askers:
            return None
        if len(self._entries) >= MOST_KNOWN and not self._forget_the_gone():
            self.left_out += 1
            return None
        entry = self._entries[subject] = _Entry(self._rescans)
        for asker in askers:
            asker.want(subject)
        return entry

    def _forget_the_gone(self) -> bool:
        """Drops what no rescan of late has asked for; False: there was nothing."""
        before = self._rescans - FORGOTTEN_RESCANS
        gone = [subject for subject, entry in self._entries.items() if entry.asked_in < before]
        for subject in gone:
            del self._entries[subject]
            for asker in self._askers:
                asker.forget(subject)
        return bool(gone)

    def _answered(self, subject: Subject, names: Names) -> None:
        """Called by an asker's thread."""
        with self._lock:
            entry = self._entries.get(subject)
            if entry is None:
                return
            entry.names = names
            self._answers += 1
            self._changed |= entry.paths
        pod = Subject(names.labels.get(POD_UID, ""), Engine.CRI, is_pod=True)
        for asker in self._askers:
            asker.forget(subject)
            asker.hurry(pod)  # it has a container now, so it has a sandbox
        self._bell.ring()
