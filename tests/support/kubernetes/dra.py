"""A stand-in for kubelet's side of dynamic resource allocation, and the driver's process. Imports nothing of fgpu."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc

from tests.support import host
from tests.support.host import FGPU, RUN_DIR
from tests.support.kubernetes import kubelet as kit
from tests.support.kubernetes.api_server import NODE, ApiServer
from tests.support.wait import eventually

DRIVER = "gpu.fgpu.dev"
PROTOS = ("dra", "registration")


def compiled(folder: Path) -> list[Any]:
    """Compile messages and services with protoc. Return the four modules."""
    from grpc_tools import protoc

    for name in PROTOS:
        if f"{name}_pb2" not in sys.modules:
            shutil.copy(kit.PROTO.with_name(f"{name}.proto"), folder)
            words = ["protoc", f"-I{folder}", f"--python_out={folder}", f"--grpc_python_out={folder}", f"{name}.proto"]
            assert protoc.main(words) == 0
            for module in (f"{name}_pb2", f"{name}_pb2_grpc"):
                kit.load(module, folder / f"{module}.py")
    return [sys.modules[f"{name}_{kind}"] for name in PROTOS for kind in ("pb2", "pb2_grpc")]


class Kubelet:
    """The folders of kubelet, and its calls. Each call of registered() acts as a kubelet that has just started."""

    def __init__(self, folder: Path, made: Path) -> None:
        self.folder = folder
        (folder / "plugins_registry").mkdir(parents=True)
        (folder / "plugins").mkdir()
        self.api, self.services, self.registration, self._registrations = compiled(made)
        self._channels: list[Any] = []

    def _channel(self, path: str | Path) -> Any:
        self._channels.append(grpc.insecure_channel(f"unix:{path}", options=kit.OPTIONS))
        return self._channels[-1]

    def registered(self, error: str = "") -> Any:
        """Register the driver that has a socket in `plugins_registry`, or refuse it. Return what it says of itself."""
        found = eventually(lambda: list((self.folder / "plugins_registry").glob("*.sock")), 30, "a socket")
        (path,) = found
        stub = self._registrations.RegistrationStub(self._channel(path))
        info = stub.GetInfo(self.registration.InfoRequest(), timeout=20, wait_for_ready=True)
        status = self.registration.RegistrationStatus(plugin_registered=not error, error=error)
        stub.NotifyRegistrationStatus(status, timeout=20)
        return info

    def call(self, method: str, *claims: dict[str, Any]) -> dict[str, Any]:
        """Call the driver at the socket that it registered. Return the answer for each claim by its UID."""
        stub = self.services.DRAPluginStub(self._channel(self.registered().endpoint))
        asked = [self.api.Claim(**{k: claim["metadata"][k] for k in ("namespace", "uid", "name")}) for claim in claims]
        request = getattr(self.api, f"{method}Request")(claims=asked)
        return dict(getattr(stub, method)(request, timeout=45).claims)

    def prepare(self, *claims: dict[str, Any]) -> list[Any]:
        """Return the answer for each claim, in their order."""
        found = self.call("NodePrepareResources", *claims)
        return [found[claim["metadata"]["uid"]] for claim in claims]

    def unprepare(self, *claims: dict[str, Any]) -> list[str]:
        """Return the error for each claim, in their order."""
        found = self.call("NodeUnprepareResources", *claims)
        return [found[claim["metadata"]["uid"]].error for claim in claims]

    def stop(self) -> None:
        """Close all connections."""
        for channel in self._channels:
            channel.close()
        self._channels.clear()


class Driver(kit.Plugin):
    """The process `fgpu dra-driver`, as a DaemonSet's container runs it: root, without any capability."""

    def __init__(self, folder: Path, log: Path, server: ApiServer, *options: str, run_dir: Path = RUN_DIR) -> None:
        command = [*kit.BARE, *FGPU, "--run-dir", run_dir, "dra-driver", "--kubelet-dir", folder, "--node-name", NODE]
        command += ["--service-account", server.folder, *options]
        self.log = log
        environment = {k: v for k, v in host.ENVIRONMENT.items() if k != "LD_LIBRARY_PATH"} | {"NO_PROXY": "*"}
        environment |= {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(server.port)}
        with open(log, "ab") as said:
            words = [os.fspath(word) for word in command]
            self.process = subprocess.Popen(words, stdout=said, stderr=said, env=environment)
