"""`fgpu setup`: what an engine's settings become, that nothing of theirs is lost, and that undo is exact."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from fgpu_ebpf.enginesetup import ENGINES, Engine, SetupError, checks, set_up, undo

HELPER = "bin/fgpu-oci"
CONTAINERD = """version = 2
# an operator's remark
root = "/srv/containerd"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "pause:3.9"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = true  # kubelet's
      BinaryName = "/usr/sbin/runc"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "/etc/containerd/certs.d"
"""
TEXTS = {
    "docker": [
        None,
        "",
        "{}",
        '{"log-level":"warn"}',
        '{\n  "debug": true,\n  "runtimes": {"crun": {"path": "crun"}}}',
    ],
    "podman": [None],
    "containerd": [
        None,
        "version = 2\n",
        CONTAINERD,
        CONTAINERD.replace('      BinaryName = "/usr/sbin/runc"\n', ""),
        CONTAINERD.split("    [plugins", 1)[0],
        "version = 3\n[plugins.'io.containerd.nri.v1.nri']\ndisable = true",
    ],
}
CASES = [(name, text) for name, texts in TEXTS.items() for text in texts]


@pytest.fixture
def helper(tmp_path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / HELPER).touch()
    return tmp_path / HELPER


@pytest.fixture(autouse=True)
def path_with_runtimes(tmp_path, monkeypatch):
    (tmp_path / "path").mkdir()
    for name in ("runc", "crun", "nvidia-container-runtime"):
        (tmp_path / "path" / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))


def engine(name: str, tmp_path: Path, text: str | None) -> Engine:
    file = tmp_path / "etc/settings"
    file.parent.mkdir(exist_ok=True)
    if text is not None:
        file.write_text(text)
        file.chmod(0o640)
    return replace(ENGINES[name], file=file)


def read(found: Engine) -> str | None:
    return found.file.read_text() if found.file.exists() else None


@pytest.mark.parametrize(("name", "text"), CASES)
def test_set_up_twice_and_undone_is_as_before(name, text, tmp_path, helper):
    found, state = engine(name, tmp_path, text), tmp_path / "state/x.json"
    assert set_up(found, helper, state)
    once = read(found)
    assert once
    assert HELPER.rsplit("/", 1)[1] in once or "fgpu-runtime" in once
    assert not set_up(found, helper, state)
    assert read(found) == once
    assert undo(found, state)
    assert read(found) == text
    assert text is None or found.file.stat().st_mode & 0o777 == 0o640
    assert not undo(found, state)
    assert read(found) == text
    assert [p.name for p in found.file.parent.iterdir()] == ([] if text is None else ["settings"])


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, t in CASES if t])
def test_what_others_change_meanwhile_stays(name, text, tmp_path, helper):
    found, state = engine(name, tmp_path, text), tmp_path / "x.json"
    set_up(found, helper, state)
    now = read(found)
    assert now
    if name == "docker":
        found.file.write_text(json.dumps({**json.loads(now), "data-root": "/srv"}))
        want = {**json.loads(text), "data-root": "/srv"}
        assert undo(found, state)
        assert json.loads(read(found) or "") == want
    else:
        found.file.write_text(now.replace("version = ", "oom_score = 7\nversion = "))
        want = {**tomllib.loads(text), "oom_score": 7}
        assert undo(found, state)
        assert tomllib.loads(read(found) or "") == want


@pytest.mark.parametrize("name", ["docker", "containerd"])
def test_without_our_notes_too(name, tmp_path, helper):
    """The state went with /var/lib: our lines still go, whatever stands beside them."""
    text = '{"debug": true}' if name == "docker" else CONTAINERD
    found, state = engine(name, tmp_path, text), tmp_path / "x.json"
    set_up(found, helper, state)
    state.unlink()
    assert not set_up(found, helper, state), "it is set up"
    assert undo(found, state)
    parse = json.loads if name == "docker" else tomllib.loads
    assert parse(read(found) or "") == parse(text)


def test_a_file_that_is_no_settings_is_left_alone(tmp_path, helper):
    for name, text in (("docker", "{"), ("docker", "[]"), ("containerd", "version = ")):
        found = engine(name, tmp_path, text)
        with pytest.raises(SetupError):
            set_up(found, helper, tmp_path / "x.json")
        assert read(found) == text
        assert not (tmp_path / "x.json").exists()


def test_a_link_stays_one(tmp_path, helper):
    found = engine("docker", tmp_path, None)
    (tmp_path / "real.json").write_text("{}")
    found.file.symlink_to(tmp_path / "real.json")
    assert set_up(found, helper, tmp_path / "x.json")
    assert found.file.is_symlink()
    assert undo(found, tmp_path / "x.json")
    assert (tmp_path / "real.json").read_text() == "{}"


def test_a_full_disk_changes_nothing(tmp_path, helper, monkeypatch):
    found = engine("docker", tmp_path, "{}")

    def full(*_):
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        set_up(found, helper, tmp_path / "x.json")
    assert read(found) == "{}"
    assert [p.name for p in found.file.parent.iterdir()] == ["settings"]


def test_doctor_says_whether_it_still_is_so(tmp_path, helper):
    found, state = engine("docker", tmp_path, "{}"), tmp_path / "state"
    assert list(checks(state)) == []
    set_up(found, helper, state / "docker.json")
    (check,) = checks(state)
    assert (check.name, check.ok) == ("docker", True)
    found.file.write_text("{}")
    (check,) = checks(state)
    assert not check.ok
    assert check.mend == "fgpu setup docker, or --undo"
    undo(found, state / "docker.json")
    assert list(checks(state)) == []


# -- what it becomes -----------------------------------------------------------------------------------------------


def test_docker_puts_us_before_the_default_runtime(tmp_path, helper):
    nvidia = {"path": "nvidia-container-runtime", "runtimeArgs": ["--x"]}
    text = json.dumps({"a": 1, "runtimes": {"nvidia": nvidia}, "default-runtime": "nvidia", "z": [2**60]})
    found = engine("docker", tmp_path, text)
    set_up(found, helper, tmp_path / "x.json")
    settings = json.loads(read(found) or "")
    real = str(tmp_path / "path/nvidia-container-runtime")
    ours = {"path": str(helper), "runtimeArgs": ["runtime", real, "--x"]}
    assert settings == {"a": 1, "runtimes": {"nvidia": nvidia, "fgpu": ours}, "default-runtime": "fgpu", "z": [2**60]}
    assert next(iter(settings)) == "a", "in the order in which it was written"


@pytest.mark.parametrize(
    "text",
    [
        '{"default-runtime": "kata", "runtimes": {"kata": {"runtimeType": "io.containerd.kata.v2"}}}',
        '{"default-runtime": "fgpu"}',
        '{"runtimes": []}',
    ],
)
def test_docker_runtimes_that_cannot_be_ours(text, tmp_path, helper):
    found = engine("docker", tmp_path, text)
    with pytest.raises(SetupError):
        set_up(found, helper, tmp_path / "x.json")
    assert read(found) == text


@pytest.mark.parametrize("text", TEXTS["containerd"])
def test_containerd_changes_one_value(text, tmp_path, helper):
    found = engine("containerd", tmp_path, text)
    set_up(found, helper, tmp_path / "x.json")
    before, after = tomllib.loads(text or "version = 2"), tomllib.loads(read(found) or "")
    plugin = "io.containerd.cri.v1.runtime" if after["version"] == 3 else "io.containerd.grpc.v1.cri"
    runtime = after["plugins"][plugin]["containerd"]["runtimes"]["runc"]
    assert runtime["runtime_type"] == "io.containerd.runc.v2"
    link = Path(runtime["options"].pop("BinaryName"))
    assert link == helper.with_name("fgpu-runtime-runc")
    assert os.readlink(link) == "fgpu-oci"
    was = before.get("plugins", {}).get(plugin, {}).get("containerd", {}).get("runtimes", {}).get("runc", {})
    assert runtime["options"] == {k: v for k, v in was.get("options", {}).items() if k != "BinaryName"}
    assert {k: v for k, v in after.items() if k != "plugins"} == {k: v for k, v in before.items() if k != "plugins"}


def test_podman_gets_a_hook_of_its_own(tmp_path, helper):
    found = engine("podman", tmp_path, None)
    set_up(found, helper, tmp_path / "x.json")
    hook = json.loads(read(found) or "")
    assert hook["stages"] == ["precreate"]
    assert hook["hook"] == {"path": str(helper), "args": ["fgpu-oci", "precreate"]}
    assert hook["when"] == {"always": True}
