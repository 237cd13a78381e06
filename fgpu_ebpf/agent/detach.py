"""`fgpu detach`: the removal of everything that fgpu has left on the host, with ten exceptions.

The exceptions are the files that an engine's settings name (run `fgpu setup --undo` first), the files with which an
engine stops containers that have the shim or, until a boot, starts containers by settings that were undone, versions of
the shim that processes have mapped, the folder of the gatekeeper's socket while a container has mounted this folder,
the parker's socket while systemd listens there, cgroups in which programs of `fgpu run` still run, the cache of
compiled BPF programs, the measured sizes of contexts, the store of `fgpu usage`, and the record of the driver's own
limits that could not be restored. This module runs in the agent's main thread, or in the command if no agent runs.
After an OSError the next call removes the remaining parts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import struct
import time
from pathlib import Path

from fgpu_ebpf.agent import driver_limits, gatekeeper_process, parker_client
from fgpu_ebpf.containers import engine_setup, injection, run
from fgpu_ebpf.driver import attach, cuda_mappings, other_layouts, programs, shim_store
from fgpu_ebpf.linux import atomic_file, clear_path, file_locks, procfs
from fgpu_ebpf.policy import last_good
from fgpu_ebpf.tenancy import tenant_names
from fgpu_ebpf.tenancy.preexisting import PreexistingProcesses
from fgpu_ebpf.workloads import shim_mounts
from fgpu_ebpf.workloads.cgroups import Workloads

log = logging.getLogger("fgpu.agent")
DETACHED_SECONDS = 10.0  # the longest wait for the kernel, which detaches the shim's probes after they were unpinned
NAMES, TENANT_NAMES = "engines.json", tenant_names.FILE
_FILES = (
    *("shim/shim.sock", "control.sock", "discover.sock", "overrides.json", "overrides.json.bad"),
    *(
        *(host.name for host in run.PRELOADS),
        NAMES,
        injection.PUBLISHED,  # removed after the store, because this file has the path of the store
        PreexistingProcesses.FILE,
        "gatekeeper.json",
        "parker.lock",
        file_locks.GATEKEEPER,
        file_locks.NEXT,
        TENANT_NAMES,
        "spared.json",
        "xids.json",
    ),
)


def take_away(run_dir: Path, pins: Path, is_locked: bool = True) -> None:
    """Stop the gatekeeper, and remove pins, probes and files.

    `is_locked`: True if the caller holds the agent's lock.
    """
    gatekeeper_process.end_any(run_dir)
    _cgroups()
    for folder in (pins, *other_layouts.folders(pins)):
        attach.detach(folder)
    _remove_empty(pins.parent)
    programs.unmount_made()
    if driver_limits.take_away(run_dir / driver_limits.FILE):
        _unlink(run_dir / driver_limits.FILE)
    # An earlier agent may have published a shim that differs from the last agent's shim.
    mounted, published = injection.mounted(run_dir).get("shim"), injection.published(run_dir)
    injection.take_away(run_dir)
    run.remove_created_preloads(run_dir)
    until = time.monotonic() + DETACHED_SECONDS
    for shim in {path for path in (mounted, published) if path}:
        if not attach.wait_until_detached(shim, until):
            text = "%s still has probes: programs with this shim get no memory until the kernel has removed the probes"
            log.warning(text, shim)
    if published:
        _published(published, run_dir)
    for path in (last_good.FILE, *(run_dir / name for name in _FILES)):
        _unlink(path)
    if not _is_of_systemd(run_dir / parker_client.SOCKET):
        _unlink(run_dir / parker_client.SOCKET)
    _leave(run_dir / "shim")
    if is_locked:  # the last file: an agent can start from now on
        _unlink(run_dir / file_locks.AGENT)
    _remove_empty(run_dir)


def _cgroups() -> None:
    """Remove the empty cgroups of `fgpu run`. A later agent removes every other cgroup when the programs have ended."""
    root = procfs.cgroup2_root()
    if root is None:
        return
    workloads = Workloads(root)
    for path in workloads.own():
        workloads.remove(path)


def _published(shim: Path, run_dir: Path) -> None:
    """Remove the store of this shim and the helper, unless an engine's settings or a process needs the files.

    The helper stays while a container has mounted the shim's folder: without it, the engine cannot stop the container.
    It stays too if an engine may still use settings that were undone: without it, the engine starts no container.
    """
    store = shim.parent.parent
    if any(engine_setup.STATE.glob("*.json")):
        return
    pids = procfs.pids()
    read = cuda_mappings.fgpu_mappings_of(pids, cuda_mappings.SEARCH_SECONDS)
    if blocking := set(pids) - read.keys():
        log.warning("%s stays: the mappings of %d processes cannot be read", store, len(blocking))
        return
    mapped = {(m.dev, m.ino) for files in read.values() for m in files or ()}
    is_run = shim_mounts.is_mounted(run_dir / "shim") or engine_setup.unread_mark(run_dir).exists()
    if shim_store.remove(store, mapped) and not is_run:
        shutil.rmtree(injection.BIN, ignore_errors=True)
    # BESIDE exists on the host if a container has mounted a folder above, because the runtime creates the
    # mount point.
    for folder in (store, engine_setup.STATE, Path(shim_mounts.BESIDE), store.parent):
        _remove_empty(folder)


def _is_of_systemd(place: Path) -> bool:
    """Return whether systemd listens at this socket. It would not notice that the file was removed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(str(place))
        except OSError:
            return False
        pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return bool(pid == 1)


def _unlink(path: Path) -> None:
    """Remove a file, the temporary file of a killed writer, and folders that were renamed to free the file's name."""
    path.unlink(missing_ok=True)
    Path(atomic_file.temporary_of(path)).unlink(missing_ok=True)
    clear_path.remove_moved(path)


def _leave(folder: Path) -> None:
    """Keep the shim's folder if containers have mounted this folder, so that the next agent uses the same folder.

    A shim that finds the sticky bit does not wait for an answer. The next gatekeeper clears the bit. A reboot removes
    the folder.
    """
    with contextlib.suppress(FileNotFoundError):
        folder.chmod(0o1755)
    if not shim_mounts.is_mounted(folder):
        _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    """Remove a folder, unless the folder has contents or is mounted."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)
