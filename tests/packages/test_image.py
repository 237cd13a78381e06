"""The agent's image, started by the command of docs/install.md in a real Docker: a container gets exactly its share.

NVIDIA's part of the command is replaced: `--gpus all` mounts the simulated driver as NVIDIA's toolkit mounts the real
one. An address for metrics that no other test uses is added.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator

import pytest

from tests.support import packages as kit
from tests.support.containers import engines
from tests.support.host import free_port

pytestmark = pytest.mark.skipif(os.environ.get("FGPU_TEST_SCALE") != "full", reason="building the image takes minutes")
LIBRARIES = "/usr/lib/x86_64-linux-gnu"
DRIVER = [
    *("--volume", "/run/fgpu-sim:/run/fgpu-sim"),
    *(
        word
        for name in ("libcuda.so.1", "libnvidia-ml.so.1")
        for word in ("--volume", f"{kit.BUILD}/sim/lib/{name}:{LIBRARIES}/{name}:ro")
    ),
]


@pytest.fixture(scope="module")
def docker(driver: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[engines.Engine]:
    """Run a Docker with CDI, with a small image for tenants."""
    work = tmp_path_factory.mktemp("docker")
    (work / "cdi").mkdir()
    cave = engines.Cave(work, work / "cdi")
    try:
        found = engines.NewerDocker(cave, work)
        try:
            found.load(engines.make_root(work / "root"), "plain")
            yield found
        finally:
            found.close()
    finally:
        cave.close()


def commands() -> list[list[str]]:
    """Return the commands of the page's section, as lists of words. The commands of the removal lack `docker`."""
    text = (kit.ROOT / "docs/install.md").read_text()
    section = text.split("\n## Other distributions: the image\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"(?:^ {4}\S?.*\n)+", section, re.MULTILINE)
    removal = re.findall(r"`docker (.*?)`", " ".join(section.split("\nTo remove fgpu, ")[1].split()))
    return [shlex.split(line) for line in [*block.replace("\\\n", " ").splitlines(), *removal]]


@pytest.mark.timeout(1200)
def test_the_documented_command_enforces_the_share_of_a_container(docker: engines.Engine) -> None:
    kit.run(kit.ROOT / "dev", "package", "image", timeout=900)
    archive = kit.package("fgpu-agent-image-*.oci.tar")
    version = archive.name.removesuffix(".oci.tar").rpartition("-")[2]
    load, run, *removal = commands()
    assert load[:3] == ["docker", "load", "--input"]
    docker.call("load", "--input", archive, timeout=300)
    at = run.index("--gpus")
    assert run[at + 1] == "all"
    run[at : at + 2] = DRIVER
    socket = "/var/run/docker.sock:/var/run/docker.sock"
    words = [word.replace("VERSION", version) for word in run[1:]]
    words[words.index(socket)] = f"{docker.work}/docker.sock:/var/run/docker.sock"
    listen = f"127.0.0.1:{free_port()}"
    docker.call(*words, "agent", "--listen", listen, timeout=120)
    try:
        kit.eventually(lambda: "enforcing" in log(docker), 60, f"the agent: {log(docker)}")
        assert docker.call("exec", "fgpu", "fgpu", "doctor", check=False).stdout
        with docker.filled("tenant", "--device", "fgpu.dev/share=1gib") as got:
            assert got == kit.GIB - kit.CONTEXT
            assert kit.driver_bytes() == [kit.GIB]
            assert "1GiB" in docker.call("exec", "fgpu", "fgpu", "status").stdout
        with docker.filled("other") as got:
            assert got > 4 * kit.GIB, "a container without a share is refused too"
        for command in removal:
            docker.call(*command)
        assert not docker.call("ps", "--all", "--quiet", "--filter", "name=^fgpu$").stdout
        assert not os.path.exists("/sys/fs/bpf/fgpu"), "the agent has started again after it was detached"
    finally:
        docker.remove("fgpu")


def log(docker: engines.Engine) -> str:
    """Return the output of the agent's container."""
    done = docker.call("logs", "fgpu", check=False)
    return str(done.stdout + done.stderr)
