"""`fgpu agent` and `fgpu load`: make the parts of the agent process, and run these parts.

This module runs in the main thread of these commands. A start that fails raises AgentError, whose text has the fix.
Limits that were in force stay in force.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fgpu_ebpf import doctor
from fgpu_ebpf.agent import detach, host_config, waking
from fgpu_ebpf.agent.agent import Agent
from fgpu_ebpf.agent.settings import Options, Settings
from fgpu_ebpf.api import control_server
from fgpu_ebpf.containers import injection
from fgpu_ebpf.driver import other_layouts, programs, shim_store, start_checks
from fgpu_ebpf.driver.start_checks import AgentError
from fgpu_ebpf.ledger import ledger
from fgpu_ebpf.linux import file_locks, logs, malloc, sd_notify
from fgpu_ebpf.linux.wakeup import Wakeup
from fgpu_ebpf.workloads import cgroups

log = logging.getLogger("fgpu agent")


def settings(options: Options) -> Settings:
    """Return the agent's settings. A setting that `options` does not have is taken from agent.yaml.

    Raises:
        AgentError: agent.yaml has errors, or a file of the package is not installed.
    """
    host, errors = host_config.read(options.config)
    if host is None:
        raise AgentError("\n".join(map(str, errors)))
    return Settings(
        run_dir=options.run_dir,
        pins=options.pins or ledger.PINS,
        driver_root=(options.driver_root or host.driver_root).resolve(),
        shim=(options.shim or _built_file("shim", "libfgpu.so")).resolve(),
        store=options.store or (None if options.shim else shim_store.STORE),
        sources=start_checks.package_file("bpf"),
        listen=options.listen or host.listen,
        listen_names=host.listen_names,
        loader=tuple(shlex.split(options.loader)) if options.loader else host.loader,
        policy_folder=options.policies or host.policy_folder,
        overcommit=host.overcommit,
        makes_room=host.makes_room,
        parking=host.parking,
        metric_labels=host.metric_labels,
        engines=host.engines,
        helper=_built_file("oci", injection.HELPER),
        # Containers use /run/fgpu only. An agent with another run folder must not offer devices to this host's engines.
        cdi_folder=host.cdi_folder if options.run_dir == Options().run_dir else options.run_dir / "cdi",
        adapters=host.adapters,
        kubelet_folder=host_config.on_node(host.kubelet_folder),
        shares=host.shares,
        profiles=host.profiles,
        ignored_xids=host.ignored_xids,
        trusted_drivers=host.trusted_drivers,
        module_bytes=host.module_bytes,
        bounds=host.bounds,
        priorities=host.priorities,
        sharing=host.sharing,
        log_format=options.log_format or host.log_format,
    )


def _built_file(folder: str, name: str) -> Path:
    """Return the path of a built file: build/FOLDER/NAME in a checkout, else NAME in the package."""
    try:
        return start_checks.package_file(folder, name)
    except AgentError:
        return start_checks.package_file(name)


def serve(options: Options) -> None:
    """Run the agent until SIGTERM. Raise AgentError, with the reason and the fix, if the agent cannot run."""
    begun = _process_start()
    os.umask(0o022)  # permissions of files for other users must not depend on how the agent was started
    _clean_environment()
    for check in doctor.host_checks():
        if not check.ok and check.name not in options.skipped:
            raise AgentError(f"{check.found}: {check.fix}")
    cgroups.make_run_folder()  # now, because the agent later drops the capability that this call needs
    malloc.keep_small()
    chosen = settings(options)
    logs.configure(logs.Format(chosen.log_format) if chosen.log_format else None)
    service = Agent(chosen)
    service.mark("imported")
    _handle_signals(service)
    try:
        service.start()
        with _reachable(service):
            devices = len(service.parts.driver.nvml.devices)
            found = (devices, len(service.parts.enforcer), service.settings.listen)
            if error := service.policy_error():
                log.error("policies are not enforced: %s", error)
            else:
                log.info("enforcing limits, %d devices, %d tenants, web page and /metrics at http://%s/", *found)
            service.mark("answering")
            parts = ", ".join(f"{part} {at - begun:.2f}" for part, at in service.marks.items())
            log.info("ready after %.2f s: %s", time.monotonic() - begun, parts)
            sd_notify.ready(f"{devices} devices")
            service.run()
    except PermissionError as error:
        raise AgentError(f"{error}: give the agent all capabilities that docs/rights.md lists") from error
    finally:
        sd_notify.stopping()
        service.stop()


def _clean_environment() -> None:
    """Remove the environment variables that make the dynamic loader or Python load code, and forbid pydantic's plugins.

    The programs that the agent starts would inherit the variables. To find plugins, pydantic would read the metadata of
    all installed packages.
    """
    for name in [name for name in os.environ if name.startswith(("LD_", "PYTHON"))]:
        del os.environ[name]
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"


def _process_start() -> float:
    """Return the start time of this process, before its imports, in seconds of the monotonic clock, to 0.01 s."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


