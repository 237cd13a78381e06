"""Tests of the gatekeeper's main loop with a test double of the ledger."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf.gatekeeper.main import Gatekeeper
from fgpu_ebpf.linux.file_locks import FileLock
from fgpu_ebpf.linux.wakeup import Wakeup


@pytest.mark.parametrize("step", ["shares", "bell"])
def test_a_ledger_that_cannot_be_used_is_closed_and_opened_again(tmp_path: Path, step: str) -> None:
    bell, failed, closed = Wakeup(), list[str](), list[bool]()

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
