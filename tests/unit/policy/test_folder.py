"""Tests of the policies' folder: which files are read, who may write it, and that no reading mixes two states."""

from __future__ import annotations

import errno
import gc
import os
import threading
import tracemalloc
import weakref
from pathlib import Path

import pytest

from fgpu_ebpf.api import health
from fgpu_ebpf.policy import folder as policy_folder
from fgpu_ebpf.policy import trusted_file
from fgpu_ebpf.policy.folder import PolicyFolder
from fgpu_ebpf.snapshot import Fields, PoliciesView, Snapshot
from tests.unit import policy_kit as kit
from tests.unit.policy.configmap_kit import ConfigMap
from tests.unit.root_kit import needs_root

as_root = needs_root("only files that belong to root are accepted")


def folder(path: Path, **settings) -> PolicyFolder:
    return PolicyFolder(path, **{"root_only": False, "settle_seconds": 0, **settings})


def names(reading):
    return [policy.name for policy in reading.policies.policies]


def errors(reading):
    assert reading.policies is None
    return [str(error) for error in reading.errors]


def test_doctor_names_the_next_step_if_there_is_no_policy(tmp_path):
    found = policy_folder.check(tmp_path / "none")
    assert (found.ok, found.found) == (True, f"0 in {tmp_path}/none: {policy_folder.NEXT_STEP}")
    for count in (0, 1):
        shown = Snapshot(1.0, policies=PoliciesView(True, 1.0, count, ()))
        (found,) = [one for one in health.checks(Fields(shown)) if one.name == "policies"]
        assert found.ok
        assert ("fgpu setup docker --memory 8GiB" in found.found) == (not count)


def test_files_are_read_in_lexical_order_and_documents_in_their_own(tmp_path):
    (tmp_path / "20-b.yml").write_text(kit.text("c"))
    (tmp_path / "10-a.yaml").write_text(kit.text("b") + kit.text("a"))
    (tmp_path / "9.yaml").write_text(kit.text("d"))
    assert names(folder(tmp_path).read()) == ["b", "a", "c", "d"]


def test_files_of_editors_are_ignored(tmp_path):
    for name in (".a.yaml.swp", ".#a.yaml", "a.yaml~", "#a.yaml#", "a.yaml.bak", "4913", ".hidden.yaml", "README"):
        (tmp_path / name).write_text("nonsense")
    (tmp_path / "a.yaml").write_text(kit.text("a"))
    assert names(folder(tmp_path).read()) == ["a"]


def test_a_missing_folder_means_no_policies_unless_it_existed_before(tmp_path):
    absent = folder(tmp_path / "policy.d")
    assert names(absent.read()) == []
    assert errors(absent.read(may_be_missing=False)) == [
        f"{tmp_path}/policy.d: does not exist: the last policies stay in force; "
        "create the folder again (an empty folder: no policies)"
    ]


def test_one_invalid_file_refuses_the_set_and_errors_name_their_files(tmp_path):
    (tmp_path / "a.yaml").write_text(kit.text("a"))
    (tmp_path / "b.yaml").write_text(kit.text("b", "{}"))
    (tmp_path / "c.yaml").write_text("x")
    found = errors(folder(tmp_path).read())
    assert [line.partition(": ")[0] for line in found] == [f"{tmp_path}/b.yaml:5", f"{tmp_path}/c.yaml:1"]


def test_a_duplicate_name_is_refused_at_the_second_policy(tmp_path):
    (tmp_path / "a.yaml").write_text(kit.text("x"))
    (tmp_path / "b.yaml").write_text(kit.text("y") + kit.text("x"))
    assert errors(folder(tmp_path).read()) == [
        f"{tmp_path}/b.yaml:7: metadata.name: the name x is taken by {tmp_path}/a.yaml:2: choose another name"
    ]


def test_an_entry_that_is_no_regular_file_is_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").mkdir()
    (tmp_path / "c.yaml").symlink_to("/dev/zero")
    (tmp_path / "d.yaml").symlink_to("nowhere")
    found = errors(folder(tmp_path).read())
    assert [line.removeprefix(str(tmp_path)) for line in found] == [
        "/a.yaml: is not a regular file: remove it",
        "/b.yaml: is not a regular file: remove it",
        "/c.yaml: is not a regular file: remove it",
        "/d.yaml: cannot be read: No such file or directory",
    ]


def test_compiled_patterns_of_removed_policies_are_freed(tmp_path):
    (tmp_path / "a.yaml").write_text(kit.text("a", "{selector: {cgroup: first/*}}"))
    reading = folder(tmp_path).read()
    known = weakref.ref(reading.policies.policies[0].selector.cgroup._compiled)
    assert known()
    del reading
    gc.collect()
    assert not known()


