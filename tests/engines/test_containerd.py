"""`fgpu setup containerd`: containers of pods get the shim, as kubelet starts them, and no other setting is changed."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.containers import engines as kit
from tests.support.containers.containerd import Containerd
from tests.support.host import FGPU, GIB, MIB, REFUSED
from tests.support.service import Service

POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: pods}
spec:
  selector: {cgroup: "kubepods/burstable/**"}
  memory: {limit: 1GiB}
"""


class SetUp(Containerd):
    """containerd as `fgpu setup` configures it. Its runtime is given by a path that is in no PATH."""

    def __init__(self, work: Path, service: Service, cave: kit.Cave) -> None:
        self.cave = cave
        super().__init__(work, service.containerd, {}, cave.prefix)

    def fgpu(self, *words: str | Path) -> None:
        """Run `fgpu …` in the engine's mount namespace."""
        command = [*self.cave.prefix, *FGPU, *map(str, words)]
        path = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        subprocess.run(command, capture_output=True, timeout=30, check=True, env=path)

    def settle(self) -> None:
        """See Containerd."""
        self.shim = {}
        self.settings = self.work / "config.toml"
        self.before = self.settings.read_text()
        self.fgpu("setup", "containerd", "--file", self.settings)


@pytest.fixture
def containerd(service: Service, unharmed: None, tmp_path: Path) -> Iterator[SetUp]:
    """Run containerd, with a policy for its pods."""
    with kit.policy(service, "pods.yaml", POLICY), contextlib.closing(kit.Cave(tmp_path, service.cdi)) as cave:
        place = SetUp(tmp_path, service, cave)
        yield place
        place.close()


def test_pods_have_the_shim_without_any_flag(containerd: SetUp) -> None:
    pod = containerd.run("any-0", {}, {})
    one = pod.container("main")
    one.assert_enforced()
    client = one.client()
    assert client.ok("info")[1] == GIB
    client.ok(f"fill {2 * MIB} 0")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert one.assert_exact() == GIB
    containerd.fgpu("setup", "containerd", "--undo")
    assert containerd.settings.read_text() == containerd.before
