"""Tests of the command `fgpu setup`: the steps to a first limit, each decision, and undo."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fgpu_ebpf import control_client, doctor
from fgpu_ebpf.agent import host_config
from fgpu_ebpf.check import Check
from fgpu_ebpf.cli.setup import NAMES
from fgpu_ebpf.containers import engine_setup, engines, injection
from fgpu_ebpf.policy import folder
from fgpu_ebpf.policy.globs import path_globs
from fgpu_ebpf.workloads import shim_mounts
from tests.unit import detach_kit
from tests.unit.cli.cli_kit import agent, fgpu

ROOT = Path(__file__).parents[3]
ID = "0123456789abcdef" * 4
DISABLED = "disable --now fgpu-agent fgpu-gatekeeper fgpu-parker.socket fgpu-parker"


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Return a host with Docker 26 and an empty folder of policies, where systemd runs.

    `systemctl` records its arguments.
    """
    for name in ("bin", "policy.d"):
        (tmp_path / name).mkdir()
    docker, systemctl = tmp_path / "bin/dockerd", tmp_path / "bin/systemctl"
    docker.write_text("#!/bin/sh\necho Docker version 26.1.5\n")
    systemctl.write_text(f"""#!/bin/sh
case "$*" in show*) ;; *is-enabled*) [ -e {tmp_path}/enabled ] ;; *is-active*) [ -e {tmp_path}/active ] ;;
*) echo "$*" >>{tmp_path}/asked; exit $(cat {tmp_path}/fails 2>/dev/null || echo 0) ;; esac
""")
    docker.chmod(0o755)
    systemctl.chmod(0o755)
    (tmp_path / "bin/runc").touch(mode=0o755)
    settings = replace(engines.ENGINES["docker"], file=tmp_path / "daemon.json")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr(engine_setup, "_FOLDERS", ())
    monkeypatch.setattr(engine_setup, "_RUN", tmp_path / "run")
    monkeypatch.setattr(engine_setup, "STATE", tmp_path / "state")
    monkeypatch.setattr(injection, "BIN", tmp_path / "beside")
    monkeypatch.setitem(engines.ENGINES, "docker", settings)
    monkeypatch.setattr(host_config, "read", lambda: (SimpleNamespace(policy_folder=tmp_path / "policy.d"), ()))
    monkeypatch.setattr(folder, "FOLDER", tmp_path / "policy.d")
    monkeypatch.setattr(control_client, "has_unit", lambda: True)
    monkeypatch.setattr("fgpu_ebpf.driver.start_checks.package_file", lambda *_: tmp_path / "bin/runc")  # any file
    detach_kit.restrict(monkeypatch, tmp_path)
    found = SimpleNamespace(path=tmp_path, daemon=settings.file, policy=tmp_path / "policy.d/zz-docker.yaml", checks=[])
    monkeypatch.setattr(doctor, "checks", lambda _: found.checks)
    return found


def asked(host) -> list[str]:
    place = host.path / "asked"
    return place.read_text().splitlines() if place.exists() else []


def setup(host, *words: str):
    return fgpu(host.path, "setup", "docker", *words)


def everything(host) -> dict[str, str]:
    return {str(p): p.read_text() for p in host.path.rglob("*") if p.is_file() and p.name != "asked"}


def test_one_command_writes_all_files_and_prints_the_next_command(host):
    host.checks = [Check("kernel", True, "6.1")]
    done = setup(host, "--memory", "8GiB")
    assert done.exit_code == 0, done.output
    settings = json.loads(host.daemon.read_text())
    assert (settings["default-runtime"], settings["features"]) == ("fgpu", {"cdi": True})
    ((policy,), errors) = folder.parse(str(host.policy), host.policy.read_bytes())
    assert errors == []
    assert policy.memory.limit.bytes == 8 << 30
    assert asked(host) == ["enable --now fgpu-agent"]
    for line in (
        "takes effect after: systemctl reload docker",
        "then try: docker run --rm --gpus all ",
        "all 1 checks",
    ):
        assert line in done.output


