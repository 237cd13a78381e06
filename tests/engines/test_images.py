"""Tests of deploy/images: an image that Docker and Podman build, and its containers' limits with an agent."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import ask
from tests.support.containers import docker
from tests.support.containers import engines as kit
from tests.support.host import CONTEXT, GIB, KINDS, MIB, REFUSED, ROOT, RUN_DIR, SHIM
from tests.support.service import Service
from tests.support.sim_driver import driver_books
from tests.support.wait import eventually

DOCKERFILE = ROOT / "deploy/images/Dockerfile"
IN_IMAGES = Path("/var/lib/fgpu/shim/current/libfgpu.so")
OLDER = SHIM.read_bytes() + b"an older one"
COUNTED = 512 * MIB  # of a context, by the ledger of an image's own limit
GB = 2
LIMIT = GB * GIB
FILLED = f"admitted {LIMIT - CONTEXT} bytes, then {REFUSED}\n"
TOOLS = ("chmod", "env", "grep", "mkdir", "sha256sum", "stat")
numbers = itertools.count(1)  # of containers: all names are different
HEIR = "FROM fgpu:1\nRUN mkdir /work\nUSER 65534\n"
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: images}}
spec:
  selector: {{cgroup: "{group}/*"}}
  memory: {{limit: 100%}}
"""


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that images are built from. Its shim is not the host's, and only its owner may read it."""
    folder = tmp_path_factory.mktemp("context")
    (folder / SHIM.name).write_bytes(OLDER)
    (folder / SHIM.name).chmod(0o600)
    (folder / "Heir").write_text(HEIR)
    return folder


@pytest.fixture(scope="module")
def built(engine: kit.Engine, image: Path, context: Path, tmp_path_factory: pytest.TempPathFactory) -> kit.Engine:
    """Return an engine that has built `fgpu` on a root file system of this distribution, and `heir` on `fgpu`."""
    base = tmp_path_factory.mktemp("base") / "root"
    shutil.copytree(image, base, symlinks=True)
    programs = [str(shutil.which(tool)) for tool in TOOLS]
    for path in (*programs, *kit.libraries(*programs)):
        place = base / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(os.path.realpath(path), place)
    engine.load(base, "base")
    for done in (build(engine, context, "fgpu:1"), build(engine, context, "heir:1", file=context / "Heir")):
        assert done.returncode == 0, done.stdout + done.stderr
    return engine


def build(engine: kit.Engine, context: Path, name: str, gb: str = str(GB), file: Path = DOCKERFILE) -> Any:
    """Run `ENGINE build`."""
    words = ["build", "--network", "none", "--file", file, "--tag", name]
    if file == DOCKERFILE:
        words += ["--build-arg", "BASE=base:1", "--build-arg", f"GB={gb}"]
    return engine.call(*words, context, check=False)