def _handle_signals(service: Agent) -> None:
    """Install signal handlers: SIGTERM and SIGINT end the agent, and SIGHUP reloads the policies.

    SIGCHLD starts a round, which checks the gatekeeper. Each signal wakes the main loop immediately.
    """
    wakeup = Wakeup()
    service.selector.register(wakeup, selectors.EVENT_READ, wakeup.clear)

    def handle(action: Callable[[], None]) -> None:
        action()
        wakeup.wake()

    for number, action in (
        (signal.SIGTERM, service.end),
        (signal.SIGINT, service.end),
        (signal.SIGHUP, service.reload_soon),
        (signal.SIGCHLD, service.round_soon),
    ):
        signal.signal(number, lambda *_, action=action: handle(action))


@contextlib.contextmanager
def _reachable(service: Agent) -> Iterator[None]:
    """Serve the control socket and the metrics address within the context. Limits must already be in force."""
    commands = control_server.ControlServer(service)
    web = control_server.MetricsAddress(service)
    try:
        service.wait_for_gatekeeper()
        commands.open()
        yield
    finally:
        commands.close()
        web.close()


def load(options: Options) -> str:
    """Compile and pin the BPF programs. An agent compiles unpinned programs at its start.

    If `fgpu load` has run before, the agent's process needs less memory.

    Returns:
        The digest of the programs.

    Raises:
        AgentError: the reason why the programs cannot be pinned, and the fix.
        ProgramError: the compiler or the kernel rejects a program.
    """
    os.umask(0o022)
    for check in doctor.load_checks():
        if not check.ok:
            raise AgentError(f"{check.found}: {check.fix}")
    s = settings(options)
    loading = programs.Loading(s.sources, s.pins, s.loader)
    try:
        start_checks.check_kernel(loading, s.shim)
        return loading.wait()
    finally:
        loading.end()


class ParkedError(Exception):
    """The error of parked tenants that could not be woken. The text has the names of the tenants and the reason."""


def take_away(run_dir: Path, hung: bool) -> bool:
    """Remove everything of fgpu from this host while no agent runs, and prevent the start of agents during the removal.

    Parked tenants are woken first.

    Args:
        run_dir: the folder of the agent's sockets.
        hung: remove everything even if an agent holds its lock. The caller has found that this agent does not answer.

    Returns:
        True if everything was removed; False if an agent is starting or exiting.

    Raises:
        ParkedError: a tenant could not be woken. Nothing was removed.
        OSError: a part could not be removed.
    """
    with _alone(run_dir) as is_held:
        if is_held or hung:
            _wake_all(run_dir)
            detach.take_away(run_dir, ledger.PINS, is_held)
    return is_held or hung


def is_pinned() -> bool:
    """Return whether the kernel has maps and programs of an agent, of any version."""
    return ledger.PINS.exists() or bool(other_layouts.folders(ledger.PINS))


def wake_all(run_dir: Path) -> bool:
    """Wake all parked tenants while no agent runs. Return False if an agent starts or exits.

    Raise ParkedError on failure.
    """
    if not is_pinned():  # leave no lock file
        return True
    with _alone(run_dir) as is_held:
        if is_held:
            _wake_all(run_dir)
    return is_held


@contextlib.contextmanager
def _alone(run_dir: Path) -> Iterator[bool]:
    """Hold the agent's lock within the context, unless an agent holds the lock. Yield whether the lock is held."""
    lock = file_locks.FileLock(run_dir / file_locks.AGENT)
    try:
        yield lock.take()
    finally:
        lock.release()


def _wake_all(run_dir: Path) -> None:
    if error := waking.wake_all(run_dir, ledger.PINS):
        raise ParkedError(error)