def test_a_second_run_changes_nothing_and_reports_that(host):
    setup(host, "--memory", "8GiB")
    before = everything(host)
    for name in ("enabled", "active"):
        (host.path / name).touch()
    done = setup(host, "--memory", "8GiB")
    assert done.output.count("nothing to do") == 3
    assert "takes effect" not in done.output
    assert {k: v for k, v in everything(host).items() if not k.endswith(("enabled", "active"))} == before
    assert asked(host) == ["enable --now fgpu-agent"]


def test_a_missing_engine_is_an_error_without_option_file_or_undo(host):
    (host.path / "bin/dockerd").unlink()
    before = everything(host)
    done = setup(host, "--memory", "8GiB")
    assert (done.exit_code, "docker is not installed here" in done.stderr) == (1, True)
    assert "; nothing was changed" in done.stderr
    assert (everything(host), asked(host)) == (before, [])
    assert setup(host, "--file", str(host.daemon)).exit_code == 0, "setup failed with a named settings file"
    assert setup(host, "--undo").exit_code == 0, "undo failed after the engine was removed"
    assert not host.daemon.exists()


def test_a_dry_run_writes_nothing(host):
    before = everything(host)
    done = setup(host, "--memory", "8GiB", "--dry-run")
    assert done.output.count("would be written") == 2
    assert (done.exit_code, everything(host), asked(host)) == (0, before, [])


def test_invalid_settings_of_the_engine_are_an_error_and_nothing_is_changed(host):
    host.daemon.write_text("{")
    before = everything(host)
    assert setup(host, "--memory", "8GiB").exit_code == 1
    assert (everything(host), asked(host)) == (before, [])


@pytest.mark.parametrize("size", ["8", "8GB", "8GiB}", ""])
def test_invalid_sizes_are_refused(size, host):
    done = setup(host, "--memory", size)
    assert (done.exit_code, host.policy.exists()) == (2, False)


def test_only_the_engine_is_set_up_without_a_memory_size(host):
    done = setup(host)
    assert (done.exit_code, host.policy.exists(), asked(host)) == (0, False, [])
    assert json.loads(host.daemon.read_text())["default-runtime"] == "fgpu"


# -- policies ------------------------------------------------------------------------------------------------------


def test_an_administrator_s_policies_are_kept(host):
    theirs = host.path / "policy.d/10-mine.yaml"
    theirs.write_text("# none yet\n")
    done = setup(host, "--memory", "8GiB")
    assert "10-mine.yaml" in done.output
    assert "kept" in done.output
    assert not host.policy.exists()
    setup(host, "--undo")
    assert theirs.read_text() == "# none yet\n"


def test_another_size_replaces_only_the_policy_of_a_setup(host):
    setup(host, "--memory", "8GiB")
    setup(host, "--memory", "50%")
    assert "{limit: 50%}" in host.policy.read_text()
    host.policy.write_text(host.policy.read_text().replace("50%", "60%"))
    assert "zz-docker.yaml" in setup(host, "--memory", "8GiB").output
    assert "{limit: 60%}" in host.policy.read_text()
    done = setup(host, "--undo")
    assert f"{host.policy}: kept" in done.output
    assert "{limit: 60%}" in host.policy.read_text()


