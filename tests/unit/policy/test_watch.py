"""Tests of the thread that detects changes of the policies' folder.

The thread scans the folder once a minute in these tests, so that only an event can cause a report in time.
"""

from __future__ import annotations

import os
import queue
import shutil
import time
from pathlib import Path

import pytest

from fgpu_ebpf.policy import watch as policy_watch
from fgpu_ebpf.policy.folder import PolicyFolder
from fgpu_ebpf.policy.watch import PolicyWatch
from tests.support.wait import steadily
from tests.unit import policy_kit as kit
from tests.unit.policy.configmap_kit import ConfigMap

SECONDS = 30.0


class Readings(queue.Queue):
    """A queue of the watch's reports."""

    def __call__(self, reading) -> None:
        names = None if reading.policies is None else [p.name for p in reading.policies.policies]
        self.put((names, [error.text for error in reading.errors]))

    def next(self):
        return self.get(timeout=SECONDS)

    def next_whole(self):
        """Return the next report that is not about a file between its truncation and its write."""
        while (told := self.next()) == ([], []):
            pass
        return told

    def quiet(self) -> bool:
        try:
            return not self.get(timeout=0.5)
        except queue.Empty:
            return True


def switches(watch: PolicyWatch) -> int:
    """Return how often the thread has started to wait."""
    status = Path(f"/proc/self/task/{watch._thread.native_id}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt_switches"))


@pytest.fixture
def watches(monkeypatch):
    monkeypatch.setattr(policy_watch, "LOOK_SECONDS", 60.0)
    return []


@pytest.fixture
def watch(watches):
    """Return watch(path), which returns the reports about a folder from then on."""

    def begin(path) -> Readings:
        folder, readings = PolicyFolder(path, root_only=False, settle_seconds=0.01), Readings()
        watches.append(PolicyWatch(folder, folder.read(), readings))
        watches[-1].start()
        return readings

    yield begin
    for one in watches:
        one.stop()


def test_only_changes_are_reported(tmp_path, watch):
    (tmp_path / "a.yaml").write_text(kit.text("a"))
    readings = watch(tmp_path)
    (tmp_path / "README").write_text("not a policy")
    assert readings.quiet()
    (tmp_path / "b.yaml").write_text(kit.text("b"))
    assert readings.next() == (["a", "b"], [])
    (tmp_path / "a.yaml").unlink()
    assert readings.next() == (["b"], [])


def test_an_invalid_set_is_reported_without_policies_and_then_a_valid_one(tmp_path, watch):
    (tmp_path / "a.yaml").write_text(kit.text("a"))
    readings = watch(tmp_path)
    (tmp_path / "a.yaml").write_text(kit.text("a", "{selector: {cgroup: a}, mode: x}"))
    assert readings.next_whole() == (None, ["'x' is none of observe, enforce: write one of these values"])
    (tmp_path / "a.yaml").write_text(kit.text("c"))
    assert readings.next_whole() == (["c"], [])


def test_a_folder_that_is_created_later_is_found(tmp_path, watch):
    readings = watch(tmp_path / "etc/fgpu/policy.d")
    (tmp_path / "etc/fgpu/policy.d").mkdir(parents=True)
    assert readings.next() == ([], [])
    (tmp_path / "etc/fgpu/policy.d/a.yaml").write_text(kit.text("a"))
    assert readings.next() == (["a"], [])


def test_a_removed_folder_is_reported_as_an_error_and_a_new_folder_is_read(tmp_path, watch):
    place = tmp_path / "policy.d"
    place.mkdir()
    (place / "a.yaml").write_text(kit.text("a"))
    readings = watch(place)
    shutil.rmtree(place)
    told = readings.next()
    while told == ([], []):  # the file disappeared before the folder
        told = readings.next()
    assert told[0] is None
    assert "does not exist" in told[1][0]
    place.mkdir()
    (place / "b.yaml").write_text(kit.text("b"))
    while told[0] != ["b"]:
        told = readings.next()


def test_a_config_map_is_read_after_its_rename(tmp_path, watch):
    place = ConfigMap(tmp_path / "policy.d", 3)
    readings = watch(place.path)
    for version in ("v1", "v2"):
        place.swap(version)
        assert readings.next() == ([f"{version}-0", f"{version}-1", f"{version}-2"], [])


def test_a_replaced_folder_is_detected(tmp_path, watch):
    place, fresh = tmp_path / "policy.d", tmp_path / "fresh"
    for folder, name in ((place, "a"), (fresh, "b")):
        folder.mkdir()
        (folder / "x.yaml").write_text(kit.text(name))
    readings = watch(place)
    place.rename(tmp_path / "old")
    fresh.rename(place)
    told = readings.next()
    assert told == (["b"], []) or readings.next() == (["b"], [])
    (place / "y.yaml").write_text(kit.text("c"))
    assert readings.next() == (["b", "c"], [])


def test_a_recreated_folder_is_watched(tmp_path, watch):
    place = tmp_path / "policy.d"
    place.mkdir()
    readings = watch(place)
    time.sleep(0.5)  # until the thread waits for events
    place.rmdir()
    place.mkdir()  # most often with the same inode
    time.sleep(0.5)
    (place / "y.yaml").write_text(kit.text("c"))
    told = readings.next()
    while told != (["c"], []):  # the folder may have been missing for a moment
        told = readings.next()


@pytest.mark.parametrize("write", ["in place", "renamed over", "linked anew"])
def test_each_kind_of_write_is_detected(tmp_path, watch, write):
    place, other = tmp_path / "policy.d/a.yaml", tmp_path / "policy.d/.new"
    place.parent.mkdir()
    for name in "ab":
        (tmp_path / name).write_text(kit.text(name))
    if write == "linked anew":
        place.symlink_to(tmp_path / "a")
    else:
        place.write_text(kit.text("a"))
    readings = watch(place.parent)
    time.sleep(0.5)  # until the thread waits for events
    if write == "in place":
        place.write_text(kit.text("b"))
    elif write == "renamed over":
        other.write_text(kit.text("b"))
        other.rename(place)
    else:
        other.symlink_to(tmp_path / "b")
        os.replace(other, place)
    assert readings.next_whole() == (["b"], [])


def test_the_folder_is_polled_without_notifications(tmp_path, watch, monkeypatch):
    def refuse(folders):
        raise OSError("no watches are left")

    monkeypatch.setattr(policy_watch, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(policy_watch, "FolderWatch", refuse)
    readings = watch(tmp_path)
    for name in "ab":
        (tmp_path / "a.yaml").write_text(kit.text(name))
        assert readings.next_whole() == ([name], [])


def test_the_watch_sleeps_without_changes(tmp_path, watch, watches):
    readings = watch(tmp_path)
    (tmp_path / "a.yaml").write_text(kit.text("a"))
    assert readings.next() == (["a"], [])
    before = switches(watches[0])

    def is_asleep() -> bool:
        nonlocal before
        last, before = before, switches(watches[0])
        return last == before and watches[0]._thread.is_alive()

    steadily(is_asleep, 0.5, what="a thread that waits for events again")
    for _ in range(5):
        (tmp_path / "a.yaml").read_text()
        os.listdir(tmp_path)
        time.sleep(0.1)
    assert switches(watches[0]) == before
