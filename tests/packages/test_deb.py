"""The Debian package on a fresh host: two commands to enforcement, and nothing left after removal."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import fresh_host
from tests.support import packages as kit


@pytest.fixture(autouse=True)
def purged(host: fresh_host.Host) -> Iterator[None]:
    """Purge fgpu as after a boot, so that the next test finds a host without it."""
    yield
    host.stop()
    boot(host)
    host.apt("purge", "fgpu", check=False)
    shutil.rmtree(host.root / "var/lib/fgpu", ignore_errors=True)


def boot(host: fresh_host.Host) -> None:
    """Remove the mark that engines may still use the settings that were undone, as the next boot does."""
    (host.root / "run/fgpu-undone").unlink(missing_ok=True)


def assert_nothing_left(host: fresh_host.Host, before: fresh_host.Listing) -> None:
    assert host.left(before) == []
    assert host.pins() == []
    assert not list((host.root / "sys/fs/cgroup").glob("fgpu*"))
    assert not list((host.root / "run").glob("fgpu"))
    kit.eventually(lambda: not host.processes(), 5, "the end of every process")


COMPLETION = """
. /usr/share/bash-completion/completions/fgpu
COMP_WORDS=(fgpu sta) COMP_CWORD=1
_fgpu_completion fgpu
echo "${COMPREPLY[@]}"
"""


READ = {f"/usr/share/doc/fgpu/{name}" for name in ("docs/index.md", "docs/runbooks.md", "examples/agent.yaml")}
READ |= {f"/usr/share/man/man1/fgpu{name}.1.gz" for name in ("", "-status", "-policy-check")}


def test_install_enforce_purge_takes_two_commands_and_leaves_nothing(
    host: fresh_host.Host, deb: Path, tmp_path: Path
) -> None:
    settings = host.root / "etc/docker/daemon.json"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text('{"debug": true}')
    before, accounts, mounts = fresh_host.listing(host.root), host.accounts(), Path("/proc/mounts").read_text()
    begun = time.monotonic()
    host.install(deb)
    installed = time.monotonic() - begun
    started = host.start_agent(tmp_path / "log")
    print(f"installed in {installed:.1f} s, enforcing {started:.1f} s later")
    kit.assert_enforced(host, "deb")
    assert host.run("dpkg", "--verify", "fgpu").stdout == ""
    assert host.left(before), "the package installed no files"
    for_tests = host.run("grep", "-rli", "failpoint", "/usr/lib/fgpu/site/fgpu_ebpf", "/usr/bin/fgpu", check=False)
    assert (for_tests.returncode, for_tests.stdout) == (1, ""), "installed files have failpoints"
    assert host.pins()
    assert host.run("bash", "-c", COMPLETION).stdout == "status\n"
    for shell, file in (("zsh", "zsh/vendor-completions/_fgpu"), ("fish", "fish/vendor_completions.d/fgpu.fish")):
        assert (host.root / "usr/share" / file).read_text() == host.run("fgpu", "completion", shell).stdout
    assert set(host.run("dpkg", "-L", "fgpu").stdout.split()) >= READ
    host.run("fgpu", "policy", "check", "/usr/share/doc/fgpu/examples/policy.d")
    done = host.run("fgpu", "setup", "docker", "--memory", "8GiB", check=False)
    assert (done.returncode, settings.read_text()) == (1, '{"debug": true}'), "Docker is not installed here"
    assert "is not installed here" in done.stderr
    assert not host.run("ls", "/etc/fgpu/policy.d").stdout
    done = host.run("fgpu", "setup", "docker", "--memory", "8GiB", "--file", "/etc/docker/daemon.json", check=False)
    assert '"default-runtime": "fgpu"' in settings.read_text()
    assert "/etc/fgpu/policy.d/zz-docker.yaml: written" in done.stdout
    assert host.run("fgpu", "policy", "list").stdout.count("matches 0 tenants now") == 1, "the policy is not in force"
    said = host.apt("purge", "fgpu").stdout
    assert "systemctl restart docker" in said, "the purge must name the restart of Docker"
    assert settings.read_text() == '{"debug": true}'
    assert host.agent is not None
    assert host.agent.wait(60) == 0  # it removes probes of other processes on this machine one by one
    helper = ["var/lib/fgpu", *(f"var/lib/fgpu/{name}" for name in ("bin", "bin/fgpu-info", "bin/fgpu-oci"))]
    assert host.left(before) == helper, "Docker runs the helper until its restart, and nothing else may be left"
    shutil.rmtree(host.root / "var/lib/fgpu")
    assert_nothing_left(host, before)
    assert host.accounts() == accounts
    assert Path("/proc/mounts").read_text() == mounts


@contextlib.contextmanager
def in_mounts(host: fresh_host.Host, script: str) -> Iterator[None]:
    """Run a script of mounts in a mount namespace of its own, which exists until the end of the block."""
    words = ["unshare", "--mount", "sh", "-ec", f"{script}\necho mounted\nexec sleep 600"]
    with subprocess.Popen(host.command(*words), env=host.environment, text=True, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "mounted\n"
            yield
        finally:
            process.kill()


ELSEWHERE = "mount -t tmpfs elsewhere /run/fgpu\nmkdir /run/fgpu/shim\nmount --bind /run/fgpu/shim /run/fgpu/shim"


def test_a_purge_removes_the_state_of_a_dead_agent(host: fresh_host.Host, deb: Path, tmp_path: Path) -> None:
    before = fresh_host.listing(host.root)
    host.install(deb)
    host.start_agent(tmp_path / "log")
    assert host.agent is not None
    host.agent.kill()
    host.agent.wait(60)
    assert host.pins()
    (host.root / "usr/bin/fgpu").write_text("#!/bin/sh\nexit 1\n")  # the purge works without its own command
    with in_mounts(host, ELSEWHERE):  # a container of a host inside this one has another host's folder
        said = host.apt("purge", "fgpu")
    assert "detach failed: the removal goes on and deletes the limits in /sys/fs/bpf/fgpu" in said.stdout + said.stderr
    assert_nothing_left(host, before)


@pytest.mark.parametrize("place", ["/run/fgpu/shim", "/var/lib/fgpu/run"])
def test_a_purge_keeps_the_folder_that_a_container_has(host: fresh_host.Host, deb: Path, place: str) -> None:
    host.install(deb)
    folder = host.root / "run/fgpu/shim"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("agent.lock", "shim/shim.sock"):
        (host.root / "run/fgpu" / name).touch()
    with in_mounts(host, f"mkdir -p {place}\nmount --bind /run/fgpu/shim {place}"):
        (host.root / "var/lib/fgpu/bin").mkdir(parents=True, exist_ok=True)
        (host.root / "var/lib/fgpu/bin/fgpu-oci").touch()
        (host.root / "var/lib/fgpu/shim").mkdir()
        host.apt("purge", "fgpu")
    assert list((host.root / "run/fgpu").iterdir()) == [folder]
    left = sorted(path.name for path in (host.root / "var/lib/fgpu").rglob("*"))
    assert left == ["bin", "fgpu-oci"], "the engine of a running container needs the helper"
    assert not list(folder.iterdir())
    assert folder.stat().st_mode & 0o7777 == 0o1755, "programs wait for an agent"
    folder.rmdir()


def test_a_purge_keeps_the_helper_that_an_engine_may_still_use(host: fresh_host.Host, deb: Path) -> None:
    """The engine still has the settings that the removal has undone, because it was not restarted."""
    host.install(deb)
    engine, settings = host.root / "usr/bin/dockerd", host.root / "etc/docker/daemon.json"
    engine.write_text("#!/bin/sh\n")
    engine.chmod(0o755)
    host.run("fgpu", "setup", "docker")
    assert '"default-runtime": "fgpu"' in settings.read_text()
    host.apt("purge", "fgpu")
    left = {path.name for path in (host.root / "var/lib/fgpu").iterdir()}
    assert (left, (host.root / "var/lib/fgpu/bin/fgpu-oci").exists()) == ({"bin"}, True)
    engine.unlink()
    boot(host)
    host.install(deb)
    host.apt("purge", "fgpu")
    assert not (host.root / "var/lib/fgpu").exists()


def test_the_package_stays_while_a_tenant_is_parked(host: fresh_host.Host, deb: Path) -> None:
    host.install(deb)
    command = host.root / "usr/bin/fgpu"
    command.write_text("#!/bin/sh\n[ $1 != wake ] || exit 5\ntouch /asked\n")
    done = host.apt("remove", "fgpu", check=False)
    assert done.returncode != 0
    assert "tenants are parked: type `fgpu wake --all`" in done.stdout + done.stderr
    assert host.run("dpkg-query", "-W", "-f", "${Status}", "fgpu").stdout == "install ok installed"
    assert not (host.root / "asked").exists(), "something was removed"
    command.write_text("#!/bin/sh\n")
    host.apt("remove", "fgpu")


def test_the_package_stays_while_programs_share_a_device_concurrently(host: fresh_host.Host, deb: Path) -> None:
    """The root is that of the other tests."""
    host.install(deb)
    command, systemctl = host.root / "usr/bin/fgpu", host.root / "usr/bin/systemctl"
    systemctl.rename(aside := systemctl.with_name("systemctl.aside"))
    command.write_text("#!/bin/sh\ntouch /asked\n")
    systemctl.write_text('#!/bin/sh\necho "$*" | grep -q "is-active fgpu-mps"\n')
    systemctl.chmod(0o755)
    done = host.apt("remove", "fgpu", check=False)
    aside.rename(systemctl)
    assert done.returncode != 0
    assert "type `systemctl stop fgpu-mps`, then remove fgpu again" in done.stdout + done.stderr
    assert not (host.root / "asked").exists(), "something was removed"
    command.write_text("#!/bin/sh\n")
    host.apt("remove", "fgpu")


def test_a_removal_undoes_the_setup_of_slurm(host: fresh_host.Host, deb: Path) -> None:
    host.install(deb)
    policy = "/etc/fgpu/policy.d/30-slurm.yaml"
    host.run("fgpu", "setup", "slurm", "--file", policy)
    assert (host.root / policy[1:]).exists()
    done = host.apt("remove", "fgpu")
    assert "slurm.conf" in done.stdout
    assert not (host.root / policy[1:]).exists()
    assert not (host.root / "var/lib/fgpu/setup/slurm.json").exists()


def test_an_upgrade_under_load_affects_no_tenant(host: fresh_host.Host, deb: Path, tmp_path: Path) -> None:
    """One tenant is at its limit all the time, and one starts program after program."""
    host.install(deb)
    fits = f"admitted {kit.GIB - kit.CONTEXT} bytes, then CUDA_ERROR_OUT_OF_MEMORY\n"
    with contextlib.ExitStack() as old:
        old.enter_context(host.gatekeeper())
        host.start_agent(tmp_path / "old")
        holder = old.enter_context(
            host.fill("fgpu", "run", "--name", "holds", "--memory", "1GiB", "--", held_seconds=200)
        )
        old.callback(holder.kill)
        assert holder.stdout
        assert holder.stdout.readline() == fits
        with fresh_host.load(host) as said:
            host.apt("install", fresh_host.newer(deb, host.root / "tmp", tmp_path))
            assert host.agent is not None
            host.agent.terminate()
            assert host.agent.wait(60) == 0
            host.start_agent(tmp_path / "new")
            assert holder.poll() is None
            kit.eventually(lambda: kit.GIB in kit.driver_bytes(), 3, "the holder's memory")
    assert len(said) > 10
    assert set(said) == {fits}, "a program got another amount of memory"