def test_each_of_two_engines_has_its_own_policy(host, monkeypatch):
    podman = replace(engines.ENGINES["podman"], file=host.path / "etc/podman.conf", programs=("dockerd",))
    monkeypatch.setitem(engines.ENGINES, "podman", podman)
    setup(host, "--memory", "8GiB")
    assert fgpu(host.path, "setup", "podman", "--memory", "4GiB").exit_code == 0
    assert {p.name for p in host.policy.parent.iterdir()} == {"zz-docker.yaml", "zz-podman.yaml"}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("docker", f"system.slice/docker-{ID}.scope"),
        ("docker", f"docker/{ID}"),
        ("podman", f"machine.slice/libpod-{ID}.scope"),
        ("podman", f"machine.slice/machine-libpod_pod_{ID}.slice/libpod-{ID}.scope"),
        ("podman", f"libpod_parent/libpod-{ID}"),
        ("podman", f"system.slice/web.service/libpod-payload-{ID}"),
        ("podman", f"system.slice/system-web.slice/web@1.service/libpod-payload-{ID}"),
        ("k3s", f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-{ID}.scope"),
        ("containerd", f"kubepods/burstable/pod1/{ID}"),
        ("rke2", f"kubepods/pod1/{ID}"),
        ("crio", f"kubepods.slice/kubepods-pod1.slice/crio-{ID}.scope"),
    ],
)
def test_the_policy_matches_containers_of_the_engine(name, path):
    globs = path_globs(engines.ENGINES[name].cgroups)
    assert globs.matches(path)
    assert not globs.matches(path.rpartition("/")[0])
    assert not globs.matches("system.slice/ssh.service")


def test_every_engine_can_be_named():
    assert set(NAMES) == set(engines.ENGINES)


# -- Slurm ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(host, monkeypatch):
    """Return a host with slurmd and with a slurm.conf that has two settings in other forms."""
    monkeypatch.setitem(engines.ENGINES, "slurm", replace(engines.ENGINES["slurm"], programs=("dockerd",)))
    monkeypatch.setenv("SLURM_CONF", str(host.path / "slurm.conf"))
    host.conf = host.path / "slurm.conf"
    host.conf.write_text(f"ClusterName=c\nprologflags = Alloc,contain # of the site\nEpilog={host.path}/bin/runc\n")
    host.policy = host.path / "policy.d/30-slurm.yaml"
    return host


def test_slurm_gets_a_policy_and_the_missing_lines_of_slurm_conf(slurm):
    before, conf = everything(slurm), slurm.conf.read_text()
    done = fgpu(slurm.path, "setup", "slurm")
    assert done.exit_code == 0
    lines = [f"Prolog={slurm.path}/bin/runc", f"TaskProlog={slurm.path}/bin/runc"]
    assert done.output.splitlines() == [
        f"{slurm.policy}: written", "add to slurm.conf, and restart slurmctld and slurmd:", *lines
    ]  # fmt: skip
    ((policy,), errors) = folder.parse(str(slurm.policy), slurm.policy.read_bytes())
    assert (policy.name, errors) == ("jobs", [])
    assert slurm.conf.read_text() == conf
    assert fgpu(slurm.path, "setup", "slurm").output == f"{slurm.policy}: nothing to do\n"
    undone = fgpu(slurm.path, "setup", "slurm", "--undo")
    assert undone.output.splitlines()[0] == f"{slurm.policy}: removed"
    assert "slurm.conf" in undone.output
    assert {name: text for name, text in everything(slurm).items() if "/beside/" not in name} == before


def test_a_changed_policy_for_slurm_is_kept(slurm):
    fgpu(slurm.path, "setup", "slurm")
    mine = slurm.policy.read_text().replace("limit: 0", "limit: 1GiB")
    slurm.policy.write_text(mine)
    assert [(check.name, check.ok) for check in engine_setup.checks(engine_setup.STATE)] == [("slurm", True)]
    again = fgpu(slurm.path, "setup", "slurm")
    assert (again.exit_code, "edit it by hand" in again.output) == (1, True)
    assert "kept" in fgpu(slurm.path, "setup", "slurm", "--undo").output
    assert slurm.policy.read_text() == mine


@pytest.mark.parametrize(("change", "is_ours"), [("", True), ("# mine\n", False)])
def test_an_engine_gets_a_first_policy_beside_the_unchanged_policy_for_slurm(change, is_ours, slurm):
    fgpu(slurm.path, "setup", "slurm")
    slurm.policy.write_text(slurm.policy.read_text() + change)
    setup(slurm, "--memory", "8GiB")
    assert slurm.policy.with_name("zz-docker.yaml").exists() == is_ours


