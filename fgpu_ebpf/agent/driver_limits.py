"""The driver's own memory limits of tenants: a second limit, which also holds for programs that bypass the probes.

NVIDIA's driver has these limits from r615 on. Each tenant's limit in the driver is the tenant's limit in the ledger
plus a margin. The margin covers memory that the driver counts and the ledger does not count yet, so that the driver
refuses no request that the ledger admits, except shortly after a limit was raised.

Limits of other programs, such as NVIDIA's container toolkit, have precedence. A stricter limit stays. If another
program changes a limit that the agent has set, the changed limit stays. `fgpu doctor` reports both cases, and limits
that the driver refuses. A file has the limits that the agent has set, and the limits before. The agent writes this file
first, so that a limit that was set before a crash is known to the next agent.

The main loop replaces `wanted`. All other methods run in the reconcile thread, because NVML may hang.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping, MutableMapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from fgpu_ebpf import abi
from fgpu_ebpf.agent.host_config import MODULES_BYTES
from fgpu_ebpf.check import Check
from fgpu_ebpf.driver.nvml import DriverError, Nvml
from fgpu_ebpf.driver.nvml_memory_limits import NONE, Limits
from fgpu_ebpf.linux import atomic_file
from fgpu_ebpf.tenancy.enforcer import Enforcer

FILE = "driver-limits.json"
CHECKED_AT_A_TIME = 16  # limits that look() compares with the driver, in addition to new and changed limits
RESTORE_SECONDS = 5.0  # the longest wait of `fgpu detach` for NVML
log = logging.getLogger("fgpu.agent")


class Key(NamedTuple):
    """A cgroup's limit on a device. `folder`: the cgroup's folder; `cgroup`: the cgroup's id."""

    device: int
    folder: str
    cgroup: int


class _Own(NamedTuple):
    """A limit of the agent in bytes.

    Attributes:
        before: the limits that the agent has replaced.
        hard: the limit.
        earlier: the limit in force when this record was written. After a crash, either limit may be in force.
    """

    before: Limits
    hard: int
    earlier: int

    def may_be(self, now: Limits) -> bool:
        """Return whether no other program has changed the limits since the agent wrote this record."""
        return now == NONE or now.hard in (self.hard, self.earlier)


