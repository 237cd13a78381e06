"""Tests of a process's view of the gatekeeper's folder, with mounts of each kind in separate namespaces."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fgpu_ebpf.driver.bypass_reason import Reason, reason
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.workloads import shim_mounts
from fgpu_ebpf.workloads.shim_mounts import BESIDE, FOLDER, LIST, Mount, is_mounted, mount_of, one_of_each_namespace
from tests.support.wait import eventually
from tests.unit.root_kit import needs_root

as_root = needs_root("it enters the namespaces of another process")

ROOT = Path(__file__).parents[3]
SHIM = ROOT / "build/shim/libfgpu.so"
# $1: the agent's folder on the host. /etc and /var/lib are those of a container.
CONTAINER = """
mount -t tmpfs none /mnt
mkdir /mnt/agent
mount --bind "$1" /mnt/agent
cp /etc/ld.so.cache /mnt
mount -t tmpfs none /etc
cp /mnt/ld.so.cache /etc
mount -t tmpfs none /var/lib
mount -t tmpfs none /run
mkdir -p /run/fgpu/shim /var/lib/fgpu/run
touch /etc/ld.so.preload
"""
GIVEN = f"mount --bind /mnt/agent/shim {FOLDER}\n"
ALSO_BESIDE = f"mount --bind /mnt/agent/shim {BESIDE}\n"
LISTED = f"mount --bind /mnt/agent/list {LIST}\n"
OVER_RUN = "mount -t tmpfs none /run\n"
WITH_LINE_ENDS = 'd="/mnt/$(printf "a\\r\\r\\302\\205b")"; mkdir "$d"; mount -t tmpfs none "$d"\n'
REMOVED = "rmdir /mnt/agent/shim\n"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the agent's folder, with the gatekeeper's folder `shim` and a preload list in it."""
    (tmp_path / "shim").mkdir()
    (tmp_path / "list").touch()
    own = shim_mounts._device_of
    monkeypatch.setattr(shim_mounts, "_device_of", lambda folder: own(tmp_path if str(folder) == FOLDER else folder))
    return tmp_path


@pytest.fixture
def program(host: Path) -> Iterator[Callable[[str], int]]:
    """Return a function that starts a program in a container, after further shell commands, and returns its pid."""
    started: list[subprocess.Popen[bytes]] = []

    def start(more: str) -> int:
        script = f"{CONTAINER}{more}echo up; LD_PRELOAD={SHIM} exec cat"
        command = ["unshare", "--map-root-user", "--mount", "sh", "-ec", script, "sh", str(host)]
        started.append(subprocess.Popen(command, stdin=-1, stdout=-1))
        assert started[-1].stdout
        assert started[-1].stdout.readline() == b"up\n"
        return started[-1].pid

    yield start
    for process in started:
        process.communicate(timeout=30)


@pytest.mark.parametrize(
    ("more", "kind", "why"),
    [
        ("", Mount.NONE, Reason.UNUSED),
        (OVER_RUN, Mount.NONE, Reason.UNUSED),
        (GIVEN, Mount.LIVE, Reason.UNUSED),
        (WITH_LINE_ENDS + GIVEN, Mount.LIVE, Reason.UNUSED),
        (GIVEN + REMOVED, Mount.REMOVED, Reason.STALE_MOUNT),
        (GIVEN + OVER_RUN, Mount.HIDDEN, Reason.RUN_HIDDEN),
        (f"{GIVEN}mount -t tmpfs none /run/fgpu\n", Mount.HIDDEN, Reason.RUN_HIDDEN),
        (LISTED, Mount.HIDDEN, Reason.RUN_HIDDEN),
        (f"{GIVEN}{LISTED}mv /run/fgpu /run/other\n", Mount.HIDDEN, Reason.RUN_HIDDEN),
        (GIVEN + ALSO_BESIDE + OVER_RUN, Mount.LIVE, Reason.UNUSED),
        (GIVEN + ALSO_BESIDE + OVER_RUN + REMOVED, Mount.REMOVED, Reason.STALE_MOUNT),
        (f"{GIVEN}{OVER_RUN}mkdir -p {FOLDER}\n{GIVEN}", Mount.LIVE, Reason.UNUSED),
    ],
)
def test_each_kind_of_mount_is_recognized(program: Callable[[str], int], more: str, kind: Mount, why: Reason) -> None:
    pid = program(more)
    assert mount_of(pid) is kind

    def has_shim() -> bool:
        """Return whether the loader has mapped the shim's code, which follows the shim's first mapping."""
        return re.search(r" r-xp .*libfgpu\.so", Path(f"/proc/{pid}/maps").read_text()) is not None

    eventually(has_shim, 5, "the program in place of its shell")
    assert reason(pid) is why


def test_a_program_that_uses_the_host_s_folder_itself_has_no_mount(program: Callable[[str], int], host: Path) -> None:
    """`fgpu run` mounts only the list."""
    pid = program(f"{LISTED}umount /run\nmount --bind /mnt/agent /run\n")
    assert mount_of(pid) is Mount.NONE


def test_a_hidden_folder_counts_as_mounted(program: Callable[[str], int], host: Path) -> None:
    """A detach must not remove such a folder: programs of the container would find a removed folder beside the shim."""
    assert not is_mounted(host / "shim")
    program(ALSO_BESIDE + OVER_RUN)
    assert is_mounted(host / "shim")


def test_a_mount_of_any_user_does_not_hide_the_lists_of_others(
    program: Callable[[str], int], host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (host / "ld.so.preload").touch()
    pids = [program(f"{WITH_LINE_ENDS}{more}") for more in ("", f"mount --bind /mnt/agent/ld.so.preload {LIST}\n")]
    monkeypatch.setattr(procfs, "pids", lambda: pids)
    assert shim_mounts.mounted_lists(host) == {LIST}
    assert [procfs.has_mount(pid, LIST) for pid in pids] == [False, True]


@as_root
def test_one_process_of_each_namespace_is_examined(program: Callable[[str], int]) -> None:
    one, other = program(""), program("")
    with subprocess.Popen(["nsenter", f"--target={one}", "--user", "--mount", "cat"], stdin=-1) as beside:
        eventually(lambda: Path(f"/proc/{beside.pid}/comm").read_text() == "cat\n", 5, "another program there")
        assert list(one_of_each_namespace([one, beside.pid, other, one])) == [one, other]
        beside.communicate(timeout=30)


@as_root
def test_another_process_of_a_namespace_follows_one_that_has_exited(program: Callable[[str], int]) -> None:
    one = program("")
    with subprocess.Popen(["nsenter", f"--target={one}", "--user", "--mount", "cat"], stdin=-1) as beside:
        eventually(lambda: Path(f"/proc/{beside.pid}/comm").read_text() == "cat\n", 5, "another program there")
        found = one_of_each_namespace([beside.pid, one])
        assert next(found) == beside.pid
        beside.communicate(timeout=30)
        assert list(found) == [one]


def test_the_shim_and_the_engines_use_the_same_path() -> None:
    assert f'PLACE("{BESIDE}"), PLACE(FGPU_SOCKET_DIR)' in (ROOT / "shim/link/hello.c").read_text()
    assert f'"{BESIDE}"' in (ROOT / "oci/edits.c").read_text()
