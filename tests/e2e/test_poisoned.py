"""An agent is started with a hostile environment and working folder. No program that it starts inherits them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.host import CONTEXT, FGPU, MIB, REFUSED, SERVICE_ENVIRONMENT
from tests.support.service import Service
from tests.support.wait import eventually

MARK = """
import os, sys
if "agent" not in open("/proc/self/cmdline").read().split("\\0"):
    open({folder!r} + "/mark." + {name!r}, "a").close()
"""


def poison(folder: Path) -> list[str]:
    """Return an env(1) command that poisons a program's environment.

    It preloads a library, and puts modules with the names of fgpu's imports into PYTHONPATH and the working directory.
    """
    library = folder / "evil.so"
    source = Path(__file__).with_name("libraries") / "evil.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=60)
    here = folder / "here"
    for name in ("sitecustomize.py", "usercustomize.py", "bcc.py", "pynvml.py", "fgpu_ebpf/__init__.py"):
        for where in (folder / "path", here):
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_text(MARK.format(folder=str(folder), name=name.replace("/", ".")))
    (folder / "path/fgpu_ebpf/__init__.py").unlink()
    (folder / "path/fgpu_ebpf").rmdir()
    (folder / "path/pynvml.py").unlink()  # the agent's own pynvml: the user that starts the agent may choose it
    variables = {"LD_PRELOAD": library, "PYTHONPATH": folder / "path", "PYTHONSTARTUP": here / "bcc.py"}
    variables |= {"PYTHONINSPECT": "", "PYTHONBREAKPOINT": "bcc.breakpoint", "LD_AUDIT": library}
    return ["env", f"--chdir={here}", *(f"{name}={value}" for name, value in variables.items())]


@pytest.fixture
def poisoned(service: Service, unharmed: None, tmp_path: Path) -> Iterator[Path]:
    """Run the agent in such an environment, and afterwards in the usual one."""
    service.detach()  # otherwise the BPF programs would be loaded already, and the agent would start no compiler
    service.command = [*poison(tmp_path), *FGPU]
    service.start_agent()
    yield tmp_path
    service.command = FGPU
    service.detach()
    service.start_agent()


@pytest.mark.places("host")
def test_programs_that_the_agent_starts_inherit_no_hostile_environment(
    poisoned: Path, service: Service, tenant
) -> None:
    one = tenant(CONTEXT + 20 * MIB)
    client = one.client()
    client.ok("context")
    assert client.do(f"alloc {40 * MIB}") == REFUSED
    service.kill_gatekeeper()
    (keeper,) = eventually(service.gatekeepers, 5, "another gatekeeper")
    environment = Path(f"/proc/{keeper}/environ").read_bytes()
    assert str(poisoned).encode() not in environment
    told = environment.replace(b"\0", b":")  # the C library splits it in place, with zero bytes
    assert all(f"{name}={value}:".encode() in told for name, value in SERVICE_ENVIRONMENT.items())
    marks = [path for path in poisoned.iterdir() if "mark" in path.name]
    assert [(path.name, path.read_bytes()) for path in marks] == []
