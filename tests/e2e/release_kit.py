"""Older versions of fgpu, from the history of this repository."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.e2e.layout_kit import LAYOUT, PYTHON, Version
from tests.support.host import BUILD, FGPU, ROOT, SHIM

RELEASES = BUILD / "releases"
FOLDERS = ("fgpu_ebpf", "bpf", "shim", "oci")
BUILT = ("shim", "oci")
GIT = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]  # the tests may run as another user than the repository's
THIS = Version(LAYOUT, FGPU, SHIM)


def release(commit: str) -> Version:
    """Return the version of a commit, which is built once into build/releases. Skips the test if there is no such
    commit here.
    """
    site = RELEASES / commit
    if not site.is_dir():
        _build(commit, site)
    command = ["env", f"PYTHONPATH={site}", str(PYTHON), "-P", "-m", "fgpu_ebpf.cli"]
    return Version(LAYOUT, command, site / "build/shim/libfgpu.so")


def _build(commit: str, site: Path) -> None:
    if subprocess.run([*GIT, "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True, check=False).returncode:
        pytest.skip(f"commit {commit} is not in this repository: it is no clone, or a shallow one")
    RELEASES.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=RELEASES))  # another process may build the same version
    made.chmod(0o755)
    archive = subprocess.run([*GIT, "archive", commit, *FOLDERS], capture_output=True, check=True, timeout=60).stdout
    subprocess.run(["tar", "-x", "-C", made], input=archive, check=True, timeout=60)
    for part in BUILT:
        make = ["make", "-s", "-j2", "-C", made / part, f"OUT={made}/build/{part}", f"HEADERS={BUILD}/headers"]
        subprocess.run(make, check=True, capture_output=True, timeout=120)
    try:
        made.rename(site)
    except OSError:
        shutil.rmtree(made)
        assert site.is_dir()
