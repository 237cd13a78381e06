"""`fgpu agent` and `fgpu doctor`: the parts put together.

Owns: start and end of the service, and the list of checks. Never: enforces by itself. On failure: AgentError with the
mend, and whatever was in force stays so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fgpu_ebpf import (
    bpf,
    control,
    detach,
    devices,
    enginesetup,
    health,
    heap,
    hostfile,
    inject,
    keeper,
    launch,
    ledger,
    notify,
    policyfolder,
    programs,
    published,
    selinux,
    server,
    start_checks,
    workloads,
)
from fgpu_ebpf.agent import Agent
from fgpu_ebpf.bell import Bell
from fgpu_ebpf.checks import Check, has_host_pids
from fgpu_ebpf.settings import Settings
from fgpu_ebpf.start_checks import AgentError
from fgpu_ebpf.yamlfile import Fault

log = logging.getLogger("fgpu agent")
LINUX = (6, 1)  # the oldest on which the product has been tested: docs/matrix.md
PTRACE_SCOPE, NO_PTRACE = Path("/proc/sys/kernel/yama/ptrace_scope"), 3


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says; None: what /etc/fgpu/agent.yaml says."""

    run_dir: Path = Path("/run/fgpu")
    driver_root: Path | None = None
    shim: Path | None = None
    listen: str | None = None
    loader: str | None = None
    pins: Path | None = None
    store: Path | None = None
    config: Path = hostfile.FILE
    policies: Path | None = None
    skipped: tuple[str, ...] = ()  # checks that tests of the packages cannot pass


def settings(options: Options) -> Settings:
    """Settings with every path absolute and there. AgentError: agent.yaml is wrong."""
    host, faults = hostfile.read(options.config)
    if host is None:
        raise AgentError("\n".join(map(str, faults)))
    return Settings(
        run_dir=options.run_dir,
        pins=options.pins or ledger.PINS,
        driver_root=(options.driver_root or host.driver_root).resolve(),
        shim=(options.shim or _carried("shim", "libfgpu.so")).resolve(),
        store=options.store or (None if options.shim else published.STORE),
        sources=start_checks.package_file("bpf"),
        listen=options.listen or host.listen,
        listen_names=host.listen_names,
        loader=tuple(shlex.split(options.loader)) if options.loader else host.loader,
        policy_folder=options.policies or host.policy_folder,
        overcommit=host.overcommit,
        engines=host.engines,
        helper=_carried("oci", inject.HELPER),
        # Containers reach /run/fgpu alone: what an agent elsewhere offers is nothing for this host's engines.
        cdi_folder=host.cdi_folder if options.run_dir == Options().run_dir else options.run_dir / "cdi",
        shares=host.shares,
        profiles=host.profiles,
        ignored_xids=host.ignored_xids,
        trusted_drivers=host.trusted_drivers,
        bounds=host.bounds,
    )


def _carried(folder: str, name: str) -> Path:
    """A program of ours: a checkout has it in build/FOLDER."""
    try:
        return start_checks.package_file(folder, name)
    except AgentError:
        return start_checks.package_file(name)


def serve(options: Options) -> None:
    """Enforces until SIGTERM. AgentError: why not, and what mends it."""
    begun = _process_start()
    os.umask(0o022)  # what others are to reach must not depend on how the agent was started
    _clean_environment()
    for check in host_checks():
        if not check.ok and check.name not in options.skipped:
            raise AgentError(f"{check.found}: {check.mend}")
    workloads.make_run_folder()  # the agent gives up what that takes
    heap.keep_small()
    service = Agent(settings(options))
    service.mark("imported")
    _handle_signals(service)
    try:
        service.start()
        with _reachable(service):
            found = (len(service.nvml.devices), len(service.enforcer), service.settings.listen)
            if lacks := service.lacks_policies():
                log.error("not enforcing policies: %s", lacks)
            else:
                log.info("enforcing, %d devices, %d tenants, page and /metrics at http://%s/", *found)
            service.mark("answering")
            parts = ", ".join(f"{part} {at - begun:.2f}" for part, at in service.marks.items())
            log.info("ready after %.2f s: %s", time.monotonic() - begun, parts)
            notify.ready(f"{len(service.nvml.devices)} devices")
            service.run()
    except PermissionError as error:
        raise AgentError(f"{error}: give the agent all capabilities that docs/security.md names") from error
    finally:
        notify.stopping()
        service.stop()


def _clean_environment() -> None:
    """What tells the loader, or Python, to bring code along is for no program that we start, whoever set it."""
    for name in [name for name in os.environ if name.startswith(("LD_", "PYTHON"))]:
        del os.environ[name]


