"""Tests of `fgpu setup`: the new settings of an engine. No existing setting is lost, and undo is exact."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from fgpu_ebpf.check import Check
from fgpu_ebpf.containers import engine_setup
from fgpu_ebpf.containers.engine_config import Engine, SetupError
from fgpu_ebpf.containers.engine_setup import (
    as_installed,
    check_cdi,
    checks,
    parts,
    program,
    set_up,
    unchanged,
    undo,
    where_it_is,
)
from fgpu_ebpf.containers.engines import ENGINES
from tests.unit.disk_kit import durable, recorded

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
# As `containerd config default` of 2.1 prints it, with other quotes.
CONTAINERD_3 = """version = 3

[plugins]
  [plugins.'io.containerd.cri.v1.runtime']
    [plugins.'io.containerd.cri.v1.runtime'.containerd]
      default_runtime_name = 'runc'

      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes]
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
          runtime_type = 'io.containerd.runc.v2'

          [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
            BinaryName = ''
            SystemdCgroup = true

    [plugins.'io.containerd.cri.v1.runtime'.cni]
      bin_dir = '/opt/cni/bin'
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
        CONTAINERD_3,
    ],
}
CASES = [(name, text) for name, texts in TEXTS.items() for text in texts]
CASES += [(name, text.replace("\n", "\r\n")) for name, text in CASES if text and "\n" in text]


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
    monkeypatch.setattr(engine_setup, "_RUN", tmp_path / "run")  # without this host's own daemons


def engine(name: str, tmp_path: Path, text: str | None) -> Engine:
    file = tmp_path / "etc/settings"
    file.parent.mkdir(exist_ok=True)
    if text is not None:
        file.write_bytes(text.encode())
        file.chmod(0o640)
    return replace(ENGINES[name], file=file)


def read(found: Engine) -> str | None:
    return found.file.read_bytes().decode() if found.file.exists() else None


@pytest.mark.parametrize(("name", "text"), CASES)
def test_two_set_ups_and_one_undo_leave_the_file_as_before(name, text, tmp_path, helper):
    found, state = engine(name, tmp_path, text), tmp_path / "state/x.json"
    assert set_up(found, helper, state)
    once = read(found)
    assert once
    assert str(helper.parent) in once
    assert not set_up(found, helper, state)
    assert read(found) == once
    assert undo(found, state)
    assert read(found) == text
    assert text is None or found.file.stat().st_mode & 0o777 == 0o640
    assert not undo(found, state)
    assert read(found) == text
    assert [p.name for p in found.file.parent.iterdir()] == ([] if text is None else ["settings"])
    assert not [p.name for p in helper.parent.rglob(".*")], "a half-written file beside the helper was kept"


@pytest.mark.parametrize(("name", "text"), CASES)
def test_a_setup_writes_lost_links_and_files_again(name, text, tmp_path, helper):
    """An agent writes only the helper itself again after /var/lib/fgpu was lost."""
    found, state = engine(name, tmp_path, text), tmp_path / "state/x.json"
    set_up(found, helper, state)
    once, beside = read(found), sorted(helper.parent.rglob("*"))
    shutil.rmtree(helper.parent)
    shutil.rmtree(state.parent)
    helper.parent.mkdir()
    helper.touch()
    set_up(found, helper, state)
    assert sorted(helper.parent.rglob("*")) == beside
    assert (len(beside) > 1) == (name != "docker"), "Docker's settings name the helper itself"
    assert read(found) == once
    assert state.exists(), "a removal of fgpu would remove the helper, and keep settings that name the helper"
    assert undo(found, state)
    assert "fgpu" not in (read(found) or "")


def test_undo_removes_exactly_the_empty_folders_that_setup_created(tmp_path, helper):
    """Undo removes folders that setup made, but not a folder that has other files by then."""
    found, state = engine("podman", tmp_path, None), tmp_path / "state.json"
    found = replace(found, file=tmp_path / "etc/containers/containers.conf.d/zz.conf")
    assert set_up(found, helper, state)
    found.file.unlink()  # so that setup writes the file again
    assert set_up(found, helper, state)
    assert undo(found, state)
    assert list((tmp_path / "etc").iterdir()) == []
    assert set_up(found, helper, state)
    (found.file.parent.parent / "theirs").touch()
    assert undo(found, state)
    assert [p.name for p in (tmp_path / "etc/containers").iterdir()] == ["theirs"]
    found.file.parent.mkdir()
    assert set_up(found, helper, state)
    assert undo(found, state)
    assert found.file.parent.exists(), "setup did not create this folder"


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, t in CASES if t])
def test_undo_keeps_changes_by_other_programs(name, text, tmp_path, helper):
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


