#!/usr/bin/env python3
"""Find driver functions without a decision: functions that allocate, launch, create a context or show memory.

Every such name must be in core/hook_table.h or, with a reason, in symbols/decided.txt. The names are found by patterns,
which match too many names rather than too few. In NVML's header, a function also counts if it writes a struct that
names a process or an amount of memory. The lists contain names from headers (which programs are written with), from
libraries (their exports) and from cuGetProcAddress. The program only reads files, except with --lookup. It prints each
name without a decision, and then exits with 1.

usage: check_hooks.py [FILE…]         libraries, nvml.h or lists of names; without any, all lists in symbols/
       check_hooks.py --names FILE…   prints the names that cuda.h, cudaGL.h, nvml.h… declare or libraries export
       check_hooks.py --lookup FILE   loads a libcuda (it needs no GPU) and prints each name that its cuGetProcAddress
                                      accepts, then the exports that it returns for all versions and kinds of stream
"""

from __future__ import annotations

import argparse
import ctypes
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
NVML = re.compile(
    r"^nvml.*(Memory|MemInfo|MemSize|Process|Accounting|BAR1|Utilization|Limits|Init|Sessions|EncoderStats|FBCStats|"
    r"FbUsage|FbReservation|Framebuffer|ExportTable|Samples?(Get|_|$)|FieldValues|Attributes|MetricsGet|ContextData|ActiveVgpus)"
)
_SHOWS = re.compile(r"(?i)pid|process|used|memory|\bfb|framebuffer|session")
_SUFFIX = {"PTDS": "_ptds", "PTSZ": "_ptsz"}


def table(text: str) -> set[str]:
    """Return the names that hook_table.h hooks."""
    return set(re.findall(r"\bHOOK\((\w+)\)", text))


def decided(text: str) -> tuple[set[str], list[str]]:
    """Parse lines `name name: reason`. Return the names, and the errors of the file."""
    names: set[str] = set()
    wrong = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        before, colon, reason = line.partition(":")
        if not colon or len(reason.split()) < 2:
            wrong.append(f"decided.txt:{number}: no reason")
        wrong += [f"decided.txt:{number}: {n} is listed twice" for n in before.split() if n in names]
        names.update(before.split())
    return names, wrong


def is_of_interest(name: str) -> bool:
    """Return whether a name needs a decision."""
    return bool(CUDA.search(name) or NVML.search(name))


