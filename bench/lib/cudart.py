"""Print the path of the CUDA runtime's library, for programs that load it by name.

It must run with the Python interpreter whose packages are searched. It does not load the library. If there is none, it
prints an empty line.
"""

from __future__ import annotations

import glob
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__)


def candidates() -> list[str]:
    """Return the paths of every libcudart.so.N of the CUDA toolkit and of Python packages, the newest version first."""
    folders = ["/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*/lib", *(f"{f}/nvidia/*/lib" for f in sys.path)]
    found = [path for folder in folders for path in glob.glob(f"{folder}/libcudart.so.*")]
    return sorted(found, key=_version, reverse=True)


def _version(path: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", path.rpartition(".so.")[2])]


def libcudart(python: str, driver_root: str) -> str | None:
    """Return the path that `python` prints with this file; None: there is no library, or the driver is simulated."""
    if driver_root != "/":
        return None
    done = subprocess.run([python, str(HERE)], capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() or None


if __name__ == "__main__":
    print(next(iter(candidates()), ""))
