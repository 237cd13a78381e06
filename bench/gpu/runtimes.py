"""The claim `runtimes`: nvidia-smi and every installed CUDA runtime show the limit, in tenants of several sizes.

$CUDARTS has further folders to search for runtimes, separated by colons, such as `nvidia/cuda_runtime/lib` of a wheel.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
from pathlib import Path

from bench.gpu.claims import PYTHON, Skip, need, say
from tests.support.host import GIB, MIB
from tests.support.place import Place
from tests.support.service import Service
from tests.support.tenant import Tenant

SIZES = (2 * GIB, 4 * GIB, 8 * GIB, 12 * GIB, 3 * GIB // 2)
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
RUNTIME = """
import ctypes, os, sys
runtime = ctypes.CDLL(sys.argv[1])
version, free, total, at = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_void_p()
assert not runtime.cudaRuntimeGetVersion(ctypes.byref(version))
assert not runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
took = [runtime.cudaMalloc(ctypes.byref(at), ctypes.c_size_t(size)) for size in (free.value // 2, free.value)]
print(version.value, total.value, *took)
"""
TORCH = "import torch; print(torch.cuda.mem_get_info()[1])"
NUMBA = "from numba import cuda; print(cuda.current_context().get_memory_info()[1])"


def installed() -> list[str]:
    """Return the paths of all installed files of libcudart, without duplicates."""
    said = subprocess.run(
        [PYTHON, str(Path(__file__).parents[1] / "lib/cudart.py")], capture_output=True, text=True, check=True
    )
    found = [said.stdout.strip(), *glob.glob("/usr/local/cuda*/lib64/libcudart.so.*")]
    for folder in filter(None, os.environ.get("CUDARTS", "").split(":")):
        found += glob.glob(f"{folder}/**/libcudart.so.*", recursive=True)
    return sorted({os.path.realpath(path): path for path in found if path}.values())


def _shows(one: Tenant, limit: int, name: str, module: str, program: str) -> None:
    if subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True, timeout=120, check=False).returncode:
        say(name, "absent")
        return
    (one.folder / f"shows_{name}.py").write_text(program)
    said = one.run(f"{PYTHON} shows_{name}.py", 120).split()
    need(said == [str(limit)], f"{name} shows {limit // MIB} MiB: {said}")


def _checks(one: Tenant, limit: int, runtimes: list[str]) -> None:
    table = one.run("nvidia-smi")
    need(re.findall(r"MiB / +(\d+)MiB", table) == [str(limit // MIB)], f"nvidia-smi shows {limit // MIB} MiB")
    (one.folder / "runtime.py").write_text(RUNTIME)
    for path in runtimes:
        said = [int(word) for word in one.run(f"{shutil.which('python3')} runtime.py {path}", 60).split()]
        need(said[1:] == [limit, 0, OUT_OF_MEMORY], f"{Path(path).name}: version, total, two results: {said}")
    _shows(one, limit, "torch", "torch", TORCH)
    _shows(one, limit, "numba", "numba.cuda", NUMBA)


def runtimes(service: Service, place: Place) -> None:
    """Check a limit of every size with nvidia-smi, each runtime, torch and numba, in a tenant with a pid namespace."""
    found = installed()
    if not found:
        raise Skip("no libcudart here")
    for limit in SIZES:
        one = place.tenant(limit)
        _checks(one, limit, found)
        place.end(one)
