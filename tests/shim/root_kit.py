"""A container's root for the tests of standalone mode: no agent, a limit in the image, a folder for the ledger."""

import json
import subprocess
from dataclasses import dataclass
from typing import Any

from tests.shim.shim_kit import DEADLINE, PREAMBLE, SYSTEM_PYTHON, Build

MIB, GIB, OOM = 1 << 20, 1 << 30, 2
TOGETHER = "fgpu: no agent: this container's programs share the image's limit\n"
BY_ITSELF = "fgpu: no agent, no shared file in /run/fgpu: each process has the image's whole limit\n"
ALONE = (
    "unshare",
    "--mount",
    "--ipc",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)  # the processes and mounts of a test end with it
# /run and /etc belong to the container. `py CODE` runs a program with the shim and the fake driver.
ROOT = """
set -eu
mount -t tmpfs -o mode=755 none /run
cp /etc/ld.so.cache /run/.cache
mount -t tmpfs -o mode=755 none /etc
mv /run/.cache /etc/ld.so.cache
mkdir -m 755 /etc/fgpu /etc/lib
cp -r {folder}/libfgpu.so {folder}/driver /etc/lib
cat >/etc/py <<'END'
#!/bin/sh
exec env LD_PRELOAD={preload}/etc/lib/libfgpu.so LD_LIBRARY_PATH=/etc/lib/driver {python} -u -c "$PREAMBLE$1"
END
chmod 755 /etc/py
PATH=/etc:$PATH
"""


@dataclass(frozen=True, slots=True)
class Container:
    """A container. `setup`: shell lines that run in it as root before the programs."""

    build: Build
    setup: str
    preload: str = ""

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a shell script, in which `py CODE` is a program."""
        root = ROOT.format(folder=self.build.folder, preload=self.preload, python=SYSTEM_PYTHON)
        return subprocess.run(
            ["env", f"PREAMBLE={PREAMBLE}", *ALONE, "sh", "-c", root + self.setup + script],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )

    def says(self, script: str) -> list[Any]:
        """Return what the script's programs passed to out()."""
        done = self.run(script)
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def python(self, code: str) -> list[Any]:
        """Return what one program passed to out()."""
        return self.says(f"py '{code}'")


def limit(text: str) -> str:
    """Return the lines that write this limit into the image."""
    return f"printf '%s' '{text}' >/etc/fgpu/limit\n"
