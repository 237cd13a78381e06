"""Tests of deploy/helm/fgpu: its output is valid for Kubernetes, gives no right that is not listed, and equals
deploy/kubernetes. Without helm, a digest of their sources guards the rendered files.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART, MADE = ROOT / "deploy/helm/fgpu", ROOT / "deploy/kubernetes"
HERE = ROOT / "tests/kubernetes"
FILES = [*sorted(MADE.glob("*.yaml")), *sorted((HERE / "rendered").glob("*.yaml"))]
# The version of Kubernetes of each file: appArmorProfile is a field from 1.30 on.
VERSIONS = {path.stem: ("1.28.0",) if path.stem == "older" else ("1.30.0", "1.34.1") for path in FILES}
AGAIN = "run deploy/kubernetes/render, and commit what it makes"
OPERATOR = {"PodMonitor", "PrometheusRule"}  # of the Prometheus operator, without a schema of Kubernetes
needs_helm = pytest.mark.skipif(
    not shutil.which("helm"), reason="no helm here: the rendered files are held as they are"
)


def objects(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def containers(one: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spec = one["spec"]["template"]["spec"]
    yield from (*spec.get("initContainers", ()), *spec["containers"])


def sets(path: Path) -> list[dict[str, Any]]:
    return [one for one in objects(path) if one["kind"] == "DaemonSet"]


def of_kind(name: str, kind: str) -> dict[str, Any]:
    (found,) = [one for one in objects(HERE / f"rendered/{name}.yaml") if one["kind"] == kind]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kubernetes_takes_it_and_knows_every_field(path: Path) -> None:
    found = objects(path)
    assert len(found) >= 3
    for one in found:
        assert one["metadata"]["namespace"] == "fgpu-system"
        for version in VERSIONS[path.stem] if one["kind"] not in OPERATOR else ():
            kubernetes_validate.validate(one, version, strict=True)
            unknown = json.loads(json.dumps(one))
            unknown["spec" if "spec" in one else "metadata"]["noSuchField"] = 1
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate(unknown, version, strict=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_account_has_more_rights_than_named(path: Path) -> None:
    assert {one["kind"] for one in objects(path)} <= {"ConfigMap", "DaemonSet", "ServiceAccount", *OPERATOR}
    for one in sets(path):
        spec = one["spec"]["template"]["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostIPC"} & set(spec)
        for container in containers(one):
            security = container["securityContext"]
            assert "privileged" not in security
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            assert security["capabilities"]["drop"] == ["ALL"]
            assert "memory" in container["resources"]["limits"]


def test_agent_and_gatekeeper_may_what_their_units_may() -> None:
    more = {"SYS_NICE"}  # systemd sets the priority itself
    less = {"gatekeeper": set[str](), "agent": {"CHOWN", "DAC_OVERRIDE"}}  # no group fgpu, no `fgpu run`
    found = {c["name"]: c for one in sets(MADE / "fgpu.yaml") for c in containers(one)}
    for name in less:
        unit = (ROOT / f"deploy/systemd/fgpu-{name}.service").read_text()
        (line,) = re.findall("^CapabilityBoundingSet=(.*)$", unit, re.M)
        named = {word.removeprefix("CAP_") for word in line.split()}
        assert set(found[name]["securityContext"]["capabilities"]["add"]) == (named | more) - less[name]


def test_every_mount_has_its_volume_and_every_volume_its_mount() -> None:
    for path in FILES:
        for one in sets(path):
            volumes = [volume["name"] for volume in one["spec"]["template"]["spec"]["volumes"]]
            mounted = {mount["name"] for c in containers(one) for mount in c["volumeMounts"]}
            assert sorted(volumes) == sorted(mounted), (path, one["metadata"]["name"])


def test_rules_and_dashboards_are_those_of_dashboards() -> None:
    values = yaml.safe_load((HERE / "values/everything.yaml").read_text())
    runbooks = values["prometheusRule"]["runbooks"]
    rules = (ROOT / "dashboards/rules.yaml").read_text().replace("https://fgpu.example/runbooks.html", runbooks)
    assert of_kind("everything", "PrometheusRule")["spec"] == yaml.safe_load(rules)
    assert f"runbook_url: {runbooks}#fgpuagentdown\n" in rules
    (boards,) = [
        one for one in objects(HERE / "rendered/everything.yaml") if one["metadata"]["name"] == "fgpu-dashboards"
    ]
    assert boards["metadata"]["labels"]["grafana_dashboard"] == "1"
    for name in ("cluster", "node", "tenant", "usage"):
        assert json.loads(boards["data"][f"fgpu-{name}.json"]) == json.loads(
            (ROOT / f"dashboards/{name}.json").read_text()
        )


def test_prometheus_finds_the_agents_and_leaves_tenants_their_names() -> None:
    spec = of_kind("everything", "PodMonitor")["spec"]
    (agent,) = [one for one in sets(HERE / "rendered/everything.yaml") if one["metadata"]["name"] == "fgpu-agent"]
    labels = agent["spec"]["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert labels[spec["jobLabel"]] == "fgpu"
    (endpoint,) = spec["podMetricsEndpoints"]
    assert endpoint["honorLabels"] is True
    assert endpoint["port"] in [port["name"] for c in containers(agent) for port in c.get("ports", ())]


def test_settings_are_what_an_agent_reads(tmp_path: Path) -> None:
    """The agent.yaml is valid, according to `fgpu doctor`."""
    for path in FILES:
        for one in objects(path):
            if "agent.yaml" not in one.get("data", {}):
                continue
            file = tmp_path / "agent.yaml"
            file.write_text(re.sub(r"(?m)^profiles:\n(?:[- ].*\n)*", "", one["data"]["agent.yaml"]))
            command = [ROOT / ".venv/bin/fgpu", "doctor", "--json", "--config", file]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            (check,) = [check for check in json.loads(done.stdout) if check["name"] == "settings"]
            assert check["ok"], (path, check)


SCHEMA = json.loads((CHART / "values.schema.json").read_text())
WRONG = {  # values that a user may type, each with what helm then names
    "devicePlugin: {enable: true}": "enable",
    "devicePlugin: {enabled: true}": "profiles",
    "devicePlugin: {enabled: true, profiles: [{share: 8GB}]}": "share",
    "devicePlugin: {deviceListStrategy: foo}": "deviceListStrategy",
    "settings: {overcommitt: allow}": "overcommitt",
    "settings: {overcommit: yes}": "overcommit",
    "policies: {10-notebooks: text}": "10-notebooks",
    "policies: {10-notebooks.yaml: {kind: GpuPolicy}}": "10-notebooks",
    "engines: [/run/containerd/containerd.sock]": "engines",
    "prometheusrule: {enabled: true}": "prometheusrule",
}


def faults(values: dict[str, Any]) -> list[str]:
    """Return what the chart's schema refuses, as helm checks it: values over the chart's own."""
    merged = yaml.safe_load((CHART / "values.yaml").read_text())
    for key, value in values.items():
        merged[key] = merged[key] | value if isinstance(merged.get(key), dict) else value
    return [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(merged)]


@pytest.mark.parametrize("path", [None, *sorted((HERE / "values").glob("*.yaml"))], ids=str)
def test_the_schema_of_values_takes_what_is_right(path: Path | None) -> None:
    assert faults(yaml.safe_load(path.read_text()) if path else {}) == []


@pytest.mark.parametrize("text", WRONG)
def test_the_schema_of_values_names_a_mistake(text: str) -> None:
    (fault,) = faults(yaml.safe_load(text))
    assert WRONG[text] in fault


def keys(values: Any, schema: dict[str, Any]) -> Iterator[str]:
    """Yield the keys that only the values have or only the schema knows."""
    known = schema.get("properties") if schema.get("additionalProperties") is False else None
    if known is not None and isinstance(values, dict):
        yield from known.keys() ^ values.keys()
        for key in known.keys() & values.keys():
            yield from keys(values[key], known[key])


def test_the_schema_has_every_value_of_the_chart_and_every_setting_of_the_agent() -> None:
    (settings,) = re.findall(r"^```yaml\n(listen: .*?)^```", (ROOT / "docs/policy.md").read_text(), re.M | re.S)
    values = yaml.safe_load((CHART / "values.yaml").read_text()) | {"settings": yaml.safe_load(settings)}
    assert set(keys(values, SCHEMA)) == {"global"}  # of charts that contain this one


@needs_helm
def test_helm_refuses_a_mistake_by_the_schema() -> None:
    words = ["helm", "template", "fgpu", CHART, "--kube-version=1.33.0", "--set=devicePlugin.enable=true"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "enable" in done.stderr


def test_rendered_files_are_of_this_chart() -> None:
    files = sorted(
        (str(path.relative_to(ROOT)), path)
        for folder in (CHART, HERE / "values")
        for path in folder.rglob("*")
        if path.is_file()
    )
    digest = hashlib.sha256(b"".join(path.read_bytes() for _, path in files)).hexdigest()
    assert (MADE / "chart.sha256").read_text().strip() == digest, (
        "run deploy/kubernetes/render, and commit what it makes"
    )


@needs_helm
def test_helm_renders_what_is_in_the_repository(tmp_path: Path) -> None:
    subprocess.run([MADE / "render", tmp_path], check=True, capture_output=True, timeout=120)
    for path in FILES:
        assert (tmp_path / path.relative_to(ROOT)).read_text() == path.read_text(), AGAIN


@needs_helm
@pytest.mark.parametrize("values", [None, HERE / "values/minimal.yaml"], ids=str)
def test_helm_finds_nothing_to_say(values: Path | None) -> None:
    words = ["--values", str(values)] if values and values.stem != "everything" else []
    done = subprocess.run(
        ["helm", "lint", "--strict", CHART, *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout


@needs_helm
def test_a_missing_operator_is_named() -> None:
    words = ["helm", "template", "fgpu", CHART, "--kube-version=1.33.0", "--set=podMonitor.enabled=true"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode
    assert "install it first" in done.stderr
