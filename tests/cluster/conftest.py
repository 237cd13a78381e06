"""One cluster for all tests of the run. The tests follow one another, from the first pod to the uninstallation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import image_kit
from tests.cluster.cluster_kit import PAUSE, Cluster
from tests.cluster.node_kit import become_a_node
from tests.support import packages
from tests.support.host import BUILD

collect_ignore_glob = [] if os.environ.get("FGPU_TEST_CLUSTER") else ["test_*.py"]  # only `./dev cluster` sets it
FOLDER = BUILD / "cluster/node"  # large, and the next run removes it if this run is killed
TENANT = "docker.io/library/tenant:1"


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Return an empty folder on a disk."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    yield FOLDER
    shutil.rmtree(FOLDER, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(folder: Path) -> Iterator[Cluster]:
    """Run the control plane and a node with one simulated device of 16 GiB, without fgpu."""
    cluster = Cluster(folder, become_a_node(folder))
    with packages.driver(cluster.logs / "fgpu-simd", "16GiB", 20):
        cluster.start(image_kit.pause(PAUSE, folder), image_kit.tenant(TENANT, folder))
        yield cluster
        cluster.stop()


@pytest.fixture(scope="session")
def agent(folder: Path) -> image_kit.Agent:
    """Return the maker of the agent's images."""
    return image_kit.Agent(folder)


@pytest.fixture(scope="session")
def namespace(cluster: Cluster, agent: image_kit.Agent) -> None:
    """Make the namespace of the chart, and load the image that the chart names."""
    cluster.load(agent.version("docker.io/library/fgpu:0.1.0", "first"))
    cluster.kubectl("create", "namespace", "fgpu-system")
    cluster.kubectl("label", "namespace", "fgpu-system", "pod-security.kubernetes.io/enforce=privileged")
