"""`fgpu agent` and `fgpu doctor`: the parts put together.

Owns: start and end of the service, and the list of checks. Never: enforces by itself. On failure: AgentError with the
mend, and whatever was in force stays so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from fgpu_ebpf import agent, devices, ledger, probes, server, workloads
from fgpu_ebpf.agent import Agent, AgentError, Settings
from fgpu_ebpf.checks import Check
from fgpu_ebpf.snapshot import Snapshot

log = logging.getLogger("fgpu agent")
LINUX = (6, 5)


def settings(
    run_dir: Path, driver_root: Path, shim: Path | None, listen: str, loader: str, pins: Path | None
) -> Settings:
    """Settings with every path absolute and there."""
    return Settings(
        run_dir=run_dir,
        pins=pins or ledger.PINS,
        driver_root=driver_root.resolve(),
        shim=(shim or _shim()).resolve(),
        sources=agent.package_file("bpf"),
        listen=listen,
        loader=tuple(shlex.split(loader)),
    )


def _shim() -> Path:
    try:
        return agent.package_file("shim", "libfgpu.so")
    except AgentError:
        return agent.package_file("libfgpu.so")


def serve(run_dir: Path, driver_root: Path, shim: Path | None, listen: str, loader: str, pins: Path | None) -> None:
    """Enforces until SIGTERM. AgentError: why not, and what mends it."""
    begun = time.monotonic()
    for check in host_checks():
        if not check.ok:
            raise AgentError(f"{check.found}: {check.mend}")
    os.environ.pop("LD_PRELOAD", None)
    service = Agent(settings(run_dir, driver_root, shim, listen, loader, pins))
    agent.handle_signals(service)
    try:
        service.start()
        with _reachable(service):
            log.info("enforcing, %d devices, metrics http://%s/metrics", len(service.nvml.devices), listen)
            log.info("ready after %.2f s", time.monotonic() - begun)
            agent.tell_service_manager("READY=1")
            service.run(_published)
    finally:
        service.stop()


@contextlib.contextmanager
def _reachable(service: Agent) -> Iterator[None]:
    """Control socket and metrics address, open once everything is in force."""
    control = server.ControlServer(service)
    web = server.serve_metrics(service)
    try:
        service.wait_for_gatekeeper()
        service.look()
        control.open()
        yield
    finally:
        control.close()
        web.shutdown()


def _published(_: Snapshot) -> None:
    """The web server reads agent.snapshot itself."""


def take_away(run_dir: Path) -> None:
    """`fgpu detach` where no agent runs. Raises OSError."""
    agent.take_away(run_dir, ledger.PINS)


# -- doctor --------------------------------------------------------------------------------------------------------


def host_checks() -> list[Check]:
    """Privilege, kernel and cgroups: what must be right before anything is tried."""
    return [_privilege(), _kernel(), _uprobes(), *workloads.checks()]


def checks(run_dir: Path, driver_root: Path, loader: str) -> list[Check]:
    """Every check, in the order in which a start would meet them."""
    found = host_checks()
    found += [_bpffs(), probes.check_loader(tuple(shlex.split(loader)))]
    found += devices.checks(driver_root)
    found.append(_agent(run_dir))
    return found


def _privilege() -> Check:
    if os.geteuid() == 0:
        return Check("privilege", True, "root")
    return Check("privilege", False, f"uid {os.geteuid()} may not load BPF programs", "run as root: sudo fgpu …")


def _kernel() -> Check:
    release = os.uname().release
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in release.split(".")[:2])
    if (major, minor) >= LINUX:
        return Check("kernel", True, release)
    return Check("kernel", False, f"Linux {release} is too old", f"Linux {LINUX[0]}.{LINUX[1]} or later is needed")


def _uprobes() -> Check:
    if os.path.exists("/sys/bus/event_source/devices/uprobe/type"):
        return Check("uprobes", True, "uprobe PMU")
    return Check(
        "uprobes", False, "the kernel has no uprobe PMU", "a kernel with CONFIG_UPROBE_EVENTS=y, and sysfs at /sys"
    )


def _bpffs() -> Check:
    if os.path.ismount("/sys/fs/bpf"):
        return Check("bpffs", True, "/sys/fs/bpf")
    return Check("bpffs", False, "no bpffs is mounted", "mount -t bpf bpf /sys/fs/bpf (the agent does it itself)")


def _agent(run_dir: Path) -> Check:
    try:
        answer = server.call(run_dir, {"verb": "ping"})
    except ConnectionError as error:
        return Check("agent", False, str(error), "start it: fgpu agent")
    except (server.RequestError, subprocess.SubprocessError) as error:
        return Check("agent", False, str(error), "restart it: fgpu agent")
    return Check("agent", True, f"pid {answer['pid']}")
