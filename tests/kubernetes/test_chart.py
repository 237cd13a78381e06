"""Tests of deploy/helm/fgpu: its output is valid, gives only listed rights, and equals deploy/kubernetes.

Without helm, a digest of their sources guards the rendered files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART, MADE = ROOT / "deploy/helm/fgpu", ROOT / "deploy/kubernetes"
HERE = ROOT / "tests/kubernetes"
FILES = [*sorted(MADE.glob("*.yaml")), *sorted((HERE / "rendered").glob("*.yaml"))]
# The version of Kubernetes of each file: appArmorProfile is a field from 1.30 on.
VERSIONS = {path.stem: ("1.30.0", "1.34.1") for path in FILES} | {"older": ("1.28.0",), "dra": ("1.34.1",)}
AGAIN = "run deploy/kubernetes/render, and commit what it makes"
DRA = {"ClusterRole", "ClusterRoleBinding", "DeviceClass", "ValidatingAdmissionPolicy"}  # without a namespace
DRA |= {"ValidatingAdmissionPolicyBinding"}
OPERATOR = {"PodMonitor", "PrometheusRule"}  # of the Prometheus operator, without a schema of Kubernetes
HELM = shutil.which("helm")
needs_helm = pytest.mark.skipif(not HELM, reason="no helm here: the chart's digest guards the rendered files")


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


# Values that the schema refuses, and a word of the error.
WRONG = {
    "devicePlugn: {enabled: true}": "devicePlugn",
    "agent: {prot: 9423}": "prot",
    "agent: {port: metrics}": "port",
    "agent: {resources: {limits: {memory: 8GB}}}": "memory",
    "devicePlugin: {profiles: [{share: 8GB}]}": "share",
    "devicePlugin: {profiles: [{share: 8gib, count: 0}]}": "count",
    "devicePlugin: {deviceListStrategy: cdi}": "deviceListStrategy",
    "dra: {gpuStrategy: cdi-cri}": "gpuStrategy",
    "engines: [/run/containerd/containerd.sock]": "engines",
    "settings: {overcomit: allow}": "overcomit",
    "settings: {adapters: [nvidia]}": "'nvidia-dra', 'kai', ",
    "policies: {notebooks: ''}": "notebooks",
    "policies: {10-notebooks.yaml: {kind: GpuPolicy}}": "10-notebooks.yaml",
}
POLICY = """\
# limits of notebooks
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: notebooks}
spec:
  selector:
    namespace: [dev]
  compute: {limit: 50%}
  memory:
    limit: 8GiB
    max: 16GiB