class DriverLimits:
    """The limits in the driver.

    Args:
        nvml: NVML, with its functions of memory limits.
        file: the record of the limits that the agent has set. A file that cannot be read counts as empty.
        root: the root of the driver's libraries, which the record has for `fgpu detach`.
    """

    def __init__(self, nvml: Nvml, file: Path, root: Path) -> None:
        self._nvml, self._limits, self._file, self._root = nvml, nvml.limits, file, root
        self._own = _read(file)
        self._others: set[Key] = set()  # limits of other programs, which hold instead
        self._changed: set[Key] = set()  # those of `_others` that were set after the agent's own limit
        self._refused: set[Key] = set()  # limits that the driver refuses
        self._fault = ""  # why the record cannot be written
        self._checked = 0
        self.wanted: Mapping[Key, int] | None = None  # bytes; None: the tenants are not known yet

    def publish(
        self, enforcer: Enforcer, folder: Path, module_bytes: int, failed_checks: MutableMapping[str, Check]
    ) -> None:
        """Replace `wanted`, and report limits of other programs. The main loop calls this method once in each round.

        Args:
            enforcer: the tenants.
            folder: the mount point of the cgroup hierarchy.
            module_bytes: the most memory without a recorded allocation that a process may have unreported.
            failed_checks: the agent's failed checks by name, which this method changes.
        """
        if not self._limits.exist:
            return
        margin = max(module_bytes, MODULES_BYTES)  # above what the ledger does not count yet
        found: dict[Key, int] = {}
        is_absent = all(device.index in self._limits.absent for device in self._nvml.devices)
        for tenant in () if is_absent else enforcer:
            for device, bytes_ in enforcer.commitments.in_force(tenant).items() if not tenant.observe else ():
                if bytes_ != abi.NO_LIMIT and device not in self._limits.absent:
                    found[Key(device, f"{folder}{tenant.path}", tenant.cgroup)] = bytes_ + margin
        self.wanted = found
        failed_checks.pop("driver limits", None)
        if check := self.check():
            failed_checks[check.name] = check

    def check(self) -> Check | None:
        """Return the finding about limits that are not in force; None: there are no such limits."""
        lacks = (("of another program", list(self._others)), ("that the driver refuses", list(self._refused)))
        found = [f"limits {which}: {len(keys)}, such as {min(keys).folder!r}" for which, keys in lacks if keys]
        found += [self._fault] if self._fault else []
        if not found:
            return None
        fix = "remove the limit of the other program, or free space under /run; fgpu's own limits stay in force"
        return Check("driver limits", False, f"the driver's own limits: {'; '.join(found)}", fix)

    def look(self) -> None:
        """Put `wanted` in force, and compare a part of the limits with the driver."""
        wanted = self.wanted
        if wanted is None:
            return
        for key in [key for key in self._own if key not in wanted]:
            self._restore(key)
        self._others.intersection_update(wanted)
        self._changed.intersection_update(wanted)
        self._refused.intersection_update(wanted)
        own = {key: one.hard for key, one in self._own.items()}
        new = [key for key, hard in wanted.items() if key not in self._others and own.get(key) != hard]
        self._put({key: wanted[key] for key in [*new, *self._next(wanted)]})

    def restore_all(self) -> bool:
        """Restore the limits that the agent has replaced. Return whether the agent has none in the driver any more."""
        for key in list(self._own):
            self._restore(key)
        return not self._own

    def _next(self, keys: Iterable[Key]) -> list[Key]:
        found = list(islice(keys, self._checked, self._checked + CHECKED_AT_A_TIME))
        self._checked = self._checked + CHECKED_AT_A_TIME if found else 0
        return found

    def _put(self, wanted: Mapping[Key, int]) -> None:
        due: dict[Key, _Own] = {}
        for key, bytes_ in wanted.items():
            now, own = self._limits.get(key.device, key.folder), self._own.get(key)
            if now is None or (own and now.hard == own.hard == bytes_):
                continue
            if own and not own.may_be(now):
                self._changed.add(key)
                del self._own[key]
            elif own or now == NONE or (now.hard > bytes_ and key not in self._changed):
                self._others.discard(key)
                self._changed.discard(key)
                due[key] = _Own(own.before if own else now, bytes_, now.hard)
                continue
            self._others.add(key)
        # A limit that the driver refuses is due again and again, with the same record.
        if due and (due.items() <= self._own.items() or self._write(self._own | due)):
            self._own |= due
            for key, own in due.items():
                self._set(key, own)

    def _set(self, key: Key, own: _Own) -> None:
        limits = Limits(min(own.before.soft, own.hard), own.hard)
        if _exists(key) and not self._limits.set(key.device, key.folder, limits):
            self._refused.add(key)
        else:
            self._own[key] = own._replace(earlier=own.hard)
            self._refused.discard(key)

    def _restore(self, key: Key) -> None:
        own = self._own[key]
        if _exists(key):
            now = self._limits.get(key.device, key.folder)
            is_own = now is not None and now.hard in (own.hard, own.earlier)
            if now is None or (is_own and not self._limits.set(key.device, key.folder, own.before)):
                return  # the next call tries again
        del self._own[key]
        self._write(self._own)

    def _write(self, own: Mapping[Key, _Own]) -> bool:
        rows = [[*key, *one.before, one.hard, one.earlier] for key, one in own.items()]
        try:
            devices = {device.uuid.hex(): device.index for device in self._nvml.devices}
            record = {"root": str(self._root), "devices": devices, "limits": rows}
            atomic_file.write(self._file, json.dumps(record))
        except OSError as error:
            self._fault = f"{self._file} cannot be written ({error.strerror})"
            return False
        self._fault = ""
        return True


def take_away(file: Path) -> bool:
    """Restore the limits before those of the agents. Return whether the record is not needed any more.

    The record is needed while the driver has such limits, so that a later call can restore them.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        root, known = Path(record["root"]), {bytes.fromhex(u): int(i) for u, i in record.get("devices", {}).items()}
    except FileNotFoundError:
        return True
    except OSError as error:
        log.warning("%s cannot be read, so that the limits in it stay in force: %s", file, error)
        return False
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return True
    restored = threading.Event()
    thread = threading.Thread(target=_restore_all, args=(file, root, known, restored), daemon=True)
    thread.start()
    thread.join(RESTORE_SECONDS)
    if thread.is_alive():
        log.warning("NVML does not answer: the driver's own limits that are recorded in %s stay in force", file)
    return restored.is_set()


def _restore_all(file: Path, root: Path, known: dict[bytes, int], restored: threading.Event) -> None:
    try:
        if DriverLimits(Nvml(root, known), file, root).restore_all():
            restored.set()
        else:
            log.warning("the driver's own limits that are recorded in %s stay in force: NVML refuses the change", file)
    except DriverError as error:
        log.warning("the driver's own limits cannot be restored: %s", error)


def _exists(key: Key) -> bool:
    """Return whether the cgroup still exists. A later cgroup at the same path has no limit of the agent."""
    try:
        return os.stat(key.folder).st_ino == key.cgroup
    except OSError:
        return False


def _read(file: Path) -> dict[Key, _Own]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["limits"]
        return {
            Key(int(device), str(folder), int(cgroup)): _Own(Limits(int(soft), int(before)), int(hard), int(earlier))
            for device, folder, cgroup, soft, before, hard, earlier in rows
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        log.error("%s cannot be read (%s): the driver's own limits of an earlier agent stay in force", file, error)
        return {}
