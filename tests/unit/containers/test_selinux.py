"""Tests of `fgpu doctor` with an enforcing SELinux: the rights that its policy refuses to containers, and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgpu_ebpf.containers import selinux

CLASSES = {
    "file": ("ioctl", "read", "write", "getattr", "map", "open", "execute"),
    "dir": ("read", "search"),
    "sock_file": ("write",),
    "unix_stream_socket": ("read", "connectto"),
    "fd": ("use",),
    "bpf": ("map_create", "map_read", "map_write"),
}


@pytest.fixture
def run_dir(tmp_path, monkeypatch) -> Path:
    """Return the agent's folder after a setup. The label of a file is its name; the gatekeeper's label is `domain`."""
    folder = tmp_path / "run"
    (folder / "shim").mkdir(parents=True)
    (folder / "shim/shim.sock").touch()
    (folder / "containers").write_text("shim /s/libfgpu.so\nsocket /s\npreload /s/list\n")
    monkeypatch.setattr(selinux, "label_of", lambda place: place.name)
    monkeypatch.setattr(selinux, "_gatekeeper", lambda _: "domain")
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Return a selinuxfs that answers no queries: see `policy`."""
    found = tmp_path / "selinux"
    for index, (kind, rights) in enumerate(CLASSES.items(), 1):
        (found / "class" / kind / "perms").mkdir(parents=True)
        (found / "class" / kind / "index").write_text(f"{index}")
        for bit, right in enumerate(rights, 1):
            (found / "class" / kind / "perms" / right).write_text(f"{bit}")
    (found / "enforce").write_text("1")
    return found


@pytest.fixture
def policy(monkeypatch) -> dict[tuple[str, str], int]:
    """Return a map from label and class to the rights that the kernel grants. Other pairs have all rights."""
    given: dict[tuple[str, str], int] = {}

    def ask(_, question):
        source, target, number = question.split()
        assert source == "system_u:system_r:container_t:s0"
        kind = list(CLASSES)[int(number) - 1]
        return f"{given.get((target, kind), 0xFFFFFFFF):x} ffffffff 0 ffffffff 5 0"

    monkeypatch.setattr(selinux, "ask", ask)
    return given


def test_a_disabled_selinux_is_not_reported_and_a_permissive_one_is_no_error(root, run_dir, policy):
    assert list(selinux.checks(run_dir, root / "nothing")) == []
    (root / "enforce").write_text("0")
    policy["libfgpu.so", "file"] = 0
    (check,) = selinux.checks(run_dir, root)
    assert (check.ok, check.found) == (True, "permissive: SELinux refuses nothing")


def test_granted_permissions_are_no_error(root, run_dir, policy):
    (check,) = selinux.checks(run_dir, root)
    assert (check.name, check.ok) == ("selinux", True)


@pytest.mark.parametrize(
    ("label", "kind", "given", "said"),
    [
        ("libfgpu.so", "file", 0b0101010, "/s/libfgpu.so (map, execute)"),  # read, getattr, open
        ("list", "file", 0b1011111, "/s/list (open)"),
        ("shim", "dir", 0b01, "the shim's folder (search)"),
        ("shim.sock", "sock_file", 0, "the shim's socket (write)"),
        ("domain", "unix_stream_socket", 0b01, "the gatekeeper (connectto)"),
        ("domain", "fd", 0, "the gatekeeper (use)"),
        ("domain", "bpf", 0b011, "the gatekeeper (map_write)"),
    ],
)
def test_only_refused_permissions_are_named(root, run_dir, policy, label, kind, given, said):
    policy[label, kind] = given
    (check,) = selinux.checks(run_dir, root)
    assert not check.ok
    assert check.found == f"containers are denied access to {said}"
    assert "restorecon" in check.fix
    assert "semodule -i fgpu.cil" in check.fix


def test_a_policy_without_containers_is_no_error(root, run_dir, policy, monkeypatch):
    def unknown(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(selinux, "ask", unknown)
    (check,) = selinux.checks(run_dir, root)
    assert check.ok
    assert "cannot be queried about containers" in check.found


def test_absent_files_need_no_permission(root, tmp_path):
    """The agent's folder has no files, and no gatekeeper runs."""
    assert list(selinux.needs(tmp_path)) == []
