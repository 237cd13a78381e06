"""Tests of settings outside of fgpu's file: setup refuses them and changes nothing, and doctor names them."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fgpu_ebpf.containers import engine_setup
from fgpu_ebpf.containers.engine_config import Engine, SetupError
from fgpu_ebpf.containers.engine_setup import checks, set_up
from fgpu_ebpf.containers.engines import ENGINES

V2, V3 = "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"
NVIDIA = """version = {version}
[plugins."{plugin}".containerd]
default_runtime_name = "nvidia"
[plugins."{plugin}".containerd.runtimes.nvidia]
runtime_type = "io.containerd.runc.v2"
[plugins."{plugin}".containerd.runtimes.nvidia.options]
BinaryName = "/usr/bin/nvidia-container-runtime"
"""
WHOLE = NVIDIA.format(version=2, plugin=V2)
WITHOUT_DEFAULT = WHOLE.replace('default_runtime_name = "nvidia"\n', "")
ONLY_DEFAULT = WHOLE[: WHOLE.index("[plugins", 50)]


@pytest.fixture
def helper(tmp_path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/fgpu-oci").touch()
    return tmp_path / "bin/fgpu-oci"


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch) -> Path:
    """Return the folder of pid files of a host without programs."""
    (tmp_path / "run").mkdir()
    (tmp_path / "path").mkdir()
    monkeypatch.setattr(engine_setup, "_RUN", tmp_path / "run")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    return tmp_path / "run"


def engine(name: str, tmp_path: Path, text: str) -> Engine:
    file = tmp_path / "etc/settings"
    (file.parent / "conf.d").mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return replace(ENGINES[name], file=file)


def refused(found: Engine, helper: Path, tmp_path: Path) -> str:
    """Return the error of a setup that has changed no file."""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SetupError) as error:
        set_up(found, helper, tmp_path / "states/x.json")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    return str(error.value)


# -- containerd ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imports", ['["conf.d/*.toml"]', '["/missing/*.toml", "gone.toml", "ETC/conf.d/*"]'])
@pytest.mark.parametrize(
    ("drop_in", "fix"),
    [
        (WHOLE, "run fgpu setup containerd --file {drop_in}"),
        (NVIDIA.format(version=3, plugin=V3), "run fgpu setup containerd --file {drop_in}"),
        (WITHOUT_DEFAULT, f"move the settings of {V2} from {{drop_in}} to {{file}}"),
        (ONLY_DEFAULT, f"move the settings of {V2} from {{drop_in}} to {{file}}"),
        (NVIDIA.format(version=2, plugin=V3), f"move the settings of {V3} from {{drop_in}} to {{file}}"),
        (NVIDIA.format(version=1, plugin="cri"), "move the settings of cri from {drop_in} to {file}"),
    ],
)
def test_imported_runtimes_of_containerd_are_refused_with_a_fix(imports, drop_in, fix, tmp_path, helper):
    found = engine("containerd", tmp_path, f"version = 2\nimports = {imports.replace('ETC', str(tmp_path / 'etc'))}\n")
    file = found.file.parent / "conf.d/99-nvidia.toml"
    file.write_text(drop_in)
    said = refused(found, helper, tmp_path)
    assert f"{found.file} imports {file}" in said
    assert fix.format(drop_in=file, file=found.file) in said


def test_a_file_that_an_imported_file_imports_is_read_and_a_circle_ends(tmp_path, helper):
    found = engine("containerd", tmp_path, 'version = 2\nimports = ["conf.d/1.toml"]\n')
    folder = found.file.parent / "conf.d"
    (folder / "1.toml").write_text('imports = ["../settings", "*.toml", ".9*"]\n')
    assert set_up(found, helper, tmp_path / "states/x.json")
    (folder / ".9").write_text(WHOLE)
    assert str(folder / ".9") in refused(found, helper, tmp_path)


def test_several_imported_files_with_runtimes_must_be_moved(tmp_path, helper):
    found = engine("containerd", tmp_path, 'version = 2\nimports = ["conf.d/*.toml"]\n')
    for name in ("1.toml", "2.toml"):
        (found.file.parent / "conf.d" / name).write_text(WHOLE)
    assert "move the settings" in refused(found, helper, tmp_path)


@pytest.mark.parametrize(
    "drop_in",
    ["", "damaged", f'[plugins."{V2}".registry]\nconfig_path = "/c"\n', "plugins = 7\n", 'imports = "x"\n', None],
)
def test_imported_files_without_runtimes_are_no_obstacle(drop_in, tmp_path, helper):
    found, state = engine("containerd", tmp_path, 'version = 2\nimports = ["conf.d/*"]\n'), tmp_path / "states"
    file = found.file.parent / "conf.d/1"
    file.mkdir() if drop_in is None else file.write_text(drop_in)
    assert set_up(found, helper, state / "containerd.json")
    assert next(checks(state, helper)).ok


def test_doctor_names_a_drop_in_that_arrives_after_the_setup_and_its_fix_works(tmp_path, helper):
    found = engine("containerd", tmp_path, 'version = 2\nimports = ["conf.d/*.toml"]\n')
    before, state = found.file.read_text(), tmp_path / "states/containerd.json"
    set_up(found, helper, state)
    assert next(checks(state.parent, helper)).ok
    file = found.file.parent / "conf.d/99-nvidia.toml"
    file.write_text(WHOLE)
    (check,) = checks(state.parent, helper)
    assert (check.ok, str(file) in check.found) == (False, True)
    assert check.fix == f"run fgpu setup containerd --file {file}"
    assert set_up(replace(found, file=file), helper, state)
    assert "fgpu-runtime-containerd-nvidia-container-runtime" in file.read_text()
    assert found.file.read_text() == before
    assert next(checks(state.parent, helper)).ok


# -- Docker --------------------------------------------------------------------------------------------------------


@pytest.fixture
def daemon(run) -> Iterator[Callable[..., None]]:
    """Return a function that starts a process with this command line, and writes the process's pid file."""
    with contextlib.ExitStack() as stack:

        def start(*flags: str, name: str = "/usr/bin/dockerd") -> None:
            command, pipe = [name, "-c", "echo; read line", *flags], subprocess.PIPE
            process = stack.enter_context(subprocess.Popen(command, executable="/bin/sh", stdin=pipe, stdout=pipe))
            stack.callback(process.kill)
            assert process.stdout
            assert process.stdout.read(1), "the program, which has a command line only once it runs, does not run"
            (run / "docker.pid").write_text(f"{process.pid}\n")

        yield start


