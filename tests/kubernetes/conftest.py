"""A node with the simulated driver, the image, and the pods of `kubectl apply -f deploy/kubernetes/fgpu.yaml`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kubernetes import image_kit, node_kit
from tests.support import packages
from tests.support.host import ROOT
from tests.support.service import compile_programs

IS_FULL = os.environ.get("FGPU_TEST_SCALE") == "full"  # building the image takes a minute or two
MANIFESTS = ROOT / "deploy/kubernetes"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run fgpu-simd with one device that has room for a hundred tenants."""
    with packages.driver(tmp_path_factory.mktemp("driver") / "log", "512GiB", 20):
        yield


@pytest.fixture(scope="module")
def manifest() -> Path:
    """Return the manifest that is applied. A module may override it."""
    return MANIFESTS / "fgpu.yaml"


@pytest.fixture(scope="module")
def image(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the image of deploy/images/agent with this tree's package.

    Outside a full run, return an image with links to this checkout's files.
    """
    work = tmp_path_factory.mktemp("image")
    (name,) = {
        container["image"]
        for one in node_kit.manifests(manifest)
        if one["kind"] == "DaemonSet"
        for kind in ("initContainers", "containers")
        for container in one["spec"]["template"]["spec"].get(kind, ())
    }
    if not IS_FULL:
        return image_kit.thin(f"docker.io/library/{name}", work)
    packages.run(ROOT / "dev", "package", "image", timeout=900)
    return packages.package("fgpu-agent-image-*.oci.tar")


@pytest.fixture(scope="module")
def node(
    driver: None, manifest: Path, image: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[node_kit.Node]:
    """Run containerd with the image."""
    compile_programs()
    node = node_kit.Node(tmp_path_factory.mktemp("node"), node_kit.manifests(manifest))
    node.beneath = () if IS_FULL else ("/usr", str(ROOT), "/etc/ld.so.cache", "/etc/alternatives")
    try:
        node.load(image)
        yield node
    finally:
        node.close()