def _process_start() -> float:
    """When this process was started, on the monotonic clock, to a hundredth of a second: imports are waited for too."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


def _handle_signals(service: Agent) -> None:
    """SIGTERM and SIGINT end the agent in order, SIGHUP reads the policies again, SIGCHLD has it look for the
    gatekeeper; the loop wakes for each at once.
    """
    bell = Bell()
    service.selector.register(bell, selectors.EVENT_READ, bell.hush)

    def handle(what: Callable[[], None]) -> None:
        what()
        bell.ring()

    for number, what in (
        (signal.SIGTERM, service.end),
        (signal.SIGINT, service.end),
        (signal.SIGHUP, service.reload_soon),
        (signal.SIGCHLD, service.round_soon),
    ):
        signal.signal(number, lambda *_, what=what: handle(what))


@contextlib.contextmanager
def _reachable(service: Agent) -> Iterator[None]:
    """Control socket and metrics address, open once everything is in force."""
    commands = server.ControlServer(service)
    web = server.MetricsAddress(service)
    try:
        service.wait_for_gatekeeper()
        commands.open()
        yield
    finally:
        commands.close()
        web.close()


def load(options: Options) -> str:
    """Pins the kernel's programs, as an agent's start would: a step of its own where the agent shall be small.

    Answers their digest. AgentError: why not, and what mends it.
    """
    os.umask(0o022)
    for check in (_privilege(), _kernel(), _uprobes()):
        if not check.ok:
            raise AgentError(f"{check.found}: {check.mend}")
    s = settings(options)
    loading = programs.Loading(s.sources, s.pins, s.loader)
    try:
        start_checks.check_kernel(loading, s.shim)
        return loading.wait()
    finally:
        loading.end()


def take_away(run_dir: Path) -> None:
    """`fgpu detach` where no agent runs. Raises OSError."""
    detach.take_away(run_dir, ledger.PINS)


# -- doctor --------------------------------------------------------------------------------------------------------


def host_checks() -> list[Check]:
    """Privilege, kernel and cgroups: what must be right before anything is tried."""
    return [_privilege(), _kernel(), _pid_namespace(), _uprobes(), _ptrace(), *workloads.checks()]


def checks(options: Options) -> list[Check]:
    """Every check, in the order in which a start would meet them; where things are, the agent that runs says itself."""
    with contextlib.suppress(ConnectionError, control.RequestError):
        said = control.call(options.run_dir, {"verb": "ping"})
        options = replace(
            options,
            driver_root=options.driver_root or Path(said["driver_root"]),
            loader=options.loader or said["loader"],
        )
    host, faults = hostfile.read(options.config)
    found = [*host_checks(), _settings(options.config, faults)]
    if host:
        loader = tuple(shlex.split(options.loader)) if options.loader else host.loader
        found += [_bpffs(), programs.check_loader(loader), *devices.checks(options.driver_root or host.driver_root)]
    agents = _agent(options.run_dir)
    if host and not any(check.name == "policies" for check in agents):
        agents.append(policyfolder.check(options.policies or host.policy_folder))
    from fgpu_ebpf import kubelet  # here: asyncio is nothing for the agent

    plugin = kubelet.check(options.run_dir)
    agents += [plugin] if plugin else []
    return [*found, *agents, *enginesetup.checks(), *selinux.checks(options.run_dir)]


def _settings(path: Path, faults: Sequence[Fault]) -> Check:
    if faults:
        return Check("settings", False, "; ".join(map(str, faults[:3])), f"mend {path}, then start the agent anew")
    return Check("settings", True, str(path) if path.exists() else "as built in")


def _privilege() -> Check:
    if os.geteuid() == 0:
        return Check("privilege", True, "root")
    return Check("privilege", False, f"uid {os.geteuid()} may not load BPF programs", "run as root: sudo fgpu …")


def _kernel() -> Check:
    release = os.uname().release
    if bpf.kernel_release() >= LINUX:
        return Check("kernel", True, release)
    return Check("kernel", False, f"Linux {release} is too old", f"Linux {LINUX[0]}.{LINUX[1]} or later is needed")


def _pid_namespace() -> Check:
    """The kernel's programs name processes as the host does: elsewhere every one of them would be taken for ended."""
    if has_host_pids():
        return Check("pid namespace", True, "the host's")
    mend = "run the agent in the host's pid namespace (hostPID: true, --pid=host); tenants need none of that"
    return Check("pid namespace", False, "the agent sees only the processes of a container", mend)


def _uprobes() -> Check:
    if os.path.exists("/sys/bus/event_source/devices/uprobe/type"):
        return Check("uprobes", True, "uprobe PMU")
    return Check(
        "uprobes", False, "the kernel has no uprobe PMU", "a kernel with CONFIG_UPROBE_EVENTS=y, and sysfs at /sys"
    )


def _ptrace() -> Check:
    """The memory of processes is read to see that they have the breakpoints of the probes."""
    try:
        scope = int(PTRACE_SCOPE.read_text(encoding="ascii"))
    except OSError:  # this kernel has no such setting
        scope = 0
    if scope < NO_PTRACE:
        return Check("ptrace", True, "memory of processes can be read")
    fix = "kernel.yama.ptrace_scope=2 in sysctl.d, or less, and a reboot"
    return Check("ptrace", False, f"kernel.yama.ptrace_scope={scope} lets no process read another's memory", fix)


def _bpffs() -> Check:
    if os.path.ismount("/sys/fs/bpf"):
        return Check("bpffs", True, "/sys/fs/bpf")
    return Check("bpffs", False, "no bpffs is mounted", "mount -t bpf bpf /sys/fs/bpf (the agent does it itself)")


def _agent(run_dir: Path) -> list[Check]:
    """The agent answers, and what it says of itself."""
    try:
        answer = control.call(run_dir, {"verb": "ping"})
        snapshot = control.call(run_dir, {"verb": "snapshot"})
    except control.NoAnswerError as error:
        return [Check("agent", False, str(error), error.fix)]
    except (ConnectionError, control.RequestError, subprocess.SubprocessError) as error:
        return [Check("agent", False, str(error), f"restart it with `{control.agent_command('restart')}`")]
    return [
        Check("agent", True, f"pid {answer['pid']}"),
        keeper.check(run_dir),
        *health.checks(snapshot),
        launch.check(run_dir),
        inject.check(run_dir),
    ]
