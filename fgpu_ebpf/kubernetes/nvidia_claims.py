"""The memory that pods have in ResourceClaims of NVIDIA's DRA driver, `gpu.nvidia.com`, from two files of this node.

kubelet writes which pod uses which claim into `dra_manager_state`, before kubelet requests a driver to prepare the
claim. NVIDIA's driver writes the scheduler's allocation for the claim into its `checkpoint.json`, before the driver
answers kubelet. Therefore both files name a pod before its first container starts. Both files are replaced as a whole,
and only root can write them. Neither the API server nor a token is needed.

The module runs in the agent's main loop. A claim that kubelet has for a pod and that is not in the driver's file is
unknown, and its pod gets no memory. Known values stay in use while a file cannot be read. The fact that a pod has no
claim is a known value too, because kubelet's file has all claims of a pod before the pod's first container exists.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import stat
from collections import defaultdict
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fgpu_ebpf.check import Check
from fgpu_ebpf.kubernetes.claims import MEMORY, quantity
from fgpu_ebpf.linux.wakeup import Wakeup
from fgpu_ebpf.policy.requests import NVIDIA_DRA
from fgpu_ebpf.policy.units import shown
from fgpu_ebpf.workloads.cgroups import Namer
from fgpu_ebpf.workloads.workload import Booking, Workload

log = logging.getLogger("fgpu.kubelet")
DRIVER = "gpu.nvidia.com"
NAME = "nvidia claims"
_FIX = "set kubeletFolder in agent.yaml to kubelet's folder; a newer Kubernetes or driver may need a newer fgpu"
ROOT = 0
MOST_BYTES = 16 << 20  # of a file
MOST_PODS = 4096  # the latest pods, which are decided again at once
MOST_PATHS = 64  # cgroups of a pod that are decided again at once; all other cgroups follow at the next rescan
_LISTS = ("ClaimInfoStateList", "Entries")  # the list of claims since Kubernetes 1.34, and before
_KINDS = {"gpu": True, "mig": False, "vfio": False, "vgpu": False}  # whether the agent limits devices of this kind
_PREPARED = "PrepareCompleted"
_FORMS = (LookupError, TypeError, AttributeError, ValueError, RecursionError, StopIteration)  # of an unknown text
_DEPTH = 10  # of the values in the driver's file that are read; the parameters that a claim's user writes are deeper
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[][{}]', re.DOTALL)  # a string, or a bracket outside of strings

Stamp = tuple[int, int, int]


class Claim(NamedTuple):
    """A claim of a pod. `name`: NAMESPACE/NAME."""

    uid: str
    name: str


class _Given(NamedTuple):
    """The last booking of a pod; None: the scheduler has booked no part of a device for the pod.

    `paths`: the pod's cgroups. `has_begun`: kubelet's file was known when a container of the pod existed, so that the
    file has named all claims of the pod.
    """

    booking: Booking | None
    paths: set[str]
    has_begun: bool


def of_pods(text: bytes) -> dict[str, list[Claim]]:
    """Return the claims with devices of NVIDIA's driver, by the UID of each pod that uses the claims.

    Raise ValueError on failure.

    Source: `Checkpoint` and `CheckpointData` (pkg/kubelet/cm/dra/state of Kubernetes).
    """
    found: dict[str, list[Claim]] = defaultdict(list)
    try:
        data = json.loads(json.loads(text)["Data"])
        for entry in data[next(key for key in _LISTS if key in data)] or ():
            if DRIVER in entry["DriverState"]:
                claim = Claim(str(entry["ClaimUID"]), f"{entry['Namespace']}/{entry['ClaimName']}")
                for pod in entry["PodUIDs"] or ():
                    found[pod].append(claim)
    except _FORMS as error:
        raise ValueError(f"has an unknown form: {type(error).__name__} {str(error)[:100]}") from error
    return dict(found)


def booked(text: bytes) -> dict[str, Mapping[str, int] | None]:
    """Return the bytes of each prepared claim by UUID of the device, by the UID of the claim.

    Raise ValueError on failure.

    A device without a number is left out: the claim has the whole device, or the driver does not divide the device's
    memory (the scheduler then counts 0 bytes). A MIG device is left out, because its size is its limit. Devices for
    virtual machines are left out too. The value is None for a claim that cannot be read or has a size of an unknown
    kind of device. A driver before version 2 of the file does not divide devices, so a claim of such a driver without
    an allocation has no such numbers.

    Source: `Checkpoint` and `PreparedClaimV2` (cmd/gpu-kubelet-plugin of kubernetes-sigs/dra-driver-nvidia-gpu).
    """
    try:
        versions = json.loads(_shallow(text))
        claims = ((versions.get("v2") or versions["v1"]).get("preparedClaims") or {}).items()
    except _FORMS as error:
        raise ValueError(f"has an unknown form: {type(error).__name__} {str(error)[:100]}") from error
    found: dict[str, Mapping[str, int] | None] = {}
    for uid, claim in claims:
        try:
            if "v2" not in versions and (isinstance(claim, list) or "allocation" not in (claim.get("status") or {})):
                found[uid] = {}
            elif claim.get("checkpointState", _PREPARED) == _PREPARED:
                found[uid] = _booked(claim)
        except _FORMS as error:
            log.error("%s: the claim %s has an unknown form: %r", DRIVER, shown(uid), error)
            found[uid] = None
    return found


def _shallow(text: bytes) -> bytes:
    """Return JSON with null for each array and object deeper than _DEPTH, in time that is linear in the length."""
    begin, depth = 0, 0
    kept: list[bytes] = []
    for token in _TOKENS.finditer(text):
        if token[0] in (b"[", b"{"):
            depth += 1
            if depth == _DEPTH + 1:
                kept += text[begin : token.start()], b"null"
        elif token[0] in (b"]", b"}"):
            if depth == _DEPTH + 1:
                begin = token.end()
            depth -= 1
    return b"".join([*kept, text[begin:]])


def _booked(claim: Mapping[str, Any]) -> Mapping[str, int]:
    devices = [device for group in claim.get("preparedDevices") or () for device in group["devices"]]
    known = {of["device"]["DeviceName"]: (kind, of) for device in devices for kind, of in device.items() if of}
    found: dict[str, int] = defaultdict(int)
    for result in claim["status"]["allocation"]["devices"]["results"]:
        size = math.ceil(quantity(str((result.get("consumedCapacity") or {}).get(MEMORY, "0"))))
        if size and result["driver"] == DRIVER and not result.get("adminAccess"):
            kind, of = known[result["device"]]
            if _KINDS[kind]:
                found[of["info"]["uuid"]] += size
    return dict(found)


class _File:
    """A file that another process replaces as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fault = ""  # why the last content, or no content, is used
        self._stamp: Stamp | None = None  # of the last content; None: read the file again

    def changed(self) -> bytes | None:
        """Return the content if the file has changed since the last call, else None."""
        try:
            if _stamp(os.stat(self.path)) == self._stamp:
                return None
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                stamp, content = _stamp(found), file.read(MOST_BYTES + 1)
        except OSError as error:
            self._stamp = None
            self.reject(f"cannot be read: {error.strerror}")
            return None
        self._stamp = stamp
        if found.st_uid not in (ROOT, os.geteuid()) or len(content) > MOST_BYTES:
            self.reject(f"is not root's, or has more than {MOST_BYTES} bytes")
            return None
        return content

    def reject(self, why: str) -> None:
        """Record why the content is not used."""
        self.fault = f"{self.path} {why}"


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_ino, found.st_mtime_ns, found.st_size