def test_comments_of_an_administrator_that_begin_with_fgpu_s_mark_are_kept(tmp_path, helper):
    text = CONTAINERD.replace('runc"\n', 'runc" # fgpu: not ours\n')
    text += (
        '[a]\nb = 7 # fgpu: see ticket 12\nstate = "/s" # fgpu\n[c] # fgpu is not here\nSystemdCgroup = true # fgpu\n'
    )
    found, state = engine("containerd", tmp_path, text), tmp_path / "x.json"
    assert set_up(found, helper, state)
    state.unlink()
    assert undo(found, state)
    assert read(found) == text


@pytest.mark.parametrize("written", ["nvidia-container-runtime", "PATH/nvidia-container-runtime"])
def test_docker_s_default_runtime_that_is_named_without_a_folder_is_kept(written, tmp_path, helper):
    """An earlier version of fgpu wrote the path at which it found the runtime."""
    nvidia = {"args": [], "path": "nvidia-container-runtime"}
    text = {"default-runtime": "nvidia", "runtimes": {"nvidia": nvidia}}
    found, state = engine("docker", tmp_path, json.dumps(text)), tmp_path / "x.json"
    set_up(found, helper, state)
    settings = json.loads(read(found) or "")
    settings["runtimes"]["fgpu"]["runtimeArgs"] = ["runtime", written.replace("PATH", str(tmp_path / "path"))]
    found.file.write_text(json.dumps({**settings, "debug": True}))
    set_up(found, helper, state)
    ours = json.loads(read(found) or "")["runtimes"]["fgpu"]
    assert ours["runtimeArgs"] == ["runtime", "nvidia-container-runtime"]
    found.file.write_text(json.dumps({**settings, "debug": True}))
    assert undo(found, state)
    assert json.loads(read(found) or "") == {**text, "debug": True}


@pytest.mark.parametrize("name", ["docker", "containerd"])
def test_undo_works_without_the_state_file(name, tmp_path, helper):
    """The state file was removed with /var/lib. Undo removes the lines of setup and no others."""
    text = '{"debug": true}' if name == "docker" else CONTAINERD
    found, state = engine(name, tmp_path, text), tmp_path / "x.json"
    set_up(found, helper, state)
    state.unlink()
    assert not set_up(found, helper, state), "the engine is already set up"
    assert undo(found, state)
    parse = json.loads if name == "docker" else tomllib.loads
    assert parse(read(found) or "") == parse(text)


def test_an_invalid_settings_file_is_refused_and_stays_unchanged(tmp_path, helper):
    for name, text in (("docker", "{"), ("docker", "[]"), ("containerd", "version = ")):
        found = engine(name, tmp_path, text)
        with pytest.raises(SetupError):
            set_up(found, helper, tmp_path / "x.json")
        assert read(found) == text
        assert not (tmp_path / "x.json").exists()


def test_a_settings_file_that_is_a_link_stays_a_link(tmp_path, helper):
    found = engine("docker", tmp_path, None)
    (tmp_path / "real.json").write_text("{}")
    found.file.symlink_to(tmp_path / "real.json")
    assert set_up(found, helper, tmp_path / "x.json")
    assert found.file.is_symlink()
    assert undo(found, tmp_path / "x.json")
    assert (tmp_path / "real.json").read_text() == "{}"


def test_a_link_to_a_missing_file_stays_and_only_its_target_is_removed(tmp_path, helper):
    found, target = engine("docker", tmp_path, None), tmp_path / "real.json"
    found.file.symlink_to(target)
    assert set_up(found, helper, tmp_path / "x.json")
    assert "fgpu" in target.read_text()
    assert undo(found, tmp_path / "x.json")
    assert (found.file.is_symlink(), target.exists()) == (True, False)