def test_settings_of_another_engine_that_cannot_be_read_do_not_prevent_a_first_policy(slurm):
    fgpu(slurm.path, "setup", "slurm")
    slurm.policy.write_bytes(b"\xff")
    slurm.policy.rename(slurm.path / "elsewhere.yaml")
    state = engine_setup.STATE / "slurm.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "file": str(slurm.path / "elsewhere.yaml")}))
    setup(slurm, "--memory", "8GiB")
    assert slurm.policy.with_name("zz-docker.yaml").exists()


def test_slurm_has_no_memory_size(slurm):
    done = fgpu(slurm.path, "setup", "slurm", "--memory", "8GiB")
    assert (done.exit_code, "shards" in done.output, slurm.policy.exists()) == (2, True, False)


# -- undo ----------------------------------------------------------------------------------------------------------


def test_undo_reverts_everything(host):
    before = everything(host)
    setup(host, "--memory", "8GiB")
    done = setup(host, "--undo")
    assert (done.exit_code, done.output.count(": removed\n")) == (0, 2)
    assert host.policy.parent.is_dir(), "without the folder, an agent keeps the last policies"
    assert {k: v for k, v in everything(host).items() if "/beside/" not in k} == before
    assert asked(host)[1:] == [DISABLED]
    assert setup(host, "--undo").output == f"{host.daemon}: nothing to do\n"


def test_undo_marks_that_a_running_engine_may_still_use_the_helper(host):
    mark = engine_setup.unread_mark(host.path)
    assert engine_setup.unread_mark(Path("/run/fgpu")) == Path("/run/fgpu-undone"), "postrm has the same name"
    setup(host, "--undo")
    assert not mark.exists(), "nothing was undone"
    setup(host)
    setup(host, "--undo")
    assert mark.exists()
    mark.unlink()
    setup(host)
    host.daemon.unlink()
    setup(host, "--undo")
    assert mark.exists(), "the engine has read the settings that were removed by hand"
    mark.unlink()
    setup(host)
    (host.path / "bin/dockerd").unlink()
    setup(host, "--undo")
    assert mark.exists(), "the engine's program may be in another folder"


def test_undo_of_slurm_does_not_keep_the_helper(slurm):
    fgpu(slurm.path, "setup", "slurm")
    fgpu(slurm.path, "setup", "slurm", "--undo")
    assert not engine_setup.unread_mark(slurm.path).exists()


def test_undo_reports_what_it_keeps(host):
    setup(host, "--memory", "8GiB")
    host.daemon.write_text(json.dumps({**json.loads(host.daemon.read_text()), "debug": True}))
    done = setup(host, "--undo")
    assert f"{host.daemon}: restored; changes since the setup are kept" in done.output
    assert json.loads(host.daemon.read_text()) == {"debug": True}


def test_undo_from_another_folder_restores_a_file_that_setup_was_given_by_a_relative_path(host, monkeypatch):
    text = '{"debug":   true}'
    host.daemon.write_text(text)
    monkeypatch.chdir(host.path)
    assert setup(host, "--file", "daemon.json").exit_code == 0
    monkeypatch.chdir("/")
    assert setup(host, "--undo").output == (
        f"{host.daemon}: restored\ntakes effect after: systemctl restart docker\n"
        "containers created since the setup use the removed runtime fgpu: create them again\n"
    )
    assert host.daemon.read_text() == text


def test_undo_of_another_file_than_the_set_up_file_is_an_error_and_changes_nothing(host):
    setup(host, "--memory", "8GiB")
    before = everything(host)
    done = setup(host, "--undo", "--file", str(host.path / "other.json"))
    assert (done.exit_code, f"`fgpu setup docker` has changed {host.daemon}" in done.stderr) == (1, True)
    assert everything(host) == before
    (host.path / "link.json").symlink_to(host.daemon)
    assert setup(host, "--undo", "--file", str(host.path / "link.json")).exit_code == 0
    assert not host.daemon.exists()