class NvidiaClaims:
    """The names of workloads from another Namer, with the bookings of their pods."""

    def __init__(self, kubelet: Path, names: Namer, failed_checks: MutableMapping[str, Check]) -> None:
        """Create the object without reading a file.

        Args:
            kubelet: kubelet's folder, as a path that this process can access.
            names: the Namer of the workloads.
            failed_checks: the agent's failed checks by name, which a fault changes.
        """
        self._names, self._failed_checks = names, failed_checks
        self._folder = kubelet / "plugins" / DRIVER
        self._pods_file = _File(kubelet / "dra_manager_state")
        self._claims_file = _File(self._folder / "checkpoint.json")
        self._pods: dict[str, list[Claim]] = {}
        self._booked: dict[str, Mapping[str, int]] = {}  # by the UID of a claim
        self._unread: set[str] = set()  # the UIDs of claims of an unknown form
        self._given: dict[str, _Given] = {}  # by the UID of a pod
        self._changed: set[str] = set()
        self._wakeup = Wakeup()
        self._said, self._warned = "", False

    def namer(self, adapters: Collection[str]) -> Namer:
        """Return this object if its adapter is one of `adapters`, else the Namer that has no bookings."""
        return self if NVIDIA_DRA in adapters else self._names

    def fileno(self) -> int:
        """Return a descriptor that is readable when take() has something to return."""
        return self._wakeup.fileno()

    def take(self) -> list[str]:
        """Return the paths of the cgroups with other bookings than at the last call."""
        self._wakeup.clear()
        found, self._changed = self._changed, set()
        return sorted(found)

    @property
    def fault(self) -> str:
        """The reason why bookings of new pods are unknown; empty: known, or NVIDIA's driver is not installed."""
        unread = next((c for claims in self._pods.values() for c in claims if c.uid in self._unread), None)
        form = f"{self._claims_file.path} has an unknown form of {unread.name}" if unread else ""
        return self._if_installed(self._pods_file.fault or self._claims_file.fault or form)

    def _pods_unknown(self) -> str:
        """Return why kubelet's file is unknown.

        The text is empty if the file is known, or if NVIDIA's DRA driver is not installed.
        """
        return self._if_installed(self._pods_file.fault)

    def _if_installed(self, fault: str) -> str:
        """Return the text if NVIDIA's driver has, or may have, a folder on this node; otherwise an empty text."""
        try:
            return fault if fault and stat.S_ISDIR(os.stat(self._folder).st_mode) else ""
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError:
            return fault

    def named(self, workload: Workload) -> Workload:
        """Return the workload with its names and its booking."""
        workload = self._names.named(workload)
        uid = workload.pod_uid
        if uid is None or workload.subject is None or workload.inside:
            return workload
        self.look()
        booking = self._booking(uid)
        _, paths, has_begun = self._given.pop(uid, _Given(None, set(), False))
        has_begun = has_begun or (workload.container is not None and not self._pods_unknown())
        self._given[uid] = _Given(booking, paths, has_begun)
        if len(paths) < MOST_PATHS:
            paths.add(workload.path)
        if len(self._given) > MOST_PODS:
            del self._given[next(iter(self._given))]
        return replace(workload, booking=booking)

    def missing(self, workload: Workload) -> str:
        """Return why names, labels or the booking are not known yet, or an empty text."""
        booking = workload.booking
        return self._names.missing(workload) or (booking.unknown if booking else "")

    def look(self) -> None:
        """Read changed files again. The caller calls this method about once a second."""
        before = self._pods_file.fault, self._claims_file.fault
        pods, claims = self._pods_file.changed(), self._claims_file.changed()
        if pods is not None:
            self._take_pods(pods)
        if claims is not None:
            self._take_claims(claims)
        self._say(self.fault if self._given else "")  # a host without pods needs no kubelet
        if pods is claims is None and before == (self._pods_file.fault, self._claims_file.fault):
            return
        for uid, given in self._given.items():
            if self._booking(uid) != given.booking:
                self._changed |= given.paths
        if self._changed:
            self._wakeup.wake()

    def _say(self, fault: str) -> None:
        if fault and fault != self._said:
            log.error("%s: pods with new claims get no memory: %s", DRIVER, fault)
            self._failed_checks[NAME] = Check(
                "nvidia claims", False, f"{fault}: pods with new claims get no memory", _FIX
            )
        elif not fault:
            self._failed_checks.pop(NAME, None)
        self._said = fault
        if self._given and not self._warned and not os.path.exists(self._pods_file.path.parent):
            self._warned = True
            text = "%s: claims limit no pod: there is no %s; set kubeletFolder in agent.yaml if kubelet runs here"
            log.warning(text, DRIVER, self._pods_file.path.parent)

    def _take_pods(self, content: bytes) -> None:
        try:
            self._pods, self._pods_file.fault = of_pods(content), ""
        except ValueError as error:
            self._pods_file.reject(str(error))

    def _take_claims(self, content: bytes) -> None:
        try:
            new = booked(content)
        except ValueError as error:
            self._claims_file.reject(str(error))
            return
        used = {claim.uid for claims in self._pods.values() for claim in claims}
        known = {uid: sizes for uid, sizes in new.items() if sizes is not None}
        self._booked = {uid: sizes for uid, sizes in self._booked.items() if uid in used} | known
        self._unread = new.keys() - self._booked.keys()
        self._claims_file.fault = ""

    def _booking(self, uid: str) -> Booking | None:
        """Return the booking of a pod; None: the scheduler has booked no part of a device for the pod."""
        claims = self._pods.get(uid)
        if claims is None:
            given = self._given.get(uid)
            why = "" if given and given.has_begun else self._pods_unknown()
            return Booking(f"claims of {DRIVER}", {}, f"claims of {DRIVER} are not known: {why}") if why else None
        names = ", ".join(claim.name for claim in claims)
        source = f"{'claims' if len(claims) > 1 else 'claim'} {names} of {DRIVER}"
        total: dict[str, int] = defaultdict(int)
        for claim in claims:
            if claim.uid not in self._booked:
                unread = claim.uid in self._unread
                form = "has the claim in an unknown form" if unread else "does not have the claim as prepared"
                why = self._claims_file.fault or f"{self._claims_file.path} {form}"
                return Booking(source, {}, f"the size of {claim.name} of {DRIVER} is not known: {why}")
            for uuid, size in self._booked[claim.uid].items():
                total[uuid] += size
        return Booking(source, dict(total)) if total else None