def test_a_state_is_root_s_alone_and_settings_keep_mode_and_owner(tmp_path, helper, monkeypatch):
    """A state has a copy of the settings, with passwords, and names the file that an undo writes."""
    password = '{"proxies": {"http-proxy": "http://user:password@proxy"}}'
    found, state = engine("docker", tmp_path, password), tmp_path / "s"
    owner, made, whole = (1000 if os.geteuid() == 0 else os.geteuid()), list[tuple[bool, int]](), os.open
    os.chown(found.file, owner, -1)

    def noted(path, flags, mode=0o777, **more):
        if os.path.basename(path).startswith((".settings.", ".s.")):
            made.append((bool(flags & os.O_EXCL), mode))
        return whole(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", noted)
    set_up(found, helper, state)
    assert made == [(True, 0o600)] * 2
    state.chmod(0o644)  # as an earlier version has left it
    set_up(found, helper, state)
    assert (state.stat().st_mode & 0o777, state.stat().st_uid) == (0o600, os.geteuid())
    assert (found.file.stat().st_mode & 0o777, found.file.stat().st_uid) == (0o640, owner)
    undo(found, state)
    assert (found.file.stat().st_mode & 0o777, found.file.stat().st_uid) == (0o640, owner)


def test_a_link_beside_settings_in_a_user_s_folder_is_not_followed(tmp_path, helper):
    found, other = engine("docker", tmp_path, "{}"), tmp_path / "other"
    other.touch()
    (found.file.parent / f".settings.{os.getpid()}").symlink_to(other)
    set_up(found, helper, tmp_path / "s")
    assert other.read_text() == ""
    assert "fgpu" in found.file.read_text()


@pytest.mark.parametrize("damage", [b"{,", b"\xff", b"[]"])
def test_doctor_names_settings_that_are_damaged(damage, tmp_path, helper):
    found, state = engine("docker", tmp_path, "{}"), tmp_path / "states/docker.json"
    set_up(found, helper, state)
    found.file.write_bytes(damage)
    (check,) = checks(state.parent, helper)
    assert (check.ok, "fix the file first" in check.found) == (False, True)


@pytest.mark.parametrize("hidden", ["state", "settings"])
def test_doctor_names_settings_that_a_user_may_not_read(hidden, tmp_path, helper, monkeypatch):
    found, state = engine("docker", tmp_path, "{}"), tmp_path / "states/docker.json"
    set_up(found, helper, state)
    unreadable = {"state": state, "settings": found.file}[hidden]

    for name, real in (("read_text", Path.read_text), ("read_bytes", Path.read_bytes)):

        def refused(path, *words, whole=real, **more):
            if path == unreadable:
                raise PermissionError(13, "Permission denied", str(path))
            return whole(path, *words, **more)

        monkeypatch.setattr(Path, name, refused)
    (check,) = checks(state.parent, helper)
    assert (check.ok, str(unreadable) in check.found, check.fix) == (False, True, "sudo fgpu doctor")


def test_a_setup_on_a_full_disk_leaves_the_settings_unchanged(tmp_path, helper, monkeypatch):
    found = engine("docker", tmp_path, "{}")

    def full(*_):
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        set_up(found, helper, tmp_path / "x.json")
    assert read(found) == "{}"
    assert [p.name for p in found.file.parent.iterdir()] == ["settings"]


def test_settings_and_the_copy_for_undo_are_on_the_disk_before_the_rename(tmp_path, helper, monkeypatch):
    """A loss of power can leave both files empty if the order is another."""
    found, state = engine("docker", tmp_path, '{"debug": true}'), tmp_path / "x.json"
    calls = recorded(monkeypatch)
    set_up(found, helper, state)
    settings = durable(found.file.with_name(f".settings.{os.getpid()}"), found.file)
    assert calls == durable(tmp_path / f".x.json.{os.getpid()}", state) + settings
    calls.clear()
    undo(found, state)
    assert calls == settings


def test_doctor_reports_whether_the_setup_is_intact(tmp_path, helper):
    found, state = engine("docker", tmp_path, "{}"), tmp_path / "state"
    assert list(checks(state, helper)) == []
    set_up(found, helper, state / "docker.json")
    (check,) = checks(state, helper)
    assert (check.name, check.ok) == ("docker", True)
    found.file.write_text("{}")
    (check,) = checks(state, helper)
    assert not check.ok
    assert check.fix == "fgpu setup docker, or fgpu setup docker --undo"
    undo(found, state / "docker.json")
    assert list(checks(state, helper)) == []


@pytest.mark.parametrize(
    ("name", "text", "unrelated", "change"),
    [
        (
            "docker",
            '{"runtimes": {"nvidia": {"path": "nvidia"}}}',
            ("{", '{"debug": true,'),
            ('runtime": "fgpu"', 'runtime": "nvidia"'),
        ),
        (
            "containerd",
            CONTAINERD_3,
            ("version", "oom_score = 7\nversion"),
            ("default_runtime_name = 'runc'", "default_runtime_name = 'nvidia'"),
        ),
    ],
)
def test_doctor_names_a_default_runtime_that_bypasses_fgpu(name, text, unrelated, change, tmp_path, helper):
    """NVIDIA's toolkit sets a default runtime like this."""
    found, state = engine(name, tmp_path, text), tmp_path / "state"
    set_up(found, helper, state / f"{name}.json")
    for (old, new), ok in ((unrelated, True), (change, False)):
        found.file.write_text((read(found) or "").replace(old, new, 1))
        (check,) = checks(state, helper)
        assert (check.ok, "have changed since" in check.found) == (ok, not ok)
    assert set_up(found, helper, state / f"{name}.json")
    assert next(checks(state, helper)).ok


# -- the new settings ----------------------------------------------------------------------------------------------


def test_docker_runs_fgpu_before_the_default_runtime(tmp_path, helper):
    nvidia = {"path": "nvidia-container-runtime", "runtimeArgs": ["--x"]}
    text = json.dumps({"a": 1, "runtimes": {"nvidia": nvidia}, "default-runtime": "nvidia", "z": [2**60]})
    found = engine("docker", tmp_path, text)
    set_up(found, helper, tmp_path / "x.json")
    settings = json.loads(read(found) or "")
    ours = {"path": str(helper), "runtimeArgs": ["runtime", "nvidia-container-runtime", "--x"]}
    assert settings == {"a": 1, "runtimes": {"nvidia": nvidia, "fgpu": ours}, "default-runtime": "fgpu", "z": [2**60]}
    assert next(iter(settings)) == "a", "the order of keys has changed"


@pytest.mark.parametrize(
    "text",
    [
        '{"default-runtime": "kata", "runtimes": {"kata": {"runtimeType": "io.containerd.kata.v2"}}}',
        '{"default-runtime": "fgpu"}',
        '{"runtimes": []}',
    ],
)
def test_docker_runtimes_that_cannot_be_wrapped_are_refused(text, tmp_path, helper):
    found = engine("docker", tmp_path, text)
    with pytest.raises(SetupError):
        set_up(found, helper, tmp_path / "x.json")
    assert read(found) == text


@pytest.mark.parametrize(
    ("version", "before", "after"),
    [
        ((20, 10), {}, {}),
        ((24, 0), {}, {}),
        ((25, 0), {}, {"cdi": True}),
        ((28, 1), {"buildkit": True}, {"buildkit": True, "cdi": True}),
        ((28, 2), {}, {}),
        ((), {}, {}),  # unknown
        ((26, 1), {"cdi": False}, {"cdi": False}),  # set by an administrator
    ],
)
def test_docker_gets_cdi_in_the_versions_that_need_the_setting(version, before, after, tmp_path, helper):
    found, state = engine("docker", tmp_path, json.dumps({"features": before} if before else {})), tmp_path / "x.json"
    found = replace(found, version=version)
    wanted = set_up(found, helper, state)
    assert wanted
    settings = json.loads(read(found) or "")
    assert settings.get("features", {}) == after
    assert ("restart docker" in wanted.note) == (before != after)
    found.file.write_text(json.dumps({**settings, "debug": True}))
    assert unchanged(state) is None
    assert undo(found, state)
    assert json.loads(read(found) or "") == {"debug": True} | ({"features": before} if before else {})


@pytest.mark.parametrize("text", TEXTS["containerd"])
def test_setup_of_containerd_changes_only_the_binary_name_of_runc(text, tmp_path, helper):
    found = engine("containerd", tmp_path, text)
    set_up(found, helper, tmp_path / "x.json")
    before, after = tomllib.loads(text or "version = 2"), tomllib.loads(read(found) or "")
    plugin = "io.containerd.cri.v1.runtime" if after["version"] == 3 else "io.containerd.grpc.v1.cri"
    runtime = after["plugins"][plugin]["containerd"]["runtimes"]["runc"]
    assert runtime["runtime_type"] == "io.containerd.runc.v2"
    link = Path(runtime["options"].pop("BinaryName"))
    was = before.get("plugins", {}).get(plugin, {}).get("containerd", {}).get("runtimes", {}).get("runc", {})
    if was.get("options", {}).get("BinaryName"):  # named by its path: the program may be in no folder of PATH
        assert link == helper.with_name("fgpu-runtime-containerd-runc")
        assert os.readlink(helper.parent / "runtimes/containerd-runc") == "/usr/sbin/runc"
    else:
        assert link == helper.with_name("fgpu-runtime-runc")
    assert os.readlink(link) == "fgpu-oci"
    assert runtime["options"] == {k: v for k, v in was.get("options", {}).items() if k != "BinaryName"}
    assert {k: v for k, v in after.items() if k != "plugins"} == {k: v for k, v in before.items() if k != "plugins"}


@pytest.mark.parametrize(
    "options",
    [
        "[{runc}]\noptions = {{ SystemdCgroup = true }}",
        '[{runc}]\noptions.BinaryName = "/usr/bin/runc"',
        '[{runc}.options]\n"BinaryName" = "/usr/bin/runc"',
    ],
)
def test_options_of_containerd_in_an_unsupported_form_are_named_and_stay_unchanged(options, tmp_path, helper):
    runc = "plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc"
    text = f"version = 3\n{options.format(runc=runc)}\n"
    tomllib.loads(text)
    found = engine("containerd", tmp_path, text)
    with pytest.raises(SetupError, match="unsupported form"):
        set_up(found, helper, tmp_path / "x.json")
    assert read(found) == text


def drop_in(name: str, tmp_path: Path, **others: str) -> Engine:
    """Return an engine with a drop-in file for the settings from fgpu.

    `others` has the texts of other files by name: `main` is the engine's main file, the rest are drop-in files.
    """
    found = replace(ENGINES[name], file=tmp_path / "etc" / f"{name}.conf.d" / "zz-fgpu.conf")
    found.file.parent.mkdir(parents=True)
    for place, text in others.items():
        file = tmp_path / "etc" / f"{name}.conf" if place == "main" else found.file.with_name(f"{place}.conf")
        file.write_text(text)
    return found


def test_a_file_of_containerd_that_was_rewritten_without_comments_is_refused(tmp_path, helper):
    """fgpu in front of its own link would run itself."""
    found, state = engine("containerd", tmp_path, CONTAINERD), tmp_path / "x.json"
    set_up(found, helper, state)
    lines = [line.partition(" # fgpu")[0] for line in (read(found) or "").splitlines()]
    rewritten = "\n".join(lines) + "\n"
    found.file.write_text(rewritten)
    with pytest.raises(SetupError, match=r"replace .* with the real runtime's path"):
        set_up(found, helper, state)
    assert read(found) == rewritten


def test_podman_gets_its_own_folder_of_hooks(tmp_path, helper):
    """Buildah and CRI-O would refuse all hooks of a folder if one has a stage that only Podman has."""
    found = drop_in("podman", tmp_path)
    set_up(found, helper, tmp_path / "x.json")
    usual, ours = tomllib.loads(read(found) or "")["engine"]["hooks_dir"]
    assert (usual, ours) == ("/usr/share/containers/oci/hooks.d", str(tmp_path / "bin/hooks.d"))
    hook = json.loads(Path(ours, "fgpu.json").read_text())
    assert hook["stages"] == ["precreate"]
    assert hook["hook"] == {"path": str(helper), "args": ["fgpu-oci", "precreate"]}
    assert hook["when"] == {"always": True}


@pytest.mark.parametrize(
    ("others", "folders"),
    [
        ({"10": '[engine]\nhooks_dir = ["/a", "/b"]'}, ["/a", "/b"]),
        ({"10": '[engine]\nhooks_dir = ["/a"]', "20": '[engine]\nhooks_dir = ["/b"]'}, ["/b"]),
        ({"10": '[engine]\nhooks_dir = ["/a", {append = true}]'}, ["/usr/share/containers/oci/hooks.d", "/a"]),
        ({"10": "[engine]\nhooks_dir = []"}, []),
        ({"10": '[containers]\nlog_driver = "journald"'}, ["/usr/share/containers/oci/hooks.d"]),
    ],
)
def test_podman_keeps_its_existing_folders_of_hooks(others, folders, tmp_path, helper):
    found = drop_in("podman", tmp_path, **others)
    set_up(found, helper, tmp_path / "x.json")
    assert tomllib.loads(read(found) or "")["engine"]["hooks_dir"] == [*folders, str(tmp_path / "bin/hooks.d")]
    assert undo(found, tmp_path / "x.json")
    assert not found.file.exists()


CRIO = """[crio.runtime]
default_runtime = "crun"
[crio.runtime.runtimes.crun]
runtime_path = "/usr/libexec/crio/crun"
runtime_root = "/run/crun"
monitor_path = "/usr/libexec/crio/conmon"
allowed_annotations = ["io.containers.trace-syscall"]
privileged_without_host_devices = true
container_min_memory = "5MiB"
default_annotations = {"a.b/c" = "d\\"e"}
[crio.runtime.runtimes.runc]
runtime_path = "/usr/libexec/crio/runc"
"""


def crio_table(found: Engine) -> tuple[str, dict]:
    (table,) = tomllib.loads(read(found) or "")["crio"]["runtime"]["runtimes"].items()
    return table


def test_crio_keeps_the_name_of_its_default_runtime_with_the_path_of_fgpu(tmp_path, helper):
    found = drop_in("crio", tmp_path, **{"10-crio": CRIO})
    set_up(found, helper, tmp_path / "x.json")
    name, table = crio_table(found)
    link = Path(table.pop("runtime_path"))
    was = tomllib.loads(CRIO)["crio"]["runtime"]["runtimes"]["crun"]
    assert (name, table) == ("crun", {key: value for key, value in was.items() if key != "runtime_path"})
    assert os.readlink(link) == "fgpu-oci"
    assert os.readlink(helper.parent / "runtimes" / link.name.removeprefix("fgpu-runtime-")) == "/usr/libexec/crio/crun"
    assert undo(found, tmp_path / "x.json")
    assert not found.file.exists()


def test_doctor_reports_a_changed_default_runtime_of_crio(tmp_path, helper):
    found, state = drop_in("crio", tmp_path, **{"10-crio": CRIO}), tmp_path / "state"
    set_up(found, helper, state / "crio.json")
    (check,) = checks(state, helper)
    assert check.ok
    later = found.file.with_name("20.conf")
    later.write_text('[crio.runtime]\ndefault_runtime = "runc"\n')
    (check,) = checks(state, helper)
    assert (check.ok, check.fix) == (False, "fgpu setup crio, or fgpu setup crio --undo")
    assert "other settings have changed" in check.found
    later.write_text('[crio.runtime]\ndefault_runtime = "gone"\n')
    assert "no [crio.runtime.runtimes.gone]" in next(checks(state, helper)).found
    later.unlink()
    assert next(checks(state, helper)).ok


def test_later_crio_settings_take_precedence(tmp_path, helper):
    main = '[crio.runtime]\ndefault_runtime = "runc"\n[crio.runtime.runtimes.runc]\nruntime_path = ""'
    nvidia = '[crio.runtime]\ndefault_runtime = "nvidia"\n[crio.runtime.runtimes.nvidia]\nruntime_path = "/n/nvidia"'
    found = drop_in("crio", tmp_path, main=main)
    set_up(found, helper, tmp_path / "x.json")
    assert crio_table(found) == ("runc", {"runtime_path": str(helper.with_name("fgpu-runtime-runc"))})
    found.file.with_name("99-nvidia.conf").write_text(nvidia)
    assert set_up(found, helper, tmp_path / "x.json"), "setup did not adapt to the new settings"
    assert crio_table(found)[0] == "nvidia"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no default_runtime"),
        ('[crio.runtime]\ndefault_runtime = "kata"', r"no \[crio.runtime.runtimes.kata\]"),
        (
            '[crio.runtime]\ndefault_runtime = "kata"\n[crio.runtime.runtimes.kata]\nruntime_type = "vm"',
            "is not an OCI runtime",
        ),
        ("[crio", "10.conf is not TOML"),
    ],
)
def test_crio_settings_without_a_usable_default_runtime_are_refused(text, why, tmp_path, helper):
    found = drop_in("crio", tmp_path, **{"10": text})
    with pytest.raises(SetupError, match=why):
        set_up(found, helper, tmp_path / "x.json")
    assert not found.file.exists()
    assert not (tmp_path / "x.json").exists()


