"""Tests of the file of overrides: unreadable entries are reported as unknown, and never treated as absent."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf.tenancy.overrides import Override, Overrides

OF_SHARE = {"share": "2gib", "share_devices": ("GPU-x",)}
ONE, TWO = Override(5, "/a", 1 << 30), Override(6, "/b", None, devices=("GPU-y",), **OF_SHARE)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "overrides.json"
    overrides = Overrides(path)
    for override in (ONE, TWO):
        overrides.put(override)
    return path


def test_a_stored_override_is_read_back(file):
    read = Overrides(file)
    assert list(read) == [ONE, TWO]
    assert not read.unknown(5)
    assert not read.unknown(7)


@pytest.mark.parametrize("text", ["", "[{", "{}", "null", "7", '["x"]', "[" * 100_000])
def test_an_invalid_file_makes_every_override_unknown(file, text):
    file.write_text(text)
    assert all(str(file) in Overrides(file).unknown(cgroup) for cgroup in (5, 6, 7))


@pytest.mark.parametrize(
    "wrong",
    [{"memory_bytes": "2GiB"}, {"memory_bytes": -1}, {"weight": 1.5}, {"priority": "urgent"}, {"share": "8gib-50pct-x"},
     {"path": None}, {"own": 1}, {"devices": [1]}, {"devices": 3}, {"share_devices": [1]}, {"limit_millionths": True}],
)  # fmt: skip
def test_an_invalid_entry_makes_only_its_cgroup_unknown(file, wrong):
    entries = json.loads(file.read_text())
    entries[0] |= wrong
    file.write_text(json.dumps(entries))
    read = Overrides(file)
    assert list(read) == [TWO]
    assert read.unknown(5)
    assert not read.unknown(6)


def test_the_devices_of_a_share_in_a_file_of_an_older_version_are_read(file):
    entries = json.loads(file.read_text())
    file.write_text(json.dumps([{key: entry[key] for key in entry if key != "share_devices"} for entry in entries]))
    (_, two) = Overrides(file)
    assert two.share_devices == two.devices == ("GPU-y",)


def test_fields_of_a_later_version_are_ignored(file):
    file.write_text(json.dumps([entry | {"colour": "blue"} for entry in json.loads(file.read_text())]))
    assert list(Overrides(file)) == [ONE, TWO]
    assert not Overrides(file).unknown(5)


def test_unknown_overrides_are_stored_and_the_old_file_is_kept(file):
    file.write_text("[{")
    read = Overrides(file)
    kept = Override(5, "/a", None, kept=read.unknown(5))
    read.settle([kept])
    assert not read.unknown(5)
    assert list(Overrides(file)) == [kept]
    assert file.with_name("overrides.json.bad").read_text() == "[{"


@given(st.binary(max_size=200))
def test_any_bytes_are_read_without_an_exception(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("any") / "overrides.json"
    file.write_bytes(data)
    Overrides(file)