def systemctl(tmp_path: Path, *flags: str) -> None:
    place = tmp_path / "path/systemctl"
    flag = " ".join(flags)
    place.write_text(f"""#!/bin/sh
[ "$*" = "show -p ExecStart docker.service" ] || exit 1
echo 'ExecStart={{ path=/usr/bin/dockerd ; argv[]=/usr/bin/dockerd -H fd:// {flag} ; ignore_errors=no ; pid=0 }}'
""")
    place.chmod(0o755)


@pytest.mark.parametrize("flags", [["--default-runtime=nvidia"], ["--debug", "--default-runtime", "nvidia"]])
@pytest.mark.parametrize("is_running", [True, False])
def test_a_default_runtime_among_dockerd_s_flags_is_refused(flags, is_running, tmp_path, helper, daemon):
    found = engine("docker", tmp_path, "{}")
    daemon(*flags) if is_running else systemctl(tmp_path, *flags)
    said = refused(found, helper, tmp_path)
    assert f"dockerd has the flag --default-runtime, and does not start if {found.file}" in said
    assert 'replace the flag by "default-runtime": "nvidia" in the file' in said


def test_another_settings_file_among_dockerd_s_flags_is_refused(tmp_path, helper, daemon):
    found, other = engine("docker", tmp_path, "{}"), tmp_path / "other.json"
    daemon("--config-file", str(other))
    said = refused(found, helper, tmp_path)
    assert said == (
        f"dockerd reads {other} (flag --config-file), not {found.file}: run fgpu setup docker --file {other}"
    )
    assert set_up(replace(found, file=other), helper, tmp_path / "states/x.json")


@pytest.mark.parametrize("flags", [[], ["--add-runtime=a=/b", "--default-runtime-of-another-kind=x"]])
def test_a_dockerd_with_other_flags_is_set_up(flags, tmp_path, helper, daemon):
    systemctl(tmp_path, "--default-runtime=of-a-service-that-was-changed-and-not-restarted")
    daemon(*flags, f"--config-file={tmp_path}/etc/conf.d/../settings")
    assert set_up(engine("docker", tmp_path, "{}"), helper, tmp_path / "states/x.json")


@pytest.mark.parametrize("pid_file", ["another process", "", "x", "-1", "999999999"])
def test_a_pid_file_of_a_dockerd_that_has_ended_is_not_used(pid_file, tmp_path, helper, daemon, run):
    if pid_file == "another process":
        daemon("--default-runtime=x", name="another")
    else:
        (run / "docker.pid").write_text(pid_file)
    assert set_up(engine("docker", tmp_path, "{}"), helper, tmp_path / "states/x.json")


def test_doctor_names_flags_of_dockerd_that_were_added_after_the_setup(tmp_path, helper, daemon):
    found, state = engine("docker", tmp_path, "{}"), tmp_path / "states/docker.json"
    set_up(found, helper, state)
    assert next(checks(state.parent, helper)).ok
    daemon("--default-runtime=runc")
    (check,) = checks(state.parent, helper)
    assert (check.ok, "flag --default-runtime" in check.found) == (False, True)
