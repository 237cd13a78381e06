"""The simulated driver with two devices of 16 GiB, and the agent. Each test file starts its own cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support import host
from tests.support.service import Service, compile_programs


class Stored(Service):
    """A service with the shim at the path that an installed fgpu has, and without overcommit, as by default."""

    def __init__(self, work: Path, asked: Sequence[str]) -> None:
        super().__init__(work, asked)
        self.config.write_text(self.config.read_text().replace("overcommit: allow\n", ""))

    def start_agent(self, stderr: int | None = None, *options: str) -> float:
        """See Service."""
        return super().start_agent(stderr, "--store", "/var/lib/fgpu/shim", *options)


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The simulated driver, and the agent, which asks an engine that does not exist."""
    compile_programs()
    gpus, host.GPUS = host.GPUS, "2"
    try:
        with Stored.running(tmp_path_factory.mktemp("service"), "cri") as service:
            yield service
    finally:
        host.GPUS = gpus
