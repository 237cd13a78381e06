"""A 32-bit C library, and the simulated driver and programs built against it. x86 only.

The module unpacks Debian's packages into build/bits32 once and never installs them. It imports nothing of fgpu.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support import debian
from tests.support.host import BUILD, ROOT

PACKAGES = ("lib32gcc-12-dev", "lib32gcc-s1", "libc6-dev-i386", "libc6-i386")
OUT = BUILD / "bits32"
LIBRARIES = OUT / "sim/lib"


def _compiler() -> list[str]:
    """Return a compiler that makes programs name the loader and the C library of the unpacked packages."""
    root = debian.fetched(OUT / "root", ["download", *PACKAGES], [])
    loader = root / "lib/ld-linux.so.2"
    if os.path.isabs(os.readlink(loader)):  # the linker does not follow it inside the root
        beside = loader.with_name(f".{os.getpid()}")
        beside.symlink_to("../lib32/ld-linux.so.2")
        beside.replace(loader)
    places = [root / "usr/lib32", root / "usr/lib/gcc/x86_64-linux-gnu/12/32"]
    headers = [root / "usr/include/x86_64-linux-gnu", "/usr/include/x86_64-linux-gnu"]
    return [
        "gcc", "-m32", "-march=i686", *(f"-B{place}" for place in places), *(f"-L{place}" for place in places),
        *(f"-isystem{place}" for place in headers), f"-Wl,--sysroot={root}", f"-Wl,-rpath,{root}/lib32:{LIBRARIES}",
        f"-Wl,--dynamic-linker={root}/lib32/ld-linux.so.2",
    ]  # fmt: skip


def client() -> Path:
    """Build a 32-bit libcuda and tests/programs/client.c, which loads it. Return the program."""
    compiler, headers = _compiler(), BUILD / "headers"
    # Comparisons of a size with the largest 64-bit value are always false there.
    command = ["make", "-s", "-C", ROOT / "sim", f"OUT={OUT / 'sim'}", f"HEADERS={headers}"]
    command += [f"CC={' '.join(compiler)}", "CFLAGS=-O2 -Wno-type-limits -Wno-psabi", LIBRARIES / "libcuda.so.1"]
    subprocess.run(command, check=True, timeout=120)
    program = OUT / "client"
    source = ROOT / "tests/programs/client.c"
    flags = ["-std=gnu11", "-Wno-psabi", f"-I{headers}", "-ldl", "-pthread"]
    subprocess.run([*compiler, "-o", program, source, *flags], check=True, timeout=60)
    return program
