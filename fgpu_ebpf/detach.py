"""`fgpu detach`: the host as it was before fgpu came.

Owns: the list of what a service leaves on a host, and its removal. Never: touches what an engine's settings name (`fgpu
setup --undo` comes first then), a version of the shim that somebody has mapped, or what was measured of the driver.
On failure: OSError; what is left is taken away by the next call.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from fgpu_ebpf import (
    enginesetup,
    inject,
    keeper,
    last_good,
    launch,
    locks,
    probes,
    procfs,
    programs,
    published,
    shim_mounts,
    sockets,
    tenant_names,
)
from fgpu_ebpf.elders import Elders
from fgpu_ebpf.workloads import Workloads

NAMES, TENANT_NAMES = "engines.json", tenant_names.FILE
_FILES = (
    *("shim/shim.sock", "control.sock", "discover.sock", "ld.so.preload", "overrides.json", "overrides.json.bad"),
    *(NAMES, Elders.FILE, "gatekeeper.json", locks.GATEKEEPER, locks.NEXT, TENANT_NAMES, "xids.json"),
)


def take_away(run_dir: Path, pins: Path, by_agent: bool = False) -> None:
    """Opens everything, unpins it and removes what was set up. `by_agent`: whoever holds the lock does it."""
    keeper.end_any(run_dir)
    _cgroups()
    for folder in (pins, *probes.folders_of_other_layouts(pins)):
        probes.detach(folder)
    _remove_empty(pins.parent)
    programs.unmount_made()
    shim = inject.take_away(run_dir)
    launch.take_away_what_was_made(run_dir)
    if shim:
        _published(shim)
    last_good.FILE.unlink(missing_ok=True)
    for name in _FILES:
        (run_dir / name).unlink(missing_ok=True)
        sockets.remove_moved(run_dir / name)
    if by_agent or not locks.is_locked(run_dir / locks.AGENT):
        (run_dir / locks.AGENT).unlink(missing_ok=True)
    _leave(run_dir / "shim")
    _remove_empty(run_dir)


def _cgroups() -> None:
    """Remove empty cgroups of `fgpu run`; a later agent removes the others when their programs have ended."""
    root = procfs.cgroup2_root()
    if root is None:
        return
    workloads = Workloads(root)
    for path in workloads.own():
        workloads.remove(path)


def _published(shim: Path) -> None:
    """The store that this path of the shim lies in, and the helper, unless somebody still needs them."""
    store = shim.parent.parent
    if any(enginesetup.STATE.glob("*.json")):
        return
    mapped = {(m.dev, m.ino) for pid in procfs.pids() for m in procfs.fgpu_mappings(pid) or ()}
    if published.remove(store, mapped):
        shutil.rmtree(inject.BIN, ignore_errors=True)
    for folder in (store, enginesetup.STATE, store.parent):
        _remove_empty(folder)


def _leave(folder: Path) -> None:
    """Containers that have it mounted keep it, so that the next agent is in the same one. The sticky bit tells shims
    that nothing is to be waited for; the gatekeeper takes it away, and a boot the folder.
    """
    with contextlib.suppress(FileNotFoundError):
        folder.chmod(0o1755)
    if not shim_mounts.is_mounted(folder):
        _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    """Others may have something in it, or have mounted it."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)
