"""Record of the devices that have reported a fatal XID. The record survives restarts of the agent.

A restart of the agent repairs no device. This module runs in the agent's main thread. The file under /run is valid
until the next boot or the next load of the driver. A file that cannot be read counts as empty. If the file cannot be
written, each round tries again. Both errors are logged.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from fgpu_ebpf.driver.nvml import Device
from fgpu_ebpf.driver.xids import Reported, Tally
from fgpu_ebpf.linux import atomic_file

FILE = "xids.json"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_DRIVER = Path("/sys/module/nvidia")  # its inode changes with each load of the driver
log = logging.getLogger("fgpu.agent")


def lifetime(boot: Path = _BOOT, driver: Path = _DRIVER) -> str:
    """Return a text that changes at each boot and at each load of the driver."""
    try:
        load = os.stat(driver).st_ino
    except OSError:
        load = 0
    return f"{boot.read_text(encoding='ascii').strip()} {load}"


class XidRecord:
    """The stored XIDs. `lifetime`: the result of lifetime() for the loaded driver."""

    def __init__(self, file: Path, lifetime: str) -> None:
        self._file = file
        self._lifetime = lifetime
        self._fatal = self._read()  # fatal XIDs by UUID
        self._has_failed = False

    def tally(self, ignored: Collection[int], devices: Iterable[Device]) -> Tally:
        """Return a tally that begins with the XIDs that these devices have reported to earlier agents."""
        known = {device.index: self._fatal.get(device.uuid_text) for device in devices}
        return Tally(ignored, {index: xid for index, xid in known.items() if xid is not None})

    def keep(self, reported: Mapping[int, Reported], devices: Iterable[Device]) -> None:
        """Write the file if an XID has changed. Devices that NVML does not watch yet keep their entries."""
        now = dict(self._fatal)
        for device in devices:
            if device.index in reported:
                fatal = reported[device.index].fatal
                now.pop(device.uuid_text, None)
                now |= {} if fatal is None else {device.uuid_text: fatal}
        if now != self._fatal:
            self._write(now)

    def _write(self, fatal: dict[str, int]) -> None:
        try:
            atomic_file.write(self._file, json.dumps({"of": self._lifetime, "fatal": fatal}))
        except OSError as error:
            if not self._has_failed:
                log.warning("XIDs that devices have reported will not survive a restart of the agent: %s", error)
            self._has_failed = True
        else:
            self._fatal, self._has_failed = fatal, False

    def _read(self) -> dict[str, int]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            if found["of"] != self._lifetime:
                return {}
            return {str(uuid): int(xid) for uuid, xid in found["fatal"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.error(
                "%s cannot be read (%s); devices that reported an XID earlier are treated as healthy", self._file, error
            )
            return {}
