"""A new user on a clean Debian with Docker types the commands of README and then the command that fgpu prints."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import fresh_host
from tests.support import packages as kit
from tests.support.containers import engines

README = (kit.ROOT / "README.md").read_text()
LIMIT = 8 * kit.GIB
# Docker's settings for a host that is itself a container, and an administrator's own setting.
SETTINGS = {"bridge": "none", "iptables": False, "ip6tables": False, "storage-driver": "vfs", "debug": True}
# What NVIDIA's toolkit does for `--gpus all`, with the simulated driver.
GPUS = [
    *("--volume", "/opt/build:/opt/build:ro", "--volume", "/run/fgpu-sim:/run/fgpu-sim"),
    *("--env", "LD_LIBRARY_PATH=/opt/build/sim/lib", "--volume", "/opt/build/sim/nvidia-smi:/usr/bin/nvidia-smi:ro"),
]
UNIT = "fgpu-agent"
# A login shell is in a cgroup of the host that it logs in to.
LOGIN = (
    "sh",
    "-c",
    'mkdir -p "$0"; echo $$ >"$0/cgroup.procs"; exec "$@"',
    "/sys/fs/cgroup/user.slice/session-1.scope",
)


def typed(deb: Path) -> list[list[str]]:
    """Return the commands of README's section on the installation, with the path of this package inside the host."""
    (section,) = re.findall(r"^## Install\n(.*?)^## ", README, re.M | re.S)
    found = [shlex.split(line, comments=True) for line in re.findall(r"^    sudo (.*)$", section, re.M)]
    name, place = f"./{deb.relative_to(kit.ROOT)}", str(fresh_host.BUILD / deb.relative_to(kit.BUILD))
    return [[place if fnmatch.fnmatchcase(name, word) else word for word in words] for words in found]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run fgpu-simd with additional room for containers that have just ended."""
    with kit.driver(tmp_path_factory.mktemp("driver") / "log", "80GiB", 5):
        yield


in_full = pytest.mark.skipif(os.environ.get("FGPU_TEST_SCALE") != "full", reason="a root of Debian 13 takes minutes")


@pytest.fixture(scope="module", params=["", pytest.param("trixie", marks=in_full)], ids=["docker-20.10", "docker-26.1"])
def release(request: pytest.FixtureRequest) -> str:
    """Return the name of a Debian release, or an empty text for this distribution."""
    return str(request.param)


@pytest.fixture
def newcomer(driver: None, image: Path, release: str, tmp_path: Path) -> Iterator[fresh_host.Host]:
    """Return a booted host without fgpu. It runs Docker, which has one image and no container."""
    host = fresh_host.Host(tmp_path, release)
    try:
        host.mount()
        (host.root / "etc/docker").mkdir()
        (host.root / "etc/docker/daemon.json").write_text(json.dumps(SETTINGS))
        command = " ".join([*host.agent_words, "--skip-check 'pid namespace'"])  # this systemd has its own
        (host.root / f"etc/systemd/system/{UNIT}.service.d").mkdir()
        drop_in = f"[Service]\nExecStart=\nExecStart={command}\n"
        (host.root / f"etc/systemd/system/{UNIT}.service.d/driver.conf").write_text(drop_in)
        host.apt("update")
        # procps: the unit of Docker reloads by /bin/kill, which every installed Debian has
        host.apt("install", "procps", "docker.io", *(["docker-cli"] if release else []))
        host.boot()
        kit.eventually(lambda: host.run("docker", "info", check=False).returncode == 0, 30, "Docker")
        kit.run("tar", "-C", image, "-cf", host.root / "tmp/image.tar", ".")
        host.run("docker", "import", "/tmp/image.tar", "ubuntu:24.04")
        yield host
    finally:
        host.close()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root file system with glibc and a shell."""
    return engines.make_root(tmp_path_factory.mktemp("image") / "root")


def container(host: fresh_host.Host, command: list[str]) -> str:
    """Return the words of a `docker run` command. `--gpus all` passes the simulated driver."""
    words = " ".join(command).replace("--gpus all", " ".join([*engines.ALLOWED, *GPUS])).split()
    done = host.run(*words, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join(done.stdout.split())


def test_two_commands_lead_to_a_limited_container(newcomer: fresh_host.Host, deb: Path) -> None:
    install, setup = typed(deb)
    assert install[:2] == ["apt", "install"]
    assert str(deb.name) in install[2], "the command of README names no package that ./dev package deb writes"
    newcomer.apt(*install[1:])
    done = newcomer.run(*LOGIN, *setup, check=False)
    # This host is a container. Doctor reports that, and nothing else.
    assert re.findall(r"^FAIL  (.*?):", done.stdout, re.M) == ["pid namespace"], done.stdout + done.stderr
    (apply,) = re.findall(r"^takes effect after: (.*)$", done.stdout, re.M)
    (example,) = re.findall(r"^then try: (.*)$", done.stdout, re.M)
    newcomer.run(*apply.split())
    kit.eventually(lambda: "fgpu" in newcomer.run("docker", "info", "-f", "{{.DefaultRuntime}}").stdout, 10, apply)
    assert f"0MiB / {LIMIT >> 20}MiB" in container(newcomer, example.split())
    fill = example.replace("nvidia-smi", "/opt/build/examples/fill --step 2MiB").split()

    def exact() -> bool:  # see test_systemd.fills()
        ((got, why),) = re.findall(r"admitted (\d+) bytes, then (\w+)", container(newcomer, fill))
        assert (int(got) >= LIMIT - kit.CONTEXT, why) == (True, "CUDA_ERROR_OUT_OF_MEMORY")
        return int(got) == LIMIT - kit.CONTEXT

    kit.eventually(exact, 20, "a limit that holds")
    if "restart docker" in done.stdout.split(apply)[1]:  # this Docker has shares by name once they are switched on
        newcomer.run("systemctl", "restart", "docker")
        share = example.replace("nvidia-smi", "").split()
        share[-1:] = ["--device", "fgpu.dev/share=2gib", share[-1], "nvidia-smi"]
        assert "0MiB / 2048MiB" in container(newcomer, share)
    else:
        assert "features" not in json.loads((newcomer.root / "etc/docker/daemon.json").read_text())
    state = ("ActiveState", "UnitFileState")
    assert newcomer.unit(f"{UNIT}.service", *state) == ["active", "enabled"]
    again = newcomer.run(*LOGIN, *setup, check=False).stdout
    assert again.count(": nothing to do\n") == 3, again
    container(newcomer, example.replace("--rm", "--detach --name across").replace("nvidia-smi", "sleep 600").split())
    done = newcomer.run("fgpu", "setup", "docker", "--undo")
    assert newcomer.unit(f"{UNIT}.service", *state) == ["inactive", "disabled"], done.stdout
    assert json.loads((newcomer.root / "etc/docker/daemon.json").read_text()) == SETTINGS
    assert list((newcomer.root / "etc/fgpu/policy.d").iterdir()) == []
    # A program in a container that ran before has no limit, and does not wait for the agent.
    done = newcomer.run("docker", "exec", "across", "/opt/build/examples/fill", "--step", "2MiB", check=False)
    (got,) = re.findall(r"admitted (\d+) bytes", done.stdout)
    assert int(got) > LIMIT, done.stderr
    newcomer.run("docker", "rm", "--force", "across")
    container(newcomer, example.replace("nvidia-smi", "sh -c :").split())
