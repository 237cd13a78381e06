"""Debian packages for tests: unpacked into a folder of build/ once, and never installed.

A failed download fails the tests with apt's output, and never skips a test. The module imports nothing of fgpu.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SOURCE = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian {} main\n"


def unpacked(root: Path, packages: Sequence[str]) -> Path:
    """Return a root with these packages, and the packages that they need and that this machine lacks."""
    words = ["install", "-y", "--download-only", "--no-install-recommends", "--reinstall", *packages]
    return fetched(root, words, [])


def suite(folder: Path, name: str, *suites: str) -> list[str]:
    """Return options with which apt uses the packages of other Debian suites. Its lists are files of this name."""
    lists = folder / f"lists-{name}"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.list").write_text("".join(SOURCE.format(each) for each in suites))
    apart = {
        "Dir::Etc::sourcelist": folder / f"{name}.list", "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": lists, "Dir::Cache::pkgcache": "", "Dir::Cache::srcpkgcache": "",
        "Acquire::Languages": "none", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
    }  # fmt: skip
    return [f"{key}={to}" for key, to in apart.items()]


def fetched(root: Path, words: list[str], options: list[str]) -> Path:
    """Return a root with the unpacked result of `apt-get WORDS` with these options.

    One process creates it, and others wait for it.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(root.parent / f"{root.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return root if root.exists() else _unpack(root, words, options)


def _unpack(root: Path, words: list[str], options: list[str]) -> Path:
    """Run `apt-get WORDS` with these options. If that fails, fetch the lists of packages again and repeat."""
    aside, archives = root.parent / f".{root.name}", root.parent / f"archives-{root.name}"
    for folder in (aside, archives):
        shutil.rmtree(folder, ignore_errors=True)
    aside.mkdir(parents=True)
    (archives / "partial").mkdir(parents=True)
    options = [*options, f"Dir::Cache::archives={archives}", "APT::Sandbox::User=root"]
    done = _apt(words, options, archives)
    if done.returncode:  # the lists may be old
        _apt(["update"], options, archives)
        done = _apt(words, options, archives)
    assert done.returncode == 0, f"no packages from Debian: {done.stdout[-500:]}{done.stderr[-500:]}"
    for archive in archives.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, aside], check=True, timeout=60)
    shutil.rmtree(archives)
    aside.rename(root)
    return root


def _apt(words: list[str], options: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["apt-get", "-q", *(word for option in options for word in ("-o", option)), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder)
