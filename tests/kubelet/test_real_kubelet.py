"""A real kubelet and containerd, if they are provided: a static pod that requests a share gets it.

This is not part of continuous integration, because Debian has no package of kubelet. CONTRIBUTING.md describes how to
build it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import ask
from tests.support.containers import containerd
from tests.support.host import BUILD, CONTEXT, GIB, SIM
from tests.support.kubernetes import kubelet as kit
from tests.support.service import Service
from tests.support.wait import eventually

KUBELET, CONTAINERD = os.environ.get("FGPU_KUBELET", ""), os.environ.get("FGPU_CONTAINERD", "")  # a program, a folder
pytestmark = pytest.mark.skipif(not (KUBELET and CONTAINERD), reason="FGPU_KUBELET and FGPU_CONTAINERD name none")

FOLDER = Path("/var/lib/kubelet")
SHARED = ["/usr", str(BUILD), "/run/fgpu-sim"]


class Containerd(containerd.Containerd):
    """containerd 1.7 or later, with CDI."""

    cdi = Path()

    def settle(self) -> None:
        """See Containerd."""
        file = self.work / "config.toml"
        section = '[plugins."io.containerd.grpc.v1.cri"]\n'
        more = f'enable_cdi = true\ncdi_spec_dirs = ["{self.cdi}"]\n'
        file.write_text(file.read_text().replace(section, section + more))


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return kubelet's folder, which is always at the same place."""
    was = FOLDER.exists()
    FOLDER.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", FOLDER], check=True)
    yield FOLDER / "device-plugins"
    for line in reversed(Path("/proc/mounts").read_text().splitlines()):
        if line.split()[1].startswith(str(FOLDER)):
            subprocess.run(["umount", "--lazy", line.split()[1]], check=True)
    if not was:
        FOLDER.rmdir()


@pytest.fixture
def runtime(service: Service, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Containerd]:
    """Run containerd in a namespace that has kubelet's folder."""
    monkeypatch.setattr(containerd, "PATH", f"{CONTAINERD}:{containerd.PATH}")
    monkeypatch.setattr(Containerd, "cdi", service.cdi)
    (tmp_path / "engine").mkdir()
    found = Containerd(tmp_path / "engine", service.containerd, {})
    yield found
    found.close()


def settings(work: Path, socket: Path) -> dict[str, Any]:
    """Return settings of a standalone kubelet: no API server, no cgroups of its own."""
    (work / "pods").mkdir()
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": f"unix://{socket}",
        "staticPodPath": str(work / "pods"),
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "cgroupsPerQOS": False,
        "enforceNodeAllocatable": [],
        "localStorageCapacityIsolation": False,
        "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%"},
        "failSwapOn": False,
        "address": "127.0.0.1",
        "readOnlyPort": 0,
        "healthzPort": 0,
    }


def pod(name: str, resource: str) -> dict[str, Any]:
    """Return a pod that allocates as much as it can, and holds it."""
    mounts = [{"name": f"m{at}", "mountPath": path, "readOnly": True} for at, path in enumerate(SHARED)]
    volumes = [{"name": f"m{at}", "hostPath": {"path": path}} for at, path in enumerate(SHARED)]
    main = {
        "name": "main",
        "image": containerd.IMAGE,
        "imagePullPolicy": "Never",
        "command": [str(BUILD / "examples/fill"), "--step", "2MiB", "--hold", "600"],
        "env": [{"name": "LD_LIBRARY_PATH", "value": str(SIM / "lib")}],
        "volumeMounts": mounts,
        "resources": {"limits": {resource: 1}},
    }
    spec = {"hostNetwork": True, "terminationGracePeriodSeconds": 0, "containers": [main], "volumes": volumes}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "dev"}, "spec": spec}


def test_a_static_pod_gets_its_share(service: Service, runtime: Containerd, folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "kubelet.json"
    config.write_text(json.dumps(settings(tmp_path, service.containerd)))
    with open(tmp_path / "kubelet.log", "wb") as log:
        words = [*containerd.OWN_MOUNTS, KUBELET, "--config", str(config), "--v=4"]
        kubelet = subprocess.Popen(words, stdout=log, stderr=log)
    plugin = None
    try:
        eventually((folder / "kubelet.sock").exists, 60, "kubelet")
        plugin = kit.Plugin(folder, tmp_path / "plugin.log", "--cdi-dir", str(service.cdi))
        eventually(lambda: plugin.said().count("registered with kubelet") == 3, 60, "registrations")
        (tmp_path / "pods/notebook.json").write_text(json.dumps(pod("notebook", "fgpu.dev/2gib-25pct")))

        def held() -> dict[str, Any] | None:
            tenants = ask(verb="snapshot")["tenants"]
            return next((t for t in tenants if t["source"] == "share" and t["devices"][0]["used_bytes"]), None)

        tenant = eventually(held, 120, "the pod")
        assert tenant["devices"][0]["limit_bytes"] == 2 * GIB
        eventually(lambda: (held() or {"devices": [{}]})["devices"][0].get("used_bytes", 0) > 2 * GIB - CONTEXT)
        (tmp_path / "pods/notebook.json").unlink()
        eventually(lambda: not held(), 60, "the pod's end")
    finally:
        kubelet.terminate()
        kubelet.wait(30)
        if plugin:
            plugin.stop()
        for name in ("kubelet", "plugin"):
            print((tmp_path / f"{name}.log").read_text()[-6000:] if (tmp_path / f"{name}.log").exists() else "")