"""
# The replaced text in POLICY, its replacement, and helm's error.
BROKEN = {
    ("limit: 8GiB", "limit: 8GB"): '10.yaml:10: spec.memory.limit: "8GB" is not valid: write it as 8GiB or 50%',
    ("limit: 50%", "limit: 50"): "10.yaml:8: spec.compute.limit: 50 is no string: write it as 50%",
    ("compute:", "compte:"): "10.yaml:8: spec.compte: is unknown; known: compute, devices",
    ("namespace: [dev]", "namespace: []"): "10.yaml:7: spec.selector.namespace: is not valid: write it as team-*",
    ("metadata: {name: notebooks}\n", ""): "10.yaml:2: needs metadata",
    ("GpuPolicy", "GPUPolicy"): '10.yaml:3: kind: "GPUPolicy" must be GpuPolicy',
    (
        "compute: {limit: 50%}",
        "compute: {limit: 50%, weight: 0}",
    ): "10.yaml:8: spec.compute.weight: 0 is not a whole number",
    ("    max: 16GiB", "    max: 16GiB: 1"): "10.yaml:11: is not YAML",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kubernetes_s_schema_accepts_every_field(path: Path) -> None:
    found = objects(path)
    assert len(found) >= 3
    for one in found:
        assert one["metadata"].get("namespace") == (None if one["kind"] in DRA else "fgpu-system")
        for version in VERSIONS[path.stem] if one["kind"] not in OPERATOR else ():
            kubernetes_validate.validate(one, version, strict=True)
            unknown = json.loads(json.dumps(one))
            unknown["spec" if "spec" in one else "metadata"]["noSuchField"] = 1
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate(unknown, version, strict=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_manifest_but_the_dra_driver_s_grants_a_role_and_every_container_is_restricted(path: Path) -> None:
    harmless = {"ConfigMap", "DaemonSet", "NetworkPolicy", "ServiceAccount"}
    allowed = {*harmless, *OPERATOR, *(DRA if path.stem == "dra" else ())}
    assert {one["kind"] for one in objects(path)} <= allowed
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


def test_only_the_dra_driver_has_a_token_and_it_writes_only_slices_and_the_status_of_claims() -> None:
    for path in FILES:
        for one in sets(path):
            spec = one["spec"]["template"]["spec"]
            has_token = "serviceAccountToken" in json.dumps(spec["volumes"])
            assert has_token == (one["metadata"]["name"] == "fgpu-dra-driver"), path
            assert (spec["serviceAccountName"] == "fgpu-dra-driver") == has_token
    writes = {"create", "update", "patch", "delete"}
    rules = of_kind("dra", "ClusterRole")["rules"]
    assert {name for rule in rules if writes & set(rule["verbs"]) for name in rule["resources"]} == {
        "resourceslices", "resourceclaims/status",
    }  # fmt: skip
    (binding,) = of_kind("dra", "ClusterRoleBinding")["subjects"]
    (account,) = [
        one["metadata"]
        for one in objects(HERE / "rendered/dra.yaml")
        if one["kind"] == "ServiceAccount" and one["metadata"]["name"] == binding["name"]
    ]
    name = f"system:serviceaccount:{account['namespace']}:{account['name']}"
    policies = [one for one in objects(HERE / "rendered/dra.yaml") if one["kind"] == "ValidatingAdmissionPolicy"]
    resources = [rule["resources"] for one in policies for rule in one["spec"]["matchConstraints"]["resourceRules"]]
    assert resources == [["resourceslices"], ["resourceclaims/status"]]
    for one in policies:
        (condition,) = one["spec"]["matchConditions"]
        assert condition["expression"] == f'request.userInfo.username == "{name}"'


def test_agent_and_gatekeeper_have_the_rights_of_their_units() -> None:
    more = {"SYS_NICE"}  # systemd sets the priority itself
    less = {"gatekeeper": set[str](), "agent": {"CHOWN", "DAC_OVERRIDE"}}  # no group fgpu, no `fgpu run`
    found = {c["name"]: c for one in sets(MADE / "fgpu.yaml") for c in containers(one)}
    for name in less:
        unit = (ROOT / f"deploy/systemd/fgpu-{name}.service").read_text()
        (line,) = re.findall("^CapabilityBoundingSet=(.*)$", unit, re.M)
        named = {word.removeprefix("CAP_") for word in line.split()}
        assert set(found[name]["securityContext"]["capabilities"]["add"]) == (named | more) - less[name]


def test_the_parker_runs_only_if_it_is_enabled_and_has_the_rights_of_its_unit() -> None:
    made = {path.stem: {one["metadata"]["name"] for one in sets(path)} for path in FILES}
    assert [name for name, found in made.items() if "fgpu-parker" in found] == ["everything"]
    (one,) = [one for one in sets(HERE / "rendered/everything.yaml") if one["metadata"]["name"] == "fgpu-parker"]
    (parker,) = containers(one)
    unit = (ROOT / "deploy/systemd/fgpu-parker.service").read_text()
    (line,) = re.findall("^CapabilityBoundingSet=(.*)$", unit, re.M)
    named = {word.removeprefix("CAP_") for word in line.split()}
    assert set(parker["securityContext"]["capabilities"]["add"]) == named
    assert one["spec"]["template"]["spec"]["hostPID"] is True
    (detach,) = sets(HERE / "rendered/detach-parking.yaml")
    (waker,) = [one for one in containers(detach) if one["name"] == "parker"]
    assert waker["securityContext"] == parker["securityContext"]


def test_annotations_of_apparmor_name_only_containers_of_the_pod() -> None:
    """The API server refuses other names."""
    for path in FILES:
        for one in sets(path):
            names = {container["name"] for container in containers(one)}
            annotations = one["spec"]["template"]["metadata"].get("annotations", {})
            found = {key.partition("/")[2] for key in annotations if key.startswith("container.apparmor.")}
            assert found <= names, (path, one["metadata"]["name"])


def test_no_probe_that_ends_a_container_uses_a_port_that_pods_can_reach() -> None:
    """Requests of a pod could fill the places of the metrics address, and kubelet would kill the agent."""
    made = [c for path in FILES for one in sets(path) for c in containers(one)]
    agents = [c for c in made if c["name"] == "agent" and "livenessProbe" in c]
    assert len(agents) >= 5
    for agent in agents:
        for kind in ("startupProbe", "livenessProbe"):
            assert agent[kind]["exec"] == {"command": ["fgpu-oci", "ping"]}


def test_every_mount_has_its_volume_and_every_volume_its_mount() -> None:
    for path in FILES:
        for one in sets(path):
            volumes = [volume["name"] for volume in one["spec"]["template"]["spec"]["volumes"]]
            mounted = {mount["name"] for c in containers(one) for mount in c["volumeMounts"]}
            assert sorted(volumes) == sorted(mounted), (path, one["metadata"]["name"])


def test_rules_and_dashboards_equal_those_of_the_folder_dashboards() -> None:
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


def test_prometheus_finds_the_agents_and_keeps_the_names_of_tenants() -> None:
    spec = of_kind("everything", "PodMonitor")["spec"]
    (agent,) = [one for one in sets(HERE / "rendered/everything.yaml") if one["metadata"]["name"] == "fgpu-agent"]
    labels = agent["spec"]["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert labels[spec["jobLabel"]] == "fgpu"
    (endpoint,) = spec["podMetricsEndpoints"]
    assert endpoint["honorLabels"] is True
    assert endpoint["port"] in [port["name"] for c in containers(agent) for port in c.get("ports", ())]


def test_the_settings_are_a_valid_agent_yaml(tmp_path: Path) -> None:
    """`fgpu doctor` accepts the agent.yaml."""
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


def test_rendered_files_belong_to_this_chart() -> None:
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


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return values with changes in them, as helm merges them."""
    found = dict(values)
    for key, value in changes.items():
        below = found.get(key)
        found[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return found


def errors(changes: str) -> list[str]:
    """Return the errors of the schema for these values."""
    values = merged(yaml.safe_load((CHART / "values.yaml").read_text()), yaml.safe_load(changes) or {})
    schema = json.loads((CHART / "values.schema.json").read_text())
    return [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(schema).iter_errors(values)]


def test_the_schema_accepts_the_used_values() -> None:
    assert errors("") == []
    for path in (HERE / "values").glob("*.yaml"):
        assert errors(path.read_text()) == [], path


def test_the_schema_has_exactly_the_keys_of_the_values() -> None:
    def keys(value: dict[str, Any], below: str = "") -> set[str]:
        closed = {f"{below}{key}" for key in value}
        free = {
            "nodeSelector",
            "affinity",
            "podLabels",
            "podAnnotations",
            "labels",
            "policies",
            "settings",
            "resources",
        }
        inner = {
            key: one for key, one in value.items() if isinstance(one, dict) and key not in {*free, "updateStrategy"}
        }
        return closed.union(*(keys(one, f"{below}{key}.") for key, one in inner.items()))

    def named(schema: dict[str, Any], below: str = "") -> set[str]:
        inner = schema.get("properties", {})
        assert not inner or schema["additionalProperties"] is False, below
        return {f"{below}{key}" for key in inner}.union(
            *(named(one, f"{below}{key}.") for key, one in inner.items() if key != "settings")
        )

    schema = json.loads((CHART / "values.schema.json").read_text())
    assert named(schema) - {"global"} == keys(yaml.safe_load((CHART / "values.yaml").read_text()))


@pytest.mark.parametrize("values", WRONG)
def test_the_schema_refuses_invalid_values(values: str) -> None:
    assert any(WRONG[values] in error for error in errors(values)), errors(values)


def test_the_schema_of_policies_equals_that_of_the_agent() -> None:
    command = [ROOT / ".venv/bin/fgpu", "policy", "schema"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    made = (CHART / "files/policy.schema.json").read_text()
    assert made == printed, "run .venv/bin/fgpu policy schema >deploy/helm/fgpu/files/policy.schema.json"


def test_the_icon_is_a_valid_image() -> None:
    icon = yaml.safe_load((CHART / "Chart.yaml").read_text())["icon"]
    picture = base64.b64decode(icon.removeprefix("data:image/svg+xml;base64,"), validate=True)
    assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"


def template(values: str, work: Path) -> subprocess.CompletedProcess[str]:
    """Run `helm template` with values; `helm install` checks the same."""
    (work / "values.yaml").write_text(values)
    words = [HELM, "template", "fgpu", CHART, "--kube-version=1.33.0", f"--values={work / 'values.yaml'}"]
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60, check=False)


@needs_helm
@pytest.mark.parametrize("values", WRONG)
def test_helm_refuses_invalid_values(values: str, tmp_path: Path) -> None:
    done = template(values, tmp_path)
    assert done.returncode
    assert "don't meet the specifications of the schema" in done.stderr
    assert WRONG[values] in done.stderr, done.stderr


@needs_helm
@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change[1].strip() or "nothing")
def test_helm_refuses_a_policy_with_its_line(change: tuple[str, str], tmp_path: Path) -> None:
    assert change[0] in POLICY
    broken = POLICY.replace(*change, 1)
    for text, lines in ((broken, 0), (f"{POLICY}---\n{broken}", POLICY.count("\n") + 1)):
        done = template(yaml.safe_dump({"policies": {"10.yaml": text}}), tmp_path)
        said = re.sub("10.yaml:([0-9]+)", lambda found, less=lines: f"10.yaml:{int(found[1]) - less}", done.stderr)
        assert BROKEN[change] in said, done.stderr


