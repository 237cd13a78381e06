"""What pyproject.toml cannot say: the wheel carries the programs of bpf/ and what `./dev build` made: the shim, and
`fgpu-oci` for container engines.

Its tag says what the shim needs, glibc 2.17 on this processor; Python it does not care about: no module is compiled.
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
    """Compile the C parts, unless `./dev build` has done so. That needs make, a C compiler and NVIDIA's headers."""
    headers = ROOT / "build/headers"
    if not SHIM.exists():
        environment = {**os.environ, "PYTHON": sys.executable}
        subprocess.run(["sh", ROOT / "sim/headers.sh", headers], check=True, env=environment)
        subprocess.run(["make", "-s", "-C", ROOT / "shim", f"OUT={SHIM.parent}", f"HEADERS={headers}"], check=True)
    if not HELPER.exists():
        subprocess.run(["make", "-s", "-C", ROOT / "oci", f"OUT={HELPER.parent}"], check=True)


class BuildWithParts(build_py):
    """Puts bpf/ and the shim into the package's folder; a checkout that is installed editable has them beside it."""

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


class Binary(Distribution):
    """Goes where libraries of this processor go."""

    def has_ext_modules(self) -> bool:
        """Called by setuptools."""
        return True


class PlatformWheel(bdist_wheel):
    """For any Python 3, for this processor."""

    def get_tag(self) -> tuple[str, str, str]:
        """Called by setuptools."""
        return "py3", "none", f"manylinux2014_{platform.machine()}"


setup(
    distclass=Binary,
    cmdclass={"build_py": BuildWithParts, "bdist_wheel": PlatformWheel},
    options={"build": {"build_base": "build/wheel"}},
)
