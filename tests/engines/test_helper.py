"""Tests of fgpu-oci, which engines call: how it edits a configuration, and which parts it never changes."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import sanitizers
from tests.support.containers import engines as kit
from tests.support.host import BUILD

SHIM = "/var/lib/fgpu/shim/current/libfgpu.so"
LIBC, IN_OPEN = ctypes.CDLL(None), 0x20
ADDR_NO_RANDOMIZE, ANY_PERSONALITY = 0x0040000, 0xFFFFFFFF


@pytest.fixture(scope="module", autouse=True, params=["as it is", "sanitized"])
def helper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run all tests twice, the second time with sanitizers.

    Any report is an error, except of memory that is held until the exit. With sanitizers the helper runs without random
    addresses, like after `setarch -R` (`sanitizers.UNRANDOM`).
    """
    if request.param == "as it is":
        yield
        return
    reports = tmp_path_factory.mktemp("reports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit, "HELPER", sanitizers.ADDRESS.make("oci") / "fgpu-oci")
        for name, value in sanitizers.ADDRESS.environment(reports, leaks=False).items():
            patch.setenv(name, value)
        before = LIBC.personality(ANY_PERSONALITY)
        LIBC.personality(before | ADDR_NO_RANDOMIZE)  # programs that are started inherit it
        yield
        LIBC.personality(before)
    assert not (text := sanitizers.reported(reports)), text


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    setup = f"shim {SHIM}\nsocket /run/fgpu/shim\npreload {folder}/container.preload\ninfo /x/fgpu-oci\n"
    (folder / "containers").write_text(setup)
    return folder


def precreate(run_dir: Path, config: str) -> subprocess.CompletedProcess[str]:
    command = [kit.HELPER, "--run-dir", run_dir, "precreate"]
    return subprocess.run(command, input=config, capture_output=True, text=True, check=False, timeout=10)


def edited(run_dir: Path, config: str) -> Any:
    done = precreate(run_dir, config)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def destinations(config: Any) -> list[str]:
    return [mount["destination"] for mount in config["mounts"]]


LISTS = ["/etc/ld.so.preload", "/etc/ld-nix.so.preload"]
OURS = [SHIM, "/run/fgpu/shim", LISTS[0], "/var/lib/fgpu/run", LISTS[1], "/var/lib/fgpu/bin/fgpu-info"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.text(), JSON, max_size=5), st.lists(JSON, max_size=3), st.sampled_from([None, 1]))
def test_the_rest_of_a_configuration_stays_byte_for_byte(tmp_path_factory, more, annotations, indent) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "containers").write_text(f"shim {SHIM}\nsocket /s\npreload /p\n")
    config = {**more, "annotations": annotations, "root": {"path": "/nowhere"}, "mounts": [{"destination": "/proc"}]}
    text = json.dumps(config, indent=indent)
    done = precreate(run_dir, text)
    assert done.returncode == 0, done.stderr
    after = json.loads(done.stdout)
    assert destinations(after) == ["/proc", *OURS[:-1]], "the file of an older agent has no fgpu-info"
    assert {**after, "mounts": config["mounts"]} == config
    same = next(at for at, (a, b) in enumerate(zip(text, done.stdout, strict=False)) if a != b)
    assert done.stdout.endswith(text[same:]), "more than one insertion"
    assert precreate(run_dir, done.stdout).stdout == done.stdout, "a second edit changed the configuration"


@pytest.mark.parametrize(
    "text", ['{"root":{"path":"/x"}}', '{"root":{"path":"/x"},"mounts":[]}', ' {"root" : {"path":"/x"} }']
)
def test_a_configuration_without_mounts_is_edited(run_dir: Path, text: str) -> None:
    assert destinations(edited(run_dir, text)) == OURS


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"root":{}}', '{"root":{"path":"/x"},"mounts":{}}', '{"a":"\x01"}']
)
def test_an_invalid_configuration_is_refused(run_dir: Path, text: str) -> None:
    done = precreate(run_dir, text)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("fgpu: "), done.stderr


def test_endless_nesting_is_refused(run_dir: Path) -> None:
    assert precreate(run_dir, '{"root":{"path":"/x"},"a":' + "[" * 100_000).returncode == 1


@pytest.mark.parametrize("place", LISTS)
def test_a_mount_at_the_place_of_a_preload_list_is_kept(run_dir: Path, place: str) -> None:
    own = {"destination": place, "source": "/mine"}
    after = edited(run_dir, json.dumps({"root": {"path": "/x"}, "mounts": [own]}))
    assert destinations(after) == [place, *(other for other in OURS if other != place)]
    assert after["mounts"][0] == own


def test_a_configuration_is_unchanged_without_an_agent(tmp_path: Path) -> None:
    text = '{"root":{"path":"/x"}}'
    assert precreate(tmp_path, text).stdout == text