@pytest.fixture(params=["podman", "crio", "k3s"])
def own(request, tmp_path, helper):
    """Return an engine with a file that has only fgpu's text, the state of its setup, and that text."""
    found, state = drop_in(request.param, tmp_path, **{"10-crio": CRIO}), tmp_path / "x.json"
    found = replace(found.more, file=found.file) if found.more else found
    set_up(found, helper, state)
    return found, state, read(found)


def test_a_changed_file_of_fgpu_is_named_and_kept(own, helper):
    found, state, ours = own
    found.file.write_text(f"{ours}# more\n")
    for change in (lambda: set_up(found, helper, state), lambda: undo(found, state), lambda: undo(found, state)):
        with pytest.raises(SetupError, match=f"{found.file} has changed since"):
            change()
    assert read(found) == f"{ours}# more\n"
    found.file.write_text(ours)
    assert undo(found, state)
    assert not found.file.exists()


def test_an_unchanged_file_of_an_earlier_version_of_fgpu_is_replaced(own, helper):
    found, state, ours = own
    found.file.write_text(f"{ours}# earlier\n")
    state.write_text(json.dumps({**json.loads(state.read_text()), "after": f"{ours}# earlier\n"}))
    assert set_up(found, helper, state)
    assert read(found) == ours
    assert undo(found, state)
    assert not found.file.exists()


