"""Tests of the host's settings: what the file may contain, and the message for each error."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fgpu_ebpf import daemon
from fgpu_ebpf.agent import host_config
from fgpu_ebpf.agent.host_config import HostSettings
from fgpu_ebpf.agent.settings import Options, Settings
from fgpu_ebpf.policy import trusted_file
from tests.unit.root_kit import needs_root


@pytest.fixture
def settings(tmp_path):
    """Return settings(text): the settings of a file with this text, and its errors without the path."""

    def read(text):
        path = tmp_path / "agent.yaml"
        path.write_text(text)
        found, errors = host_config.read(path, root_only=False)
        return found, [str(error).removeprefix(str(path)) for error in errors]

    return read


def test_the_defaults_apply_without_a_file_and_with_an_empty_one(tmp_path, settings):
    assert host_config.read(tmp_path / "none.yaml") == (HostSettings(), ())
    assert settings("") == settings("# nothing\n") == settings("{}") == (HostSettings(), [])


def test_the_settings_of_a_file_are_read(settings):
    text = """
listen: "[::1]:9999"
listenNames: [gpu1, gpu1.example]
overcommit: allow
loader: [/usr/bin/python3.12, -I, -B]
driverRoot: /run/nvidia/driver
policyFolder: /srv/policies
metricLabels: [team]
engines: ["docker:/srv/docker.sock", "cri:/srv/containerd.sock"]
logFormat: journal
ignoredXids: [13, 94]
adapters: [kai, nvidia-dra]
kubeletFolder: /srv/kubelet
drivers: {trusted: ["sha256:%s"]}
""" % ("0a" * 32)
    assert settings(text) == (
        HostSettings(
            listen="[::1]:9999",
            listen_names=("gpu1", "gpu1.example"),
            overcommit=True,
            loader=("/usr/bin/python3.12", "-I", "-B"),
            driver_root=Path("/run/nvidia/driver"),
            policy_folder=Path("/srv/policies"),
            metric_labels=("team",),
            engines=("docker:/srv/docker.sock", "cri:/srv/containerd.sock"),
            log_format="journal",
            ignored_xids=(13, 94),
            adapters=("kai", "nvidia-dra"),
            kubelet_folder=Path("/srv/kubelet"),
            trusted_drivers=(f"sha256:{'0a' * 32}",),
        ),
        [],
    )


@pytest.mark.parametrize("digest", ["0A" * 32, "0a" * 31, "0a" * 33, "0g" * 32])
def test_a_digest_without_64_lower_case_hexadecimal_digits_is_refused(settings, digest):
    found, errors = settings(f"drivers: {{trusted: ['sha256:{digest}']}}")
    assert found is None
    assert "is not a digest: write it as sha256: and 64 digits" in errors[0]
    assert settings("drivers: {trusted: []}")[0] == settings("drivers: {}")[0] == HostSettings()


def test_an_unknown_adapter_is_refused(settings):
    found, errors = settings("adapters: [nvidia]")
    assert found is None
    assert "'nvidia' is not an adapter: write nvidia-dra, kai, hami" in errors[0]
    assert settings("adapters: []")[0].adapters == ()


def test_memory_that_needs_no_recorded_allocation_is_a_size(settings):
    assert settings("drivers: {modules: 256MiB}") == (HostSettings(module_bytes=256 << 20), [])
    assert settings("drivers: {trusted: []}")[0].module_bytes == 1 << 30


def test_priorities_are_read_by_name(settings):
    found, errors = settings("priorities: {low: [batch, train], high: [interactive]}")
    assert (found.priorities, errors) == ({"batch": "low", "train": "low", "interactive": "high"}, [])
    assert settings("priorities: {}") == (HostSettings(), [])


def test_the_first_entry_that_matches_a_device_says_how_it_is_shared(settings):
    found, errors = settings(
        "devices: [{match: [1], sharing: turns}, {match: ['*H200*', 2], sharing: concurrent}, "
        "{match: 0, sharing: turns}]"
    )
    assert not errors
    names = ["NVIDIA H200", "NVIDIA H200", "NVIDIA L4", "NVIDIA L4"]
    devices = [SimpleNamespace(index=index, name=name, uuid_text="") for index, name in enumerate(names)]
    assert Settings(sharing=found.sharing).concurrent(devices) == {0, 2}
    assert Settings().concurrent(devices) == frozenset()


@pytest.mark.parametrize(
    "entry", ["{match: ['*']}", "{sharing: turns}", "{match: [], sharing: turns}", "{match: 0, sharing: mps}"]
)
def test_a_wrong_entry_of_devices_is_refused(settings, entry):
    found, errors = settings(f"devices: [{entry}]")
    assert found is None
    assert errors[0].startswith(":1")


@pytest.mark.parametrize(
    ("word", "values"), [("forbid", (False, False)), ("allow", (True, False)), ("park", (True, True))]
)
def test_limits_may_exceed_a_device_with_two_of_the_words(settings, word, values):
    found, errors = settings(f"overcommit: {word}\nparking: on")
    assert (errors, found.overcommit, found.makes_room) == ([], *values)


def test_one_key_does_not_change_the_other_settings(settings):
    assert settings("logFormat: json") == (HostSettings(log_format="json"), [])


@pytest.mark.parametrize("address", ["0.0.0.0:1", "localhost:65535", "gpu-3.example:9423", "[fd00::1]:80"])
def test_valid_listen_addresses_are_accepted(settings, address):
    assert settings(f"listen: '{address}'")[0].listen == address


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "drivers: {trusted: [0a0a]}",
            ":1: drivers.trusted[0]: '0a0a' is not a digest: write it as sha256: and 64 digits, 0 to 9 and a to f",
        ),
        ("drivers: {any: true}", ":1: drivers: unknown key 'any': use one of trusted, modules"),
        ("drivers: {modules: 50%}", ":1: drivers.modules: '50%' is a part of a device: write a size, such as 1GiB"),
        ("drivers: {modules: 256}", ":1: drivers.modules: '256' has no unit: did you mean 256GiB?"),
        ("drivers: {modules: 8GB}", ":1: drivers.modules: '8GB': did you mean 8GiB?"),
        ("drivers: {modules: [1GiB]}", ":1: drivers.modules: is not a quantity: write it as 1GiB"),
        ("listen: 9423", ":1: listen: must be text: write it in quotes"),
        ("listen: localhost", ":1: listen: 'localhost' has no valid port: write it as 127.0.0.1:9423"),
        ("listen: ':9423'", ":1: listen: ':9423' has no valid address: write it as 127.0.0.1:9423 or [::1]:9423"),
        ("listen: '::1:9423'", ":1: listen: '::1:9423' has no valid address: write it as 127.0.0.1:9423 or [::1]:9423"),
        ("listen: 'a:65536'", ":1: listen: 'a:65536' has no valid port: write it as 127.0.0.1:9423"),
        ("\nlisten:", ":2: listen: is empty: write a value, or leave the key out"),
        ("priorities: {low: [a], high: [b, a]}", ":1: priorities: 'a' is listed twice: keep one entry"),
        ("priorities: {urgent: [a]}", ":1: priorities: unknown key 'urgent': use one of high, normal, low"),
        ("priorities: {low: batch}", ":1: priorities.low: must be a list, as in [a, b]"),
        ("overcommit: true", ":1: overcommit: 'true' is none of forbid, allow, park: write one of these values"),
        (
            "listen: localhost:1\novercommit: park",
            ":1: `overcommit: park` parks tenants, but parking is off: write `parking: on` too",
        ),
        ("loader: /usr/bin/python3", ":1: loader: must be a list, as in [a, b]"),
        ("loader: [python3]", ":1: loader: 'python3' is not an absolute path: begin it with /"),
        ("loader: []", ":1: loader: is empty: list at least one item, or leave the key out"),
        (
            "engines: [/run/docker.sock]",
            ":1: engines[0]: '/run/docker.sock' is not a valid engine: "
            "write it as docker:/run/docker.sock, podman:… or cri:…",
        ),
        ("engines: ['cri:crio.sock']", ":1: engines[0]: 'crio.sock' is not an absolute path: begin it with /"),
        ("driverroot: /", ":1: unknown key 'driverroot': did you mean driverRoot?"),
        ("driverRoot: run", ":1: driverRoot: 'run' is not an absolute path: begin it with /"),
        ("metricLabels: [gpu]", ":1: metricLabels[0]: 'gpu' is a reserved label of metrics: choose another name"),
        (
            "listenNames: ['gpu1:80']",
            ":1: listenNames[0]: 'gpu1:80' is not a host name: write it as gpu1.example, without a port",
        ),
        ("logFormat: yaml", ":1: logFormat: 'yaml' is none of text, json, journal: write one of these values"),
        ("[]", ":1: is not a mapping: write listen: 127.0.0.1:9423"),
        ("{}\n---\n{}", ":3: is a second document: join the documents, because a host has one agent"),
        ("a: &b c", ":1: a: anchors and aliases (&, *) are refused: write the value out, or in quotes"),
    ],
)
def test_an_error_in_the_settings_is_reported_with_its_line(settings, text, error):
    assert settings(text) == (None, [error])


def test_the_agent_has_every_setting_of_the_file():
    assert {*HostSettings._fields} <= {*Settings._fields}


@needs_root("only files that belong to root are accepted")
def test_a_file_that_others_may_write_is_refused(tmp_path):
    path = tmp_path / "agent.yaml"
    path.write_text("")
    path.chmod(0o644)
    assert host_config.read(path)[1] == ()
    path.chmod(0o666)
    settings, (error,) = host_config.read(path)
    assert settings is None
    assert "may be written by users other than root: chown root" in str(error)


def test_a_folder_in_place_of_the_settings_file_is_reported(tmp_path):
    assert str(host_config.read(tmp_path, root_only=False)[1][0]) == f"{tmp_path}: is not a regular file: remove it"


def test_the_guide_lists_the_default_settings(settings):
    guide = (Path(__file__).parents[3] / "docs/policy.md").read_text()
    block = guide.rpartition("```yaml\n")[2].partition("```")[0]
    assert settings(block) == (HostSettings(), [])


@pytest.mark.parametrize(("option", "chosen"), [(None, "json"), ("text", "text")])
def test_an_option_of_the_agent_has_precedence_over_the_file(tmp_path, monkeypatch, option, chosen):
    monkeypatch.setattr(daemon, "_built_file", lambda *_: tmp_path)
    monkeypatch.setattr(trusted_file, "load", lambda *_: (b"logFormat: json", None))
    assert daemon.settings(Options(config=tmp_path / "agent.yaml", log_format=option)).log_format == chosen


def test_the_agent_has_the_priorities_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon, "_built_file", lambda *_: tmp_path)
    monkeypatch.setattr(trusted_file, "load", lambda *_: (b"priorities: {low: [batch]}", None))
    assert daemon.settings(Options(config=tmp_path / "agent.yaml")).priorities == {"batch": "low"}


@pytest.mark.parametrize(
    ("line", "folder"),
    [
        ("", "/proc/2/root/var/lib/kubelet"),
        ("kubeletFolder: /srv/kubelet\n", "/proc/2/root/srv/kubelet"),
        ("kubeletFolder: /proc/2/root/srv/kubelet\n", "/proc/2/root/srv/kubelet"),
    ],
)
def test_kubelet_s_folder_is_that_of_the_node_also_for_an_agent_in_a_pod(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, folder: str
) -> None:
    """`kubernetes/test_node.py` reads a file below the same root from the agent's pod."""
    monkeypatch.setattr(daemon, "_built_file", lambda *_: tmp_path)
    monkeypatch.setattr(trusted_file, "load", lambda *_: (line.encode(), None))
    assert daemon.settings(Options(config=tmp_path / "agent.yaml")).kubelet_folder == Path(folder)
