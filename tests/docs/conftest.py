"""The site as `./dev docs` builds it, and a host on which the quick start's commands can be typed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.containers import engines
from tests.support.host import ROOT
from tests.support.service import Service


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site, and return its folder. A warning of the build is a failure."""
    folder = tmp_path_factory.mktemp("site")
    # Without --quiet, which would exclude warnings from the count of --strict.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Fresh(Service):
    """A host as a package leaves it: `/etc/fgpu/policy.d` does not exist yet."""

    def __init__(self, work: Path, asked: Sequence[str]) -> None:
        super().__init__(work, asked)
        self.policies.rmdir()
        self.policies = work / "etc/policy.d"
        self.policies.parent.mkdir()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The simulated driver (16 GiB, one device) and the agent."""
    with Fresh.running(tmp_path_factory.mktemp("service"), "docker") as service:
        yield service


@pytest.fixture(scope="module")
def docker(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[engines.Engine]:
    """Return a Docker at the socket that the agent uses.

    It has an image `ubuntu:24.04`: a root with glibc and a shell.
    """
    image = engines.make_root(tmp_path_factory.mktemp("image") / "root")
    work = service.engine.parent  # the folder of its socket
    cave = engines.Cave(work, service.cdi)
    try:
        found = engines.NewerDocker(cave, work)
        try:
            found.load(image, "plain")
            found.call("tag", "plain:1", "ubuntu:24.04")
            yield found
        finally:
            found.close()
    finally:
        cave.close()
