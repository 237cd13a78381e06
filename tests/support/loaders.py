"""Programs with another dynamic loader than the host's: a copy of the host's, which may be changed as in nixpkgs."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.host import BUILD, ROOT

USUAL = Path("/lib64/ld-linux-x86-64.so.2")
NIX_GLIBC = "nix/store/8p33is69mjdw3bi1wmi8v2zpsxir8nwd-glibc-2.40-66/lib/ld-linux-x86-64.so.2"  # below a root
LIST, NIX_LIST = b"/etc/ld.so.preload\0", b"/etc/ld-nix.so.preload\0"
UNUSED = b"You have invoked "  # begins a text that a loader prints if it is called without a program
_SEGMENT, _LOADED = struct.Struct("<IIQQQQQQ"), 1


def of_nix(target: Path) -> Path:
    """Write a copy of the host's loader that reads /etc/ld-nix.so.preload, and return its path.

    nixpkgs' patch of glibc (dont-use-system-ld-so-preload.patch) changes that one string. The new string is longer than
    glibc's. Therefore the copy has the new string in place of a text that is not printed, and every address of the old
    string in the code is replaced by that of the new string.
    """
    image = bytearray(USUAL.read_bytes())
    old, new = image.index(LIST), image.index(UNUSED)
    image[new : new + len(NIX_LIST)] = NIX_LIST
    moved = 0
    for start, end, address in _code(image):
        for at in range(start, end - 4):  # lea DISPLACEMENT(%rip), REGISTER
            (displacement,) = struct.unpack_from("<i", image, at)
            if address + at + 4 + displacement == _address(image, old) and image[at - 2] == 0x8D:
                struct.pack_into("<i", image, at, displacement + _address(image, new) - _address(image, old))
                moved += 1
    assert moved, "no code has the address of the list"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(image)
    target.chmod(0o755)
    return target


def client_of(loader: Path, target: Path, loaded_as: Path | None = None) -> Path:
    """Compile tests/programs/client.c for a loader, and return its path.

    Args:
        loaded_as: the loader's path where the program runs; None: the same.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    source, flags = ROOT / "tests/programs/client.c", ["-std=gnu11", f"-I{BUILD}/headers", "-ldl", "-pthread"]
    command = ["cc", f"-Wl,--dynamic-linker={loaded_as or loader}", "-o", target, source, *flags]
    subprocess.run(command, check=True, timeout=60)
    return target


def _segments(image: bytearray) -> Iterator[tuple[int, int, int, int]]:
    """Yield flags, offset, address and size of each segment that is loaded."""
    (table,) = struct.unpack_from("<Q", image, 32)
    (count,) = struct.unpack_from("<H", image, 56)
    for kind, flags, offset, address, _, size, _, _ in _SEGMENT.iter_unpack(image[table : table + 56 * count]):
        if kind == _LOADED:
            yield flags, offset, address, size


def _code(image: bytearray) -> Iterator[tuple[int, int, int]]:
    """Yield start and end in the file of each executable segment, and what is added to an offset for its address."""
    for flags, offset, address, size in _segments(image):
        if flags & 1:
            yield offset, offset + size, address - offset


def _address(image: bytearray, at: int) -> int:
    """Return the address of an offset in the file."""
    return next(at + address - offset for _, offset, address, size in _segments(image) if offset <= at < offset + size)
