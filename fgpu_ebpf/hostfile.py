"""`/etc/fgpu/agent.yaml`: the settings of this host.

Owns: what the settings are without a file. Never: obeys a file that others than root may write: it names the program
that loads BPF. On failure: faults and no settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fgpu_ebpf import configfile
from fgpu_ebpf.bounds import Bounds
from fgpu_ebpf.cdi import FOLDER as CDI_FOLDER
from fgpu_ebpf.policyfolder import FOLDER
from fgpu_ebpf.profiles import Profile
from fgpu_ebpf.shares import USUAL
from fgpu_ebpf.xids import OF_PROGRAMS
from fgpu_ebpf.yamlfile import Fault, FaultError

FILE = Path("/etc/fgpu/agent.yaml")
ENGINES = (
    "docker:/run/docker.sock",
    "podman:/run/podman/podman.sock",
    "cri:/run/containerd/containerd.sock",
    "cri:/run/crio/crio.sock",
    "cri:/run/cri-dockerd.sock",
    "cri:/run/k3s/containerd/containerd.sock",
)


@dataclass(frozen=True, slots=True)
class HostSettings:
    """`overcommit`: limits may sum past a device. `loader`: the interpreter that sees BCC, and its arguments.

    `engines`: who is asked for labels, as KIND:SOCKET. `profiles`: what a device plugin offers.
    `ignored_xids`: after which it goes on to offer a device. `trusted_drivers`: digests of files, as `sha256:…`.
    `bounds`: how much one workload may have.
    """

    listen: str = "127.0.0.1:9423"
    listen_names: tuple[str, ...] = ()
    overcommit: bool = False
    loader: tuple[str, ...] = ("/usr/bin/python3", "-I")
    driver_root: Path = Path("/")
    policy_folder: Path = FOLDER
    metric_labels: tuple[str, ...] = ()
    engines: tuple[str, ...] = ENGINES
    log_format: Literal["text", "json", "journal"] = "text"
    cdi_folder: Path = CDI_FOLDER
    shares: tuple[str, ...] = USUAL
    profiles: tuple[Profile, ...] = ()
    ignored_xids: tuple[int, ...] = OF_PROGRAMS
    trusted_drivers: tuple[str, ...] = ()
    bounds: Bounds = field(default_factory=Bounds)


def read(path: Path = FILE, root_only: bool = True) -> tuple[HostSettings | None, tuple[Fault, ...]]:
    """The settings, or None and all that is wrong with the file. Without a file: those above."""
    try:
        data, _ = configfile.load(str(path), str(path), root_only)
    except FileNotFoundError:
        return HostSettings(), ()
    except FaultError as error:
        return None, (error.fault,)
    except OSError as error:
        return None, (Fault(str(path), 0, "", f"cannot be read: {error.strerror}"),)
    # Imported here: it brings pydantic, 11 MiB that a host without such a file must not pay for.
    from fgpu_ebpf import hostmodel

    values, faults = hostmodel.read(str(path), data)
    return (None if faults else HostSettings(**values)), faults
