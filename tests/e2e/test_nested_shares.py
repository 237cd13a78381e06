"""T47: a tenant with a share of a device's time creates cgroups below its own. It gets no more time by that."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.spin_kit import SECONDS, Spin, together
from tests.support.commands import metrics, output
from tests.support.host import ENVIRONMENT, SHIM, cgroup_root
from tests.support.place import Cgroups
from tests.support.service import Service
from tests.support.wait import eventually

pytestmark = pytest.mark.timed
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: nested}}
spec:
  selector: {{cgroup: {cgroup}}}
  memory: {{limit: 4GiB}}
  compute: {{{compute}}}
"""
Nested = Callable[..., list["Inside"]]
FOLDER_TOO, ALL_BELOW = '["{group}/own", "{group}/own/*"]', '["{group}/**"]'


class Inside(Spin):
    """A running spin in a cgroup that its tenant has created, or in one without a policy."""

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
        eventually(lambda: not (self._cgroup / "cgroup.procs").read_text(), 5, "the exit of the program")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Cgroups]:
    found = Cgroups(tmp_path)
    yield found
    found.close()


@pytest.fixture
def nested(service: Service, unharmed: None, group: Cgroups, spin: Path) -> Iterator[Nested]:
    """Yield nested(compute, N, cgroup): it starts N programs of one tenant with that share.

    Each program is in a cgroup that the tenant has created.
    """
    root, file = cgroup_root() / group.group.lstrip("/"), service.policies / "nested.yaml"
    made: list[Inside] = []

    def make(compute: str, number: int, cgroup: str = FOLDER_TOO) -> list[Inside]:
        if not made:
            selected = cgroup.format(group=group.group.lstrip("/"))
            file.write_text(POLICY.format(cgroup=selected, compute=compute))
            eventually(lambda: metrics()["fgpu_policies", frozenset()] == 1, 5, "the policy")
        new = [Inside(spin, root / f"own/{len(made) + one}") for one in range(number)]
        made.extend(new)
        assert all(one.compute() for one in new), "a cgroup has no share"
        return new

    yield make
    for one in made:
        one.close()
    file.unlink()
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 0, 5, "no policy")


def entitled() -> list[float]:
    """Return the parts of the device that all tenants are entitled to, in ascending order."""
    return sorted(value for (name, _), value in metrics().items() if name == "fgpu_compute_entitled_ratio")


def test_three_cgroups_of_a_tenant_share_one_ceiling(nested: Nested, group: Cgroups, spin: Path) -> None:
    free = Inside(spin, cgroup_root() / group.group.lstrip("/") / "free")
    (most,) = together(free)
    free.close()
    made = nested("limit: 25%", 3)
    for one in made:
        one.begin()
    ratios = pytest.approx([0.25 / 3] * 3 + [0.25], abs=0.001)
    eventually(lambda: entitled() == ratios, SECONDS, "a third of the ceiling for each")
    assert sum(one.kernels() for one in made) / most == pytest.approx(0.25, abs=0.06)
    (own,) = [t["devices"][0] for t in output("status")["tenants"] if t["path"] == f"{group.group}/own"]
    inside = sum(one.compute()["owned_seconds"] for one in made)
    assert own["compute"]["owned_seconds"] == pytest.approx(inside, rel=0.1)


def test_three_cgroups_of_a_tenant_share_one_weight(nested: Nested, start) -> None:
    own, honest = nested("weight: 100", 3), start("honest", "--weight", "100")
    *_, part = done = together(*own, honest)
    assert honest.compute()["waits"] > 10  # the weight is enforced
    assert part / sum(done) == pytest.approx(0.5, abs=0.05)


def test_a_tenant_gets_no_more_time_by_a_new_cgroup_each_second(nested: Nested, start) -> None:
    """The policy matches cgroups that the tenant creates, at any depth.

    Their time is charged to the outermost cgroup.
    """
    honest, seconds = start("honest", "--weight", "100"), 8
    first = nested("weight: 100", 1, ALL_BELOW)
    began = time.monotonic()
    for one in (honest, *first):
        one.begin(seconds)
    made = list(first)
    while len(made) < 6:
        time.sleep(max(0.0, began + len(made) - time.monotonic()))
        made += nested("weight: 100", 1, ALL_BELOW)
        made[-1].begin(seconds - (time.monotonic() - began))
    part, done = honest.kernels(), [one.kernels() for one in made]
    assert honest.compute()["waits"] > 10  # the weight is enforced
    assert all(done)
    assert part / (part + sum(done)) == pytest.approx(0.5, abs=0.05)
