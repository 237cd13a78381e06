"""A detach that changes nothing outside of a test's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgpu_ebpf.agent import detach, gatekeeper_process
from fgpu_ebpf.containers import run
from fgpu_ebpf.driver import other_layouts, programs
from fgpu_ebpf.ledger import ledger
from fgpu_ebpf.policy import last_good


def restrict(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Restrict a detach to `folder`, in which the pins are PINS. The caller sets STATE and BIN of fgpu setup."""
    nothing = ((gatekeeper_process, "end_any"), (detach, "_cgroups"), (programs, "unmount_made"))
    for module, name in (*nothing, (run, "remove_created_preloads")):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(other_layouts, "folders", lambda _: [])
    monkeypatch.setattr(last_good, "FILE", folder / "last")
    monkeypatch.setattr(ledger, "PINS", folder / "pins")