@pytest.mark.parametrize(
    ("policies", "tenants", "why"), [(1, [], "1 policy in force"), (0, [{"tenant": "alice"}], "alice"), (0, [], "")]
)
def test_undo_keeps_a_service_that_is_still_needed(policies, tenants, why, host):
    setup(host, "--memory", "8GiB")
    with agent(host.path, reload={"policies": policies}, snapshot={"tenants": tenants}, detach={"tenants": 0}) as got:
        done = setup(host, "--undo")
    assert ("kept" in done.output, len(asked(host))) == ((True, 1) if why else (False, 2))
    assert ("detach" in [request["verb"] for request in got]) == (not why)
    assert why in done.output


def test_undo_keeps_the_service_that_a_parked_tenant_needs(host, monkeypatch):
    setup(host, "--memory", "8GiB")
    monkeypatch.setattr("fgpu_ebpf.cli.parking.still_parked", lambda _: "alice: no room")
    done = setup(host, "--undo")
    assert "kept: there are parked tenants: alice: no room" in done.output
    assert len(asked(host)) == 1


def test_undo_keeps_the_service_whose_agent_starts_and_has_policies(host, monkeypatch):
    setup(host, "--memory", "8GiB")
    with contextlib.ExitStack() as stack:

        def waits_for_the_agent(_) -> str:
            stack.enter_context(agent(host.path, reload={"policies": 1}, snapshot={"tenants": []}))
            return ""

        monkeypatch.setattr("fgpu_ebpf.cli.parking.still_parked", waits_for_the_agent)
        done = setup(host, "--undo")
    assert "fgpu-agent: kept: there is 1 policy in force" in done.output
    assert len(asked(host)) == 1


@pytest.mark.parametrize("name", ["mine.yaml", "zz-docker.yaml"])
def test_undo_without_an_agent_keeps_the_service_if_an_administrator_has_written_a_policy(name, running):
    running.policy.unlink()
    running.policy.with_name(name).write_text("# mine\n")
    done = setup(running, "--undo")
    assert f"fgpu-agent: kept: {running.policy.parent} has policies" in done.output
    assert len(asked(running)) == 1
    assert (running.path / "shim").stat().st_mode & 0o7777 == 0o755, "the shim no longer waits for the agent"


def test_undo_without_an_agent_keeps_the_service_if_agent_yaml_has_an_error(host, monkeypatch):
    setup(host, "--memory", "8GiB")
    monkeypatch.setattr(host_config, "read", lambda: (None, ("agent.yaml: no such key: policy",)))
    assert "fgpu-agent: kept: agent.yaml: no such key: policy" in setup(host, "--undo").output
    assert len(asked(host)) == 1


@pytest.mark.parametrize(
    ("was", "words"),
    [
        ((), ["enable --now fgpu-agent", DISABLED]),
        (("active",), ["enable --now fgpu-agent", "disable fgpu-agent fgpu-gatekeeper fgpu-parker.socket fgpu-parker"]),
        (("enabled",), ["enable --now fgpu-agent"]),
        (("enabled", "active"), []),
    ],
)
def test_undo_restores_the_state_of_the_service(was, words, host):
    for name in was:
        (host.path / name).touch()
    setup(host, "--memory", "8GiB")
    setup(host, "--undo")
    assert asked(host) == words


@pytest.fixture
def running(host, monkeypatch):
    """Return a host with a setup, an agent that has just ended, and a container that has mounted the shim's folder."""
    setup(host, "--memory", "8GiB")
    (host.path / "shim").mkdir(mode=0o755)
    store = host.path / "store"
    (store / "1").mkdir(parents=True)
    (store / "1/libfgpu.so").touch()
    (store / "current").symlink_to("1")
    (host.path / "published").write_text(f"{store}/current/libfgpu.so\n")
    (host.path / "containers").write_text(f"shim {store}/current/libfgpu.so\n")
    monkeypatch.setattr(shim_mounts, "is_mounted", lambda path: path == host.path / "shim")
    return host


