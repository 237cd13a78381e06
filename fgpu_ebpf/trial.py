"""Whether programs outlive being probed on this kernel.

Owns: a child that is probed before anybody else is. Never: leaves a probe behind. On failure: OSError where nothing
can be probed at all.
"""

from __future__ import annotations

import os
import subprocess
import sys

from fgpu_ebpf import bpf
from fgpu_ebpf.probes import symbol_offsets

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_URETPROBE_CALL, _ALLOW, _ERRNO_EPERM = 335, 0x7FFF0000, 0x00050001

# Denies one system call, as Docker's profile does what it does not know, and calls a probed function.
_TRIAL = f"""
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


def return_probes_survive_seccomp(shim: str, denied: int = _URETPROBE_CALL) -> bool:
    """Whether a process under Docker's seccomp profile outlives a return probe.

    From Linux 6.11 to early 6.13 the trampoline is a system call that the profile refuses, and the process dies.
    """
    event = bpf.open_uprobe(shim, symbol_offsets(shim, ["fgpu_release"])["fgpu_release"], True)
    try:
        done = subprocess.run([sys.executable, "-I", "-c", _TRIAL, shim], capture_output=True, timeout=30, check=False)
    finally:
        os.close(event)
    return done.returncode >= 0
