"""`fgpu policy`: output and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from fgpu_ebpf.agent import host_config
from fgpu_ebpf.agent.host_config import HostSettings
from fgpu_ebpf.cli.policy import policy
from fgpu_ebpf.policy.folder import PolicyFolder
from fgpu_ebpf.policy.yaml_document import ConfigError
from tests.unit import policy_kit as kit
from tests.unit.cli import cli_kit
from tests.unit.root_kit import needs_root


def fgpu(*arguments):
    """Run the command. Return its exit code and all of its output."""
    done = CliRunner().invoke(policy, [str(word) for word in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.fixture
def two(tmp_path):
    spec = """
  selector: {cgroup: ['system.slice/docker-*.scope', x], matchLabels: {tier: notebook}}
  memory: {limit: 8GiB, max: 50%}
  compute: {limit: 25%, priority: low}
  mode: observe"""
    (tmp_path / "a.yaml").write_text(kit.text("first", spec) + kit.text("second"))
    (tmp_path / "b.yaml").write_text(kit.text("third"))
    return tmp_path


def test_check_prints_the_number_of_valid_policies_and_files(two):
    assert fgpu("check", two) == (0, "ok: 3 policies in 2 files\n")
    assert fgpu("check", two / "b.yaml") == (0, "ok: 1 policy in 1 file\n")
    assert fgpu("check", two / "a.yaml", two / "b.yaml") == (0, "ok: 3 policies in 2 files\n")


@needs_root("only files that belong to root are accepted")
def test_check_warns_of_a_policy_of_this_host_that_parks_while_parking_is_off(two, monkeypatch):
    (two / "b.yaml").write_text(kit.text("idle", "{selector: {cgroup: a}, memory: {limit: 8GiB, park: {after: 10m}}}"))
    for is_on, warnings in ((False, 1), (True, 0)):
        found = HostSettings(parking=is_on, policy_folder=two), ()
        monkeypatch.setattr(host_config, "read", lambda found=found: found)
        code, said = fgpu("check")
        assert (code, said.count("spec.memory.park: has no effect while parking is off")) == (0, warnings), said
    assert "warning" not in fgpu("check", two)[1], "the files may be for another host"
    assert "memory 8GiB, parked when idle for 10 min" in fgpu("list", two)[1]
    park = "{after: 10m, hostMemory: 6GiB, deadline: 30s}"
    (two / "b.yaml").write_text(kit.text("idle", f"{{selector: {{cgroup: a}}, memory: {{limit: 8GiB, park: {park}}}}}"))
    assert "memory 8GiB, parked with 6GiB at most when idle for 10 min, requests wait for 30 s" in fgpu("list", two)[1]


def test_check_prints_every_error(two):
    (two / "b.yaml").write_text(kit.text("x", "{selector: {cgroup: a}, memory: {limit: 8GB}, mode: of}"))
    assert fgpu("check", two) == (
        1,
        f"{two}/b.yaml:5: spec.mode: 'of' is none of observe, enforce: write one of these values\n"
        f"{two}/b.yaml:5: spec.memory.limit: '8GB': did you mean 8GiB?\n"
        "fgpu: 2 errors: no policy of these files would be used\n",
    )
    assert fgpu("list", two)[0] == 1


def test_check_requires_unique_names_over_all_files(two):
    code, output = fgpu("check", two / "b.yaml", two / "b.yaml")
    assert code == 1
    assert "the name third is taken by" in output


def test_a_missing_path_is_an_error(tmp_path):
    assert fgpu("check", tmp_path / "no.yaml") == (
        1,
        f"{tmp_path}/no.yaml: cannot be read: No such file or directory\n"
        "fgpu: 1 error: no policy of these files would be used\n",
    )


def test_check_without_a_path_reads_the_host_s_folder_by_the_agent_s_rules(tmp_path, monkeypatch):
    settings = HostSettings(policy_folder=tmp_path / "policy.d"), ()
    monkeypatch.setattr(host_config, "read", lambda: settings)
    missing = f"{tmp_path}/policy.d: warning: does not exist: an agent that runs keeps its last policies\n"
    none = ": no workload gets a limit from a policy\n"
    assert fgpu("check") == (0, f"{missing}ok: 0 policies in 0 files, 1 warning{none}")
    assert fgpu("list") == (0, "no policy: no workload gets a limit from a policy\n")
    (tmp_path / "policy.d").mkdir()
    assert fgpu("check") == (0, f"ok: 0 policies in 0 files{none}")
    (tmp_path / "policy.d").chmod(0o777)
    (tmp_path / "policy.d/a.yaml").write_text(kit.text())
    code, output = fgpu("check")
    assert code == 1
    assert "users other than root" in output
    assert fgpu("check", tmp_path / "policy.d")[0] == 0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            "{selector: {cgroup: /sys/fs/cgroup/system.slice/docker-*.scope}}",
            "selector.cgroup: '/sys/fs/cgroup/system.slice/docker-*.scope' matches nothing: paths begin below "
            "/sys/fs/cgroup: did you mean 'system.slice/docker-*.scope'?",
        ),
        ("{selector: {unit: ollama}}", "the name of a unit ends with .service or .scope and has no slash"),
        ("{selector: {unit: 'user-*.slice'}}", "the name of a unit ends with .service or .scope and has no slash"),
        ("{selector: {namespace: team-a/}}", "the name of a namespace has no slash"),
        ("{selector: {image: nvcr.io/nvidia/}}", "the name of an image does not end with a slash"),
        ("{selector: {cgroup: a}, devices: [GPU0]}", "'GPU0' is read as the name of a model, not as an index: did you"),
        ("{selector: {cgroup: a}, devices: ['cuda:1']}", "did you mean 1?"),
        ("{selector: {cgroup: a}, devices: [GPU-0]}", "'GPU-0' is read as the beginning of a UUID, not as an index"),
    ],
)
def test_check_warns_about_a_selector_or_device_that_can_never_match(spec, said, tmp_path):
    (tmp_path / "a.yaml").write_text(kit.text("x", spec))
    code, output = fgpu("check", tmp_path)
    assert code == 0
    assert f"{tmp_path}/a.yaml:2: warning: spec." in output
    assert said in output
    assert output.endswith("ok: 1 policy in 1 file, 1 warning\n")


@pytest.mark.parametrize(
    "spec",
    [
        "{selector: {cgroup: [/system.slice/, 'sys/fs/cgroups', '**']}}",
        "{selector: {unit: ['ollama.service', 'docker-*', '*.s*', 'x-?']}}",
        "{selector: {cgroup: a}, devices: [0, GPU-1f3a, '*H200*', Tesla V100]}",
        "{selector: {namespace: 'team-*', image: ['nvcr.io/*', 'a/b:c']}}",
    ],
)
def test_check_does_not_warn_about_selectors_and_devices_that_may_match(spec, tmp_path):
    (tmp_path / "a.yaml").write_text(kit.text("x", spec))
    assert fgpu("check", tmp_path) == (0, "ok: 1 policy in 1 file\n")


@needs_root("only files that belong to root are accepted")
def test_list_shows_the_number_of_tenants_of_each_policy(tmp_path, monkeypatch):
    def snapshot(_):
        found = [("a", "first", "tenant"), ("b", "first", "tenant"), ("c", "", "tenant"), ("d", "second", "gone")]
        return {"tenants": [dict(zip(("tenant", "policy", "kind"), each, strict=True)) for each in found]}

    settings = HostSettings(policy_folder=tmp_path / "policy.d"), ()
    monkeypatch.setattr(host_config, "read", lambda: settings)
    (tmp_path / "policy.d").mkdir()
    (tmp_path / "policy.d/a.yaml").write_text(kit.text("first") + kit.text("second"))

    def counts(*words):
        done = cli_kit.fgpu(tmp_path, "policy", "list", *words)
        return [one.get("tenants", "-") for one in json.loads(done.stdout)]

    with cli_kit.agent(tmp_path, snapshot=snapshot):
        assert counts("--json") == [2, 0]
        assert counts("--json", str(tmp_path / "policy.d")) == ["-", "-"], "another folder may not be in force"
        said = cli_kit.fgpu(tmp_path, "policy", "list").stdout
        assert [line for line in said.splitlines() if "now" in line] == [
            "   matches 2 tenants now",
            "   matches 0 tenants now",
        ]
    assert counts("--json") == [None, None], "no agent answers"


def test_list_shows_policies_in_their_order(two):
    code, output = fgpu("list", two)
    assert code == 0
    assert (
        output
        == f"""\
