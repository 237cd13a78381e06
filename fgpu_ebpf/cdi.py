"""Specifications of the Container Device Interface: `fgpu.dev/shim=all` and `fgpu.dev/share=8gib-50pct`.

Owns: what an engine edits into a container that asks for one of these devices, and the files that say so. Never:
decides what a share gets: a hook asks the agent, and a container whose share cannot be given does not start. On
failure: OSError, and the file before stays whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpu_ebpf import shares, wholefile

FOLDER = Path("/var/run/cdi")
VENDOR = "fgpu.dev"
SOCKET = "/run/fgpu/shim"  # where the shim looks, in every container
PRELOAD = "/etc/ld.so.preload"
HOOK_SECONDS = 10
_READ_ONLY = ["bind", "ro", "nosuid", "nodev"]


@dataclass(frozen=True, slots=True)
class Parts:
    """Files of the host: the shim, the folder of its socket, the list that preloads it, and `fgpu-oci`."""

    shim: Path
    socket: Path
    preload: Path
    helper: Path
    run_dir: Path


def mounts(parts: Parts) -> list[dict[str, Any]]:
    """What every container needs, all of it read-only."""
    return [
        {"hostPath": str(parts.shim), "containerPath": str(parts.shim), "options": _READ_ONLY},
        {"hostPath": str(parts.socket), "containerPath": SOCKET, "options": [*_READ_ONLY, "noexec"]},
        {"hostPath": str(parts.preload), "containerPath": PRELOAD, "options": [*_READ_ONLY, "noexec"]},
    ]


def shim_spec(parts: Parts) -> dict[str, Any]:
    """One device, `all`: the shim alone; policies say what the container gets."""
    device = {"name": "all", "containerEdits": {"mounts": mounts(parts)}}
    return {"cdiVersion": "0.3.0", "kind": f"{VENDOR}/shim", "devices": [device]}


def share_spec(parts: Parts, names: Iterable[str]) -> dict[str, Any]:
    """A device for each share. QuantityError: a name is none."""
    devices = [_share(parts, shares.parse(name)) for name in dict.fromkeys(names)]
    # Names that begin with a digit came with 0.5.0; nothing else here is younger than 0.3.0.
    version = "0.5.0" if any(device["name"][0].isdigit() for device in devices) else "0.3.0"
    edits = {"mounts": mounts(parts)}
    return {"cdiVersion": version, "kind": f"{VENDOR}/share", "devices": devices, "containerEdits": edits}


def _share(parts: Parts, share: shares.Share) -> dict[str, Any]:
    """The hook runs on the host before the container's first program; what the container does cannot reach it."""
    hook = {
        "hookName": "createRuntime",
        "path": str(parts.helper),
        "args": [parts.helper.name, "--run-dir", str(parts.run_dir), "share", share.text],
        "timeout": HOOK_SECONDS,
    }
    # The variable informs; nothing of ours reads it.
    return {"name": share.text, "containerEdits": {"env": [f"FGPU_SHARE={share.name}"], "hooks": [hook]}}


# -- files ---------------------------------------------------------------------------------------------------------


def file_name(spec: dict[str, Any]) -> str:
    """`fgpu.dev-share.json`, as the interface's own library would name it."""
    return f"{spec['kind'].replace('/', '-')}.json"


def text(spec: dict[str, Any]) -> str:
    """As it is written."""
    return json.dumps(spec, indent=2) + "\n"


def write(path: Path, spec: dict[str, Any]) -> None:
    """The whole file or the one before: engines read it at any moment. The name aside is one that they pass over."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    wholefile.write(path, text(spec))
