"""A version of fgpu whose pages have another layout: a copy of the package, of its BPF programs and of its shim."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.host import BUILD, ROOT, SHIM
from tests.support.service import Service

HEADER, MIRROR = ROOT / "bpf/fgpu.h", ROOT / "fgpu_ebpf/abi.py"
LAYOUT = int(re.findall(r"#define FGPU_LAYOUT (\d+)", HEADER.read_text())[0])
PINS = Path("/sys/fs/bpf/fgpu")
PYTHON = ROOT / ".venv/bin/python"


@dataclass
class Version:
    """A version of fgpu: the number of its layout, the command that runs the version, and its shim."""

    layout: int
    command: list[str]
    shim: Path

    def start(self, service: Service, store: Path) -> None:
        """Start the version's agent, with the shim in that store. Return when limits are in force."""
        before, service.command = service.command, self.command
        try:
            service.start_agent(None, "--shim", str(self.shim), "--store", str(store))
        finally:
            service.command = before
        assert os.listdir(PINS) == [f"v{self.layout}"]


def version(work: Path, ahead: int) -> Version:
    """Copy this tree's fgpu to `work`, with the number of the layout raised by `ahead`."""
    site, sources = work / "site", work / "sources"
    shutil.copytree(ROOT / "fgpu_ebpf", site / "fgpu_ebpf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("bpf", "shim"):
        shutil.copytree(ROOT / name, sources / name)
    header, mirror = sources / "bpf/fgpu.h", site / "fgpu_ebpf/abi.py"
    replace(header, f"#define FGPU_LAYOUT {LAYOUT}\n", f"#define FGPU_LAYOUT {LAYOUT + ahead}\n")
    replace(mirror, f"\nLAYOUT = {LAYOUT}\n", f"\nLAYOUT = {LAYOUT + ahead}\n")
    shutil.copytree(sources / "bpf", site / "fgpu_ebpf/bpf")
    shutil.copytree(BUILD / "oci", site / "fgpu_ebpf/oci")
    command = ["env", f"PYTHONPATH={site}", str(PYTHON), "-P", "-m", "fgpu_ebpf.cli"]
    return Version(LAYOUT + ahead, command, shim(sources, ahead))


def shim(sources: Path, ahead: int) -> Path:
    """Build the shim from these sources, and return its path. If `ahead` is 0, return this tree's shim."""
    if not ahead:
        return SHIM
    out = sources.parent / "shim"
    make = ["make", "-s", "-j2", "-C", str(sources / "shim"), f"OUT={out}", f"HEADERS={BUILD}/headers"]
    subprocess.run(make, check=True, capture_output=True, timeout=120)
    return out / "libfgpu.so"


def replace(file: Path, old: str, new: str) -> None:
    """Replace the only occurrence of a text."""
    text = file.read_text()
    assert text.count(old) == 1, (file, old)
    file.write_text(text.replace(old, new))


def change(service: Service, to: Version, store: Path, how: signal.Signals) -> None:
    """End the agent, and start that of another version."""
    service.kill_agent(how)
    to.start(service, store)
