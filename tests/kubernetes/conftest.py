"""A node with the simulated driver, the image, and what `kubectl apply -f deploy/kubernetes/fgpu.yaml` would bring."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import harness
import image_kit
import node_kit
import pytest

sys.path.append(str(harness.ROOT / "tests/packages"))
import host_kit
import package_kit

MANIFESTS = harness.ROOT / "deploy/kubernetes"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """fgpu-simd, one device with room for a hundred tenants."""
    path = tmp_path_factory.mktemp("driver") / "log"
    with open(path, "wb") as log:
        environment = {"FGPU_SIM_MEMORY": "512GiB", "FGPU_SIM_GPUS": "1"}
        driver = subprocess.Popen([harness.SIM / "fgpu-simd"], stdout=log, stderr=log, env=environment)
    try:
        harness.eventually(lambda: b"ready" in path.read_bytes(), 20, "the driver")
        yield
    finally:
        driver.terminate()
        driver.wait(10)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image of deploy/images/agent, of this tree's package."""
    if not list(package_kit.PACKAGES.glob("fgpu_*.deb")):
        package_kit.run(harness.ROOT / "dev", "package", "deb", timeout=170)
    deb, work = package_kit.package("fgpu_*.deb"), tmp_path_factory.mktemp("image")
    (name,) = {
        container["image"]
        for one in node_kit.manifests(MANIFESTS / "fgpu.yaml")
        if one["kind"] == "DaemonSet"
        for kind in ("initContainers", "containers")
        for container in one["spec"]["template"]["spec"].get(kind, ())
    }
    return image_kit.archive(host_kit.fresh_root(), deb, name, work)


@pytest.fixture(scope="module")
def node(driver: None, image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[node_kit.Node]:
    """containerd, with the image."""
    harness.compile_programs()
    found = node_kit.manifests(MANIFESTS / "fgpu.yaml")
    node = node_kit.Node(tmp_path_factory.mktemp("node"), found)
    try:
        node.load(image)
        yield node
    finally:
        node.close()
