"""A stand-in for NVIDIA's DRA driver: the answers to kubelet, CDI files and the driver's own file, `checkpoint.json`.

usage: python -m tests.cluster.nvidia_driver KUBELET_FOLDER UUID

The driver is a process with one device, `gpu-0`. It asks the API server by kubectl. The server of fgpu's own driver
answers kubelet, by the other name. The files have the forms of NVIDIA's (commit 95932046 of
kubernetes-sigs/dra-driver-nvidia-gpu), with checksums of 0.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from fgpu_ebpf.kubernetes import dra_messages, dra_server
from fgpu_ebpf.kubernetes.until_signal import run_until_signal

DRIVER, KIND, DEVICE = "gpu.nvidia.com", "k8s.gpu.nvidia.com/claim", "gpu-0"
SPECIFICATIONS = Path("/var/run/cdi")
HOST = Path("/etc/cdi/nvidia.json")  # what brings the driver's libraries into a container
DONE = "PrepareCompleted"


class Driver:
    """The claims that are prepared, also by an earlier process."""

    def __init__(self, folder: Path, uuid: str) -> None:
        self._file, self._uuid = folder / "plugins" / DRIVER / "checkpoint.json", uuid
        self._file.parent.mkdir(parents=True, exist_ok=True)
        old = json.loads(self._file.read_text()) if self._file.exists() else {"v2": {}}
        self._claims: dict[str, dict[str, Any]] = old["v2"].get("preparedClaims", {})
        self._messages = dra_messages.classes()
        self.server = dra_server.DraServer(folder, self._messages, self._prepare, self._unprepare)
        self._write()

    def _write(self) -> None:
        kept = {uid: claim for uid, claim in self._claims.items() if claim["checkpointState"] == DONE}
        first = {uid: {key: claim[key] for key in ("status", "preparedDevices")} for uid, claim in kept.items()}
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        second = {"checksum": 0, "preparedClaims": self._claims, "nodeBootID": boot}
        new = self._file.with_name(".checkpoint")
        new.write_text(json.dumps({"checksum": 0, "v1": {"preparedClaims": first}, "v2": second}))
        os.replace(new, self._file)

    async def _prepare(self, claim: Any) -> Any:
        words = ["kubectl", "get", "resourceclaim", claim.name, "--namespace", claim.namespace, "--output", "json"]
        found = json.loads(subprocess.run(words, check=True, capture_output=True, timeout=30).stdout)
        about = {"name": claim.name, "namespace": claim.namespace}
        self._claims[claim.uid] = {"checkpointState": "PrepareStarted", "status": found["status"], **about}
        self._write()
        name = f"{claim.uid}-{DEVICE}"
        devices = [
            {
                "Requests": [result["request"]],
                "PoolName": result["pool"],
                "DeviceName": result["device"],
                "CDIDeviceIDs": [f"{KIND}={name}"],
            }
            for result in found["status"]["allocation"]["devices"]["results"]
        ]
        host = json.loads(HOST.read_text())
        edits = host["devices"][0]["containerEdits"]
        specification = host | {"kind": KIND, "devices": [{"name": name, "containerEdits": edits}]}
        SPECIFICATIONS.mkdir(exist_ok=True)
        _specification(claim.uid).write_text(json.dumps(specification))
        prepared = [{"gpu": {"info": {"uuid": self._uuid}, "device": device}, "mig": None} for device in devices]
        group = {"devices": prepared, "configState": {}}
        self._claims[claim.uid] = {
            "checkpointState": DONE, "status": found["status"], "preparedDevices": [group]
        }  # fmt: skip
        self._write()
        answer = [
            {
                "request_names": device["Requests"],
                "pool_name": device["PoolName"],
                "device_name": device["DeviceName"],
                "cdi_device_ids": device["CDIDeviceIDs"],
            }
            for device in devices
        ]
        return self._messages["NodePrepareResourceResponse"](devices=answer)

    async def _unprepare(self, claim: Any) -> Any:
        _specification(claim.uid).unlink(missing_ok=True)
        self._claims.pop(claim.uid, None)
        self._write()
        return self._messages["NodeUnprepareResourceResponse"]()


def _specification(uid: str) -> Path:
    return SPECIFICATIONS / f"k8s.gpu.nvidia.com-claim_{uid}.yaml"


async def main(folder: Path, uuid: str) -> None:
    """Serve kubelet until SIGTERM."""
    driver = Driver(folder, uuid)
    await driver.server.open()
    await run_until_signal()
    await driver.server.close()


if __name__ == "__main__":
    with mock.patch.object(dra_server, "DRIVER", DRIVER):
        asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