@pytest.mark.parametrize("place", LISTS)
@pytest.mark.parametrize(
    ("own", "joined"),
    [
        ("", None),
        ("\n \n", None),
        ("# nothing\n", None),
        ("/usr/lib/libfgpu.so\n", None),
        ("liba.so:libb.so  libc.so", "liba.so\nlibb.so\nlibc.so\n"),
        ("/opt/libfgpu.so.1 liba.so # a remark: x.so\nlibb.so", "liba.so\nlibb.so\n"),
    ],
)
def test_preload_lists_of_the_image_are_joined_with_the_shim(
    run_dir: Path, tmp_path: Path, place: str, own: str, joined: str | None
) -> None:
    """Each list is joined by itself: a library may suit the loader of only one list."""
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / f"root{place}").write_text(own)
    mounts = edited(run_dir, json.dumps({"root": {"path": str(tmp_path / "root")}}))["mounts"]
    sources = {mount["destination"]: mount["source"] for mount in mounts}
    source, other = (sources[at] for at in (LISTS if place == LISTS[0] else LISTS[::-1]))
    assert other == f"{run_dir}/container.preload"
    if joined is None:
        assert source == f"{run_dir}/container.preload"
    else:
        assert Path(source).parent == run_dir / "preload.d"
        assert Path(source).read_text() == f"{joined}{SHIM}\n"


def test_links_of_the_image_stay_inside_its_root(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "secret").write_text("libsecret.so\n")
    (tmp_path / "root/etc/ld.so.preload").symlink_to(tmp_path / "secret")
    after = edited(run_dir, json.dumps({"root": {"path": str(tmp_path / "root")}}))
    assert after["mounts"][2]["source"] == f"{run_dir}/container.preload"
    os.unlink(tmp_path / "root/etc/ld.so.preload")
    os.mkfifo(tmp_path / "root/etc/ld.so.preload")  # it never gets a writer
    assert precreate(run_dir, json.dumps({"root": {"path": str(tmp_path / "root")}})).returncode == 0


def test_the_helper_opens_only_regular_files(run_dir: Path, tmp_path: Path) -> None:
    """Opening some devices has effects, and images may have device nodes. The kernel reports every opening."""
    place = tmp_path / "root/etc/ld.so.preload"
    place.parent.mkdir(parents=True)
    config = json.dumps({"root": {"path": str(tmp_path / "root")}})
    openings = []
    for make in (Path.touch, os.mkfifo):
        place.unlink(missing_ok=True)
        make(place)
        watch = LIBC.inotify_init1(os.O_NONBLOCK)
        assert LIBC.inotify_add_watch(watch, str(place).encode(), IN_OPEN) > 0
        edited(run_dir, config)
        with open(watch, "rb", buffering=0) as told:
            openings.append(told.read(4096) is not None)
    assert openings == [True, False]


def test_at_most_256_preload_lists_of_images_are_kept(run_dir: Path, tmp_path: Path) -> None:
    """Podman's hook does not get the bundle's path. At most 256 lists are kept for it, and the oldest is removed."""
    (tmp_path / "root/etc").mkdir(parents=True)

    def code(number: int) -> int:
        (tmp_path / "root/etc/ld.so.preload").write_text(f"lib{number}.so")
        return precreate(run_dir, json.dumps({"root": {"path": str(tmp_path / "root")}})).returncode

    assert [code(number) for number in range(256)] == [0] * 256
    lists = sorted((run_dir / "preload.d").iterdir())
    assert len(lists) == 256
    for age, name in enumerate(lists[:3], 20):
        os.utime(name, (time.time() - age, time.time() - age))
    assert code(257) == 0
    assert sorted(name in set((run_dir / "preload.d").iterdir()) for name in lists[:3]) == [False, True, True]
    assert not lists[2].exists(), "the oldest"


