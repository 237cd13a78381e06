"""Tests of the replacement of a file as a whole, also if the power fails."""

from __future__ import annotations

from pathlib import Path

from fgpu_ebpf.linux import atomic_file
from fgpu_ebpf.policy import last_good
from fgpu_ebpf.policy.rules import PolicySet
from tests.unit.disk_kit import durable, recorded


def test_a_durable_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    file, calls = tmp_path / "file", recorded(monkeypatch)
    atomic_file.write(file, "text", durable=True)
    assert file.read_text() == "text"
    assert calls == durable(tmp_path / ".file.new", file)


def test_a_file_that_a_boot_removes_is_not_waited_for(tmp_path, monkeypatch):
    calls = recorded(monkeypatch)
    atomic_file.write(tmp_path / "file", "text")
    assert [name for name, *_ in calls] == ["replace"]


def test_the_last_good_policies_are_durable(tmp_path, monkeypatch):
    file, calls = tmp_path / "state/policies.json", recorded(monkeypatch)
    last_good.write(file, Path("/policies"), PolicySet((), ()))
    assert calls == durable(file.with_name(".policies.json.new"), file)
