"""Compiles bpf/fgpu.bpf.c and pins its maps and programs; then exits, and its 130 MB with it.

Owns: the only use of BCC. Never: attaches, reads a map, imports anything of fgpu: it runs as
`/usr/bin/python3 -I loader.py SOURCES PINS`, under the interpreter that sees the distribution's BCC.
On failure: one line on stderr that names the mend, exit 1, and nothing half pinned is used.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

# They read the names of cgroups in the kernel's memory, which lockdown=confidentiality refuses.
OPTIONAL = {"cgroup_attach", "cgroup_made", "cgroup_populated", "cgroup_removed"}
UPROBE_MULTI, MULTI_FROM = 48, (6, 6)  # BPF_TRACE_UPROBE_MULTI: one link for all places of a file
SPARSE_FROM = (6, 1)  # BPF_F_NO_PREALLOC in tracing programs
PEER_PIDFD_FROM = (6, 5)  # a socket says by a pidfd who connected: before that, whether a pid was another's since
GROUP_DEAD_FROM = (6, 16)  # sched_process_exit says when a process ends with its thread
TYPES = "/sys/kernel/btf/vmlinux"
BTF_STRUCT = 4  # BTF_KIND_STRUCT
RAW_TRACEPOINTS = {"process_exit", "process_exec", "program_began", "adjust"} | OPTIONAL
# The same programs for half the work: debugging information that nobody reads, a second optimiser (BCC runs LLVM's own
# over whatever clang hands it), and the table of all kernel symbols anew wherever a program names this helper.
LEAN = ("-g0", "-Xclang", "-disable-llvm-passes", "-Dbpf_probe_read_user=read_user")
_PART = re.compile(r'^#include "(\w+\.bpf\.h)"$', re.MULTILINE)


class LoadError(Exception):
    """What went wrong and what mends it."""


def import_bcc() -> ModuleType:
    """The distribution's BCC. The PyPI project of that name is a crystallography lattice."""
    try:
        import bcc  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise LoadError(f"{sys.executable} sees no BCC ({error}): apt-get install python3-bpfcc") from error
    if not hasattr(bcc, "BPF"):
        raise LoadError(f"{bcc.__file__} is not BPF's bcc: pip uninstall bcc; apt-get install python3-bpfcc")
    return bcc  # type: ignore[no-any-return,unused-ignore]


def kernel_release() -> tuple[int, int]:
    """(major, minor) of the running kernel."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))


def member_offset(bcc: ModuleType, struct: str, member: str) -> int:
    """Where a member lies in a struct of the running kernel, in bytes. LoadError: the kernel does not tell."""
    import ctypes

    library = bcc.lib  # finds libbpf's functions too, which it is linked with
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
    """What the programs do otherwise on this kernel."""
    release = kernel_release()
    flags = [f"-DSPARSE={int(release >= SPARSE_FROM)}", f"-DENDS={int(release < PEER_PIDFD_FROM)}"]
    if release < GROUP_DEAD_FROM:
        places = (member_offset(bcc, "task_struct", "signal"), member_offset(bcc, "signal_struct", "live"))
        flags += [f"-DSIGNAL_AT={places[0]}", f"-DLIVE_AT={places[1]}"]
    with contextlib.suppress(LoadError):  # without it, a process made by vfork is charged by itself
        flags.append(f"-DMM_AT={member_offset(bcc, 'task_struct', 'mm')}")
    return flags


def whole_text(sources: str) -> str:
    """The programs with their parts in place: BCC rewrites what stands in the main file alone."""

    def read(name: str) -> str:
        with open(os.path.join(sources, name), encoding="utf-8") as file:
            return f'#line 1 "{name}"\n' + file.read()

    return _PART.sub(lambda part: read(part[1]), read("fgpu.bpf.c"))


def compile_programs(bcc: ModuleType, sources: str, maps: str) -> Any:
    """Compiles; maps that are pinned already are used as they are."""
    os.environ["BCC_KERNEL_SOURCE"] = sources  # its include/ holds the stub headers
    flags = ["-I" + sources, f'-DPINS="{maps}/"', *kernel_flags(bcc), "-Wno-everything", *LEAN]
    try:
        return bcc.BPF(text=whole_text(sources), cflags=flags)
    except Exception as error:  # bcc raises no class of its own
        raise LoadError(f"BCC cannot compile {sources}/fgpu.bpf.c: {error}") from error


def pin_program(bcc: ModuleType, fd: int, path: str) -> None:
    """Pins beside and renames over: there is never a moment without the program."""
    import ctypes

    beside = path + "-new"  # bpffs allows no dot
    if os.path.exists(beside):
        os.unlink(beside)
    if bcc.lib.bpf_obj_pin(fd, ctypes.c_char_p(beside.encode())) != 0:
        why = os.strerror(ctypes.get_errno()) if ctypes.get_errno() else "unknown error"
        raise LoadError(f"cannot pin {path} ({why}): is a bpffs mounted at /sys/fs/bpf?")
    os.rename(beside, path)


def load_program(bcc: ModuleType, module: Any, name: str) -> int:
    """A descriptor of the program; -1: this kernel refuses one that can be done without."""
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
    """Compiles, loads and pins all programs under PINS/programs, their maps under PINS/maps."""
    bcc = import_bcc()
    maps, programs = os.path.join(pins, "maps"), os.path.join(pins, "programs")
    for folder in (maps, programs):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    module = compile_programs(bcc, sources, maps)
    names = [
        bcc.lib.bpf_function_name(module.module, i).decode() for i in range(bcc.lib.bpf_num_functions(module.module))
    ]
    names.sort(key=lambda name: bcc.lib.bpf_function_size(module.module, name.encode()), reverse=True)
    with ThreadPoolExecutor() as threads:  # the kernel verifies each on its own: the longest first, or all wait for it
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
    os._exit(CODE)  # bcc's atexit would detach what it thinks is its own
