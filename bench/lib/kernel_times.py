"""The times in which a program's kernels ran, by CUPTI: builds bench/programs/lib/kernels.c, and reads its files.

CUPTI's headers and library are those of the packages that torch has installed, or else of the CUDA toolkit, or of
HEADERS (build/headers). TORCH_PYTHON is a Python interpreter with torch.
"""

from __future__ import annotations

import heapq
import os
import re
import subprocess
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.lib.service import ROOT, BenchError

SOURCE, LIBRARY = ROOT / "bench/programs/lib/kernels.c", ROOT / "build/bench/libkernels.so"
TOOLKIT = Path("/usr/local/cuda")
INCLUDES = ("*/include", "include", "extras/CUPTI/include", "targets/*/include")
LIBRARIES = ("*/lib", "extras/CUPTI/lib64", "lib64", "targets/*/lib")
HEADER_WORDS = 4
SHORT_NS = 100_000
NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Ran:
    """The kernels of a program, or of several.

    `seconds`: the time in which at least one ran. `short_pauses`: the seconds of the pauses between them that lasted
    SHORT_NS or less. `kernels`, `missing`: the number of recorded kernels, and of those that CUPTI has not recorded.
    """

    seconds: float
    short_pauses: float
    kernels: int
    missing: int


def build() -> list[str]:
    """Build the library. Return the environment of a program that is to be recorded, as NAME=VALUE.

    The program also needs KERNELS_OUT. Raises BenchError if there is no CUPTI.
    """
    tops = [*_packages(), TOOLKIT, Path(os.environ.get("HEADERS", ROOT / "build/headers"))]
    groups = [[top, *_folders(top, INCLUDES)] for top in tops]
    found = [(folder, group) for group in groups for folder in group if (folder / "cupti_activity.h").exists()]
    if not found:
        raise BenchError(f"absent: no CUPTI: no cupti_activity.h in {', '.join(map(str, tops))}")
    _compile([found[0][0], *found[0][1], *(folder for group in groups for folder in group)])
    folders = [folder for top in tops for folder in _folders(top, LIBRARIES)]
    libraries = [path for folder in folders for path in folder.glob("libcupti.so.1[23]")]
    return [f"CUDA_INJECTION64_PATH={LIBRARY}", *(f"CUPTI={path}" for path in libraries[:1])]


def _compile(folders: list[Path]) -> None:
    """Compile the library with the headers of these folders. The first one has CUPTI's."""
    header = folders[0] / "cupti_activity.h"
    versions = re.findall(r"\bCUpti_ActivityKernel(\d+);", header.read_text(encoding="utf-8", errors="replace"))
    flags = ["-std=gnu11", "-O2", "-g", "-Wall", "-shared", "-fPIC"]
    flags += [f"-DKERNEL=CUpti_ActivityKernel{max(map(int, versions))}", f"-I{SOURCE.parent}"]
    flags += [f"-I{folder}" for folder in folders]
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    command = ["gcc", *flags, "-o", LIBRARY, SOURCE, "-ldl", "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"absent: no CUPTI: {SOURCE.name} does not compile with {header}:\n{done.stderr[:2000]}")


def _packages() -> list[Path]:
    """Return the folder of NVIDIA's packages next to torch, if torch is installed."""
    code = "import importlib.util as u; found = u.find_spec('torch'); print(found.origin if found else '')"
    python = os.environ.get("TORCH_PYTHON", "python3")
    path = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
    return [Path(path).parents[1] / "nvidia"] if path else []


def _folders(top: Path, patterns: Iterable[str]) -> list[Path]:
    return [folder for pattern in patterns for folder in sorted(top.glob(pattern)) if folder.is_dir()]


def ran(files: Iterable[Path]) -> Ran:
    """Return the union of the times of all processes with these files. Raises BenchError if a file is not complete."""
    kernels, missing, intervals = 0, 0, []
    for file in files:
        words = array("Q", file.read_bytes())
        if len(words) < HEADER_WORDS or not words[2]:
            raise BenchError(f"{file.name}: the process did not end by itself, or CUPTI recorded nothing")
        kernels, missing = kernels + words[0], missing + words[1]
        intervals.append(zip(words[HEADER_WORDS::2], words[HEADER_WORDS + 1 :: 2], strict=True))
    total = pauses = until = 0
    for begin, end in heapq.merge(*intervals):
        pauses += begin - until if 0 < begin - until <= SHORT_NS else 0
        total += max(0, end - max(begin, until))
        until = max(until, end)
    return Ran(total / NS, pauses / NS, kernels, missing)
