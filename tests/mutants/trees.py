"""Copies of this tree in which tests run as in the tree itself.

A copy has the sources and the built files. Large parts that never change are shared with the tree. The copy is mounted
over the tree in a separate mount namespace, so that every path means the copy: those in .venv, those that tests print,
and the working directory. The tree itself is never written.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.mutants.judge import Outcome

ROOT = Path(__file__).resolve().parents[2]
BUILT = ("bench", "e2e", "examples", "headers", "oci", "shim", "sim")  # in build/; the rest is shared
# The arguments are a copy, the parts that it shares with the tree, `--`, and the command.
ALONE = """
root=$PWD copy=$1
shift
while [ "$1" != -- ]; do
    mount --rbind "$root/$1" "$copy/$1" || exit 99
    shift
done
shift
mount --rbind "$copy" "$root" || exit 99
cd "$root" && mkdir -p /run/fgpu /run/fgpu-sim && mount -t tmpfs tmpfs /run/fgpu &&
    mount -t tmpfs tmpfs /run/fgpu-sim && mount -t bpf bpf /sys/fs/bpf && exec "$@"
exit 99
"""


class Tree:
    """A copy in `copy`, of the current tree, or of another copy."""

    def __init__(self, copy: Path, of: Tree | None = None) -> None:
        self.copy = copy
        self.shared = of.shared if of else _copy(copy)
        if of:
            shutil.copytree(of.copy, copy, symlinks=True)  # with time stamps, which make compares

    def judge(self, *tests: str, once: bool, log: Path) -> Outcome:
        """Return how these tests end in the copy. Their output goes to `log`."""
        judge = [sys.executable, "tests/mutants/judge.py", "once" if once else "retry"]
        return Outcome(self._run(log, *judge, "-q", "-x", "--timeout=120", *tests))

    def build(self, log: Path) -> bool:
        """Compile outdated files. Return whether that succeeds."""
        return self._run(log, "./dev", "build") == 0

    def _run(self, log: Path, *command: str) -> int:
        inside = ["unshare", "--mount", "sh", "-c", ALONE, "sh", str(self.copy), *self.shared, "--"]
        environment = {**os.environ, "FGPU_DEV_ALONE": "1"}
        with log.open("ab") as file:
            done = subprocess.run([*inside, *command], cwd=ROOT, env=environment, stdout=file, stderr=file, check=False)
        return done.returncode


def _copy(copy: Path) -> list[str]:
    """Copy sources and built files. Return the folders to mount instead, by their path in the tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if os.path.lexists(ROOT / name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    shared = [name for name in (".git", ".venv") if (ROOT / name).is_dir()]
    for path in (ROOT / "build").iterdir():
        if path.name in BUILT:
            shutil.copytree(path, copy / "build" / path.name, symlinks=True)
        elif path.is_dir():
            shared.append(f"build/{path.name}")
    for name in shared:
        (copy / name).mkdir(parents=True)
    return shared
