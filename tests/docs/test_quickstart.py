"""The quick start, typed: each command of its ```console blocks is run, and its output is compared with the page.

Steps that cannot be done here are left out and have their own tests: the demo (`test_the_demo_enforces_both_limits`),
packages and systemd (`tests/packages`). NVIDIA's part of `docker run --gpus` and the path of Docker's settings are
replaced. The user is in no group at first, so commands of root need `sudo`.
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support import host
from tests.support.containers import engines
from tests.support.host import BUILD, ROOT, SIM
from tests.support.service import Service

PAGE = ROOT / "docs/quickstart.md"
ABSENT = ("./dev demo", "./dev package", "apt install")
ALIKE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Commands of this host that are found first. Each is a shell script.
SUDO = 'BY_SUDO=yes; export BY_SUDO; exec "$@"'
ASKS = '[ "${BY_SUDO:-}" ] || { echo "$0: root alone may, or a group that has no member yet" >&2; exit 1; }'
# Docker reads its settings some time after the signal. This script runs the next command sooner than a user types it.
SYSTEMCTL = """
[ "$*" = "reload docker" ] && kill -HUP "$(cat {pid})" || exit 1
until docker info --format '{{{{.DefaultRuntime}}}}' | grep -qx fgpu; do sleep 0.05; done
"""
# The settings are not at Docker's usual path, and tenants' cgroups are at a place that the agent scans.
FGPU = """
case $1 in
setup) exec {fgpu} "$@" --file {settings} ;;
run) exec nsenter --target={outside} --mount {fgpu} "$@" ;;
*) exec {fgpu} "$@" ;;
esac
"""
# `--gpus all` mounts the simulated driver as NVIDIA's toolkit mounts the real one.
DOCKER = """
for word; do
    shift
    case $word in
    --gpus) ;;
    all) set -- "$@" {gpus} ;;
    *) set -- "$@" "$word" ;;
    esac
done
exec env {environment} {docker} "$@"
"""
GPUS = [
    *("--volume", f"{BUILD}:/opt/build:ro", "--volume", "/run/fgpu-sim:/run/fgpu-sim"),
    *("--env", "LD_LIBRARY_PATH=/opt/build/sim/lib", "--volume", f"{SIM}/nvidia-smi:/usr/bin/nvidia-smi:ro"),
]


def steps(text: str) -> list[tuple[str, str]]:
    """Return the commands of a page and the output of each."""
    found = []
    for session in BLOCK.findall(text):
        for one in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
            command, _, said = one.partition("\n")
            found.append((command, said))
    return found


@pytest.fixture
def words(docker: engines.Engine, service: Service, tmp_path: Path) -> list[str]:
    """Return the command line that runs a typed line on this host."""
    programs = {
        "sudo": SUDO,
        "systemctl": SYSTEMCTL.format(pid=docker.work / "pid"),
        "fgpu": FGPU.format(fgpu=shlex.join(host.FGPU), settings=docker.settings, outside=os.getpid()),
        "docker": DOCKER.format(
            gpus=shlex.join([*engines.ALLOWED, *GPUS]),
            environment=shlex.join(f"{key}={value}" for key, value in docker.environment.items()),
            docker=shlex.join(map(str, docker.words())),
        ),
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text if name == 'sudo' else ASKS + chr(10) + text}")
        (tmp_path / name).chmod(0o755)
    etc = 'mkdir -p /etc/fgpu && mount --bind "$0" /etc/fgpu'
    subprocess.run([*docker.cave.prefix, "sh", "-c", etc, service.policies.parent], check=True, timeout=10)
    environment = {**host.ENVIRONMENT, "PATH": f"{tmp_path}:{host.ENVIRONMENT['PATH']}"}
    given = [f"{key}={value}" for key, value in environment.items()]
    return [*docker.cave.prefix, "env", f"--chdir={ROOT}", *given, "bash", "-c"]


def typed(words: list[str], command: str) -> str:
    """Return the output of a command. A failure is an error of the page."""
    done = subprocess.run([*words, command], cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_every_command_prints_what_the_page_shows(words: list[str], service: Service) -> None:
    done = 0
    for command, shown in steps(PAGE.read_text()):
        if any(word in command for word in ABSENT):
            continue
        said = typed(words, command)
        assert doctest.OutputChecker().check_output(shown, said, ALIKE), f"$ {command}\n{said}\nThe page has:\n{shown}"
        done += 1
    assert done >= 11, "the page has too few commands"
    service.check()
