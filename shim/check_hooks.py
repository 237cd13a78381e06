#!/usr/bin/env python3
"""Finds what nobody decided about: a driver's function that allocates, launches, makes a context or shows memory.

Every such name must stand in the table of shim.h or, with a reason, in symbols/decided.txt. What "such" means is told
by patterns that rather take too much. Reads files only; fails by naming what is missing.

usage: check_hooks.py [FILE…]      libraries or lists of names; without any, all lists in symbols/
       check_hooks.py --names HEADER…   prints the names that cuda.h, cudaGL.h, nvml.h… know, for a new list
"""

from __future__ import annotations

import argparse
import re
import struct
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUDA = re.compile(
    r"^cu(?!da|rand|fft|blas|sparse|solver).*(Alloc|Create|Import|Ipc|Launch|Pool|TotalMem|MemGetInfo|Retain|Release|"
    r"Reset|Attach|Detach|Destroy|FromGreenCtx|Instantiate|Upload|GraphMem|MemAttribute|MemTrim|AddNode|AddChild|"
    r"Load|Register|MemMap|MemUnmap|MemFree|Managed|MemPrefetch|Mapped|Capture|Multicast|ExternalMemory|ExportTable|"
    r"GetProcAddress|Checkpoint|LogicalEndpoint|SetLimit|cuInit)|^cu(Init|LaunchGrid|Launch)"
)
NVML = re.compile(r"^nvml.*(Memory|MemInfo|MemSize|Process|Accounting|BAR1|Utilization|Limits|Init)")
_SUFFIX = {"PTDS": "_ptds", "PTSZ": "_ptsz"}


def table(text: str) -> set[str]:
    """The names that shim.h hooks."""
    return set(re.findall(r"\b(?:HOOK|ASK)\((\w+)\)", text))


def decided(text: str) -> tuple[set[str], list[str]]:
    """`name name: reason` per line; the names, and what is wrong with the file."""
    names: set[str] = set()
    wrong = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        before, colon, reason = line.partition(":")
        if not colon or len(reason.split()) < 2:
            wrong.append(f"decided.txt:{number}: no reason")
        wrong += [f"decided.txt:{number}: {n} stands twice" for n in before.split() if n in names]
        names.update(before.split())
    return names, wrong


def is_of_interest(name: str) -> bool:
    """True where somebody must have decided."""
    return bool(CUDA.search(name) or NVML.search(name))


def exports(data: bytes) -> set[str]:
    """The defined dynamic symbols of a 64-bit little-endian ELF file."""
    sections, size, count = struct.unpack_from("<Q", data, 0x28)[0], *struct.unpack_from("<HH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, sections + i * size) for i in range(count)]
    found = set()
    for header in headers:
        if header[1] != 11:  # SHT_DYNSYM
            continue
        text = headers[header[6]][4]
        for at in range(header[4], header[4] + header[5], 24):
            name, _, _, section = struct.unpack_from("<IBBH", data, at)
            if section:
                found.add(data[text + name : data.index(b"\0", text + name)].decode())
    return found


def names_of(path: Path) -> set[str]:
    """What a library exports, or what a list has: one name per line, the last word of it."""
    data = path.read_bytes()
    if data[:4] == b"\x7fELF":
        return exports(data)
    return {line.split()[-1] for line in data.decode().splitlines() if line.strip() and not line.startswith("#")}


def header_names(text: str) -> set[str]:
    """Every exported name that a header of the driver declares or makes of another: versions and streams alike."""
    names = set(re.findall(r"(?:CUresult|nvmlReturn_t)\s+(?:CUDAAPI\s+|DECLDIR\s+)?((?:cu|nvml)[A-Z]\w+)\s*\(", text))
    names |= set(re.findall(r"#\s*define\s+(?:cu|nvml)[A-Z]\w+\s+((?:cu|nvml)[A-Z]\w+)\s*$", text, re.M))
    for kind, name in re.findall(r"#\s*define\s+cu\w+\s+__CUDA_API_(PTDS|PTSZ)\((cu\w+)\)", text):
        names |= {name, name + _SUFFIX[kind]}
    return {n for n in names if not n.endswith("_t")}


def check(paths: list[Path], folder: Path, whole: bool) -> list[str]:
    """What is wrong, one line each. `whole`: the lists are all there are; a name in none of them is an error."""
    hooked = table((folder / "shim.h").read_text())
    known, wrong = decided((folder / "symbols" / "decided.txt").read_text())
    wrong += [f"{name}: hooked, and in decided.txt" for name in sorted(hooked & known)]
    seen: set[str] = set()
    for path in paths:
        if not path.is_file():
            wrong.append(f"{path}: no such file")
            continue
        names = names_of(path)
        seen |= names
        missing = sorted(n for n in names if is_of_interest(n) and n not in hooked and n not in known)
        wrong += [f"{path.name}: {name}: neither hooked nor decided about" for name in missing]
        if not names:
            wrong.append(f"{path.name}: no names")
    if whole:
        wrong += [f"{name}: in no list: misspelt, or a list is missing" for name in sorted((hooked | known) - seen)]
    return wrong


def main() -> int:
    """Exit status 1 when anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--names", action="store_true", help="print the names in headers")
    parser.add_argument("--shim", type=Path, default=HERE, help="where shim.h and symbols/ are")
    arguments = parser.parse_args()
    if arguments.names:
        texts = [path.read_text(errors="replace") for path in arguments.files]
        print("\n".join(sorted(set().union(*map(header_names, texts)))))
        return 0
    lists = sorted(p for p in (arguments.shim / "symbols").glob("*.txt") if p.name != "decided.txt")
    wrong = check(arguments.files or lists, arguments.shim, not arguments.files)
    print("\n".join(wrong) if wrong else "every name is hooked or decided about")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
