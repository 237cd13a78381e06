"""The last good set of policies on disk: a start uses it if the files have an error or the folder is missing."""

from __future__ import annotations

import json
import os
import select
import shutil
import threading
import time
from types import SimpleNamespace

import pytest

from fgpu_ebpf.agent.policy_reload import Policies, at_start
from fgpu_ebpf.policy import last_good
from fgpu_ebpf.policy.folder import PolicyFolder
from tests.unit.policy_kit import text
from tests.unit.root_kit import needs_root

pytestmark = needs_root("only files that belong to root are accepted")


@pytest.fixture
def place(tmp_path):
    """Return a folder with one policy, and the file in which this policy is stored."""
    folder, file = tmp_path / "policy.d", tmp_path / "state" / "policies.json"
    folder.mkdir()
    (folder / "50.yaml").write_text(text("mine", "{selector: {cgroup: a}, devices: [1], memory: {limit: 1GiB}}"))
    last_good.write(file, folder, PolicyFolder(folder, settle_seconds=0).read().policies)
    return folder, file


def damaged(folder, how):
    match how:
        case "typo":
            (folder / "60.yaml").write_text("x: [")
        case "gone":
            shutil.rmtree(folder)
        case "a file":
            shutil.rmtree(folder)
            folder.write_text("")
        case "others' file":
            (folder / "50.yaml").chmod(0o666)


@pytest.mark.parametrize("how", ["typo", "gone", "a file", "others' file"])
def test_a_start_that_cannot_read_the_policies_uses_the_last_good_ones(place, how):
    folder, file = place
    good = at_start(folder, file).reading.policies
    damaged(folder, how)
    start = at_start(folder, file)
    assert start.reading.policies is None
    assert start.reading.errors
    assert start.kept == good


def test_an_empty_folder_takes_precedence_over_the_stored_set(place):
    folder, file = place
    (folder / "50.yaml").unlink()
    start = at_start(folder, file)
    assert (start.reading.policies.policies, start.kept) == ((), None)


def test_a_host_that_never_had_the_folder_has_no_policies_and_no_error(tmp_path):
    start = at_start(tmp_path / "none", tmp_path / "state" / "policies.json")
    assert (start.reading.policies.policies, start.reading.errors, start.kept) == ((), (), None)


@pytest.mark.parametrize(
    "said",
    ["", "[", "[]", "null", "{}",
     '{"version": 2, "folder": "%s", "files": []}', '{"version": 1, "folder": "/else", "files": []}',
     '{"version": 1, "folder": "%s", "files": [["a.yaml", "x: ["]]}', '{"version": 1, "folder": "%s", "files": 3}'],
)  # fmt: skip
def test_an_invalid_stored_set_is_ignored(place, said):
    folder, file = place
    file.write_text(said.replace("%s", str(folder)))
    damaged(folder, "typo")
    assert at_start(folder, file).kept is None


def test_a_stored_set_that_users_other_than_root_may_write_is_ignored(place):
    folder, file = place
    file.chmod(0o666)
    damaged(folder, "typo")
    assert at_start(folder, file).kept is None
    file.chmod(0o644)
    os.chown(file, 4711, 4711)
    assert at_start(folder, file).kept is None


def test_a_full_disk_keeps_the_earlier_set(place, monkeypatch):
    folder, file = place
    before = file.read_text()
    (folder / "50.yaml").write_text(text("other"))
    policies = PolicyFolder(folder, settle_seconds=0).read().policies

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        last_good.write(file, folder, policies)
    assert file.read_text() == before
    assert os.listdir(file.parent) == [file.name]
    assert json.loads(before)["version"] == last_good.VERSION


class Reloads:
    """Policies of a folder, with the names in each set that the manager was given after the start, and all events."""

    def __init__(self, folder, file):
        self.names, self.events = [], []
        manager = SimpleNamespace(reload=self._reload, policies=None, policies_unknown="")
        history = SimpleNamespace(add=lambda kind, **_: self.events.append(kind))
        self.policies = Policies(folder, at_start(folder, file), manager, history, file)
        self.events.clear()

    def _reload(self, policies):
        self.names.append([policy.name for policy in policies.policies])


def test_a_late_reading_does_not_replace_a_newer_one(place):
    """The thread that watches the folder has read it before a reload, and is slow to report this reading."""
    folder, file = place
    reloads, is_read = Reloads(folder, file), threading.Event()
    watch, changed = reloads.policies._watch, reloads.policies._changed

    def late(reading):
        if threading.current_thread() is thread:
            is_read.set()
            time.sleep(0.5)
        changed(reading)

    watch._changed, thread = late, threading.Thread(target=watch.look)
    (folder / "50.yaml").rename(folder / "aside")
    thread.start()
    assert is_read.wait(30)
    (folder / "aside").rename(folder / "50.yaml")
    reloads.policies.ask()
    thread.join()
    reloads.policies.take()
    assert reloads.names == [[], ["mine"]]


def test_the_reading_of_a_reload_is_not_applied_again_by_the_thread(place):
    folder, file = place
    reloads = Reloads(folder, file)
    (folder / "60.yaml").write_text(text("other"))
    reloads.policies.ask()
    reloads.policies._watch.look()
    reloads.policies.take()
    assert (len(reloads.names), reloads.events) == (1, ["policies"])
    reloads.policies.ask()
    assert len(reloads.names) == 2, "a reload applies the files in any case"


def test_a_reading_is_applied_although_the_one_before_it_raised_an_exception(place, monkeypatch):
    folder, file = place
    reloads = Reloads(folder, file)
    (folder / "60.yaml").write_text(text("other"))
    for _ in range(2):
        reloads.policies._watch.look(always=True)

    def fails(_):
        raise OSError("a map of the kernel is full")

    with monkeypatch.context() as broken:
        broken.setattr(reloads.policies._manager, "reload", fails)
        with pytest.raises(OSError, match="full"):
            reloads.policies.take()
    assert select.select([reloads.policies], [], [], 0)[0], "the agent's loop calls take() again"
    reloads.policies.take()
    assert reloads.names == [["mine", "other"]]
    assert not select.select([reloads.policies], [], [], 0)[0]


def test_policies_that_were_not_watched_yet_can_be_stopped(place):
    Reloads(*place).policies.stop()
