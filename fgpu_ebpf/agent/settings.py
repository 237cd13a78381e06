"""The options of the command line, and the settings of an agent, which combine the options with agent.yaml.

This module contains data and values derived from the data. The module runs in the main thread of the agent and of
commands.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from fgpu_ebpf.agent import host_config
from fgpu_ebpf.containers import cdi
from fgpu_ebpf.driver import programs, xids
from fgpu_ebpf.ledger.ledger import PINS
from fgpu_ebpf.ledger.owner_bounds import Bounds
from fgpu_ebpf.policy import requests, rules, share_name
from fgpu_ebpf.tenancy import profiles


class Settings(NamedTuple):
    """The settings of an agent, from the command line and agent.yaml.

    `loader`: the interpreter that can import BCC, and the interpreter's arguments. `store`: the folder for copies of
    the shim that tenants get; None if tenants get the file `shim` itself.
    """

    run_dir: Path = Path("/run/fgpu")
    pins: Path = PINS
    driver_root: Path = Path("/")
    shim: Path = Path()
    store: Path | None = None
    sources: Path = Path()
    listen: str = "127.0.0.1:9423"
    listen_names: tuple[str, ...] = ()
    loader: tuple[str, ...] = programs.LOADER
    policy_folder: Path = Path("/etc/fgpu/policy.d")
    overcommit: bool = False
    makes_room: bool = False
    parking: bool = False
    metric_labels: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    helper: Path = Path()
    cdi_folder: Path = cdi.FOLDER
    adapters: tuple[str, ...] = tuple(requests.ADAPTERS)
    kubelet_folder: Path = host_config.on_node(host_config.KUBELET_FOLDER)
    shares: tuple[str, ...] = share_name.USUAL
    profiles: tuple[profiles.Profile, ...] = ()
    ignored_xids: Collection[int] = xids.OF_PROGRAMS
    trusted_drivers: tuple[str, ...] = ()  # digests, as sha256:…
    module_bytes: int = host_config.MODULES_BYTES
    bounds: Bounds = Bounds()
    priorities: rules.Classes = rules.NO_CLASSES
    sharing: host_config.Sharing = ()
    log_format: str | None = None  # see Options

    def concurrent(self, devices: Iterable[rules.Device]) -> frozenset[int]:
        """Return the indexes of the concurrent devices. The first item of `sharing` that matches a device decides."""
        return frozenset(device.index for device in devices if self._is_concurrent(device))

    def _is_concurrent(self, device: rules.Device) -> bool:
        said = (is_on for choices, is_on in self.sharing if any(choice.takes(device) for choice in choices))
        return next(said, False)


class Options(NamedTuple):
    """The options of `fgpu agent`, `load` and `doctor`.

    If an option is None, its value is read from the file `config`. `shim`, `pins` and `store` have fixed defaults
    instead.
    """

    run_dir: Path = Path("/run/fgpu")
    driver_root: Path | None = None
    shim: Path | None = None
    listen: str | None = None
    loader: str | None = None
    pins: Path | None = None
    store: Path | None = None
    config: Path = host_config.FILE
    policies: Path | None = None
    log_format: str | None = None  # a value of linux.logs.Format; logs.usual_format() if it is None in the file too
    skipped: tuple[str, ...] = ()  # names of checks that the tests of packages cannot pass
