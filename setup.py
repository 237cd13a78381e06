"""Build the wheel with the files that pyproject.toml cannot name: bpf/, the shim, and `fgpu-oci` for container engines.

The wheel's tag names the requirements of the shim: glibc 2.17 (manylinux2014) and this processor. It names any Python
3, because the wheel has no compiled Python module.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHIM = ROOT / "build/shim/libfgpu.so"
HELPER = ROOT / "build/oci/fgpu-oci"


def make_parts() -> None:
    """Compile the C parts, unless `./dev build` has done so. Needs make and a C compiler; fetches NVIDIA's headers."""
    headers = ROOT / "build/headers"
    if not SHIM.exists():
        environment = {**os.environ, "PYTHON": sys.executable}
        subprocess.run(["sh", ROOT / "sim/headers.sh", headers], check=True, env=environment)
        subprocess.run(["make", "-s", "-C", ROOT / "shim", f"OUT={SHIM.parent}", f"HEADERS={headers}"], check=True)
    if not HELPER.exists():
        subprocess.run(["make", "-s", "-C", ROOT / "oci", f"OUT={HELPER.parent}"], check=True)


class BuildWithParts(build_py):
    """Copies bpf/, the shim, fgpu-oci and the scripts for Slurm into the package.

    An editable installation uses those of the checkout.
    """

    def run(self) -> None:
        """Called by setuptools."""
        super().run()
        if self.editable_mode:
            return
        make_parts()
        package = Path(self.build_lib) / "fgpu_ebpf"
        shutil.copytree(ROOT / "bpf", package / "bpf", dirs_exist_ok=True)
        (package / "shim").mkdir(exist_ok=True)
        shutil.copy2(SHIM, package / "shim")
        (package / "oci").mkdir(exist_ok=True)
        shutil.copy2(HELPER, package / "oci")
        shutil.copytree(ROOT / "deploy/slurm", package / "deploy/slurm", dirs_exist_ok=True)


class Binary(Distribution):
    """A distribution for this processor: it is installed in the folder for compiled packages."""

    def has_ext_modules(self) -> bool:
        """Called by setuptools."""
        return True


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3, on this processor."""

    def get_tag(self) -> tuple[str, str, str]:
        """Called by setuptools."""
        return "py3", "none", f"manylinux2014_{platform.machine()}"


setup(
    distclass=Binary,
    cmdclass={"build_py": BuildWithParts, "bdist_wheel": PlatformWheel},
    options={"build": {"build_base": "build/wheel"}},
)