def test_settings_that_were_removed_since_are_not_written_again_by_undo(tmp_path, helper):
    """The states of earlier versions do not have the text with which a setup began."""
    found, state = engine("docker", tmp_path, '{"debug": true}'), tmp_path / "x.json"
    set_up(found, helper, state)
    kept = json.loads(state.read_text())
    del kept["had"]
    state.write_text(json.dumps(kept))
    found.file.unlink()
    assert not undo(found, state)
    assert not found.file.exists()


@pytest.mark.parametrize("change", [set_up, lambda found, _, state: undo(found, state)])
def test_a_second_setup_that_was_interrupted_can_be_repeated_and_undone(change, tmp_path, helper, monkeypatch):
    found, state = drop_in("crio", tmp_path, **{"10-crio": CRIO}), tmp_path / "x.json"
    set_up(found, helper, state)
    had, write = read(found), engine_setup._write

    def full(path, text, like=None):
        if path != state:
            raise OSError(28, "no space")
        write(path, text, like)

    (found.file.parent / "50-other.conf").write_text(CRIO.replace("/run/crun", "/run/other"))
    with monkeypatch.context() as patch:
        patch.setattr(engine_setup, "_write", full)
        with pytest.raises(OSError, match="no space"):
            set_up(found, helper, state)
    assert read(found) == had
    assert change(found, helper, state)