def test_a_file_of_a_gigabyte_is_refused_unread(tmp_path):
    with open(tmp_path / "a.yaml", "wb") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    assert errors(folder(tmp_path).read()) == [f"{tmp_path}/a.yaml: is larger than 1 MiB: split it"]
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_files_and_policies_are_bounded(tmp_path):
    for at in range(5):
        (tmp_path / f"{at}.yaml").write_text("".join(kit.text(f"p{at}-{n}") for n in range(240)))
    assert "more than 1,000 policies" in errors(folder(tmp_path).read())[0]
    for at in range(300):
        (tmp_path / f"{at}.yaml").write_text("")
    assert "more than 256 files" in errors(folder(tmp_path).read())[0]


# -- permissions --------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """Return a folder that only root may write."""
    place = tmp_path / "fgpu/policy.d"
    place.mkdir(parents=True, mode=0o755)
    (place / "a.yaml").write_text(kit.text("a"))
    for path in (place.parent, place, place / "a.yaml"):
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
    return place


@as_root
def test_a_file_that_only_root_may_write_is_read(own):
    assert names(folder(own, root_only=True).read()) == ["a"]


@as_root
@pytest.mark.parametrize(
    ("inner", "mode", "owner"),
    [("a.yaml", 0o664, 0), ("a.yaml", 0o646, 0), ("a.yaml", 0o644, 1000), (".", 0o775, 0), (".", 0o1777, 0),
     (".", 0o755, 1000), ("..", 0o777, 0), ("..", 0o755, 1000)],
)  # fmt: skip
def test_a_policy_file_is_refused_if_others_may_write_the_file_or_its_folders(own, inner, mode, owner):
    path = own / inner
    os.chmod(path, mode)
    os.chown(path, owner, -1)
    (error,) = errors(folder(own, root_only=True).read())
    assert "users other than root" in error
    assert f"chown root {os.path.realpath(path)}" in error
    assert names(folder(own).read()) == ["a"]


@as_root
def test_a_link_to_a_file_in_a_folder_that_others_may_write_is_refused(own, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    theirs.chmod(0o777)
    (theirs / "x.yaml").write_text(kit.text("b"))
    (own / "b.yaml").symlink_to(theirs / "x.yaml")
    (error,) = errors(folder(own, root_only=True).read())
    assert error.startswith(f"{own}/b.yaml: is in {theirs}, which users other than root may write")


@as_root
def test_an_outer_sticky_folder_and_a_read_only_mount_are_accepted(own, monkeypatch):
    own.parent.chmod(0o1777)
    assert names(folder(own, root_only=True).read()) == ["a"]
    own.chmod(0o777)
    assert errors(folder(own, root_only=True).read())
    monkeypatch.setattr(trusted_file, "read_only", lambda _: True)  # as a ConfigMap's volume is mounted
    assert names(folder(own, root_only=True).read()) == ["a"]


# -- concurrent changes --------------------------------------------------------------------------------------------


def test_a_continuously_changing_folder_is_never_read_in_part(tmp_path, scale):
    place = ConfigMap(tmp_path / "policy.d", 4)
    end = threading.Event()

    def change() -> None:
        for at in range(1, 1_000_000):
            if end.wait(0.002):
                return
            place.swap(f"v{at}")

    writer = threading.Thread(target=change)
    writer.start()
    seen = set()
    try:
        for _ in range(scale(100, 500, 10_000)):
            reading = folder(place.path).read()
            if reading.policies is None:
                assert [error.text for error in reading.errors] == [policy_folder.CHANGING]
                continue
            versions = {name.partition("-")[0] for name in names(reading)}
            assert len(versions) == 1, names(reading)
            assert len(reading.policies.policies) == 4
            seen |= versions
    finally:
        end.set()
        writer.join()
    assert len(seen) > 10  # the folder did change


def test_a_file_is_not_read_while_it_is_written(tmp_path):
    (tmp_path / "a.yaml").write_text(kit.text("a"))
    later = threading.Timer(0.05, lambda: (tmp_path / "a.yaml").open("a").write(kit.text("b")))
    later.start()
    assert names(folder(tmp_path, settle_seconds=1.0).read()) == ["a", "b"]
    later.join()


def test_a_file_that_is_opened_and_still_empty_does_not_mean_no_policies(tmp_path):
    (tmp_path / "a.yaml").touch()
    later = threading.Timer(0.4, lambda: (tmp_path / "a.yaml").write_text(kit.text("a")))
    later.start()
    assert names(folder(tmp_path, settle_seconds=0.1).read()) == ["a"]
    later.join()
    (tmp_path / "b.yaml").touch()
    assert names(folder(tmp_path, settle_seconds=0.01).read()) == ["a"], "some files are empty"


def test_a_folder_that_can_be_read_only_at_times_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text(kit.text("a"))
    listdir, calls = os.listdir, []

    def fail_at_times(path):
        calls.append(path)
        if len(calls) in (1, 3):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", fail_at_times)
    assert errors(folder(tmp_path).read()) == [f"{tmp_path}: cannot be read"]
    assert names(folder(tmp_path).read()) == ["a"]


def test_a_folder_that_changes_continuously_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text(kit.text("a"))
    patient = folder(tmp_path, settle_seconds=0.01)
    monkeypatch.setattr(patient, "_unsettled_seconds", lambda _: 0.01)
    assert "changes all the time" in errors(patient.read())[0]
