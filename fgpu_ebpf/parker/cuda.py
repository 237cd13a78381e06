"""The functions cuCheckpointProcess* of the host's libcuda, which lock, checkpoint and restore another process.

This module runs only in the process of a job, because a call can hang, and because libcuda cannot be used after a fork.
"""

from __future__ import annotations

import ctypes
import enum
from pathlib import Path
from typing import Protocol

NEEDS = "parking needs NVIDIA driver 570 or later"
ILLEGAL_STATE, NOT_READY = 401, 600
_UNKNOWN_PROCESS = (1, 3)  # CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_NOT_INITIALIZED
_ARGUMENT_WORDS = 8  # each structure of arguments has 64 bytes
_NAMES = ("GetState", "Lock", "Checkpoint", "Restore", "Unlock")


class State(enum.IntEnum):
    """The state of a process (CUprocessState). UNKNOWN: the driver has no record of the process."""

    UNKNOWN = -1
    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3


_STATES = {int(state): state for state in State}


class DriverError(Exception):
    """A failed call of the driver. `code`: the result of the call."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(what)
        self.code = code


class Checkpoints(Protocol):
    """The driver's functions for one process. Each function raises DriverError."""

    def state(self, pid: int) -> State:
        """Return the state of a process. Raise DriverError on failure."""

    def lock(self, pid: int, milliseconds: int) -> None:
        """Block the process's calls when its work is done. Raise NOT_READY if the work takes longer."""

    def checkpoint(self, pid: int) -> None:
        """Move the memory of a locked process to the host."""

    def restore(self, pid: int) -> None:
        """Move a process's memory back to the device. The process stays locked."""

    def unlock(self, pid: int) -> None:
        """Unblock the process's calls."""


class Libcuda:
    """The driver of this host. The constructor raises DriverError if the driver cannot be used or is older than 570."""

    def __init__(self, library: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(library))
            self._calls = {name: getattr(self._library, f"cuCheckpointProcess{name}") for name in _NAMES}
        except OSError as error:
            raise DriverError(f"{library} cannot be loaded: {error}", 0) from error
        except AttributeError:
            raise DriverError(f"{library} has no functions to checkpoint a process: {NEEDS}", 0) from None
        if code := self._library.cuInit(0):
            raise DriverError(f"the driver cannot be used: cuInit returned {self._name(code)}", code)

    def state(self, pid: int) -> State:
        """Return the state of a process. Raise DriverError on failure."""
        found = ctypes.c_int(-1)
        code = self._calls["GetState"](pid, ctypes.byref(found))
        if code in _UNKNOWN_PROCESS:
            return State.UNKNOWN
        self._check("GetState", pid, code)
        return _STATES.get(found.value, State.FAILED)

    def lock(self, pid: int, milliseconds: int) -> None:
        """Block the process's calls when its work is done. Raise DriverError on failure."""
        # The first 4 bytes are the time-out. The processors that NVIDIA supports are little-endian.
        self._call("Lock", pid, milliseconds)

    def checkpoint(self, pid: int) -> None:
        """Move the memory of a locked process to the host. Raise DriverError on failure."""
        self._call("Checkpoint", pid)

    def restore(self, pid: int) -> None:
        """Move a process's memory back to the device. The process stays locked. Raise DriverError on failure."""
        self._call("Restore", pid)

    def unlock(self, pid: int) -> None:
        """Unblock the process's calls. Raise DriverError on failure."""
        self._call("Unlock", pid)

    def _call(self, name: str, pid: int, first: int = 0) -> None:
        self._check(name, pid, self._calls[name](pid, (ctypes.c_uint64 * _ARGUMENT_WORDS)(first)))

    def _check(self, name: str, pid: int, code: int) -> None:
        if code:
            raise DriverError(f"cuCheckpointProcess{name} of process {pid} returned {self._name(code)}", code)

    def _name(self, code: int) -> str:
        text = ctypes.c_char_p()
        if self._library.cuGetErrorName(code, ctypes.byref(text)) or not text.value:
            return f"error {code}"
        return text.value.decode("ascii", "replace")
