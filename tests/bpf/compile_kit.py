"""Compile the kernel's programs for an architecture and read their instructions."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

from tests.bpf.conftest import REPOSITORY

SYSTEM_PYTHON = ("/usr/bin/python3", "-I")  # sees the distribution's BCC
# Prints the instructions of every program, once this kernel has taken those that are to be loaded.
COMPILE = """
import importlib.util, json, os, sys
spec = importlib.util.spec_from_file_location("loader", sys.argv[1])
loader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loader)
bcc = loader.import_bcc()
module = loader.compile_programs(bcc, sys.argv[2], sys.argv[3])
names = [bcc.lib.bpf_function_name(module.module, i) for i in range(bcc.lib.bpf_num_functions(module.module))]
for name in sys.argv[4:]:
    loader.load_program(bcc, module, name)
print(json.dumps({name.decode(): module.dump_func(name).hex() for name in names}), flush=True)
os._exit(0)
"""
Instruction = tuple[int, int, int, int]


def compiled(arch: str, *loaded: str) -> dict[str, list[Instruction]]:
    """Every program as BCC makes it for an architecture: operation, registers, offset, constant; some are loaded."""
    pins = Path(f"/sys/fs/bpf/fgpu-{arch}-{os.getpid()}")
    pins.mkdir()
    sources = str(REPOSITORY / "bpf")
    command = [
        *SYSTEM_PYTHON,
        "-c",
        COMPILE,
        str(REPOSITORY / "fgpu_ebpf/driver/loader.py"),
        sources,
        str(pins),
        *loaded,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={"ARCH": arch})
    finally:
        shutil.rmtree(pins)
    assert done.returncode == 0, done.stderr
    return {
        name: list(struct.iter_unpack("<BBhi", bytes.fromhex(code))) for name, code in json.loads(done.stdout).items()
    }
