"""Fixtures of the shim's tests: the library, the fake agent, and a host without an agent."""

import dataclasses
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.shim.shim_kit import DEADLINE, ROOT, SYSTEM_PYTHON, Agent, Build, Libc, Simulator
from tests.support import roots
from tests.support.sanitizers import SANITIZERS

LIBCS = (None, *(roots.OLD if platform.machine() == "x86_64" else ()))


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("shim")
    os.chmod(folder, 0o755)
    headers = ROOT / "build" / "headers"
    if not (headers / "cuda.h").exists():
        subprocess.run([ROOT / "sim" / "headers.sh", headers], check=True, timeout=120)
    under = os.environ.get("FGPU_SHIM_UNDER")  # a shim built with a sanitizer by test_shim_sanitizers.py
    first = (SANITIZERS[under].runtime, SANITIZERS[under].folder / "early.so") if under else ()
    made = Build(folder, folder / "libfgpu.so", headers, first)
    shutil.copy(SANITIZERS[under].make("shim") / "libfgpu.so" if under else made.make(folder / "out"), made.shim)
    made.libraries()
    return made


@pytest.fixture(scope="session", params=LIBCS, ids=lambda release: f"glibc-{release.glibc}" if release else "host")
def libc(request: pytest.FixtureRequest, build: Build) -> Libc:
    """Return the C library of this host, and older ones with a Python of their time."""
    release = request.param
    if not release:
        return Libc(build)
    if build.first:
        pytest.skip("the sanitizer's library needs this host's C library")
    try:
        root, compiler = roots.root_of(release), roots.compiler()
    except roots.NoDownload as error:
        pytest.skip(f"no glibc {release.glibc}: {error}")
    folder = build.folder / root.name
    folder.mkdir(exist_ok=True)
    made = dataclasses.replace(build, folder=folder, compiler=compiler)
    made.libraries()
    return Libc(made, root)


@pytest.fixture(scope="session")
def one_agent(build: Build) -> Iterator[Agent]:
    if os.geteuid():
        pytest.skip("probes and mount namespaces need root")
    if subprocess.run([SYSTEM_PYTHON, "-c", "import bcc"], capture_output=True, timeout=DEADLINE).returncode:
        pytest.skip("no python3-bpfcc: the fake agent cannot answer requests")
    agent = Agent(build)
    yield agent
    agent.process.stdin.close()
    agent.process.wait(DEADLINE)


@pytest.fixture
def agent(one_agent: Agent) -> Agent:
    """Return the agent in its initial state, before it listens."""
    one_agent.do("reset")
    return one_agent


@pytest.fixture
def held(agent: Agent) -> Agent:
    """Return the agent with a tenant that has 1 GiB on the ledger's device 3, which is CUDA's device 0."""
    agent.do("start")
    return agent


@pytest.fixture
def plain(build: Build) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a program with the shim on a host without an agent."""

    def go(*command: Any, preload: tuple[Any, ...] | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
        libraries = ":".join(map(str, (build.shim,) if preload is None else preload))
        environment = dict(os.environ, LD_PRELOAD=libraries, LD_LIBRARY_PATH=str(build.folder / "driver"))
        if not libraries:
            del environment["LD_PRELOAD"]
        hidden = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh"]
        return subprocess.run(
            [*(["env", "-u", "LD_PRELOAD"]), *hidden, "env", f"LD_PRELOAD={libraries}", *map(str, command)],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            env={k: v for k, v in environment.items() if k != "LD_PRELOAD"},
            **more,
        )

    return go


@pytest.fixture(scope="session")
def built(build: Build) -> Path:
    folder = build.folder / "sim"
    command = ["make", "-s", "-j2", "-C", ROOT / "sim", f"OUT={folder}", f"HEADERS={build.headers}"]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def simulator(built: Path, held: Agent) -> Iterator[Simulator]:
    inside = [
        "nsenter",
        f"--mount=/proc/{held.process.pid}/ns/mnt",
        "--",
        "env",
        "FGPU_SIM_GPUS=2",
        "FGPU_SIM_MODEL=t4",
    ]
    server = subprocess.Popen([*inside, built / "fgpu-simd"], stdout=subprocess.PIPE, text=True)
    assert server.stdout
    assert server.stdout.readline() == "ready\n"
    simulator = Simulator(held, built)
    listing = simulator.run(built / "nvidia-smi", "-L")
    uuids = [u.replace("-", "") for u in re.findall(r"GPU-([0-9a-f-]{36})", listing)]
    assert len(uuids) == 2
    held.do("reset")
    held.do("set", uuids=uuids)
    held.do("start")
    yield simulator
    simulator.end()
    server.terminate()
    server.wait(10)
    server.stdout.close()