class Running:
    """A container of an image that runs commands."""

    def __init__(self, engine: kit.Engine, name: str) -> None:
        self._engine, self.name = engine, name

    @contextlib.contextmanager
    def starts(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """Start a program in the container, in the background."""
        command = [*self._engine.cave.prefix, *self._engine.words(), "exec", self.name, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(list(map(str, command)), env=self._engine.environment, text=True, **pipes) as program:
            try:
                yield program
            finally:
                program.kill()

    def says(self, command: str) -> list[str]:
        """Return the output of a shell in the container."""
        with self.starts("sh", "-c", command) as program:
            return program.communicate(timeout=60)[0].splitlines()


@contextlib.contextmanager
def container(engine: kit.Engine, image: str, *options: str) -> Iterator[Running]:
    """Run a container that waits for commands."""
    name = f"of-an-image-{next(numbers)}"
    try:
        done = engine.run(name, *options, image=image, command="sleep 300")
        assert done.returncode == 0, done.stderr
        yield Running(engine, name)
    finally:
        engine.remove(name)


# -- contents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fgpu", "heir"])
def test_image_labels_and_variables_have_the_limit_and_root_owns_the_limit_s_file(built: kit.Engine, name: str) -> None:
    (image,) = json.loads(built.call("image", "inspect", f"{name}:1").stdout)
    assert image["Config"]["Labels"]["fgpu.dev/memory"] == f"{GB}GiB"
    for line in (f"GPU_MEM_LIMIT_GB={GB}", "NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"):
        assert line in image["Config"]["Env"]
    lists = "/etc/ld.so.preload /etc/ld-nix.so.preload"
    files = f"/run/fgpu /etc/fgpu /etc/fgpu/limit {lists} {IN_IMAGES.parent} {IN_IMAGES}"
    with container(built, name) as one:
        lines = one.says(f"stat -c '%u %g %a %F' {files}; cat /etc/fgpu/limit {lists}")
    folder, file = "0 0 755 directory", "0 0 644 regular file"
    kinds = ["0 0 1777 directory", folder, *[file] * 3, folder, file]
    assert lines == [*kinds, f"{GB}GiB", *[str(IN_IMAGES)] * 2]


@pytest.mark.parametrize("gb", ["", "0", "1.5", "8GiB"])
def test_an_invalid_size_fails_the_build(built: kit.Engine, context: Path, gb: str) -> None:
    done = build(built, context, "none:1", gb)
    assert done.returncode
    assert f"GB={gb}: whole GiB, such as 8\n" in done.stdout + done.stderr


# -- without an agent ------------------------------------------------------------------------------------------------


def test_programs_of_an_image_share_the_image_s_limit_without_an_agent(built: kit.Engine) -> None:
    with (
        container(built, "fgpu") as one,
        one.starts("/opt/build/examples/fill", "--step", "2MiB", "--hold", "60") as fill,
    ):
        assert fill.stdout
        assert fill.stdout.readline() == FILLED.replace(str(LIMIT - CONTEXT), str(LIMIT - COUNTED))
        assert one.says("test -d /run/fgpu/shim || echo none; /opt/build/examples/fill --step 2MiB")[0] == "none"
        driver = [sum(process[f"{kind}_bytes"] for kind in KINDS) for process in driver_books()]
        assert driver == [LIMIT + CONTEXT - COUNTED], "only the first program's memory is allocated"
        assert any(f"{LIMIT // MIB}MiB /" in line for line in one.says("/opt/build/sim/nvidia-smi"))


# -- with an agent ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def managed(built: kit.Engine, service: Service) -> Iterator[kit.Engine]:
    """Set the engine up with `fgpu setup`.

    The agent reads the engine's labels, and a policy leaves the limit to images.
    """
    with kit.policy(service, "10-images.yaml", POLICY.format(group=built.group)):  # before those of other tests
        built.setup()
        built.apply()
        with answering(built, service):
            yield built
        built.setup("--undo")
        built.apply()


@contextlib.contextmanager
def answering(engine: kit.Engine, service: Service) -> Iterator[None]:
    """Serve the engine's socket at the path that the agent uses."""
    if isinstance(engine, kit.Docker):
        front = docker.Front(service.engine, engine.work / "docker.sock")
        yield
        front.close()
        return
    words = [*engine.cave.prefix, *engine.words(), "system", "service", "--time=0", f"unix://{service.podman}"]
    with subprocess.Popen([str(word) for word in words], env=engine.environment) as server:
        eventually(service.podman.exists, 20, "podman's socket")
        yield
        server.terminate()


@pytest.fixture
def ready(managed: kit.Engine, unharmed: None) -> kit.Engine:
    """Return `managed`, without any state of the previous test."""
    return managed


@contextlib.contextmanager
def held(engine: kit.Engine, image: str, *options: str) -> Iterator[Running]:
    """Run a container whose limit is in force. It exists before the engine's labels are read."""
    with container(engine, image, *options) as one:
        eventually(lambda: limits().get(one.name) == ("images", LIMIT), 10, f"its limit: {limits()}")
        yield one


def limits() -> dict[str, tuple[str, int]]:
    """Return the policy and the limit of each tenant."""
    found = ask(verb="snapshot")["tenants"]
    return {t["tenant"]: (t["policy"], t["devices"][0]["limit_bytes"]) for t in found}


@pytest.mark.parametrize(("name", "options"), [("fgpu", ()), ("fgpu", ("--pid=host",)), ("heir", ())])
def test_a_container_gets_its_images_limit(ready: kit.Engine, name: str, options: tuple[str, ...]) -> None:
    with (
        held(ready, name, *options) as one,
        one.starts("/opt/build/examples/fill", "--step", "2MiB", "--hold", "60") as fill,
    ):
        assert fill.stdout
        assert fill.stdout.readline() == FILLED
        (tenant,) = [t for t in ask(verb="snapshot")["tenants"] if t["tenant"] == one.name]
        (device,) = tenant["devices"]
        assert device["admitted_bytes"] == device["witnessed_bytes"] == LIMIT - CONTEXT, device  # the shim is in use
        assert (device["limit_bytes"], device["used_bytes"]) == (LIMIT, LIMIT)
        driver = [sum(process[f"{kind}_bytes"] for kind in KINDS) for process in driver_books()]
        assert driver == [LIMIT]
        assert any(f"{LIMIT // MIB}MiB /" in line for line in one.says("/opt/build/sim/nvidia-smi"))


def test_nothing_in_the_container_changes_its_limit(ready: kit.Engine) -> None:
    """Variables that the engine or a program sets or removes do not change it, nor does root's change of the file."""
    mine = ("GPU_MEM_LIMIT_GB=12", "LD_PRELOAD=/lib/none.so", "FGPU_SHARE=12gib", "NVIDIA_VISIBLE_DEVICES=void")
    ways = ("", f"env {' '.join(mine)}", "env -u GPU_MEM_LIMIT_GB", "env -i LD_LIBRARY_PATH=$LD_LIBRARY_PATH")
    with held(ready, "fgpu", *(word for variable in mine for word in ("--env", variable))) as one:
        assert one.says("echo 12GiB >/etc/fgpu/limit; cat /etc/fgpu/limit") == ["12GiB"]
        assert one.says("echo $GPU_MEM_LIMIT_GB $LD_PRELOAD") == ["12 /lib/none.so"]
        for way in ways:
            assert one.says(f"{way} /opt/build/examples/fill --step 2MiB") == [FILLED.strip()], way


# -- an image's shim, and the host's -------------------------------------------------------------------------------

IN_USE = f"sha256sum <{IN_IMAGES}; stat -c %i {IN_IMAGES}; grep -m1 {IN_IMAGES} /proc/self/maps; cat /etc/ld.so.preload"


def in_use(one: Running) -> tuple[str, list[str]]:
    """Return the digest of the shim that its programs have mapped, and the preload list that names the shim."""
    digest, inode, mapped, *names = one.says(IN_USE)
    assert mapped.split()[4:] == [inode, str(IN_IMAGES)]
    return digest.split()[0], names


@pytest.fixture
def published(ready: kit.Engine) -> Iterator[kit.Engine]:
    """Put the host's shim at the path at which an agent publishes it, which is also the path in images."""
    told, preload = RUN_DIR / "containers", RUN_DIR / "published.preload"
    text = told.read_text()
    put = [*ready.cave.prefix, "install", "-D", SHIM, IN_IMAGES]
    subprocess.run(list(map(str, put)), check=True, timeout=10)
    preload.write_text(f"{IN_IMAGES}\n")
    told.write_text(f"shim {IN_IMAGES}\nsocket {RUN_DIR}/shim\npreload {preload}\n")
    yield ready
    told.write_text(text)
    preload.unlink()


def test_the_host_s_shim_is_used_if_it_exists_and_otherwise_the_image_s(published: kit.Engine) -> None:
    with container(published, "fgpu") as one:
        assert in_use(one) == (hashlib.sha256(SHIM.read_bytes()).hexdigest(), [str(IN_IMAGES)])
    (RUN_DIR / "containers").unlink()  # as without an agent
    with container(published, "fgpu") as one:
        assert in_use(one) == (hashlib.sha256(OLDER).hexdigest(), [str(IN_IMAGES)])
    if isinstance(published, kit.Podman):  # Docker has CDI from version 25 on
        with container(published, "fgpu", "--device", "fgpu.dev/shim=all") as one:
            assert one.says("cat /etc/ld.so.preload; grep -om1 '/.*libfgpu.*' /proc/self/maps") == [str(SHIM)] * 2