def test_many_images_with_their_own_lists_prevent_no_other_from_starting(run_dir: Path, tmp_path: Path) -> None:
    """Each list is in its container's bundle, and is removed with it. Nothing is kept beside the agent's own files."""
    own = sorted(os.listdir(run_dir))
    for number in range(300):
        bundle = tmp_path / f"bundle {number}"
        (bundle / "rootfs/etc").mkdir(parents=True)
        (bundle / "rootfs/etc/ld.so.preload").write_text(f"lib{number}.so")
        (bundle / "config.json").write_text('{"root":{"path":"rootfs"}}')
        command = [kit.HELPER, "--run-dir", run_dir, "runtime", "/bin/true", "create", "--bundle", bundle.name, "name"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, (number, done.stderr)
        (mount,) = [
            m for m in json.loads((bundle / "config.json").read_text())["mounts"] if m["destination"] == OURS[2]
        ]
        assert mount["source"] == f"{bundle}/fgpu.ld.so.preload"
        assert Path(mount["source"]).read_text() == f"lib{number}.so\n{SHIM}\n"
        assert Path(mount["source"]).stat().st_mode & 0o777 == 0o644
    assert sorted(os.listdir(run_dir)) == own


def test_a_bundle_with_a_path_that_no_configuration_can_contain_is_refused(run_dir: Path, tmp_path: Path) -> None:
    bundle = tmp_path / 'a"b'
    (bundle / "rootfs/etc").mkdir(parents=True)
    (bundle / "rootfs/etc/ld.so.preload").write_text("lib.so")
    (bundle / "config.json").write_text('{"root":{"path":"rootfs"}}')
    command = [kit.HELPER, "--run-dir", run_dir, "runtime", "/bin/true", "create", "--bundle", bundle, "name"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    assert (bundle / "config.json").read_text() == '{"root":{"path":"rootfs"}}'


def test_a_list_that_is_requested_again_gets_a_new_time(run_dir: Path, tmp_path: Path) -> None:
    """The agent removes lists that were not used for some time."""
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/ld.so.preload").write_text("lib.so")
    config = json.dumps({"root": {"path": str(tmp_path / "root")}})
    assert precreate(run_dir, config).returncode == 0
    (made,) = (run_dir / "preload.d").iterdir()
    os.utime(made, (23, 23))
    assert precreate(run_dir, config).returncode == 0
    assert time.time() - made.stat().st_mtime < 60


def test_the_runtime_gets_the_same_arguments(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"root":{"path":"rootfs"}}')
    words = ["--log", "x", "create", "--bundle", str(tmp_path), "--console-socket", "a b", "name"]
    command = [kit.HELPER, "--run-dir", run_dir, "runtime", "/bin/echo", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (" ".join(words) + "\n", "")
    assert destinations(json.loads((tmp_path / "config.json").read_text())) == OURS
    for other in (["start"], ["delete"], ["state"], ["kill", "run"], ["delete", "--force", "create"]):
        (tmp_path / "config.json").write_text("{}")
        subprocess.run([*command[:5], *other, "--bundle", tmp_path], capture_output=True, check=True)
        assert (tmp_path / "config.json").read_text() == "{}"


def test_the_engine_gets_the_reason_of_a_failure(run_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    (tmp_path / "config.json").write_text("{")
    command = [kit.HELPER, "--run-dir", run_dir, "runtime", "/bin/true", "--log", log, "create", "--bundle", tmp_path]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    said = json.loads(log.read_text())
    assert said["level"] == "error"
    assert "the shim cannot be added to the container" in said["msg"]


def test_a_configuration_that_is_written_in_part_is_kept_and_the_reason_is_named(run_dir: Path, tmp_path: Path) -> None:
    """A limit of a file's size stands for a full disk: the first write is short, and the next one names the reason."""
    before = json.dumps({"root": {"path": "rootfs"}, "annotations": {"text": "x" * 1000}})
    (tmp_path / "config.json").write_text(before)
    runtime = [kit.HELPER, "--run-dir", run_dir, "runtime", "/bin/true", "create", "--bundle", tmp_path]
    command = ["prlimit", "--fsize=1024", "env", "--ignore-signal=XFSZ", *runtime]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "config.json: File too large" in done.stderr) == (1, True), done.stderr
    assert (tmp_path / "config.json").read_text() == before
    assert not list(tmp_path.glob("config.json.*"))


def test_the_helper_is_hardened_and_needs_no_library() -> None:
    helper = BUILD / "oci/fgpu-oci"
    text = subprocess.run(["readelf", "-dlW", helper], check=True, capture_output=True, text=True).stdout
    assert "GNU_RELRO" in text
    assert not re.search(r"GNU_STACK.*E", text)
    assert "NEEDED" not in text
    assert "INTERP" not in text


def test_the_helper_runs_under_the_name_of_a_runtime(tmp_path: Path) -> None:
    """Settings that allow no arguments, such as containerd's, use a link with this name."""
    (tmp_path / "fgpu-runtime-echo").symlink_to(kit.HELPER)
    done = subprocess.run([tmp_path / "fgpu-runtime-echo", "state", "x"], capture_output=True, text=True, check=True)
    assert done.stdout == "state x\n"
    (tmp_path / "fgpu-runtime-fgpu-oci").symlink_to(kit.HELPER)
    done = subprocess.run([tmp_path / "fgpu-runtime-fgpu-oci"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, "the helper would call itself for ever"


def test_the_helper_finds_a_runtime_by_a_link_beside_itself(tmp_path: Path) -> None:
    """Runtimes that engines name by a path need not be in PATH. The link is searched beside the helper."""
    shutil.copy(kit.HELPER, tmp_path / "fgpu-oci")
    (tmp_path / "fgpu-runtime-crio-said").symlink_to("fgpu-oci")
    (tmp_path / "runtimes").mkdir()
    (tmp_path / "runtimes/crio-said").symlink_to("/bin/echo")
    done = subprocess.run([tmp_path / "fgpu-runtime-crio-said", "state"], capture_output=True, text=True, check=True)
    assert done.stdout == "state\n"
    (tmp_path / "runtimes/crio-said").unlink()
    (tmp_path / "runtimes/crio-said").symlink_to(tmp_path / "fgpu-oci")
    done = subprocess.run([tmp_path / "fgpu-runtime-crio-said"], capture_output=True, text=True, check=False)
    assert (done.returncode, "the command names no OCI runtime" in done.stderr) == (1, True), (
        "the helper would call itself for ever"
    )
