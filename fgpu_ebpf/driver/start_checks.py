"""Checks of the package and the kernel before anything is enforced.

This module runs in the agent's main thread at its start, in `fgpu load` and in `fgpu setup`. The text of an AgentError
has the reason and the fix. Before the first use of the BPF programs, the check of the kernel probes only a child
process, and determines whether processes survive return probes. The probe is removed afterwards.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fgpu_ebpf.driver import programs
from fgpu_ebpf.driver.probe_plan import symbol_offsets
from fgpu_ebpf.linux import bpf

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_URETPROBE_CALL, _ALLOW, _ERRNO_EPERM = 335, 0x7FFF0000, 0x00050001

# This program forbids itself one system call, as Docker's profile forbids unknown calls, and calls a probed function.
_CHILD = f"""
import ctypes, struct, sys
libc = ctypes.CDLL(None)
code = struct.pack("HBBI", 0x20, 0, 0, 0) + struct.pack("HBBI", 0x15, 0, 1, int(sys.argv[2]))
code += struct.pack("HBBI", 6, 0, 0, {_ERRNO_EPERM}) + struct.pack("HBBI", 6, 0, 0, {_ALLOW})
program = ctypes.create_string_buffer(code)
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(program)))
shim = ctypes.CDLL(sys.argv[1])
libc.prctl({_PR_SET_NO_NEW_PRIVS}, 1, 0, 0, 0)
libc.prctl({_PR_SET_SECCOMP}, {_SECCOMP_MODE_FILTER}, filter, 0, 0)
shim.fgpu_release(0, 0, 0, 0)
"""

KILLS = "return probes kill containers on this kernel (Linux 6.11 to 6.13): update the kernel"
CAPABLE = "run fgpu outside a container, or give the container CAP_SYS_ADMIN, CAP_BPF and CAP_PERFMON"


class AgentError(Exception):
    """Enforcement is not possible. The text has the reason and, if known, the fix."""


def package_file(*names: str) -> Path:
    """Return the path of a file of the package, or of a build in a checkout. Raise AgentError for a missing file."""
    package = Path(__file__).parents[1]
    for base in (package, package.parent, package.parent / "build"):
        path = base.joinpath(*names)
        if path.exists():
            return path
    raise AgentError(f"{'/'.join(names)} is not installed: reinstall fgpu, or run ./dev build in a checkout")


def check_kernel(loading: programs.Loading, shim: Path) -> None:
    """Check the kernel before the first use of the BPF programs. Raise AgentError if probes would kill processes."""
    if loading.begun and (why := unfit(str(shim))):
        raise AgentError(why)


def return_probes_survive_seccomp(shim: str, denied: int = _URETPROBE_CALL) -> bool:
    """Return whether a process under Docker's seccomp profile survives a return probe. Raise OSError on failure.

    From Linux 6.11 to early 6.13, the trampoline of return probes is a system call. The profile refuses this call
    (number `denied`), and the kernel kills the process.
    """
    command = [sys.executable, "-I", "-S", "-c", _CHILD, shim, str(denied)]
    event = bpf.open_uprobe(shim, symbol_offsets(shim, ["fgpu_release"])["fgpu_release"], True)
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    finally:
        os.close(event)
    if done.returncode > 0:  # the child has failed before it reached the probe
        raise OSError(f"the check failed: {done.stderr.decode(errors='replace').strip()[-200:]}")
    return done.returncode == 0


def unfit(shim: str) -> str:
    """Return why this kernel cannot run the BPF programs, with the fix; empty: the kernel can run the programs."""
    try:
        return "" if return_probes_survive_seccomp(shim) else KILLS
    except OSError as error:
        return f"root may not use uprobes here ({error}): {CAPABLE}"
