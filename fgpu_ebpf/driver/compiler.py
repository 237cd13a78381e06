"""The compiler, which compiles bpf/fgpu.bpf.c, prints programs and maps as JSON, and exits (which frees 180 MB).

Two processes compile half of the programs each, at the same time. The agent runs the compiler as a child process,
`/usr/bin/python3 -I compiler.py SOURCES`, with the interpreter that has the distribution's BCC. Therefore the compiler
imports nothing of fgpu. After an error the compiler prints one line with the fix to stderr and exits with status 1.
driver/image.py parses the output.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import struct
import sys
from types import ModuleType
from typing import Any

SPARSE_FROM = (6, 1)  # BPF_F_NO_PREALLOC in tracing programs
PEER_PIDFD_FROM = (6, 5)  # sockets report the peer as a pidfd; earlier kernels report a pid, which may be reused
GROUP_DEAD_FROM = (6, 16)  # sched_process_exit reports whether the process ends with its thread
TYPES = "/sys/kernel/btf/vmlinux"
BTF_STRUCT = 4  # BTF_KIND_STRUCT
LOAD_MAP = 0x1018  # the first two bytes of an instruction that loads a map by its descriptor
FORM = ("map_type", "key_size", "value_size", "max_entries", "map_flags")  # fields of a map, as in /proc/PID/fdinfo
# These flags halve the work. They leave out three steps: debugging information, which is never read; a second
# optimiser, because BCC runs LLVM's own optimiser over clang's result; and the reading of all kernel symbols for each
# program that names the helper bpf_probe_read_user.
LEAN = ("-g0", "-Xclang", "-disable-llvm-passes", "-Dbpf_probe_read_user=read_user")
_INCLUDED = re.compile(r'^#include "(\w+\.bpf\.h)"$', re.MULTILINE)
_PROGRAM = re.compile(r"^int \w+\((struct \w+)", re.MULTILINE)
_OF_UPROBES = "struct pt_regs"  # the type of the argument of half of the code
_PR_SET_PDEATHSIG = 1


class CompileError(Exception):
    """The programs cannot be compiled. The text has the reason and, if known, the fix."""


def import_bcc() -> ModuleType:
    """Return the distribution's BCC. PyPI's project `bcc` is another program.

    Raise CompileError on failure.
    """
    try:
        import bcc  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise CompileError(f"{sys.executable} cannot import BCC ({error}): apt-get install python3-bpfcc") from error
    if not hasattr(bcc, "BPF"):
        fix = "pip uninstall bcc; apt-get install python3-bpfcc"
        raise CompileError(f"{bcc.__file__} is not the BPF Compiler Collection: {fix}")
    return bcc  # type: ignore[no-any-return,unused-ignore]


def kernel_release() -> tuple[int, int]:
    """Return (major, minor) of the running kernel."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))


def member_offset(bcc: ModuleType, struct: str, member: str) -> int:
    """Return the offset in bytes of a member in a kernel's struct. Raise CompileError if the offset is unknown."""
    library = bcc.lib  # BCC's library also has libbpf's functions, because it is linked with libbpf
    library.btf__load_vmlinux_btf.restype = library.btf__type_by_id.restype = ctypes.c_void_p
    library.btf__name_by_offset.restype = ctypes.c_char_p
    types = ctypes.c_void_p(library.btf__load_vmlinux_btf() if os.path.exists(TYPES) else None)
    number = library.btf__find_by_name_kind(types, struct.encode(), BTF_STRUCT) if types else -1
    if number > 0:
        at = library.btf__type_by_id(types, number)
        _, info, _ = (ctypes.c_uint32 * 3).from_address(at)
        for i in range(info & 0xFFFF):
            name, _, bits = (ctypes.c_uint32 * 3).from_address(at + 12 * (i + 1))
            if library.btf__name_by_offset(types, name) == member.encode():
                return (bits & 0xFFFFFF) // 8
    raise CompileError(
        f"the kernel's BTF ({TYPES}) lacks the offset of {struct}.{member}: use a kernel with CONFIG_DEBUG_INFO_BTF=y"
    )


def kernel_flags(bcc: ModuleType) -> list[str]:
    """Return the compiler flags that adapt the programs to this kernel. Raise CompileError on failure."""
    release = kernel_release()
    flags = [f"-DSPARSE={int(release >= SPARSE_FROM)}", f"-DENDS={int(release < PEER_PIDFD_FROM)}"]
    if release < GROUP_DEAD_FROM:
        places = (member_offset(bcc, "task_struct", "signal"), member_offset(bcc, "signal_struct", "live"))
        flags += [f"-DSIGNAL_AT={places[0]}", f"-DLIVE_AT={places[1]}"]
    with contextlib.suppress(CompileError):  # without this flag, a child of vfork() is charged separately
        flags.append(f"-DMM_AT={member_offset(bcc, 'task_struct', 'mm')}")
    return flags


