"""Compile the kernel's programs on this machine for another kernel, for verify_programs.py.

In an emulated machine, a compilation takes minutes, and a verification a moment.

usage: /usr/bin/python3 compile.py MAJOR.MINOR OUT
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).parent.parent.parent


def import_compiler() -> ModuleType:
    """Import the compiler by its file: this interpreter lacks the package's dependencies."""
    spec = importlib.util.spec_from_file_location("compiler", REPOSITORY / "fgpu_ebpf/driver/compiler.py")
    assert spec
    assert spec.loader
    compiler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiler)
    return compiler


def main() -> None:
    """Write the image."""
    compiler, release = import_compiler(), tuple(map(int, sys.argv[1].split(".")))
    compiler.kernel_release = lambda: release
    compiler.member_offset = lambda *_: 8  # any value: the verifier does not check it
    Path(sys.argv[2]).write_text(json.dumps(compiler.whole_image(str(REPOSITORY / "bpf"))))


if __name__ == "__main__":
    main()