@pytest.mark.parametrize("name", ["podman", "crio"])
def test_a_file_of_another_program_is_never_replaced(name, tmp_path, helper):
    found = drop_in(name, tmp_path, **{"10-crio": CRIO})
    found.file.write_text("# theirs\n")
    with pytest.raises(SetupError, match="not fgpu's"):
        set_up(found, helper, tmp_path / "x.json")
    assert not undo(found, tmp_path / "x.json")
    assert read(found) == "# theirs\n"


def test_a_setup_in_another_file_undoes_the_setup_in_the_first_file(tmp_path, helper):
    """Setup restores a file if the settings name another one, or if a newer version of fgpu uses another place."""
    first, second, state = engine("docker", tmp_path, "{}"), drop_in("docker", tmp_path), tmp_path / "x.json"
    set_up(first, helper, state)
    assert set_up(second, helper, state)
    assert read(first) == "{}"
    assert where_it_is(first, state).file == second.file
    assert undo(where_it_is(first, state), state)
    assert not second.file.exists()
    assert where_it_is(first, state) == first


# -- k3s and RKE2 --------------------------------------------------------------------------------------------------

MADE = """version = {version}
[plugins.'{plugin}'.containerd]
  snapshotter = "overlayfs"
[plugins.'{plugin}'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins.'{plugin}'.containerd.runtimes.runc.options]
  SystemdCgroup = true
"""
NVIDIA = """[plugins.'{plugin}'.containerd.runtimes.'nvidia']
  runtime_type = "io.containerd.runc.v2"
[plugins.'{plugin}'.containerd.runtimes.'nvidia'.options]
  BinaryName = "/usr/bin/nvidia-container-runtime"
"""
PLUGINS = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}
BASE = '{{ template "base" . }}'


