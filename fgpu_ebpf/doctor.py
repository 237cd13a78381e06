"""`fgpu doctor`: all checks of this host, and the checks that `fgpu agent` and `fgpu load` require.

This module runs in the main thread of the commands. The checks of a subject, such as SELinux, are defined in the module
of that subject. This module collects all checks.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fgpu_ebpf import control_client
from fgpu_ebpf.agent import gatekeeper_process, host_config, parker_check
from fgpu_ebpf.agent.settings import Options
from fgpu_ebpf.api import health
from fgpu_ebpf.check import Check, has_host_pids
from fgpu_ebpf.containers import engine_setup, injection, run, selinux
from fgpu_ebpf.driver import mps, nvml, programs
from fgpu_ebpf.linux import bpf
from fgpu_ebpf.policy import folder
from fgpu_ebpf.policy.yaml_document import ConfigError
from fgpu_ebpf.workloads import cgroups

LINUX = (6, 1)  # the oldest release on which the product has been tested: docs/matrix.md
NVML_SECONDS = 20.0  # NVML initializes many devices without persistence mode in less time
PTRACE_SCOPE, NO_PTRACE = Path("/proc/sys/kernel/yama/ptrace_scope"), 3


def host_checks() -> list[Check]:
    """Check privileges, kernel and cgroups. The agent starts only if all of these checks succeed."""
    return [_privilege(), _kernel(), _pid_namespace(), _uprobes(), _ptrace(), *cgroups.checks()]


def load_checks() -> list[Check]:
    """Check the conditions for pinning the BPF programs."""
    return [_privilege(), _kernel(), _uprobes()]


def checks(options: Options) -> list[Check]:
    """Return every check, in the order of an agent's start.

    The driver's root and the loader are taken from `options`, else from the running agent, else from agent.yaml.
    """
    is_released = False
    with contextlib.suppress(ConnectionError, control_client.RequestError):
        reply = control_client.call(options.run_dir, {"verb": "ping"})
        options = options._replace(
            driver_root=options.driver_root or Path(reply["driver_root"]),
            loader=options.loader or reply["loader"],
        )
        is_released = reply.get("released", False)  # an agent of an older version does not report a release
    host, errors = host_config.read(options.config)
    found = [*host_checks(), _settings(options.config, errors)]
    if host:
        loader = tuple(shlex.split(options.loader)) if options.loader else host.loader
        found += [_bpffs(), programs.check_loader(loader)]
        found += [] if is_released else _driver(options.driver_root or host.driver_root)
    agents = _agent(options.run_dir)
    if host and not any(check.name == "policies" for check in agents):
        agents.append(folder.check(options.policies or host.policy_folder))
    agents += [parker_check.check(options.run_dir)] if host and host.parking else []
    agents += [mps.check(options.run_dir)] if host and any(shared for _, shared in host.sharing) else []
    from fgpu_ebpf.kubernetes import device_plugin  # not at the top: the agent must not import asyncio

    plugin = device_plugin.check(options.run_dir)
    agents += [plugin] if plugin else []
    cdi = engine_setup.check_cdi(options.run_dir)
    return [*found, *agents, *engine_setup.checks(), *([cdi] if cdi else []), *selinux.checks(options.run_dir)]


def _settings(path: Path, errors: Sequence[ConfigError]) -> Check:
    if errors:
        return Check("settings", False, "; ".join(map(str, errors[:3])), f"fix {path}, then restart the agent")
    return Check("settings", True, str(path) if path.exists() else "built-in defaults")


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
    """Check that this process is in the host's pid namespace.

    The BPF programs report host pids. In another pid namespace the agent would treat every process as exited.
    """
    if has_host_pids():
        return Check("pid namespace", True, "the host's")
    fix = "run the agent in the host's pid namespace (hostPID: true, --pid=host); tenants do not need this namespace"
    return Check("pid namespace", False, "this process is not in the host's pid namespace", fix)


def _uprobes() -> Check:
    if os.path.exists("/sys/bus/event_source/devices/uprobe/type"):
        return Check("uprobes", True, "uprobe PMU")
    return Check(
        "uprobes", False, "the kernel has no uprobe PMU", "use a kernel with CONFIG_UPROBE_EVENTS=y, and sysfs at /sys"
    )


def _ptrace() -> Check:
    """Check that the agent may read the memory of other processes, which has the breakpoints of the probes."""
    try:
        scope = int(PTRACE_SCOPE.read_text(encoding="ascii"))
    except OSError:  # this kernel has no such setting
        scope = 0
    if scope < NO_PTRACE:
        return Check("ptrace", True, "memory of processes can be read")
    fix = "set kernel.yama.ptrace_scope to 2 or less in /etc/sysctl.d, and reboot"
    return Check("ptrace", False, f"kernel.yama.ptrace_scope={scope} forbids reading memory of other processes", fix)


def _bpffs() -> Check:
    if os.path.ismount("/sys/fs/bpf"):
        return Check("bpffs", True, "/sys/fs/bpf")
    fix = "mount -t bpf bpf /sys/fs/bpf (the agent mounts bpffs at its start)"
    return Check("bpffs", False, "no bpffs is mounted at /sys/fs/bpf", fix)


def _driver(root: Path) -> list[Check]:
    """Check the driver in a child process: a call of NVML may hang as long as the driver hangs, and cannot be killed.

    A thread that hangs would keep this process from its end.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _answer(root, writer)
    os.close(writer)
    answers = select.poll()
    answers.register(reader, select.POLLIN)
    with open(reader, "rb") as pipe:
        if not answers.poll(NVML_SECONDS * 1000):
            silent = f"NVML does not answer within {NVML_SECONDS:.0f} s"
            return [Check("driver", False, silent, "nvidia-smi shows whether the driver responds")]
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        return [
            Check("driver", False, f"the check of the driver ended with status {os.waitstatus_to_exitcode(status)}")
        ]
    return [Check(*check) for check in json.loads(answer)]


def _answer(root: Path, writer: int) -> NoReturn:
    """Write the checks to the pipe, and exit. No file of the command stays open if NVML hangs."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for file in range(3):
            os.dup2(null, file)
        try:
            found = nvml.checks(root)
        except Exception as error:
            found = [Check("driver", False, f"the check of the driver failed: {error!r}")]
        os.write(writer, json.dumps(found).encode())
    finally:
        os._exit(0)


def _agent(run_dir: Path) -> list[Check]:
    """Check the agent and, if the agent answers, the gatekeeper, the Snapshot and the files that tenants get."""
    try:
        answer = control_client.call(run_dir, {"verb": "ping"})
        snapshot = control_client.call(run_dir, {"verb": "snapshot"})
    except control_client.NoAnswerError as error:
        return [Check("agent", False, str(error), error.fix)]
    except (ConnectionError, control_client.RequestError, subprocess.SubprocessError) as error:
        fix = f"restart the agent with `{control_client.agent_command('restart')}`"
        return [Check("agent", False, str(error), fix)]
    return [
        Check("agent", True, f"pid {answer['pid']}"),
        gatekeeper_process.check(run_dir),
        *health.checks(snapshot),
        run.check(run_dir),
        injection.check(run_dir),
    ]