1. first ({two}/a.yaml:2): observe
   cgroup: system.slice/docker-*.scope, x
   labels: tier In (notebook)
   devices *: memory 8GiB (up to 50% by label), compute up to 25%, weight 100, low priority
2. second ({two}/a.yaml:11): enforce
   cgroup: a
   devices *: no limit
3. third ({two}/b.yaml:2): enforce
   cgroup: a
   devices *: no limit
"""
    )


def test_list_prints_policies_as_json(two):
    first, second, _ = json.loads(fgpu("list", "--json", two)[1])
    assert first == {
        "name": "first",
        "source": f"{two}/a.yaml:2",
        "mode": "observe",
        "selector": {"cgroup": ["system.slice/docker-*.scope", "x"], "labels": ["tier In (notebook)"]},
        "devices": ["*"],
        "memory": {
            "limit": {"bytes": 8 << 30},
            "max": {"ratio": 0.5},
            "contexts": 0,
            "park_after_seconds": None,
            "park_bytes": None,
            "park_deadline_seconds": None,
        },
        "compute": {
            "limit_ratio": 0.25,
            "weight": 100,
            "priority": "low",
            "quantum_ns": 20_000_000,
            "isolation": "shared",
        },
        "on_bypass": "report",
        "utilization": "device",
        "metric_labels": [],
    }
    assert (second["memory"], second["compute"]) == (None, None)


def test_schema_prints_the_json_schema():
    code, output = fgpu("schema")
    assert code == 0
    assert json.loads(output)["title"] == "GpuPolicy"


@settings(max_examples=40)
@given(st.lists(kit.documents, min_size=1, max_size=4))
def test_the_agent_loads_exactly_the_files_that_check_accepts(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("policies")
    for at, document in enumerate(documents):
        (folder / f"{at}.yaml").write_bytes(kit.as_yaml(document))
    loads = PolicyFolder(folder, root_only=False, settle_seconds=0).read().policies is not None
    assert fgpu("check", folder)[0] == (0 if loads else 1)


@needs_root("it starts a program as another user")
def test_an_unprivileged_user_can_run_check(two):
    for path in (two, *two.parents):
        if path.stat().st_uid == 0 and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    code = "import sys; from fgpu_ebpf.cli.policy import policy; policy(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "check", str(two)],
        capture_output=True,
        text=True,
        user=65534,
        group=65534,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "ok: 3 policies in 2 files\n"), done.stderr


def test_check_without_a_path_refuses_an_agent_yaml_with_errors(monkeypatch):
    monkeypatch.setattr(host_config, "read", lambda: (None, (ConfigError("agent.yaml", 3, "policyFolder", "no"),)))
    code, said = fgpu("check")
    assert code == 1
    assert "agent.yaml:3: policyFolder: no" in said
