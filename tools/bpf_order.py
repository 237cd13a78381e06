#!/usr/bin/env python3
"""Check that the headers of the BPF programs build on one another in one direction.

It runs on its own and in tests/unit/test_bpf_order.py. It reads the sources only, and imports nothing of fgpu.

    tools/bpf_order.py [FOLDER]

FOLDER is bpf/ of the repository by default. `fgpu.bpf.c` must include each part exactly once, and so defines the order
of the parts. A part may call its own functions and functions of earlier parts. It must define every function that it
declares. The program prints each exception. The exit status is 0 without exceptions, 1 with exceptions, and 2 if FOLDER
has no `fgpu.bpf.c`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

MAIN = "fgpu.bpf.c"
_INCLUDE = re.compile(r'^#include "(\w+\.bpf\.h)"$', re.MULTILINE)
_NO_CODE = re.compile(r'/\*.*?\*/|"(?:\\.|[^"\\])*"', re.DOTALL)
_FUNCTION = re.compile(r"^(?:static\s+)?(?:struct\s+)?\w+[\s*]+(\w+)\([^;{}()]*\)\s*([;{])", re.MULTILINE)
_CALL = re.compile(r"(?<![.\w])(\w+)\(")


def code(path: Path) -> str:
    """Return the text of a file without comments and strings."""
    return _NO_CODE.sub("", path.read_text(encoding="utf-8"))


def parts(folder: Path) -> list[str]:
    """Return the names of the headers that the main file includes, in order."""
    return _INCLUDE.findall((folder / MAIN).read_text(encoding="utf-8"))


def exceptions(folder: Path) -> Iterator[str]:
    """Yield a line for each violation.

    Violations are a declaration without a body, a call of a function of a later part, and a part that is not included
    exactly once.
    """
    order = parts(folder)
    texts = {name: code(folder / name) for name in order}
    functions = {name: _FUNCTION.findall(text) for name, text in texts.items()}
    home = {function: name for name in order for function, ends in functions[name] if ends == "{"}
    for number, name in enumerate(order):
        for function in sorted({function for function, ends in functions[name] if ends == ";"}):
            yield f"{name}: {function} is declared, not defined"
        for function in sorted(set(_CALL.findall(texts[name])) & home.keys()):
            if order.index(home[function]) > number:
                yield f"{name} calls {function} of {home[function]}, which comes later"
    for path in sorted(folder.glob("*.bpf.h")):
        if order.count(path.name) != 1:
            yield f"{path.name}: {MAIN} includes it {order.count(path.name)} times"


def main(arguments: list[str]) -> int:
    """Check one folder and return the exit status."""
    folder = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent / "bpf"
    try:
        found = list(exceptions(folder))
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    for line in found:
        print(line)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
