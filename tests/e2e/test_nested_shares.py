"""T47: a tenant that makes cgroups of its own below one that has a share of a device's time gets no more for it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import ENVIRONMENT, SHIM, Cgroups, Service, cgroup_root, eventually, metrics
from test_compute import Spin, spin, start, together  # noqa: F401 - fixtures

pytestmark = pytest.mark.timed
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: nested}}
spec:
  selector: {{cgroup: ["{group}/own", "{group}/own/*"]}}
  memory: {{limit: 4GiB}}
  compute: {{{compute}}}
"""
Nested = Callable[[str, int], list["Inside"]]


class Inside(Spin):
    """A running spin in a cgroup that its tenant has made, or in one without a policy."""

    def __init__(self, program: Path, cgroup: Path) -> None:
        cgroup.mkdir(parents=True)
        command = ["sh", "-c", f'echo $$ >{cgroup}/cgroup.procs; exec "$@"', "sh", program, "200", "burst"]
        pipe, environment = subprocess.PIPE, {**ENVIRONMENT, "LD_PRELOAD": str(SHIM)}
        self.name, self._cgroup = cgroup.name, cgroup
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1, env=environment)
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"

    def close(self) -> None:
        super().close()
        eventually(lambda: not (self._cgroup / "cgroup.procs").read_text(), 5, "its end")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Cgroups]:
    found = Cgroups(tmp_path)
    yield found
    found.close()


@pytest.fixture
def nested(service: Service, unharmed: None, group: Cgroups, spin: Path) -> Iterator[Nested]:  # noqa: F811
    """nested(compute, N): so many programs of one tenant with that share, each in a cgroup that it has made."""
    root, file = cgroup_root() / group.group.lstrip("/"), service.policies / "nested.yaml"
    made: list[Inside] = []

    def make(compute: str, number: int) -> list[Inside]:
        file.write_text(POLICY.format(group=group.group.lstrip("/"), compute=compute))
        eventually(lambda: metrics()["fgpu_policies", frozenset()] == 1, 5, "the policy")
        made.extend(Inside(spin, root / f"own/{one}") for one in range(number))
        assert all(one.compute() for one in made), "each has a share of its own"
        return made

    yield make
    for one in made:
        one.close()
    file.unlink()
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 0, 5, "no policy")


def test_three_cgroups_have_the_ceiling_of_one(nested: Nested, group: Cgroups, spin: Path) -> None:  # noqa: F811
    free = Inside(spin, cgroup_root() / group.group.lstrip("/") / "free")
    (most,) = together(free)
    free.close()
    assert sum(together(*nested("limit: 25%", 3))) / most == pytest.approx(0.25, abs=0.06)


def test_three_cgroups_have_the_weight_of_one(nested: Nested, start) -> None:  # noqa: F811
    own, honest = nested("weight: 100", 3), start("honest", "--weight", "100")
    *_, part = done = together(*own, honest)
    assert honest.compute()["waits"] > 10  # it is enforced
    assert part / sum(done) == pytest.approx(0.5, abs=0.05)
