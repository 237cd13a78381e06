"""Tests of versions of the shim: a process that opens the published file always gets a complete file."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fgpu_ebpf.driver import shim_store
from fgpu_ebpf.driver.shim_store import publish, retire, stable_path, stage


@pytest.fixture
def store(tmp_path) -> Path:
    return tmp_path / "state/shim"


def shim(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "built.so"
    path.write_bytes(content)
    return path


def version(tmp_path: Path, store: Path, content: bytes) -> Path:
    return stage(shim(tmp_path, content), store)


def test_a_staged_version_exists_and_is_not_published(tmp_path, store) -> None:
    staged = version(tmp_path, store, b"one")
    assert staged.read_bytes() == b"one"
    assert staged.stat().st_mode & 0o7777 == 0o755
    assert not stable_path(store).exists()
    assert shim_store.published(store) is None
    assert publish(staged) == stable_path(store)
    assert stable_path(store).read_bytes() == b"one"


def test_the_same_contents_are_the_same_file(tmp_path, store) -> None:
    first = version(tmp_path, store, b"one")
    publish(first)
    inode = first.stat().st_ino
    again = version(tmp_path, store, b"one")
    publish(again)
    assert (again, again.stat().st_ino) == (first, inode)  # the probes of this file stay
    assert not (store / "previous").exists()


def test_staging_does_not_change_the_published_version(tmp_path, store) -> None:
    publish(version(tmp_path, store, b"one"))
    staged = version(tmp_path, store, b"two")
    assert stable_path(store).read_bytes() == b"one"
    publish(staged)
    assert stable_path(store).read_bytes() == b"two"


def test_a_damaged_version_is_staged_again_as_another_file(tmp_path, store) -> None:
    staged = version(tmp_path, store, b"one")
    with open(staged, "rb") as mapped:
        os.truncate(staged, 1)
        assert version(tmp_path, store, b"one").read_bytes() == b"one"
        assert os.fstat(mapped.fileno()).st_ino != staged.stat().st_ino  # the mapped file keeps its contents


def test_a_folder_at_the_path_of_a_version_is_replaced_by_the_version(tmp_path, store) -> None:
    staged = version(tmp_path, store, b"one")
    staged.unlink()
    staged.mkdir()
    assert version(tmp_path, store, b"one").read_bytes() == b"one"


def test_a_version_that_is_not_staged_cannot_be_published(tmp_path, store) -> None:
    publish(version(tmp_path, store, b"one"))
    with pytest.raises(FileNotFoundError):
        publish(store / "0123456789abcdef" / "libfgpu.so")
    assert stable_path(store).read_bytes() == b"one"


def test_a_full_disk_changes_no_version(tmp_path, store, monkeypatch) -> None:
    publish(version(tmp_path, store, b"one"))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        version(tmp_path, store, b"two")
    monkeypatch.undo()
    assert stable_path(store).read_bytes() == b"one"
    assert not list(store.rglob(".*")), "a half-written file was kept"


def test_only_unused_versions_are_retired(tmp_path, store) -> None:
    versions = [version(tmp_path, store, f"version {n}".encode()) for n in range(5)]
    for staged in versions:
        publish(staged)
    mapped = os.stat(versions[1])
    gone = retire(store, {(mapped.st_dev, mapped.st_ino)})
    assert sorted(gone) == sorted([versions[0].parent.name, versions[2].parent.name])
    assert [v.exists() for v in versions] == [False, True, False, True, True]
    assert retire(store, set()) == [versions[1].parent.name]
    assert stable_path(store).read_bytes() == b"version 4"
    assert retire(tmp_path / "nothing", set()) == []


def test_a_downgrade_publishes_the_older_version(tmp_path, store) -> None:
    one, two = (version(tmp_path, store, text) for text in (b"one", b"two"))
    publish(one)
    publish(two)
    publish(one)
    assert stable_path(store).read_bytes() == b"one"
    assert retire(store, set()) == []


READER = """
import sys
path, wanted, reads = sys.argv[1], {b"1" * 65536, b"2" * 65536}, 0
print("ready", flush=True)
while True:
    with open(path, "rb") as file:
        if file.read() not in wanted:
            sys.exit("half a shim")
    reads += 1
    if reads % 1009 == 0:
        print(reads, flush=True)
"""


def test_readers_get_the_old_or_the_new_version(tmp_path, store, scale) -> None:
    versions = [version(tmp_path, store, digit * 65536) for digit in (b"1", b"2")]
    publish(versions[0])
    command = [sys.executable, "-c", READER, stable_path(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        assert reader.stdout
        assert reader.stdout.readline() == b"ready\n"
        for number in range(scale(101, 1009, 10007)):
            publish(versions[number % 2])
        assert reader.poll() is None, "a reader found no shim, or half of one"
        assert reader.stdout.readline(), "the reader has read nothing"
        reader.kill()


def test_every_recorded_version_counts_as_genuine_and_the_record_is_bounded(tmp_path, store, monkeypatch) -> None:
    """Images have copies of versions, and containers keep removed versions mapped."""
    for content in (b"one", b"two", b"three", b"two"):
        publish(version(tmp_path, store, content))
    assert retire(store, set()), "no version was removed"
    assert len(shim_store.files(store)) == 2
    mine = shim(tmp_path, b"mine")
    known = shim_store.genuine(mine, store)
    assert known == {hashlib.sha256(text).hexdigest(): len(text) for text in (b"one", b"two", b"three", b"mine")}
    assert shim_store.genuine(mine) == {hashlib.sha256(b"mine").hexdigest(): 4}
    (store / shim_store.VERSIONS).write_text("nonsense")
    assert set(known) > set(shim_store.genuine(mine, store)) > {hashlib.sha256(b"mine").hexdigest()}
    monkeypatch.setattr(shim_store, "MOST_VERSIONS", 3)
    for n in range(10):
        version(tmp_path, store, b"%d" % n)
    assert len((store / shim_store.VERSIONS).read_text().splitlines()) == 3
    assert shim_store.remove(store, set())
    assert not list(store.iterdir())


# -- a store that cannot be written


def a_shim(tmp_path: Path, text: str = "newer") -> Path:
    shim = tmp_path / f"{text}.so"
    shim.write_text(text)
    return shim


def test_a_release_uses_the_package_s_file_if_nothing_is_published_and_the_store_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    shim = a_shim(tmp_path)
    release = shim_store.Release(shim, tmp_path / "file/store")
    assert (release.file, release.files(), release.publish()) == (shim, [shim], shim)
    assert "cannot be put into" in release.failed_checks()["store"].found


def test_a_release_uses_the_published_file_if_the_store_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    older = shim_store.Release(a_shim(tmp_path, "older"), store)
    assert older.publish() == shim_store.stable_path(store)
    assert older.failed_checks() == {}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shim_store, "write_durably", full)
    newer = shim_store.Release(a_shim(tmp_path), store)
    assert newer.publish() == shim_store.stable_path(store)
    assert newer.file.read_text() == "older"
    assert "No space left" in newer.failed_checks()["store"].found


def test_a_folder_at_the_path_of_the_published_file_is_replaced_by_the_file(tmp_path: Path) -> None:
    store = tmp_path / "store"
    (store / "current/libfgpu.so").mkdir(parents=True)
    release = shim_store.Release(a_shim(tmp_path), store)
    assert release.publish().read_text() == "newer"
    assert release.failed_checks() == {}