def whole_text(sources: str, of_uprobes: bool) -> str:
    """Return the source with all included files in one text, because BCC rewrites only code in the main file.

    The programs of uprobes, or all other programs, are static functions, which are not compiled because no function
    calls them.
    """

    def read(name: str) -> str:
        with open(os.path.join(sources, name), encoding="utf-8") as file:
            return f'#line 1 "{name}"\n' + file.read()

    def program(found: re.Match[str]) -> str:
        return found[0] if (found[1] == _OF_UPROBES) is of_uprobes else f"static {found[0]}"

    return _PROGRAM.sub(program, _INCLUDED.sub(lambda found: read(found[1]), read("fgpu.bpf.c")))


def compile_programs(bcc: ModuleType, sources: str, of_uprobes: bool) -> Any:
    """Return BCC's module of half of the programs. Its maps exist until this process exits.

    Raise CompileError on failure.
    """
    os.environ["BCC_KERNEL_SOURCE"] = sources  # SOURCES/include has the stub headers
    flags = ["-I" + sources, *kernel_flags(bcc), "-Wno-everything", *LEAN]
    try:
        return bcc.BPF(text=whole_text(sources, of_uprobes), cflags=flags)
    except Exception as error:  # bcc has no exception class of its own
        raise CompileError(f"BCC cannot compile {sources}/fgpu.bpf.c: {error}") from error


def form(fd: int) -> list[int]:
    """Return the fields of FORM for an open map."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        found = dict(line.split(":") for line in file)
    return [int(found[name], 0) for name in FORM]


def image(bcc: ModuleType, module: Any) -> dict[str, Any]:
    """Return the maps by name (FORM) and the programs by name: instructions in hex, which contain positions of maps."""
    library, handle = bcc.lib, module.module
    library.bpf_table_name.restype = ctypes.c_char_p
    library.bpf_table_name.argtypes = library.bpf_table_fd_id.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    names = [library.bpf_table_name(handle, i).decode() for i in range(library.bpf_num_tables(handle))]
    descriptors = [library.bpf_table_fd_id(handle, i) for i in range(len(names))]
    programs = {}
    for i in range(library.bpf_num_functions(handle)):
        name = library.bpf_function_name(handle, i)
        start, size = library.bpf_function_start(handle, name), library.bpf_function_size(handle, name)
        code = bytearray(ctypes.string_at(start, size))
        for at in range(0, size, 8):
            operation, _, value = struct.unpack_from("<HhI", code, at)
            if operation & 0xF0FF == LOAD_MAP:
                struct.pack_into("<I", code, at + 4, descriptors.index(value))
        programs[name.decode()] = code.hex()
    return {"maps": {name: form(fd) for name, fd in zip(names, descriptors, strict=True)}, "programs": programs}


def half(sources: str, of_uprobes: bool) -> dict[str, Any]:
    """Return the image with half of the programs. Raise CompileError on failure."""
    bcc = import_bcc()
    return image(bcc, compile_programs(bcc, sources, of_uprobes))


def other_half(sources: str, parent: int, writing: int) -> None:
    """Write the image with the programs that are not of uprobes, or the text of the error. The child runs this."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the agent may kill the parent
    if os.getppid() != parent:
        return
    said: dict[str, Any] | str
    try:
        said = half(sources, of_uprobes=False)
    except (CompileError, OSError) as error:
        said = str(error)
    with open(writing, "w", encoding="ascii") as file:
        json.dump(said, file)


def whole_image(sources: str) -> dict[str, Any]:
    """Return the image with all programs. Raise CompileError or OSError on failure."""
    reading, writing = os.pipe()
    parent = os.getpid()
    if not os.fork():
        try:
            other_half(sources, parent, writing)
        finally:
            os._exit(0)  # skips bcc's atexit handler, because nothing is attached and the kernel frees the maps
    os.close(writing)
    with open(reading, encoding="ascii") as file:
        mine, text = half(sources, of_uprobes=True), file.read()
    try:
        other = json.loads(text)
    except ValueError:
        raise CompileError("a process of the compiler has ended early") from None
    if isinstance(other, str):
        raise CompileError(other)
    if other["maps"] != mine["maps"]:
        raise CompileError("the halves of the programs have different maps")
    return {"maps": mine["maps"], "programs": mine["programs"] | other["programs"]}


def main() -> int:
    """usage: compiler.py SOURCES"""
    if len(sys.argv) != 2:
        print(main.__doc__, file=sys.stderr)
        return 2
    try:
        print(json.dumps(whole_image(sys.argv[1])))
    except (CompileError, OSError) as error:
        print(f"fgpu compiler: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    CODE = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(CODE)  # as in the child