@needs_helm
def test_helm_accepts_every_policy_of_the_examples(tmp_path: Path) -> None:
    texts = {path.name: path.read_text() for path in (ROOT / "examples/policy.d").glob("*.yaml")}
    assert texts
    for policies in (texts, {"all.yaml": "---\n".join([POLICY, *texts.values()])}):
        done = template(yaml.safe_dump({"policies": policies}), tmp_path)
        assert done.returncode == 0, done.stderr


@needs_helm
def test_a_device_plugin_without_profiles_is_refused(tmp_path: Path) -> None:
    done = template("devicePlugin: {enabled: true}", tmp_path)
    assert done.returncode
    assert "devicePlugin.enabled needs devicePlugin.profiles" in done.stderr


@needs_helm
def test_parking_without_a_parker_is_refused(tmp_path: Path) -> None:
    done = template("settings: {parking: 'on'}", tmp_path)
    assert done.returncode
    assert "settings.parking: on needs parking.enabled" in done.stderr


@needs_helm
def test_a_dra_driver_is_refused_before_kubernetes_1_34(tmp_path: Path) -> None:
    done = template("dra: {enabled: true}", tmp_path)
    assert done.returncode
    assert "dra.enabled needs Kubernetes 1.34 or later" in done.stderr


@needs_helm
def test_helm_renders_the_committed_files(tmp_path: Path) -> None:
    subprocess.run([MADE / "render", tmp_path], check=True, capture_output=True, timeout=120)
    for path in FILES:
        assert (tmp_path / path.relative_to(ROOT)).read_text() == path.read_text(), AGAIN


@needs_helm
@pytest.mark.parametrize("values", [None, HERE / "values/minimal.yaml"], ids=str)
def test_helm_lint_has_no_findings(values: Path | None) -> None:
    words = ["--values", str(values)] if values and values.stem != "everything" else []
    done = subprocess.run(
        [str(HELM), "lint", "--strict", CHART, *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout


@needs_helm
def test_helm_refuses_a_pod_monitor_without_its_operator(tmp_path: Path) -> None:
    done = template("podMonitor: {enabled: true}", tmp_path)
    assert done.returncode
    assert "install the operator first" in done.stderr
