"""One gatekeeper a folder, and looking whether there is one keeps nobody from being it."""

from __future__ import annotations

import fcntl
import threading
import time
from pathlib import Path

from fgpu_ebpf import keeper
from fgpu_ebpf.door import Lock


def test_whoever_only_looks_keeps_no_gatekeeper_out(tmp_path: Path) -> None:
    path = tmp_path / "gatekeeper.lock"
    path.touch()
    with open(path, "rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.03, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        assert Lock(tmp_path).take(), "taken for another gatekeeper"


def test_a_second_one_is_told_soon(tmp_path: Path) -> None:
    first, begun = Lock(tmp_path), time.monotonic()
    assert first.take()
    assert not Lock(tmp_path).take()
    assert time.monotonic() - begun < 2
    assert keeper.locked(tmp_path / "gatekeeper.lock")