def k3s(tmp_path: Path, made: str, template: str | None = None, version: tuple[int, ...] = (1, 30)) -> Engine:
    """Return k3s with the settings that it has generated for containerd, and with an administrator's template."""
    folder = tmp_path / "containerd"
    folder.mkdir()
    if made:
        (folder / "config.toml").write_text(made)
    found = replace(as_installed(replace(ENGINES["k3s"], file=folder / "config.toml.tmpl")), version=version)
    if template is not None:
        found.file.write_text(template)
    return found


def rendered(template: str, made: str) -> str:
    """Return the file that k3s renders from a template."""
    return template.replace(BASE, made).replace("{{ .SystemdCgroup }}", "true")


@pytest.mark.parametrize("version", PLUGINS)
@pytest.mark.parametrize("nvidia", [False, True])
@pytest.mark.parametrize("template", [None, f"{BASE}\n[plugins.a]\nb = 1"])
def test_k3s_gets_a_runtime_in_front_of_nvidia_s_or_runc(version, nvidia, template, tmp_path, helper):
    made = (MADE + (NVIDIA if nvidia else "")).format(version=version, plugin=PLUGINS[version])
    found, state = k3s(tmp_path, made, template), tmp_path / "x.json"
    assert found.file.name == ("config.toml.tmpl" if version == 2 else "config-v3.toml.tmpl")
    assert set_up(found, helper, state)
    assert not set_up(found, helper, state)
    settings = tomllib.loads(rendered(read(found) or "", made))
    runtimes = settings["plugins"][PLUGINS[version]]["containerd"]["runtimes"]
    real = "k3s-nvidia-container-runtime" if nvidia else "runc"
    link = helper.with_name(f"fgpu-runtime-{real}")
    assert runtimes["fgpu"]["options"] == {"BinaryName": str(link), "SystemdCgroup": True}
    assert os.readlink(link) == "fgpu-oci"
    assert "BinaryName" not in runtimes["runc"]["options"], "the base runtime was changed"
    assert undo(found, state)
    assert read(found) == template
    assert set_up(found, helper, state)
    state.unlink()
    assert undo(found, state), "undo failed without the state file"
    assert (read(found) or "").strip() == (template or "")


def test_doctor_reports_a_missing_default_runtime_of_k3s(tmp_path, helper, monkeypatch):
    """The template defines the runtime, and a second file makes this runtime the default."""
    found, states = k3s(tmp_path, MADE.format(version=2, plugin=PLUGINS[2])), tmp_path / "states"
    more = replace(found.more, file=tmp_path / "config.yaml.d/zz.yaml")
    found = replace(found, more=more)
    monkeypatch.setitem(ENGINES, "k3s", found)
    ((_, first), (_, second)) = parts("k3s", found, states)
    assert list(checks(states, helper)) == []
    set_up(found, helper, first)
    wrong = Check(
        "k3s", False, f"{more.file} no longer has fgpu's settings", "fgpu setup k3s, or fgpu setup k3s --undo"
    )
    assert list(checks(states, helper)) == [wrong], "an interrupted setup was not reported"
    set_up(more, helper, second)
    assert list(checks(states, helper)) == [Check("k3s", True, f"{found.file} has fgpu's settings")]
    more.file.unlink()
    assert list(checks(states, helper)) == [wrong]


