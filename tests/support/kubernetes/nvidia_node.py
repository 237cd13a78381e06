"""The files in which kubelet 1.36 and NVIDIA's DRA driver record the claims of pods."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DRIVER = "gpu.nvidia.com"


def _replace(path: Path, value: object) -> None:
    """Replace a file as kubelet's manager of checkpoints does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f".{path.name}").write_text(json.dumps(value))
    os.replace(path.with_name(f".{path.name}"), path)


class NvidiaNode:
    """kubelet's folder of a node. `uuids`: the device with the name `gpu-N` has the N-th."""

    def __init__(self, folder: Path, uuids: Sequence[str]) -> None:
        self.folder, self._uuids = folder, uuids
        self.pods_file = folder / "dra_manager_state"
        self.claims_file = folder / "plugins" / DRIVER / "checkpoint.json"
        self._entries: dict[str, dict[str, Any]] = {}
        self._prepared: dict[str, dict[str, Any]] = {}
        self._write()

    def use(self, claim: str, pod: str) -> None:
        """Write what kubelet writes before it asks the driver: the pod uses the claim, and its name is its UID."""
        entry = {"ClaimUID": claim, "ClaimName": f"gpu-{claim[:4]}", "Namespace": "dev", "PodUIDs": {}}
        self._entries.setdefault(claim, entry | {"DriverState": {DRIVER: {"Devices": []}}})["PodUIDs"][pod] = {}
        self._write()

    def leave(self, claim: str, pod: str) -> None:
        """Write what kubelet writes when a pod has ended and another one uses its claim."""
        del self._entries[claim]["PodUIDs"][pod]
        self._write()

    def prepare(self, claim: str, *sizes: str | None, state: str = "PrepareCompleted") -> None:
        """Write what the driver writes: the claim has consumed these sizes of the devices 0, 1, …; None: the device."""
        names = [f"gpu-{number}" for number, _ in enumerate(sizes)]
        results = [
            {"request": "gpu", "driver": DRIVER, "pool": "node-1", "device": name}
            | ({} if size is None else {"shareID": claim, "consumedCapacity": {"memory": size}})
            for name, size in zip(names, sizes, strict=True)
        ]
        devices = [
            {"gpu": {"info": {"uuid": uuid}, "device": {"Requests": ["gpu"], "DeviceName": name}}, "mig": None}
            for name, uuid in zip(names, self._uuids, strict=False)
        ]
        self._prepared[claim] = {
            "checkpointState": state,
            "status": {"allocation": {"devices": {"results": results}}},
            "preparedDevices": [{"devices": devices, "configState": {}}],
        }
        self._write()

    def prepare_in_another_form(self, *claims: str) -> None:
        """Write that claims are prepared, in a form that no version of the driver has."""
        self._prepared |= {claim: {"checkpointState": "PrepareCompleted", "allocated": []} for claim in claims}
        self._write()

    def end(self, claim: str) -> None:
        """Write what both write after the last pod of the claim has ended: nothing of the claim."""
        self._entries.pop(claim, None)
        self._prepared.pop(claim, None)
        self._write()

    def _write(self) -> None:
        data: Mapping[str, Any] = {"kind": "DRACheckpoint", "ClaimInfoStateList": list(self._entries.values())}
        _replace(self.pods_file, {"Data": json.dumps(data), "Checksum": 0})
        _replace(self.claims_file, {"checksum": 0, "v1": {}, "v2": {"checksum": 0, "preparedClaims": self._prepared}})
