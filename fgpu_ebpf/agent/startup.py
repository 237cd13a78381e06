"""The first steps of the agent's start, up to attached probes, and the last step, which writes the containers' files.

This module runs in the main thread of the agent process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fgpu_ebpf.agent.policy_reload import Start, at_start
from fgpu_ebpf.agent.settings import Settings
from fgpu_ebpf.containers import cdi, injection
from fgpu_ebpf.driver import host_driver, other_layouts, programs
from fgpu_ebpf.driver.host_driver import HostDriver
from fgpu_ebpf.driver.nvml import Device
from fgpu_ebpf.driver.start_checks import AgentError
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.linux import capabilities, file_locks
from fgpu_ebpf.tenancy import profiles
from fgpu_ebpf.tenancy.overrides import Override
from fgpu_ebpf.tenancy.preexisting import PreexistingProcesses


class Attached(NamedTuple):
    """The objects that a start has made when all probes are attached."""

    driver: HostDriver
    ledger: Ledger
    policies: Start
    preexisting: PreexistingProcesses


def take_lock(run_dir: Path) -> file_locks.FileLock:
    """Take the lock that keeps a second agent from starting, and return the lock.

    The lock is held until release() or the end of this process.

    Raises:
        AgentError: another agent has the lock.
    """
    lock = file_locks.FileLock(run_dir / file_locks.AGENT)
    if not lock.take():
        raise AgentError("an agent is already running on this host")
    return lock


def attach(settings: Settings, mark: Callable[[str], None], start_gatekeeper: Callable[[], None]) -> Attached:
    """Load the BPF programs and attach all probes. The steps that need no program run while programs are compiled.

    Args:
        mark: called with the name of each part of the start that is done.
        start_gatekeeper: called early if the programs and maps of this version are pinned already, so that the
            gatekeeper starts at the same time as the agent. Without pinned maps, an early gatekeeper could open maps
            that this agent replaces.

    Raises:
        AgentError: the text names the missing requirement, and its fix.
    """
    if why := other_layouts.parked(settings.pins):
        raise AgentError(why)
    try:
        libraries = host_driver.libcuda(settings.driver_root)
        loading = programs.Loading(settings.sources, settings.pins, settings.loader)
        if not loading.begun:
            start_gatekeeper()
        try:
            prepared = host_driver.prepare(
                settings.driver_root, libraries, settings.shim, settings.store, settings.pins, loading, mark
            )
            policies = at_start(settings.policy_folder)
            mark("prepared")
            digest = loading.wait()
        finally:
            loading.end()
        mark("loaded")
        capabilities.keep_only(capabilities.AGENT)  # before a second thread starts, which would keep all capabilities
        older = PreexistingProcesses.found(settings.run_dir, bool(other_layouts.folders(settings.pins)))
        ledger = Ledger(settings.pins)
        driver = prepared.attach(digest, ledger, settings.run_dir, settings.trusted_drivers, settings.bounds.files)
        mark("attached")
    except host_driver.ERRORS as error:
        raise AgentError(str(error)) from error
    return Attached(driver, ledger, policies, older)


def set_up_containers(
    settings: Settings, shim: Path, devices: Sequence[Device], overrides: Iterable[Override]
) -> cdi.Parts:
    """Write the files that containers get at their start, and return the paths of these files.

    Raise OSError or ValueError if a file cannot be written. Limits are enforced even without the files.

    Args:
        overrides: the running containers' shares, which stay in the files because the containers may be restarted.
    """
    used = (name for override in overrides for name in override.share_names)
    helper = settings.helper if settings.store is None else injection.publish_helper(settings.helper)
    parts = injection.parts(settings.run_dir, shim, helper)
    names = [*settings.shares, *profiles.names(settings.profiles, devices), *used]
    injection.set_up(parts, settings.cdi_folder, names)
    return parts
