"""`/etc/fgpu/agent.yaml`: the settings of this host, and the defaults of these settings.

This module runs in the main thread of the agent and of commands. A file that users other than root may write is
refused, because the settings name the program that loads the BPF programs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from fgpu_ebpf.containers.cdi import FOLDER as CDI_FOLDER
from fgpu_ebpf.driver.xids import OF_PROGRAMS
from fgpu_ebpf.ledger.owner_bounds import Bounds
from fgpu_ebpf.policy import requests, trusted_file
from fgpu_ebpf.policy.folder import FOLDER
from fgpu_ebpf.policy.rules import NO_CLASSES, Classes, DeviceChoice
from fgpu_ebpf.policy.share_name import USUAL
from fgpu_ebpf.policy.yaml_document import ConfigError, InvalidFileError
from fgpu_ebpf.tenancy.profiles import Profile

FILE = Path("/etc/fgpu/agent.yaml")
ENGINES = (
    "docker:/run/docker.sock",
    "podman:/run/podman/podman.sock",
    "cri:/run/containerd/containerd.sock",
    "cri:/run/crio/crio.sock",
    "cri:/run/cri-dockerd.sock",
    "cri:/run/k3s/containerd/containerd.sock",
)
KUBELET_FOLDER = Path("/var/lib/kubelet")
NODE = Path("/proc/2/root")  # the root of a kernel thread, which is the node's root even for an agent in a pod
MODULES_BYTES = 1 << 30  # the reason for this size: docs/operations.md, "Memory without a recorded allocation"


# The first item with a matching choice determines whether the tenants of a device run at the same time.
Sharing: TypeAlias = tuple[tuple[tuple[DeviceChoice, ...], bool], ...]


def on_node(folder: Path) -> Path:
    """Return the path by which this process can access a folder of the node without a mount."""
    return folder if folder.is_relative_to("/proc") else NODE / folder.relative_to("/")


class HostSettings(NamedTuple):
    """The settings of a host.

    `adapters`: the projects whose requests are read. The requests are in labels, or in files for NVIDIA's DRA driver.
    `overcommit`: the sum of limits may exceed a device's memory. `makes_room`: idle tenants are parked to make room for
    tenants that wake up, and for requests for memory. `parking`: tenants may be parked. `loader`: the interpreter that
    can import BCC, and the arguments of the interpreter. `engines`: the engines from which labels are requested, as
    KIND:SOCKET. `profiles`: the shares that a device plugin offers. `ignored_xids`: XIDs after which a device is still
    offered. `trusted_drivers`: digests of trusted files of libcuda, as `sha256:…`. `module_bytes`: the most memory that
    a process may have without a recorded allocation. `bounds`: how much of the shared tables one workload may have.
    `priorities`: the priority of each priority class of Kubernetes or quality of service of Slurm.
    """

    listen: str = "127.0.0.1:9423"
    listen_names: tuple[str, ...] = ()
    overcommit: bool = False
    makes_room: bool = False
    parking: bool = False
    loader: tuple[str, ...] = ("/usr/bin/python3", "-I")
    driver_root: Path = Path("/")
    policy_folder: Path = FOLDER
    metric_labels: tuple[str, ...] = ()
    engines: tuple[str, ...] = ENGINES
    log_format: Literal["text", "json", "journal"] | None = None
    cdi_folder: Path = CDI_FOLDER
    adapters: tuple[str, ...] = tuple(requests.ADAPTERS)
    kubelet_folder: Path = KUBELET_FOLDER
    shares: tuple[str, ...] = USUAL
    profiles: tuple[Profile, ...] = ()
    ignored_xids: tuple[int, ...] = OF_PROGRAMS
    trusted_drivers: tuple[str, ...] = ()
    module_bytes: int = MODULES_BYTES
    bounds: Bounds = Bounds()
    priorities: Classes = NO_CLASSES
    sharing: Sharing = ()


def read(path: Path = FILE, root_only: bool = True) -> tuple[HostSettings | None, tuple[ConfigError, ...]]:
    """Return the settings, or None and the file's errors. If there is no file, the settings are the defaults."""
    try:
        data, _ = trusted_file.load(str(path), str(path), root_only)
    except FileNotFoundError:
        return HostSettings(), ()
    except InvalidFileError as invalid:
        return None, (invalid.error,)
    except OSError as error:
        return None, (ConfigError(str(path), 0, "", f"cannot be read: {error.strerror}"),)
    # host_schema is imported only now, because it imports pydantic, which takes 11 MiB. A host without the file does
    # not need pydantic.
    from fgpu_ebpf.agent import host_schema

    values, errors = host_schema.read(str(path), data)
    return (None if errors else HostSettings(**values)), errors
