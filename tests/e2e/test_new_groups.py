"""Four programs start at the moment at which their cgroups get limits. All of them fit, so none is refused."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.commands import fgpu, metrics
from tests.support.host import BUILD, ENVIRONMENT, FGPU, MIB, SHIM, cgroup_root
from tests.support.service import Service
from tests.support.wait import eventually, remove_cgroup

NAME = "fgpu-e2e-new"
POLICIES = f"""
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: outer}}
spec:
  selector: {{cgroup: ["{NAME}/policy-*"]}}
  memory: {{limit: 3GiB}}
---
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: inner}}
spec:
  selector: {{cgroup: ["{NAME}/policy-*/*"]}}
  memory: {{limit: 1GiB}}
"""


@pytest.fixture
def folder(strict: Service) -> Iterator[Path]:
    """Yield a cgroup whose children have limits of 3 GiB each by policy.

    Cgroups inside these children have 1 GiB each.
    """
    file, folder = strict.policies / "new-groups.yaml", cgroup_root() / NAME
    file.write_text(POLICIES)
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 2, 5, "the policies")
    folder.mkdir()
    yield folder
    folder.rmdir()
    file.unlink()
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 0, 5, "no policy")


def start(cgroup: Path) -> subprocess.Popen[str]:
    """Start a program in this cgroup that allocates a context and 100 MiB, and exits."""
    command = ["sh", "-c", f'echo $$ >{cgroup}/cgroup.procs && exec "{BUILD}/e2e/client"']
    environment = {**ENVIRONMENT, "LD_PRELOAD": str(SHIM)}
    pipe = subprocess.PIPE
    program = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
    assert program.stdin
    program.stdin.write(f"context\nalloc {100 * MIB}\n")
    program.stdin.flush()
    return program


def answers(programs: list[subprocess.Popen[str]]) -> list[list[str]]:
    """Return the first word of each line that each program prints, and the lines of its stderr."""
    said = [program.communicate(timeout=60) for program in programs]
    return [[*(line.split()[0] for line in out.splitlines()), *err.splitlines()] for out, err in said]


def remove(*cgroups: Path) -> None:
    for cgroup in cgroups:
        remove_cgroup(cgroup)


def set_limit(path: str, memory: str) -> subprocess.Popen[bytes]:
    """Start `fgpu set` in the background."""
    command = [*FGPU, "set", path, "--memory", memory]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


@pytest.mark.timeout(900)
def test_no_program_that_starts_under_a_new_limit_is_refused(folder: Path, scale: Callable[..., int]) -> None:
    for number, kind in itertools.product(range(scale(3, 15, 200)), ("policy", "hand")):
        group = folder / f"{kind}-{number}"
        members = [group / f"member-{n}" for n in range(4)]
        for member in members:
            member.mkdir(parents=True)
        path = f"/{NAME}/{group.name}"
        setting = []
        if kind == "hand":
            fgpu("set", path, "--memory", "3GiB")
            setting = [set_limit(f"{path}/{member.name}", "1GiB") for member in members[:2]]
            time.sleep(0.03 * (number % 15))  # a limit is in force about 0.2 s later
        said = answers([start(member) for member in members])
        assert [one.wait(30) for one in setting] == [0] * len(setting)
        assert said == [["ready", "ok", "ok"]] * 4, (kind, number)
        remove(*members, group)
