"""Tests of `./dev`: a wrong word is refused before any work, and a shell of `./dev sim` prints the commands to try."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "words",
    [
        "package tar",
        "release foo",
        "release --sign /no/key",
        "docs serv",
        "build shim",
        "check sim",
        "setup now",
        "nonsense",
        "test tests",
        "test tests/unit/nope.py",
    ],
)
def test_dev_refuses_a_wrong_word_before_it_builds(words: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "dev", tmp_path)
    done = subprocess.run([tmp_path / "dev", *words.split()], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    refused = "docs takes serve" if words.startswith("docs") else words.split()[-1]
    assert refused in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["dev"]


def function(name: str) -> str:
    """Return the text of one function of `./dev`."""
    found = re.search(rf"^{name}\(\) \{{.*?^\}}$", (ROOT / "dev").read_text(), re.M | re.S)
    assert found
    return found[0]


def driver_with(node: Path) -> str:
    """Return the driver that `./dev` chooses with `node` as nvidiactl."""
    script = f"set -eu\n{function('kind')}\nkind".replace("/dev/nvidiactl", str(node))
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test_the_driver_is_real_only_if_its_node_can_be_opened(tmp_path: Path) -> None:
    node = tmp_path / "nvidiactl"
    assert driver_with(node) == "sim"
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(195, 255))  # as NVIDIA's libcuda makes it where no driver is loaded
    assert driver_with(node) == ("real" if Path("/proc/driver/nvidia/version").exists() else "sim")
    assert driver_with(Path("/dev/null")) == "real"


def greeting(*command: str, agent: str = "") -> str:
    """Return the text that `./dev sim COMMAND` prints before it runs the command."""
    script = f"set -eu; build=/b logs=/logs agent='{agent}'\n{function('greet')}\ngreet {' '.join(command)}"
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stderr


def test_only_an_interactive_shell_in_the_simulator_prints_a_greeting() -> None:
    said = greeting("/usr/bin/bash")
    assert "simulated GPU" in said
    assert "an agent that ran before" in said
    assert "its log is /logs/fgpu-agent" in greeting("bash", agent="4711")
    assert "fgpu run --memory 2GiB --name alice -- nvidia-smi" in said
    assert "/b/examples/fill --hold 60" in said
    assert (greeting("nvidia-smi"), greeting("bash", "-c", "true")) == ("", "")
