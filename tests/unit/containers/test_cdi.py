"""Tests of CDI specifications: valid by the interface's own schema, complete at every moment, and removed in time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from fgpu_ebpf.agent import host_config
from fgpu_ebpf.cli.containers import cdi_group
from fgpu_ebpf.containers import cdi, injection
from fgpu_ebpf.containers.cdi import Parts
from fgpu_ebpf.policy import share_name
from fgpu_ebpf.policy.units import QuantityError
from tests.unit.disk_kit import durable, recorded

SCHEMA = Path(__file__).parent / "cdi_schema"


@pytest.fixture
def parts(tmp_path) -> Parts:
    (tmp_path / "run").mkdir()
    return injection.parts(tmp_path / "run", tmp_path / "libfgpu.so", tmp_path / "fgpu-oci")


def validate(spec: dict) -> None:
    schema, definitions = (json.loads((SCHEMA / name).read_text()) for name in ("schema.json", "defs.json"))
    registry = Registry().with_resource("defs.json", Resource.from_contents(definitions, DRAFT7))
    jsonschema.Draft7Validator(schema, registry=registry).validate(spec)


def keys(value: object) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "memory", "compute"),
    [
        ("8gib-50pct", 8 << 30, 500_000),
        ("8gib", 8 << 30, None),
        ("1.5gib", 3 << 29, None),
        ("1536mib-12.5pct", 3 << 29, 125_000),
        ("all-100pct", None, 1_000_000),
    ],
)
def test_the_name_of_a_share_contains_its_memory_and_compute_limits(name, memory, compute):
    share = share_name.parse(name)
    assert (share.amount and share.amount.bytes, share.limit_millionths) == (memory, compute)


def test_a_memory_percentage_of_a_share_is_relative_to_the_device():
    share = share_name.parse("50pct-25pct")
    assert share.amount
    assert share.amount.of(100 << 30) == 50 << 30
    assert share.limit_millionths == 250_000


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "8",
            "8gb",
            "8GiB",
            "gib",
            "all",
            "8gib-",
            "8gib-50",
            "8gib-0pct",
            "8gib-101pct",
            "0gib",
            "101pct",
            "-1gib",
        ),
        *("8gib-50pct-2", "8gib 50pct", "9999999gib", "\u0661gib", "1mib", "8gib-50pct\n", "../8gib", "8gib;id"),
    ],
)
def test_an_invalid_share_name_is_refused(name):
    with pytest.raises(QuantityError):
        share_name.parse(name)


def test_the_default_share_names_are_valid():
    assert [share_name.parse(name).name for name in share_name.USUAL] == list(share_name.USUAL)


def test_shares_and_cdi_folder_are_read_from_agent_yaml_and_an_invalid_share_is_an_error(tmp_path):
    file = tmp_path / "agent.yaml"
    file.write_text("shares: [6gib-30pct, all-10pct]\ncdiFolder: /etc/cdi\n")
    host, errors = host_config.read(file, root_only=False)
    assert host
    assert not errors
    assert (host.shares, host.cdi_folder) == (("6gib-30pct", "all-10pct"), Path("/etc/cdi"))
    file.write_text("shares: []\n")
    host, _ = host_config.read(file, root_only=False)
    assert host
    assert host.shares == ()
    file.write_text("listen: 127.0.0.1:1\nshares: [6gib, 8gb]\n")
    host, errors = host_config.read(file, root_only=False)
    assert host is None
    assert "agent.yaml:2" in str(errors[0])
    assert "'8gb' is not a share: write it as 8gib" in str(errors[0])


# -- specifications ------------------------------------------------------------------------------------------------


def test_specifications_are_valid_and_of_the_lowest_version(parts):
    for spec, version in (
        (cdi.shim_spec(parts), "0.3.0"),
        (cdi.share_spec(parts, ["8gib-50pct", "all-50pct"]), "0.5.0"),
        (cdi.share_spec(parts, ["all-50pct"]), "0.3.0"),
    ):
        validate(spec)
        assert spec["cdiVersion"] == version
        # Nothing from later versions is used: `type` of mounts came with 0.4.0, hostPath of nodes with 0.5.0,
        # annotations with 0.6.0.
        assert keys(spec) <= {
            *("cdiVersion", "kind", "devices", "name", "containerEdits", "mounts", "hostPath", "containerPath"),
            *("options", "hooks", "hookName", "path", "args", "timeout", "env"),
        }
    broken = cdi.shim_spec(parts)
    del broken["devices"][0]["containerEdits"]["mounts"][0]["containerPath"]
    with pytest.raises(jsonschema.ValidationError):
        validate(broken)


def test_mounts_have_the_expected_paths_and_are_read_only(parts):
    found = cdi.mounts(parts)
    lists, folders = ["/etc/ld.so.preload", "/etc/ld-nix.so.preload"], ["/run/fgpu/shim", "/var/lib/fgpu/run"]
    info = "/var/lib/fgpu/bin/fgpu-info"
    assert [m["containerPath"] for m in found] == [str(parts.shim), *folders, *lists, info]
    assert [m["hostPath"] for m in found[1:]] == [
        *[str(parts.socket)] * 2, *[str(parts.preload)] * 2, str(parts.helper),
    ]  # fmt: skip
    assert all({"bind", "ro", "nosuid", "nodev"} <= set(m["options"]) for m in found)
    assert "noexec" not in found[0]["options"], "the shim is mapped executable"
    assert found[5]["hostPath"] == str(parts.helper), "fgpu-info is the helper under another name"
    assert "noexec" not in found[5]["options"]


def test_a_share_named_twice_is_one_device(parts):
    assert [d["name"] for d in cdi.share_spec(parts, ["8gib", "4gib", "8gib"])["devices"]] == ["8gib", "4gib"]


def test_a_create_runtime_hook_calls_the_helper_with_the_share_s_name(parts):
    (device,) = cdi.share_spec(parts, ["8gib"])["devices"]
    (hook,) = device["containerEdits"]["hooks"]
    assert hook["hookName"] == "createRuntime"
    assert hook["args"][-2:] == ["share", "8gib"]
    assert hook["path"] == str(parts.helper)


# -- files ---------------------------------------------------------------------------------------------------------


def test_specifications_are_written_and_removed(parts, tmp_path):
    folder = tmp_path / "cdi"
    injection.set_up(parts, folder, ["8gib"])
    assert sorted(os.listdir(folder)) == ["fgpu.dev-share.json", "fgpu.dev-shim.json"]
    assert all((folder / name).stat().st_mode & 0o777 == 0o644 for name in os.listdir(folder))
    assert parts.preload.read_text() == f"{parts.shim}\n"
    assert len(injection.written(parts.run_dir)) == 2
    injection.take_away(parts.run_dir)
    assert not folder.exists()
    assert os.listdir(parts.run_dir) == []
    injection.take_away(parts.run_dir)


def test_unused_preload_lists_are_removed(parts, monkeypatch):
    """Unused lists are removed. Otherwise images could use up all lists and prevent later containers from starting."""
    now = 1000.0
    monkeypatch.setattr(injection.time, "monotonic", lambda: now)
    swept, lists = injection.Lists(parts.run_dir), parts.run_dir / "preload.d"
    swept.sweep()
    lists.mkdir(parents=True)
    for name in ("unused", "used"):
        (lists / name).touch()
    swept.sweep()
    now += injection.UNUSED_SECONDS - 1
    swept.sweep()
    os.utime(lists / "used", (0, 0))  # each use changes the time stamp; its value is irrelevant
    swept.sweep()
    assert sorted(os.listdir(lists)) == ["unused", "used"]
    now += 2
    swept.sweep()
    assert os.listdir(lists) == ["used"]
    now += injection.UNUSED_SECONDS - 1
    swept.sweep()
    assert os.listdir(lists) == []


def test_a_setup_removes_the_specifications_of_an_earlier_setup(parts, tmp_path):
    injection.set_up(parts, tmp_path / "old", ["8gib"])
    injection.set_up(parts, tmp_path / "new", [])
    assert not (tmp_path / "old").exists()
    assert os.listdir(tmp_path / "new") == ["fgpu.dev-shim.json"]


def test_containers_get_the_shim_although_no_specification_can_be_written(parts, tmp_path):
    """Otherwise fgpu-oci would report that no agent runs here, and start containers without the shim."""
    (tmp_path / "cdi").touch()
    with pytest.raises(OSError, match="cdi"):
        injection.set_up(parts, tmp_path / "cdi", ["8gib"])
    assert injection.mounted(parts.run_dir) == {"shim": parts.shim, "preload": parts.preload, "info": parts.helper}
    assert parts.preload.read_text() == f"{parts.shim}\n"


@pytest.mark.parametrize(
    "text", [None, b"", bytes(range(256)), b"/\n\n.\n\0\n"], ids=["folder", "empty", "bytes", "paths"]
)
def test_an_invalid_list_of_specifications_does_not_prevent_a_setup(parts, tmp_path, text):
    folder = tmp_path / "cdi"
    injection.set_up(parts, folder, ["8gib"])
    shutil.rmtree(folder)
    (parts.run_dir / "cdi.files").unlink()
    if text is None:
        (parts.run_dir / "cdi.files").mkdir()
    else:
        (parts.run_dir / "cdi.files").write_bytes(text)
    assert injection.written(parts.run_dir) == []
    injection.set_up(parts, folder, ["8gib"])
    assert sorted(os.listdir(folder)) == ["fgpu.dev-share.json", "fgpu.dev-shim.json"]
    assert len(injection.written(parts.run_dir)) == 2


def test_the_helper_replaces_a_folder_at_its_path(tmp_path, monkeypatch):
    monkeypatch.setattr(injection, "BIN", tmp_path / "bin")
    built = tmp_path / "built"
    built.write_text("helper")
    (tmp_path / "bin/fgpu-oci").mkdir(parents=True)
    assert injection.publish_helper(built).read_text() == "helper"
    assert (tmp_path / "bin/fgpu-info").read_text() == "helper", "fgpu-info was not replaced"


def test_the_helper_is_on_the_disk_before_the_rename_and_the_same_helper_is_not_written_again(tmp_path, monkeypatch):
    """Engines that were set up start no container with an empty helper, which a loss of power could leave."""
    monkeypatch.setattr(injection, "BIN", tmp_path / "bin")
    built = tmp_path / "built"
    built.write_text("helper")
    calls, place, aside = recorded(monkeypatch), tmp_path / "bin/fgpu-oci", tmp_path / f"bin/.fgpu-oci.{os.getpid()}"
    link = ("replace", str(tmp_path / "bin/fgpu-info"), True)
    *written, folder = durable(aside, place)
    injection.publish_helper(built)
    assert calls == [*written, link, folder]
    calls.clear()
    injection.publish_helper(built)
    assert calls == [], "each attempt of an agent that cannot write its CDI files would wait for the disk"
    place.write_text("")
    injection.publish_helper(built)
    assert place.read_text() == "helper"


def test_the_earlier_helper_stays_if_no_other_can_be_published(tmp_path, monkeypatch):
    monkeypatch.setattr(injection, "BIN", tmp_path / "bin")
    built = tmp_path / "built"
    built.write_text("helper")
    place = injection.publish_helper(built)
    built.write_text("the next helper")

    def full(target: Path, _content: bytes) -> None:
        target.touch()
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(injection.shim_store, "write_durably", full)
    assert injection.publish_helper(built) == place
    assert sorted(os.listdir(tmp_path / "bin")) == ["fgpu-info", "fgpu-oci"], "a half-written file was kept"
    place.unlink()
    with pytest.raises(OSError, match="no space"):
        injection.publish_helper(built)


def test_specifications_of_other_programs_are_kept(parts, tmp_path):
    (tmp_path / "nvidia.yaml").write_text("x")
    injection.set_up(parts, tmp_path, ["8gib"])
    injection.take_away(parts.run_dir)
    assert (tmp_path / "nvidia.yaml").read_text() == "x"


def test_a_reader_gets_the_old_or_the_new_specification(parts, tmp_path):
    path, ended, seen = tmp_path / "x.json", threading.Event(), set()
    both = [cdi.share_spec(parts, [name]) for name in ("8gib", "16gib-50pct")]
    cdi.write(path, both[0])

    def read() -> None:
        while not ended.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    while not seen and reader.is_alive():
        time.sleep(0.001)
    for number in range(1009):
        cdi.write(path, both[number % 2])
    ended.set()
    reader.join()
    assert seen
    assert seen <= {cdi.text(spec) for spec in both}
    assert sorted(os.listdir(tmp_path)) == ["run", "x.json"]


def test_a_path_with_a_quote_is_refused(tmp_path):
    with pytest.raises(ValueError, match="quotes"):
        injection.parts(tmp_path, tmp_path / 'a"b', tmp_path)


# -- the command ---------------------------------------------------------------------------------------------------


def fgpu(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cdi_group, list(words))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_fgpu_cdi_generate_prints_or_writes_a_specification_and_refuses_an_invalid_share(tmp_path):
    code, said = fgpu("generate", "8gib-50pct", "1.5gib")
    assert code == 0
    validate(json.loads(said))
    assert [d["name"] for d in json.loads(said)["devices"]] == ["8gib-50pct", "1.5gib"]
    assert fgpu("generate", "8gib-50pct", "1.5gib", "--output", str(tmp_path / "a/b.json")) == (0, "")
    assert (tmp_path / "a/b.json").read_text() == said
    assert fgpu("generate", "8gb") == (
        2,
        "fgpu: '8gb' is not a share: write it as 8gib, 8gib-50pct, 50pct-50pct or all-50pct\n",
    )


def test_fgpu_cdi_list_prints_the_devices_of_written_specifications_and_fails_without_any(parts, tmp_path, monkeypatch):
    from fgpu_ebpf.cli import request

    monkeypatch.setattr(request, "RUN_DIR", parts.run_dir)
    assert fgpu("list")[0] == 1
    injection.set_up(parts, tmp_path / "cdi", ["8gib-50pct", "all-25pct"])
    assert fgpu("list") == (
        0,
        "fgpu.dev/shim=all                the limits of the policies\n"
        "fgpu.dev/share=8gib-50pct        memory 8GiB, compute up to 50%\n"
        "fgpu.dev/share=all-25pct         compute up to 25%\n",
    )
    assert [d["name"] for d in json.loads(fgpu("list", "--json")[1])][1] == "fgpu.dev/share=8gib-50pct"