@pytest.mark.parametrize(
    ("made", "template", "version", "why"),
    [
        (MADE, None, (1, 28), "1.29 or later"),
        (MADE, None, (), "1.29 or later"),
        ("", None, (1, 30), "start the service once"),
        (MADE, "version = 2\n", (1, 30), "add that line, and run fgpu setup again"),
    ],
)
def test_k3s_that_cannot_be_set_up_stays_unchanged(made, template, version, why, tmp_path, helper):
    made = made.format(version=2, plugin=PLUGINS[2])
    found = k3s(tmp_path, made, template, version)
    with pytest.raises(SetupError, match=why):
        set_up(found, helper, tmp_path / "x.json")
    assert read(found) == template


# -- installed versions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said", "version"),
    [
        ("dockerd", "Docker version 20.10.24+dfsg1, build 297e128", (20, 10)),
        ("dockerd", "Docker version 26.1.5+dfsg1, build a72d7cd", (26, 1)),
        ("k3s", "k3s version v1.30.2+k3s1 (aa4794b3)\ngo version go1.22.4", (1, 30)),
        ("rke2", "rke2 version v1.31.1+rke2r1 (909d20d6)", (1, 31)),
        ("containerd", "containerd github.com/containerd/containerd 1.6.20~ds1", ()),
    ],
)
def test_versions_of_engines_are_parsed(name, said, version, tmp_path, monkeypatch):
    found = next(engine for engine in ENGINES.values() if name in engine.programs)
    monkeypatch.setattr("fgpu_ebpf.containers.engine_setup._FOLDERS", ())
    assert (program(found), as_installed(found).version) == ("", ())
    place = tmp_path / "path" / name
    place.write_text(f"#!/bin/sh\necho '{said}'\n")
    place.chmod(0o755)
    assert (program(found), as_installed(found).version) == (str(place), version)


@pytest.mark.parametrize(
    ("version", "settings", "ok", "says"),
    [
        ("25.0.0", None, False, "Docker 25.0 ignores CDI: features.cdi is not set in "),
        ("28.1.1", '{"features": {"buildkit": true}}', False, "Docker 28.1 ignores CDI"),
        ("26.1.5", '{"features": {"cdi": true}}', True, ""),
        ("26.1.5", '{"features": {"cdi": false}}', True, ""),  # set by an administrator
        ("24.0.9", "{}", True, ""),
        ("28.2.0", "{}", True, ""),
        ("26.1.5", "{", False, "fix the file first"),
    ],
)
def test_doctor_names_a_docker_that_ignores_the_cdi_specifications(version, settings, ok, says, tmp_path, monkeypatch):
    monkeypatch.setattr("fgpu_ebpf.containers.engine_setup._FOLDERS", ())
    found, state = engine("docker", tmp_path, settings), tmp_path / "states"
    monkeypatch.setitem(ENGINES, "docker", found)
    spec = tmp_path / "fgpu.json"
    spec.write_text("{}")
    assert check_cdi(tmp_path, state) is None, "Docker is not installed"
    place = tmp_path / "path/dockerd"
    place.write_text(f"#!/bin/sh\necho 'Docker version {version}, build a'\n")
    place.chmod(0o755)
    assert check_cdi(tmp_path, state) is None, "there are no specifications"
    (tmp_path / "cdi.files").write_text(f"{spec}\n")
    check = check_cdi(tmp_path, state)
    assert check
    assert (check.name, check.ok, says in check.found) == ("docker cdi", ok, True)
    assert ok or "fgpu setup docker" in check.fix


def test_doctor_reports_no_missing_cdi_after_docker_was_set_up(tmp_path, helper, monkeypatch):
    found, state = replace(engine("docker", tmp_path, "{}"), version=(26, 1)), tmp_path / "states"
    monkeypatch.setitem(ENGINES, "docker", found)
    place, spec = tmp_path / "path/dockerd", tmp_path / "fgpu.json"
    place.write_text("#!/bin/sh\necho Docker version 26.1.5\n")
    place.chmod(0o755)
    spec.write_text("{}")
    (tmp_path / "cdi.files").write_text(f"{spec}\n")
    before = check_cdi(tmp_path, state)
    set_up(found, helper, state / "docker.json")
    after = check_cdi(tmp_path, state)
    assert before
    assert after
    assert (before.ok, after.ok) == (False, True)
