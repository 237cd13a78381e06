"""The driver of this host, with probes on each of its files that is in use.

This module runs in the agent's main thread, at its start. The start has two steps. prepare() needs no BPF programs, and
runs while the programs are compiled. Prepared.attach() needs the programs. Errors are AgentError and ERRORS, whose text
has the reason and the fix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fgpu_ebpf.check import Check
from fgpu_ebpf.driver import other_layouts, shim_store, xid_record
from fgpu_ebpf.driver.attach import Probes
from fgpu_ebpf.driver.bypass_reason import Reasons
from fgpu_ebpf.driver.context_sizes import context_bytes
from fgpu_ebpf.driver.device_indexes import pinned
from fgpu_ebpf.driver.discovery import Discovery
from fgpu_ebpf.driver.image import ProgramError
from fgpu_ebpf.driver.library_files import driver_libraries
from fgpu_ebpf.driver.nvml import DriverError, Nvml
from fgpu_ebpf.driver.probe_plan import ProbeError, look_up
from fgpu_ebpf.driver.programs import Loading
from fgpu_ebpf.driver.start_checks import AgentError, check_kernel
from fgpu_ebpf.ledger.ledger import Ledger

STATE = Path("/var/lib/fgpu/contexts.json")
ERRORS = (DriverError, ProbeError, ProgramError)


@dataclass(frozen=True, slots=True)
class HostDriver:
    """The host's driver after Prepared.attach(): NVML, the probes and the published shim.

    `contexts`: bytes of one context by ledger index. `shim`: the published file. `failed_checks`: the failed checks of
    the shim's store, by name. `layout_changed`: limits of another layout were taken over.
    """

    nvml: Nvml
    contexts: dict[int, int]
    discovery: Discovery
    reasons: Reasons
    xids: xid_record.XidRecord
    shim: Path
    failed_checks: Mapping[str, Check]
    layout_changed: bool


class Prepared(NamedTuple):
    """The driver before its probes are attached."""

    pins: Path
    store: Path | None
    libraries: list[Path]
    nvml: Nvml
    contexts: dict[int, int]
    release: shim_store.Release

    def attach(self, digest: str, ledger: Ledger, run_dir: Path, trusted: Iterable[str], most_files: int) -> HostDriver:
        """Enter the devices in the ledger, probe every file in use, publish the shim, and take over other layouts.

        Raise ERRORS or OSError on failure.

        Args:
            digest: the digest of the loaded BPF programs.
            ledger: the ledger.
            run_dir: the folder for the record of XIDs.
            trusted: digests of other drivers that are trusted.
            most_files: how many files may be probed for one cgroup.
        """
        for device in self.nvml.devices:
            ledger.set_device(device.index, device.uuid)
            ledger.set_context_bytes(device.index, self.contexts[device.index])
        probes = Probes(self.pins, digest, ledger)
        probes.attach_process_ends()
        discovery = Discovery.of_host(probes, self.libraries, self.release.files(), self.store, trusted, most_files)
        shim = self._publish(discovery)
        return HostDriver(
            self.nvml, self.contexts, discovery, Reasons(discovery.explain, discovery.hidden),
            xid_record.XidRecord(run_dir / xid_record.FILE, xid_record.lifetime()), shim, self.release.failed_checks(),
            other_layouts.take_over(self.pins, ledger),
        )  # fmt: skip

    def _publish(self, discovery: Discovery) -> Path:
        """Probe and then publish the shim. Programs that start before the publication get the previous version."""
        used = discovery.start()
        shim = self.release.publish()
        if self.store and used is not None:
            with contextlib.suppress(OSError):  # an old version that is not removed only takes disk space
                shim_store.retire(self.store, used)
        return shim


def libcuda(root: Path) -> list[Path]:
    """Return the files of libcuda under a driver root. Raise AgentError or DriverError if the root has no such file."""
    libraries = driver_libraries(root, "libcuda.so.1")
    if not libraries:
        Nvml(root)  # if there is no driver at all, this raises a more precise error
        raise AgentError(f"no libcuda.so.1 under {root}: install the driver's CUDA library")
    return libraries


def prepare(
    root: Path, libraries: list[Path], shim: Path, store: Path | None, pins: Path, loading: Loading,
    mark: Callable[[str], None],
) -> Prepared:  # fmt: skip
    """Do all steps of the start that need no BPF programs. Raise ERRORS or AgentError on failure.

    Args:
        root: the driver root.
        libraries: the host's files of libcuda.
        shim: the package's shim.
        store: the store of shims, if there is one.
        pins: the folder of the pinned maps.
        loading: the compiler, which runs while this function runs.
        mark: called with the name of each finished step.
    """
    nvml = Nvml(root, pinned(pins))
    mark("devices")
    contexts = context_bytes(nvml, libraries[0], STATE)
    check_kernel(loading, shim)
    release = shim_store.Release(shim, store)
    look_up([release.file, *libraries])
    return Prepared(pins, store, libraries, nvml, contexts, release)
