"""Two simulated devices of 16 GiB, an agent that offers profiles of them, a kubelet and a plugin for each test."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import host
from tests.support.commands import ask
from tests.support.kubernetes import kubelet as kit
from tests.support.service import Service, compile_programs


@pytest.fixture(scope="package")
def sysfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], None]]:
    """Yield a function that sets the memory node of a PCI device."""
    place = Path("/sys/bus/pci/devices")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)

    def say(pci: str, node: str) -> None:
        folder = place / pci.lower()[-12:]
        folder.mkdir()
        (folder / "numa_node").write_text(node)

    yield say
    subprocess.run(["umount", place], check=True)


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory, sysfs: Callable[[str, str], None]) -> Iterator[Service]:
    """The simulated driver with two devices, and the agent."""
    compile_programs()
    gpus, host.GPUS = host.GPUS, "2"
    service = Service(tmp_path_factory.mktemp("service"), ["cri"])
    service.config.write_text(
        f"engines: ['cri:{service.containerd}']\ncdiFolder: {service.cdi}\nprofiles: {kit.PROFILES}\n"
    )
    try:
        service.start_driver()
        service.start_agent()
        for device in ask(verb="snapshot")["devices"]:
            sysfs(device["pci_bus_id"], kit.NODES[device["index"]])
        yield service
    finally:
        host.GPUS = gpus
        service.stop()


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder for the output of protoc."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def uuids(service: Service) -> list[str]:
    """Return the UUIDs of the two devices."""
    return [device["uuid"] for device in ask(verb="snapshot")["devices"]]


@pytest.fixture
def kubelet(service: Service, made: Path, tmp_path: Path) -> Iterator[kit.Kubelet]:
    """Run a kubelet."""
    found = kit.Kubelet(Path("/tmp") / f"kubelet-{os.getpid()}", made)  # a socket's path has at most 107 characters
    found.start()
    yield found
    found.stop()
    shutil.rmtree(found.folder)


@pytest.fixture
def start(kubelet: kit.Kubelet, service: Service, tmp_path: Path) -> Iterator[Callable[..., kit.Plugin]]:
    """Return a function that starts plugins, which leave nothing in kubelet's folder."""
    plugins: list[kit.Plugin] = []

    def start(*options: str) -> kit.Plugin:
        folders = ("--cdi-dir", str(tmp_path / "cdi"), "--cdi-dir", str(service.cdi))
        plugins.append(kit.Plugin(kubelet.folder, tmp_path / "plugin.log", *folders, *options))
        return plugins[-1]

    yield start
    for plugin in plugins:
        if plugin.process.poll() is None:
            plugin.stop()
    left = [path.name for path in kubelet.folder.iterdir() if path.name != "kubelet.sock"]
    assert not left
    service.check()


@pytest.fixture
def plugin(start: Callable[..., kit.Plugin]) -> kit.Plugin:
    """Run a plugin."""
    return start()