def revealing(text: str) -> set[str]:
    """Return the functions of nvml.h whose parameters, or their types, are named after processes or memory."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
    shows: set[str] = set()

    def tells(declaration: str) -> bool:
        return any(word in shows or _SHOWS.search(word) for word in re.findall(r"\w+", declaration))

    typedef = r"typedef\s+(?:struct\s*\w*\s*\{(.*?)\}|(\w+))\s*(\w+)\s*;"
    for body, other, name in re.findall(typedef, text, re.DOTALL):
        if tells(body) or other in shows:
            shows.add(name)
    functions = re.findall(r"nvmlReturn_t\s+DECLDIR\s+(nvml\w+)\s*\((.*?)\)\s*;", text, re.DOTALL)
    return {name for name, parameters in functions if tells(parameters)}


def exports(data: bytes) -> set[str]:
    """Return the defined dynamic symbols of a 64-bit little-endian ELF file."""
    sections, size, count = struct.unpack_from("<Q", data, 0x28)[0], *struct.unpack_from("<HH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, sections + i * size) for i in range(count)]
    found = set()
    for header in headers:
        if header[1] != 11:  # SHT_DYNSYM
            continue
        text = headers[header[6]][4]
        for at in range(header[4], header[4] + header[5], 24):
            name, _, _, section = struct.unpack_from("<IBBH", data, at)
            if section and name:
                found.add(data[text + name : data.index(b"\0", text + name)].decode())
    return found


def names_of(path: Path) -> set[str]:
    """Return the names that a library exports, a header declares or a list has."""
    data = path.read_bytes()
    if data[:4] == b"\x7fELF":
        return exports(data)
    if path.suffix == ".h":
        return header_names(data.decode(errors="replace"))
    return {word for words in listed(data.decode()) for word in words}


def listed(text: str) -> list[list[str]]:
    """Return the names on each line of a list."""
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return [words for line in lines if (words := re.findall(r"\b(?:cu|nvml)\w+", line))]


def unlike(text: str, hooked: set[str]) -> list[str]:
    """Return a line for each hooked function that cuGetProcAddress returns for a name of another form.

    lookup.c replaces a function by its hook only if the name of the function is the requested name or a version of it.
    """
    pairs = [(words[0], given) for words in listed(text) for given in words[1:]]
    returned = [(asked, given) for asked, given in pairs if given in hooked and not is_form(asked, given)]
    return [f"cuGetProcAddress returns {given} for {asked}" for asked, given in returned]


def is_form(asked: str, given: str) -> bool:
    """Return whether `given` is `asked`, or a version of it."""
    return given == asked or given.startswith(asked + "_")


def answers(library: Path) -> dict[str, set[str]]:
    """Return each name that the cuGetProcAddress of a libcuda accepts, with the exports that it returns.

    Every version and both kinds of default stream are requested. An address that is not an export has the name
    "nowhere". Raises OSError if the library cannot be loaded.
    """
    data = library.read_bytes()
    cuda = ctypes.CDLL(str(library.resolve()))
    newest, found = ctypes.c_int(), ctypes.c_void_p()
    cuda.cuDriverGetVersion(ctypes.byref(newest))
    lookup = cuda.cuGetProcAddress
    lookup.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64)
    place = {ctypes.cast(getattr(cuda, name), ctypes.c_void_p).value: name for name in exports(data)}
    known: dict[str, set[str]] = {}
    for name in sorted(set(re.findall(rb"\0(cu[A-Z]\w+)(?=\0)", data))):
        for version in range(2000, newest.value + 1, 10):
            for flags in (1, 2):
                if lookup(name, ctypes.byref(found), version, flags) == 0 and found.value:
                    known.setdefault(name.decode(), set()).add(place.get(found.value, "nowhere"))
    return known


def of_interest(path: Path, names: set[str]) -> set[str]:
    """Return the names that need a decision; of a header, also its functions that show processes or memory."""
    told = revealing(path.read_text(errors="replace")) if path.suffix == ".h" else set()
    return {name for name in names if is_of_interest(name)} | told


def header_names(text: str) -> set[str]:
    """Return each exported name that a header of the driver declares, or derives from another name by a macro."""
    names = set(re.findall(r"(?:CUresult|nvmlReturn_t)\s+(?:CUDAAPI\s+|DECLDIR\s+)?((?:cu|nvml)[A-Z]\w+)\s*\(", text))
    names |= set(re.findall(r"#\s*define\s+(?:cu|nvml)[A-Z]\w+\s+((?:cu|nvml)[A-Z]\w+)\s*$", text, re.M))
    for kind, name in re.findall(r"#\s*define\s+cu\w+\s+__CUDA_API_(PTDS|PTSZ)\((cu\w+)\)", text):
        names |= {name, name + _SUFFIX[kind]}
    return {n for n in names if not n.endswith("_t")}


def check(paths: list[Path], folder: Path, whole: bool) -> list[str]:
    """Return a line for each error. `whole`: the lists are complete, so a name in none of them is an error."""
    hooked = table((folder / "core" / "hook_table.h").read_text())
    known, wrong = decided((folder / "symbols" / "decided.txt").read_text())
    wrong += [f"{name}: hooked, and in decided.txt" for name in sorted(hooked & known)]
    seen: set[str] = set()
    for path in paths:
        if not path.is_file():
            wrong.append(f"{path}: no such file")
            continue
        names = names_of(path)
        seen |= names
        missing = sorted(of_interest(path, names) - hooked - known)
        wrong += [f"{path.name}: {name}: neither hooked nor decided about" for name in missing]
        if path.suffix == ".txt":
            wrong += [f"{path.name}: {what}" for what in unlike(path.read_text(), hooked)]
        if not names:
            wrong.append(f"{path.name}: no names")
    if whole:
        wrong += [f"{name}: in no list: misspelt, or a list is missing" for name in sorted((hooked | known) - seen)]
    return wrong


def main() -> int:
    """Run the command; return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--names", action="store_true", help="print the names in headers and libraries")
    parser.add_argument("--lookup", action="store_true", help="print the names that cuGetProcAddress accepts")
    parser.add_argument("--shim", type=Path, default=HERE, help="the folder of core/hook_table.h and symbols/")
    arguments = parser.parse_args()
    if arguments.names:
        print("\n".join(sorted(set().union(*map(names_of, arguments.files)))))
        return 0
    if arguments.lookup:
        for library in arguments.files:
            print("\n".join(" ".join([asked, *sorted(given)]) for asked, given in answers(library).items()))
        return 0
    lists = sorted(p for p in (arguments.shim / "symbols").glob("*.txt") if p.name != "decided.txt")
    wrong = check(arguments.files or lists, arguments.shim, not arguments.files)
    print("\n".join(wrong) if wrong else "every name is hooked or decided about")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
