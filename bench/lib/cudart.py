"""Print the path of the CUDA runtime's library, for programs that load it by name.

Run it with the interpreter whose packages are searched. It never loads the library, and prints an empty line if there
is none.
"""

from __future__ import annotations

import glob
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__)


def candidates() -> list[str]:
    """Return every libcudart.so.N of the toolkit and of Python packages, the newest first."""
    folders = ["/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*/lib", *(f"{f}/nvidia/*/lib" for f in sys.path)]
    found = [path for folder in folders for path in glob.glob(f"{folder}/libcudart.so.*")]
    return sorted(found, key=_version, reverse=True)


def _version(path: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", path.rpartition(".so.")[2])]


def libcudart(python: str, driver_root: str) -> str | None:
    """Return the library that this interpreter finds; None: there is none, or the driver is a simulated one."""
    if driver_root != "/":
        return None
    done = subprocess.run([python, str(HERE)], capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() or None


if __name__ == "__main__":
    print(next(iter(candidates()), ""))
