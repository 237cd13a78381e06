"""What pyproject.toml cannot say: the wheel carries the programs of bpf/ and what `./dev build` made: the shim, and
`fgpu-oci` for container engines.

Its tag says what the shim needs, glibc 2.17 on this processor; Python it does not care about: no module is compiled.
"""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHIM = ROOT / "build/shim/libfgpu.so"
HELPER = ROOT / "build/oci/fgpu-oci"


class BuildWithParts(build_py):
    """Puts bpf/ and the shim into the package's folder; a checkout that is installed editable has them beside it."""

    def run(self) -> None:
        """Called by setuptools."""
        super().run()
        if self.editable_mode:
            return
        for made in (SHIM, HELPER):
            if not made.exists():
                raise SystemExit(f"{made} is not there: ./dev build makes it, ./dev package wheel does all")
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