def test_programs_in_a_container_do_not_wait_for_the_agent_after_an_undo(running):
    done = setup(running, "--undo")
    assert done.exit_code == 0
    assert (running.path / "shim").stat().st_mode & 0o7777 == 0o1755, "a shim without a reply refuses memory"
    assert not (running.path / "containers").exists()


def test_an_engine_starts_containers_until_it_reads_its_settings_after_an_undo(running, monkeypatch):
    monkeypatch.setattr(shim_mounts, "is_mounted", lambda _: False)
    assert setup(running, "--undo").exit_code == 0
    assert not (running.path / "shim").exists()
    assert (injection.BIN / injection.HELPER).exists(), "the settings that the engine has read name the helper"


def test_undo_without_an_agent_keeps_limits_of_the_kernel(running):
    (running.path / "pins").mkdir()
    done = setup(running, "--undo")
    assert (done.exit_code, asked(running)[1:2]) == (0, [DISABLED])
    assert "`fgpu detach` removes limits that the kernel may have" in done.output
    assert (running.path / "pins").exists()
    assert (running.path / "shim").stat().st_mode & 0o7777 == 0o755, "programs get memory without a limit"


def test_undo_of_an_agent_that_ran_before_does_not_detach_it(host):
    (host.path / "active").touch()
    setup(host, "--memory", "8GiB")
    with agent(host.path, reload={"policies": 0}, snapshot={"tenants": []}) as got:
        assert setup(host, "--undo").exit_code == 0
    assert "detach" not in [request["verb"] for request in got]


def test_a_removal_of_the_package_disables_the_service_once_and_reports_only_the_engines(host):
    """The undo of an engine finds no agent, and would print `fgpu detach`, which is the next step of the removal."""
    setup(host, "--memory", "8GiB")
    (host.path / "bin/fgpu").write_text(f'#!/bin/sh\n[ "$1" != setup ] || ls {engine_setup.STATE} >{host.path}/told\n')
    (host.path / "bin/fgpu").chmod(0o755)
    text = (ROOT / "deploy/debian/prerm").read_text()
    for usual, place in (("/var/lib/fgpu/setup", engine_setup.STATE), ("/usr/lib/fgpu/site", host.path / "bin")):
        assert usual in text
        text = text.replace(usual, str(place))
    subprocess.run(["sh", "-c", text, "prerm", "remove"], check=True)
    assert (host.path / "told").read_text() == "docker-policy.json\ndocker.json\n"
    assert "fgpu-agent" not in setup(host, "--undo").output


def test_undo_disables_a_service_whose_start_was_interrupted(host, monkeypatch):
    real = subprocess.run

    def interrupted(words, **how):
        if "enable" in words:
            raise KeyboardInterrupt
        return real(words, **how)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", interrupted)
        assert setup(host, "--memory", "8GiB").exit_code == 1
    setup(host, "--undo")
    assert asked(host) == [DISABLED]


def test_folders_of_setup_are_open_to_all_users(host):
    before = os.umask(0o077)
    try:
        setup(host, "--memory", "8GiB")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (engine_setup.STATE, injection.BIN)] == [0o755, 0o755]


# -- failures ------------------------------------------------------------------------------------------------------


def test_a_service_that_does_not_start_is_an_error(host):
    (host.path / "fails").write_text("1")
    done = setup(host, "--memory", "8GiB")
    assert (done.exit_code, "does not start" in done.output) == (1, True)


def test_setup_prints_only_failed_checks_of_doctor_and_fails(host):
    host.checks = [Check("kernel", True, "6.1"), Check("driver", False, "no driver", "install it")]
    done = setup(host, "--memory", "8GiB")
    assert done.exit_code == 1
    assert "FAIL  driver: no driver\n      fix: install it" in done.output
    assert "kernel" not in done.output


def test_an_agent_of_another_installation_is_not_changed(host):
    with agent(host.path, ping={}):
        done = setup(host, "--memory", "8GiB")
    assert (done.exit_code, asked(host)) == (0, [])
