"""What an agent is told when it starts.

Owns: the defaults. Never: reads a file, or checks that anything is there (`service` does). Cannot fail.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from fgpu_ebpf import cdi, profiles, programs, shares, xids
from fgpu_ebpf.bounds import Bounds
from fgpu_ebpf.ledger import PINS


@dataclass(frozen=True, slots=True)
class Settings:
    """Where things are. `loader` is the interpreter that sees BCC; no `store`: tenants get `shim` itself."""

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
    engines: tuple[str, ...] = ()
    helper: Path = Path()
    cdi_folder: Path = cdi.FOLDER
    shares: tuple[str, ...] = shares.USUAL
    profiles: tuple[profiles.Profile, ...] = ()
    ignored_xids: Collection[int] = xids.OF_PROGRAMS
    trusted_drivers: tuple[str, ...] = ()  # digests, as sha256:…
    bounds: Bounds = field(default_factory=Bounds)
