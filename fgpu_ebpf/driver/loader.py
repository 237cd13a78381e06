"""The loader: compiles bpf/fgpu.bpf.c, pins its maps and programs, and exits, which frees BCC's 130 MB.

The agent runs it as a child, `/usr/bin/python3 -I loader.py SOURCES PINS`, under the interpreter that has the
distribution's BCC, so it imports nothing of fgpu. It does not attach the programs. After an error it prints one line
with the fix to stderr and exits with 1; nothing that is pinned in part is used.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

# These read the names of cgroups in the kernel's memory, which lockdown=confidentiality refuses.
OPTIONAL = {"cgroup_attach", "cgroup_made", "cgroup_populated", "cgroup_removed"}
UPROBE_MULTI, MULTI_FROM = 48, (6, 6)  # BPF_TRACE_UPROBE_MULTI: one link for all places of a file
SPARSE_FROM = (6, 1)  # BPF_F_NO_PREALLOC in tracing programs
PEER_PIDFD_FROM = (6, 5)  # sockets report the peer as a pidfd; before that, a pid could be another process's by now
GROUP_DEAD_FROM = (6, 16)  # sched_process_exit reports whether the process ends with its thread
TYPES = "/sys/kernel/btf/vmlinux"
BTF_STRUCT = 4  # BTF_KIND_STRUCT
RAW_TRACEPOINTS = {"process_exit", "process_exec", "program_began", "adjust"} | OPTIONAL
# Half the work for the same programs, by leaving out: debugging information that is never read, a second optimiser
# (BCC runs LLVM's own over clang's result), and reading all kernel symbols for each program that names this helper.
LEAN = ("-g0", "-Xclang", "-disable-llvm-passes", "-Dbpf_probe_read_user=read_user")
_PART = re.compile(r'^#include "(\w+\.bpf\.h)"$', re.MULTILINE)


class LoadError(Exception):
    """An error, with its fix."""


def import_bcc() -> ModuleType:
    """Return the distribution's BCC. The PyPI project of that name is a crystallography lattice. Raises LoadError."""
    try:
        import bcc  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise LoadError(f"{sys.executable} sees no BCC ({error}): apt-get install python3-bpfcc") from error
    if not hasattr(bcc, "BPF"):
        raise LoadError(f"{bcc.__file__} is not BPF's bcc: pip uninstall bcc; apt-get install python3-bpfcc")
    return bcc  # type: ignore[no-any-return,unused-ignore]


def kernel_release() -> tuple[int, int]:
    """Return (major, minor) of the running kernel."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))


def member_offset(bcc: ModuleType, struct: str, member: str) -> int:
    """Return the offset of a member in a struct of the running kernel, in bytes. Raises LoadError: it is unknown."""
    import ctypes

    library = bcc.lib  # finds libbpf's functions too, since it is linked with libbpf
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
    raise LoadError(
        f"this kernel does not say where {struct}.{member} is ({TYPES}): one with CONFIG_DEBUG_INFO_BTF=y is needed"
    )


def kernel_flags(bcc: ModuleType) -> list[str]:
    """Return the compiler flags for what the programs do differently on this kernel."""
    release = kernel_release()
    flags = [f"-DSPARSE={int(release >= SPARSE_FROM)}", f"-DENDS={int(release < PEER_PIDFD_FROM)}"]
    if release < GROUP_DEAD_FROM:
        places = (member_offset(bcc, "task_struct", "signal"), member_offset(bcc, "signal_struct", "live"))
        flags += [f"-DSIGNAL_AT={places[0]}", f"-DLIVE_AT={places[1]}"]
    with contextlib.suppress(LoadError):  # without it, a process made by vfork is charged separately
        flags.append(f"-DMM_AT={member_offset(bcc, 'task_struct', 'mm')}")
    return flags


def whole_text(sources: str) -> str:
    """Return the programs with all included parts: BCC rewrites code in the main file only."""

    def read(name: str) -> str:
        with open(os.path.join(sources, name), encoding="utf-8") as file:
            return f'#line 1 "{name}"\n' + file.read()

    return _PART.sub(lambda part: read(part[1]), read("fgpu.bpf.c"))


def compile_programs(bcc: ModuleType, sources: str, maps: str) -> Any:
    """Compile the programs; maps that are pinned already are used as they are. Raises LoadError."""
    os.environ["BCC_KERNEL_SOURCE"] = sources  # its include/ has the stub headers
    flags = ["-I" + sources, f'-DPINS="{maps}/"', *kernel_flags(bcc), "-Wno-everything", *LEAN]
    try:
        return bcc.BPF(text=whole_text(sources), cflags=flags)
    except Exception as error:  # bcc has no exception class of its own
        raise LoadError(f"BCC cannot compile {sources}/fgpu.bpf.c: {error}") from error


def pin_program(bcc: ModuleType, fd: int, path: str) -> None:
    """Pin a program under another name and rename it, so that the path exists at all times. Raises LoadError."""
    import ctypes

    beside = path + "-new"  # bpffs allows no dot
    if os.path.exists(beside):
        os.unlink(beside)
    if bcc.lib.bpf_obj_pin(fd, ctypes.c_char_p(beside.encode())) != 0:
        why = os.strerror(ctypes.get_errno()) if ctypes.get_errno() else "unknown error"
        raise LoadError(f"cannot pin {path} ({why}): is a bpffs mounted at /sys/fs/bpf?")
    os.rename(beside, path)


def load_program(bcc: ModuleType, module: Any, name: str) -> int:
    """Return a descriptor of the program; -1: this kernel refuses it, and it is optional. Raises LoadError."""
    kind, attach_type = bcc.BPF.KPROBE, UPROBE_MULTI if kernel_release() >= MULTI_FROM else -1
    if name in RAW_TRACEPOINTS:
        kind, attach_type = bcc.BPF.RAW_TRACEPOINT, -1
    try:
        return int(module.load_func(name, kind, attach_type=attach_type).fd)
    except Exception as error:
        if name in OPTIONAL:
            return -1
        release = os.uname().release
        raise LoadError(f"Linux {release} refuses the program {name} ({error}): update the kernel, or fgpu") from error


def load(sources: str, pins: str) -> None:
    """Compile, load and pin all programs under PINS/programs, and their maps under PINS/maps."""
    bcc = import_bcc()
    maps, programs = os.path.join(pins, "maps"), os.path.join(pins, "programs")
    for folder in (maps, programs):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    module = compile_programs(bcc, sources, maps)
    names = [
        bcc.lib.bpf_function_name(module.module, i).decode() for i in range(bcc.lib.bpf_num_functions(module.module))
    ]
    names.sort(key=lambda name: bcc.lib.bpf_function_size(module.module, name.encode()), reverse=True)
    with ThreadPoolExecutor() as threads:  # the kernel verifies in parallel; the longest program goes first
        loaded = threads.map(lambda name: load_program(bcc, module, name), names)
        for name, fd in zip(names, loaded, strict=True):
            if fd >= 0:
                pin_program(bcc, fd, os.path.join(programs, name))


def main() -> int:
    """usage: loader.py SOURCES PINS"""
    if len(sys.argv) != 3:
        print(main.__doc__, file=sys.stderr)
        return 2
    try:
        load(sys.argv[1], sys.argv[2])
    except (LoadError, OSError) as error:
        print(f"fgpu loader: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    CODE = main()
    sys.stderr.flush()
    os._exit(CODE)  # bcc's atexit handler would detach links that are not its own
