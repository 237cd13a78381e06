"""Compiles the kernel's programs here as the loader would on another kernel, for verify_programs.py: to compile takes
an emulated machine minutes, to verify a moment. usage: /usr/bin/python3 compile.py MAJOR.MINOR OUT
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import struct
import sys
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).parent.parent.parent

MAP = ("map_type", "key_size", "value_size", "max_entries", "map_flags")
LOAD_MAP = 0x1018  # BPF_LD | BPF_IMM | BPF_DW, source register BPF_PSEUDO_MAP_FD


def import_loader() -> ModuleType:
    """Import the loader by its file: this interpreter lacks what the package needs."""
    spec = importlib.util.spec_from_file_location("loader", REPOSITORY / "fgpu_ebpf/driver/loader.py")
    assert spec
    assert spec.loader
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    return loader


def main() -> None:
    """Writes {programs: {name: code in hex}, maps: {descriptor in that code: its form}, raw: names}."""
    loader, release = import_loader(), tuple(map(int, sys.argv[1].split(".")))
    loader.kernel_release = lambda: release
    loader.member_offset = lambda *_: 8  # wherever it is there: the verifier does not care
    pins = Path(f"/sys/fs/bpf/fgpu-compile-{os.getpid()}")
    (pins / "maps").mkdir(parents=True)
    try:
        bcc = loader.import_bcc()
        module = loader.compile_programs(bcc, str(REPOSITORY / "bpf"), str(pins / "maps"))
        programs = {name: _code(bcc, module, name) for name in _names(bcc, module)}
        maps = {fd: _form(fd) for code in programs.values() for fd in _maps(code)}
    finally:
        shutil.rmtree(pins)
    hexed = {name: code.hex() for name, code in programs.items()}
    said = {"programs": hexed, "maps": maps, "raw": sorted(loader.RAW_TRACEPOINTS)}
    Path(sys.argv[2]).write_text(json.dumps(said))


def _names(bcc: object, module: object) -> list[str]:
    count = bcc.lib.bpf_num_functions(module.module)
    return [bcc.lib.bpf_function_name(module.module, i).decode() for i in range(count)]


def _code(bcc: object, module: object, name: str) -> bytes:
    start = bcc.lib.bpf_function_start(module.module, name.encode())
    return ctypes.string_at(start, bcc.lib.bpf_function_size(module.module, name.encode()))


def _maps(code: bytes) -> set[int]:
    found = (struct.unpack_from("HhI", code, at) for at in range(0, len(code), 8))
    return {number for operation, _, number in found if operation & 0xF0FF == LOAD_MAP}


def _form(fd: int) -> list[int]:
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    said = dict(line.split(":\t") for line in lines if ":\t" in line)
    return [int(said[name], 0) for name in MAP]


if __name__ == "__main__":
    main()
