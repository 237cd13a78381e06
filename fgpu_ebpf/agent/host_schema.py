"""The schema of `agent.yaml`: the keys and the permitted values.

This module runs in the main thread of the agent and of commands. `host_config` opens the file and has the defaults.
Errors are returned with line numbers.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from fgpu_ebpf.driver.library_class import DIGEST
from fgpu_ebpf.ledger.owner_bounds import Bounds
from fgpu_ebpf.policy import share_name
from fgpu_ebpf.policy.fields import Devices, MetricLabels, Model, Several, Size, absent
from fgpu_ebpf.policy.requests import ADAPTERS
from fgpu_ebpf.policy.rules import Classes, Priority
from fgpu_ebpf.policy.units import shown
from fgpu_ebpf.policy.validation import config_errors
from fgpu_ebpf.policy.yaml_document import ConfigError, InvalidFileError, documents
from fgpu_ebpf.tenancy.profiles import MOST_COUNT, MOST_NAME_CHARACTERS, Profile

MOST_XID = 1023
_SWITCHES = {"overcommit": ("allow", "park"), "parking": ("on",)}  # each key with the words that mean True
_PATHS = ("driver_root", "policy_folder", "cdi_folder", "kubelet_folder")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"{shown(value)} has no valid port: write it as 127.0.0.1:9423")
    if not _HOST.fullmatch(host) and not _is_ipv6(host):
        raise ValueError(f"{shown(value)} has no valid address: write it as 127.0.0.1:9423 or [::1]:9423")
    return value


def _name(value: str) -> str:
    if not _HOST.fullmatch(value):
        raise ValueError(f"{shown(value)} is not a host name: write it as gpu1.example, without a port")
    return value


def _is_ipv6(host: str) -> bool:
    try:
        return host.startswith("[") and host.endswith("]") and bool(ipaddress.IPv6Address(host[1:-1]))
    except ValueError:
        return False


def _absolute(value: str) -> str:
    if not value.startswith("/") or "\0" in value:
        raise ValueError(f"{shown(value)} is not an absolute path: begin it with /")
    return value


def _program(value: list[str]) -> list[str]:
    _absolute(value[0])
    return value


def _engine(value: str) -> str:
    kind, colon, path = value.partition(":")
    if kind not in ("docker", "podman", "cri") or not colon:
        wanted = "docker:/run/docker.sock, podman:… or cri:…"
        raise ValueError(f"{shown(value)} is not a valid engine: write it as {wanted}")
    _absolute(path)
    return value


def _adapter(value: str) -> str:
    if value not in ADAPTERS:
        raise ValueError(f"{shown(value)} is not an adapter: write {', '.join(ADAPTERS)}")
    return value


def _share(value: str) -> str:
    return share_name.parse(value).text


def _profile_share(value: str) -> str:
    share = share_name.parse(value)
    if share.device or not share.memory:
        raise ValueError(f"{shown(value)} is not a profile: write memory and no device, such as 8gib or 8gib-50pct")
    if len(value) > MOST_NAME_CHARACTERS:
        raise ValueError(
            f"{shown(value)} is longer than {MOST_NAME_CHARACTERS} characters: "
            "shorten this text, because the length of kubelet's device ids is limited"
        )
    return value


def _digest(value: str) -> str:
    if not DIGEST.fullmatch(value):
        raise ValueError(f"{shown(value)} is not a digest: write it as sha256: and 64 digits, 0 to 9 and a to f")
    return value


def _different(value: list[ProfileDocument]) -> list[ProfileDocument]:
    names = [profile.share for profile in value]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{shown(twice)} is listed twice: join the two entries")
    return value


_ClassNames = Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Several]
_Path = Annotated[str, AfterValidator(_absolute), Field(max_length=4096)]


class ProfileDocument(Model):
    """An entry of `profiles` in agent.yaml."""

    share: Annotated[str, AfterValidator(_profile_share)] = Field(
        description="The share: memory, then a ceiling of compute time."
    )
    count: Annotated[int, Field(ge=1, le=MOST_COUNT)] = absent(
        "The number of shares on each device; absent: as many shares as fit."
    )
    devices: Devices = absent("The devices: index, UUID or its beginning, or model; absent: every device.")

    def profile(self) -> Profile:
        """Return this entry of agent.yaml as the `Profile` that the agent uses."""
        return Profile(self.share, self.count, tuple(self.devices or ()))


class SharingDocument(Model):
    """An entry of `devices` in agent.yaml."""

    match: Devices = Field(description="The devices: index, UUID or its beginning, or model.")
    sharing: Literal["turns", "concurrent"] = Field(
        description="`turns`: tenants with a share of time run one after another. `concurrent`: the tenants run at the"
        " same time, through NVIDIA's MPS, and a tenant that is ahead of its share waits."
    )


class DriversDocument(Model):
    """The mapping under `drivers:` in agent.yaml: trusted files of libcuda, and the memory that a driver may take."""

    trusted: Annotated[list[Annotated[str, AfterValidator(_digest)]], Field(max_length=256)] = absent(
        "SHA-256 of files of libcuda that are trusted like the host's own files; `fgpu doctor` prints the setting."
    )
    modules: Size = absent(
        "The most memory for code and data that the driver may load by itself in a process. If NVML shows more than"
        " this size beyond the process's contexts and the recorded calls, the process is reported as `unwitnessed`."
    )


class BoundsDocument(Model):
    """The mapping under `bounds:` in agent.yaml."""

    levels: Annotated[int, Field(ge=1, le=4096)] = absent("Maximum number of cgroups with a limit, per workload.")
    allocations: Annotated[int, Field(ge=1, le=262_144)] = absent(
        "Maximum number of allocations in the ledger, per workload."
    )
    threads: Annotated[int, Field(ge=1, le=65_536)] = absent(
        "Maximum number of threads that use a device, per workload."
    )
    processes: Annotated[int, Field(ge=1, le=16_384)] = absent(
        "Maximum number of processes that use a device, per workload."
    )
    orphans: Annotated[int, Field(ge=1, le=65_536)] = absent(
        "Maximum number of exited processes whose memory the device holds, per workload."
    )
    files: Annotated[int, Field(ge=1, le=2_048)] = absent(
        "Maximum number of libcuda files that are probed, per workload."
    )
    unmanaged: Annotated[int, Field(ge=1, le=8_192)] = absent(
        "Maximum number of cgroups without a limit in the kernel's map, per workload."
    )


class PrioritiesDocument(Model):
    """The mapping under `priorities:` in agent.yaml."""

    high: _ClassNames = absent("Names that give high priority.", ["interactive"])
    normal: _ClassNames = absent("Names that give normal priority.")
    low: _ClassNames = absent("Names that give low priority.", ["batch"])

    @model_validator(mode="after")
    def _has_each_name_once(self) -> Self:
        names = [name for names in self.model_dump(exclude_unset=True).values() for name in names]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{shown(twice)} is listed twice: keep one entry")
        return self

    def classes(self) -> Classes:
        """Return the priority of each class name."""
        named = self.model_dump(exclude_unset=True).items()
        return {name: Priority(priority) for priority, names in named for name in names}


class HostDocument(Model):
    """The document `agent.yaml`."""

    listen: Annotated[str, AfterValidator(_address)] = absent("The address of the web page and /metrics.")
    listen_names: Annotated[list[Annotated[str, AfterValidator(_name)]], Field(max_length=64)] = absent(
        "Host names in requests for the page; absent: any name, or only localhost if no other host can reach the page."
    )
    overcommit: Literal["forbid", "allow", "park"] = Field(
        "forbid",
        description="`allow`: the sum of limits may exceed a device's memory. `park`: such a sum is permitted too,"
        " and idle tenants are parked if a parked tenant that wakes up, or a request for memory, has no room; only with"
        " `parking: on`.",
    )
    parking: Literal["off", "on"] = Field(
        "off", description="`on`: idle tenants can be parked, which copies their device memory to the host."
    )
    loader: Annotated[list[str], Field(min_length=1, max_length=16), AfterValidator(_program)] = absent(
        "The interpreter that can import BCC, and its arguments."
    )
    driver_root: _Path = absent("Root of the NVIDIA driver's libraries.")
    policy_folder: _Path = absent("The folder of policies.")
    metric_labels: MetricLabels = absent("Labels that every tenant's metrics carry.")
    engines: Annotated[list[Annotated[str, AfterValidator(_engine)]], Field(max_length=16)] = absent(
        "Engines that report labels, as `docker:`, `podman:` or `cri:` and a socket; `[]`: no engine."
    )
    log_format: Literal["text", "json", "journal"] = absent(
        "Format of the agent's log. Default: journal under systemd, else text."
    )
    cdi_folder: _Path = absent("The folder in which container engines search for devices.")
    adapters: Annotated[list[Annotated[str, AfterValidator(_adapter)]], Field(max_length=16)] = absent(
        "Projects from which requests are read; absent: all projects that fgpu supports."
    )
    devices: Annotated[list[SharingDocument], Field(max_length=64)] = absent(
        "How the tenants of a device share its time: the first entry that matches the device counts; absent: `turns`."
    )
    kubelet_folder: _Path = absent("kubelet's folder, for ResourceClaims of NVIDIA's DRA driver.")
    shares: Annotated[list[Annotated[str, AfterValidator(_share)]], Field(max_length=256)] = absent(
        "Shares that containers may request by name."
    )
    profiles: Annotated[list[ProfileDocument], Field(max_length=64), AfterValidator(_different)] = absent(
        "Shares that a device plugin offers to Kubernetes, and the number of each share."
    )
    ignored_xids: Annotated[list[Annotated[int, Field(ge=1, le=MOST_XID)]], Field(max_length=256)] = absent(
        "XIDs after which shares of a device are still offered to Kubernetes; absent: the XIDs that programs cause."
    )
    drivers: DriversDocument = absent("Trusted files of libcuda, and the memory that a driver allocates by itself.")
    bounds: BoundsDocument = absent("The most that one workload, with all inner cgroups, may use of shared tables.")
    priorities: PrioritiesDocument = absent(
        "Priorities by the name of a PriorityClass of Kubernetes or a quality of service of Slurm."
    )

    @model_validator(mode="after")
    def _parks_only_if_parking_is_on(self) -> Self:
        if self.overcommit == "park" and self.parking != "on":
            raise ValueError("`overcommit: park` parks tenants, but parking is off: write `parking: on` too")
        return self


def read(file: str, data: bytes) -> tuple[dict[str, Any], tuple[ConfigError, ...]]:
    """Return the settings in a file as fields of HostSettings, or the file's errors.

    Args:
        file: the path of the file, for errors.
        data: the contents of the file.
    """
    try:
        found = list(documents(file, data))
        if len(found) > 1:
            text = "is a second document: join the documents, because a host has one agent"
            return {}, (ConfigError(file, found[1].line(()), "", text),)
        if not found:
            return {}, ()
        document = found[0]
        if not isinstance(document.value, dict):
            return {}, (ConfigError(file, document.line(()), "", "is not a mapping: write listen: 127.0.0.1:9423"),)
        return _values(HostDocument.model_validate(document.value)), ()
    except InvalidFileError as invalid:
        return {}, (invalid.error,)
    except ValidationError as error:
        return {}, tuple(config_errors(file, document, HostDocument, error))


def _values(document: HostDocument) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(document, name) for name in document.model_fields_set}
    for name, value in values.items():
        if name == "profiles":
            values[name] = tuple(document.profile() for document in value)
        elif isinstance(value, list):
            values[name] = tuple(value)
        elif name in _SWITCHES:
            values[name] = value in _SWITCHES[name]
        elif name in _PATHS:
            values[name] = Path(value)
    values["makes_room"] = document.overcommit == "park"
    documents = values.pop("devices", ())
    values["sharing"] = tuple((tuple(each.match), each.sharing == "concurrent") for each in documents)
    if "drivers" in values:
        drivers = values.pop("drivers").model_dump(exclude_unset=True)
        values["trusted_drivers"] = tuple(drivers.get("trusted", ()))
        if "modules" in drivers:
            values["module_bytes"] = drivers["modules"]
    if "bounds" in values:
        values["bounds"] = Bounds(**values["bounds"].model_dump(exclude_unset=True))
    if "priorities" in values:
        values["priorities"] = values["priorities"].classes()
    return values
