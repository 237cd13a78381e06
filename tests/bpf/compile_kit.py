"""Compile the kernel's programs for an architecture and read their instructions."""

from __future__ import annotations

import struct
import subprocess

from fgpu_ebpf.driver import image, programs
from tests.bpf.conftest import REPOSITORY

Instruction = tuple[int, int, int, int]


def image_for(arch: str) -> image.Image:
    """Return the programs and maps as BCC makes them for an architecture."""
    command = [*programs.LOADER, str(programs.COMPILER_FILE), str(REPOSITORY / "bpf")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={"ARCH": arch})
    assert done.returncode == 0, done.stderr
    return image.parsed(done.stdout)


def compiled(arch: str) -> dict[str, list[Instruction]]:
    """Return every program's instructions: operation, registers, offset, constant."""
    return {name: list(struct.iter_unpack("<BBhi", code)) for name, code in image_for(arch).programs.items()}
