"""Tests of the gatekeeper's main loop with a test double of the ledger."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from fgpu_ebpf.gatekeeper.main import Gatekeeper
from fgpu_ebpf.linux.file_locks import FileLock
from fgpu_ebpf.linux.wakeup import Wakeup


class Bell(Wakeup):
    """A test double of the reader of the kernel's reports."""

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)
        del self._fd


@pytest.mark.parametrize("step", ["shares", "bell"])
def test_a_ledger_that_cannot_be_used_is_closed_and_opened_again(tmp_path: Path, step: str) -> None:
    bell, failed, closed = Bell(), list[str](), list[bool]()

    def read(name: str, found: Any) -> Any:
        if name == step and not failed:
            failed.append(name)
            raise OSError(errno.ENOMEM, "no memory")
        return found

    times = SimpleNamespace(shares=lambda: read("shares", {}), bell=lambda: read("bell", bell))
    ledger: Any = SimpleNamespace(
        times=times, file_check=lambda *_: 7, epoch=lambda: 1, close=lambda: closed.append(True)
    )
    gatekeeper = Gatekeeper(FileLock(tmp_path / "lock"), lambda: ledger, tmp_path)
    with pytest.raises(OSError, match="no memory"):
        gatekeeper._again()
    assert closed == [True]
    gatekeeper._again()
    assert (closed, gatekeeper._scanner.check) == ([True], ledger.file_check)
    assert gatekeeper._selector.get_key(bell)
    gatekeeper._listener.close()


def test_each_failed_attempt_to_use_the_ledger_closes_its_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bells = [Bell() for _ in range(3)]
    times = SimpleNamespace(shares=dict, bell=iter(bells).__next__)
    ledger: Any = SimpleNamespace(times=times, close=lambda: None)
    gatekeeper = Gatekeeper(FileLock(tmp_path / "lock"), lambda: ledger, tmp_path)
    monkeypatch.setattr(gatekeeper._selector, "register", Mock(side_effect=OSError(errno.ENOMEM, "no memory")))
    for _ in bells:
        with pytest.raises(OSError, match="no memory"):
            gatekeeper._again()
    assert not any(hasattr(bell, "_fd") for bell in bells)
    gatekeeper._listener.close()
