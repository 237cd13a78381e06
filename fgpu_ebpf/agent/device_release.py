"""The release of the devices, so that a device can be reset and the driver unloaded, and the check for a new driver.

This module runs in the agent's main loop. The reconcile thread shuts NVML down. During a release limits stay in force
in the kernel, but memory that only NVML shows is not charged. A command ends a release, or the release ends after
its maximum duration.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpu_ebpf.agent.nvml_reconcile import Reconciler
from fgpu_ebpf.check import Check
from fgpu_ebpf.driver.descriptor_holders import device_files
from fgpu_ebpf.driver.library_files import file_at
from fgpu_ebpf.tenancy.enforcement import RELEASED
from fgpu_ebpf.tenancy.event_log import EventLog

FILES = "driver files"
MOST_SECONDS = 86_400.0
_FILES_FIX = "once the modules of the new driver are loaded, restart the agent: limits stay in force"


@dataclass(slots=True)
class DeviceRelease:
    """The state of the release, and the driver's files.

    `files`: the driver's files at the agent's start. `failed_checks`: the agent's failed checks by name, which this
    class changes. `fault`: the reason why the agent must exit and be started again with another driver, or empty.
    """

    reconciler: Reconciler
    files: Mapping[Path, tuple[int, int] | None]
    history: EventLog
    failed_checks: MutableMapping[str, Check]
    fault: str = ""
    _since: float = 0.0  # the start of the release, since the epoch
    _until: float | None = None  # the end of the release on the monotonic clock; None if no device is released

    @property
    def is_released(self) -> bool:
        """True if a release is in force or is about to begin."""
        return self._until is not None

    def release(self, seconds: float) -> dict[str, Any]:
        """Release the devices for at most `seconds` from now on. The caller repeats this call until `done` is True.

        Returns:
            `done`: whether the devices are released. `open`: the files of devices that the agent still has open.
            `until`: the end of the release as local time, HH:MM:SS.
        """
        if self._until is None:
            self._since = time.time()
            self.history.add("devices released", text="limits stay in force")
        self._until = time.monotonic() + min(seconds, MOST_SECONDS)
        self.reconciler.let_go(True)
        self._report_release()
        left = device_files(os.getpid())
        return {"done": self.reconciler.has_let_go and not left, "open": left, "until": _at(self._until)}

    def take(self) -> None:
        """Open the devices again. If the driver's files were replaced, set `fault` instead: the agent must restart."""
        if self._until is None:
            return
        self._until = None
        self.history.add("devices taken up", text=f"released since {_clock(self._since)}")
        if replaced := self._replaced():
            self.fault = f"driver files {replaced}: the agent exits, to be restarted with the new driver"
        else:
            self.reconciler.let_go(False)
        self._report_release()

    def look(self) -> None:
        """End a release after its maximum duration, and report replaced files. The agent calls look() once a round."""
        if self._until is not None and time.monotonic() >= self._until:
            self.take()
        replaced = self._replaced()
        if replaced and FILES not in self.failed_checks:
            self.history.add("driver replaced", text=f"driver files {replaced}")
        self._report(FILES, replaced, _FILES_FIX)

    def _replaced(self) -> str:
        """Return a text that names the driver's files that were replaced since the agent's start, or an empty text."""
        replaced = sorted(str(path) for path, file in self.files.items() if file_at(path) != file)
        return f"replaced since the agent's start: {', '.join(replaced)}" if replaced else ""

    def _report_release(self) -> None:
        until = "" if self._until is None else f"until {_at(self._until)} at the latest; limits stay in force"
        self._report(RELEASED, until and f"since {_clock(self._since)}, {until}", "fgpu device take")

    def _report(self, name: str, found: str, fix: str) -> None:
        if found:
            self.failed_checks[name] = Check(name, False, found, fix)
        else:
            self.failed_checks.pop(name, None)


def _at(monotonic: float) -> str:
    return _clock(time.time() + monotonic - time.monotonic())


def _clock(epoch: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(epoch))
