"""Specifications of the Container Device Interface: `fgpu.dev/shim=all` and `fgpu.dev/share=8gib-50pct`.

This module runs in the agent's main thread, in `fgpu cdi`, and in the DRA driver. A specification lists the edits that
an engine makes to a container that requests a device. The hook of a share requests the share from the agent. If the
agent refuses, the container does not start. If a file cannot be written (OSError), the previous file stays unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fgpu_ebpf.linux import atomic_file
from fgpu_ebpf.policy import share_name
from fgpu_ebpf.workloads import shim_mounts

FOLDER = Path("/var/run/cdi")
VENDOR = "fgpu.dev"
CLAIM_KIND = f"{VENDOR}/claim"
INFO = "/var/lib/fgpu/bin/fgpu-info"
HOOK_SECONDS = 10
_READ_ONLY = ["bind", "ro", "nosuid", "nodev"]


class Parts(NamedTuple):
    """Files of the host: the shim, the folder of the shim's socket, the list that preloads the shim, and `fgpu-oci`.

    In a container the helper `fgpu-oci` has the name `fgpu-info`, and prints the container's limits.
    """

    shim: Path
    socket: Path
    preload: Path
    helper: Path
    run_dir: Path


def mounts(parts: Parts) -> list[dict[str, Any]]:
    """Return the mounts that every container needs, all read-only."""
    folders = ((parts.socket, place) for place in (shim_mounts.FOLDER, shim_mounts.BESIDE))
    lists = ((parts.preload, place) for place in shim_mounts.LISTS)
    return [
        {"hostPath": str(parts.shim), "containerPath": str(parts.shim), "options": _READ_ONLY},
        *(
            {"hostPath": str(source), "containerPath": place, "options": [*_READ_ONLY, "noexec"]}
            for source, place in (*folders, *lists)
        ),
        {"hostPath": str(parts.helper), "containerPath": INFO, "options": _READ_ONLY},
    ]


def shim_spec(parts: Parts) -> dict[str, Any]:
    """Return a specification with one device, `all`: the shim alone. Policies decide about the container's limits."""
    device = {"name": "all", "containerEdits": {"mounts": mounts(parts)}}
    return {"cdiVersion": "0.3.0", "kind": f"{VENDOR}/shim", "devices": [device]}


def share_spec(parts: Parts, names: Iterable[str]) -> dict[str, Any]:
    """Return a specification with a device for each share. Raise QuantityError if a name is invalid."""
    shares = {share.text: share for share in map(share_name.parse, names)}
    devices = [_share(parts, share) for share in shares.values()]
    # Names that begin with a digit need version 0.5.0 of the interface. All other parts need 0.3.0.
    version = "0.5.0" if any(device["name"][0].isdigit() for device in devices) else "0.3.0"
    edits = {"mounts": mounts(parts)}
    return {"cdiVersion": version, "kind": f"{VENDOR}/share", "devices": devices, "containerEdits": edits}


def _share(parts: Parts, share: share_name.Share) -> dict[str, Any]:
    """Return a device with a hook.

    The hook runs on the host before the container's first program, so the container cannot affect the hook.
    """
    hook = {
        "hookName": "createRuntime",
        "path": str(parts.helper),
        "args": [parts.helper.name, "--run-dir", str(parts.run_dir), "share", share.text],
        "timeout": HOOK_SECONDS,
    }
    # The variable is for people; no part of fgpu reads it.
    return {"name": share.text, "containerEdits": {"env": [f"FGPU_SHARE={share.name}"], "hooks": [hook]}}


def claim_spec(parts: Parts, uid: str, shares: Iterable[share_name.Share], env: Iterable[str]) -> dict[str, Any]:
    """Return a specification of the devices of one ResourceClaim of Kubernetes.

    Args:
        parts: the files of the host that containers get.
        uid: the UID of the claim. The devices are named UID-0, UID-1 and so on.
        shares: the share of each device.
        env: variables of each container that uses the claim, as NAME=VALUE.
    """
    devices = [_share(parts, share) | {"name": f"{uid}-{number}"} for number, share in enumerate(shares)]
    edits = {"env": list(env), "mounts": mounts(parts)}
    return {"cdiVersion": "0.5.0", "kind": CLAIM_KIND, "devices": devices, "containerEdits": edits}


# -- files ---------------------------------------------------------------------------------------------------------


def file_name(spec: dict[str, Any]) -> str:
    """Return the file name that the interface's own library would use, such as `fgpu.dev-share.json`."""
    return f"{spec['kind'].replace('/', '-')}.json"


def text(spec: dict[str, Any]) -> str:
    """Return the text of the file with a specification."""
    return json.dumps(spec, indent=2) + "\n"


def write(path: Path, spec: dict[str, Any]) -> None:
    """Replace the file as a whole, because engines may read it at any moment. Engines ignore the temporary file."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    atomic_file.write(path, text(spec))
