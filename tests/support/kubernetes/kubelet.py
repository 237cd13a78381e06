"""A stand-in for kubelet: its messages to device plugins and their answers, by the interface that kubelet publishes.

The module runs a Registration server, a DevicePlugin client for each resource, and the plugin's process. Both
interfaces are compiled by protoc from api.proto, which is k8s.io/kubelet v0.34.0's
pkg/apis/deviceplugin/v1beta1/api.proto (Apache License 2.0, the Kubernetes Authors). Imports nothing of fgpu.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc

from tests.support import host
from tests.support.host import FGPU, RUN_DIR
from tests.support.wait import eventually

PROTO = Path(__file__).with_name("api.proto")
PROFILES = "[{share: 2gib-25pct, count: 2}, {share: 1gib, count: 3}, {share: 4gib, devices: ['1']}]"
NODES = {0: "0\n", 1: "1\n"}  # memory nodes of the devices, whichever nodes this machine has
BARE = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
OPTIONS = (("grpc.use_local_subchannel_pool", 1),)


def compiled(folder: Path) -> tuple[ModuleType, ModuleType]:
    """Compile messages and services with protoc."""
    from grpc_tools import protoc

    if "api_pb2" not in sys.modules:
        shutil.copy(PROTO, folder / "api.proto")
        words = ["protoc", f"-I{folder}", f"--python_out={folder}", f"--grpc_python_out={folder}", "api.proto"]
        assert protoc.main(words) == 0
        for name in ("api_pb2", "api_pb2_grpc"):  # the second imports the first
            load(name, folder / f"{name}.py")
    return sys.modules["api_pb2"], sys.modules["api_pb2_grpc"]


def load(name: str, file: Path) -> None:
    """Import a file as the module `name`."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec
    assert spec.loader
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


class Resource:
    """A registered plugin, as kubelet holds it. A separate thread reads its stream."""

    def __init__(self, kubelet: Kubelet, request: Any) -> None:
        self.request, self.lists = request, []
        self.channel = grpc.insecure_channel(f"unix:{kubelet.folder / request.endpoint}", options=OPTIONS)
        self.plugin = kubelet.services.DevicePluginStub(self.channel)
        self.options = None
        self.ended = ""
        self._api = kubelet.api
        self._stream: Any = None
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        try:
            self.options = self.plugin.GetDevicePluginOptions(self._api.Empty(), timeout=20, wait_for_ready=True)
            self._stream = self.plugin.ListAndWatch(self._api.Empty())
            for answer in self._stream:
                self.lists.append(list(answer.devices))
        except (grpc.RpcError, ValueError) as error:
            self.ended = str(error)
        self.ended = self.ended or "ended"

    def close(self) -> None:
        """Close the connection."""
        self.channel.close()
        self._thread.join(10)

    @property
    def ids(self) -> list[str]:
        """Return all ids, in the order of the last list."""
        return [device.ID for device in self.lists[-1]] if self.lists else []

    @property
    def healthy(self) -> list[str]:
        """Return the ids that a pod could get."""
        return [device.ID for device in self.lists[-1] if device.health == "Healthy"] if self.lists else []

    def allocate(self, *ids: str, seconds: float = 30) -> Any:
        """Return the answer for one container."""
        wanted = self._api.ContainerAllocateRequest(devices_ids=ids)
        asked = self._api.AllocateRequest(container_requests=[wanted])
        (answer,) = self.plugin.Allocate(asked, timeout=seconds).container_responses
        return answer

    def preferred(self, size: int, available: list[str], must: tuple[str, ...] = ()) -> list[str]:
        """Return the ids that the plugin prefers among the available ones."""
        one = self._api.ContainerPreferredAllocationRequest(
            available_deviceIDs=available, must_include_deviceIDs=must, allocation_size=size
        )
        asked = self._api.PreferredAllocationRequest(container_requests=[one])
        (answer,) = self.plugin.GetPreferredAllocation(asked, timeout=20).container_responses
        return list(answer.deviceIDs)


class Kubelet:
    """Kubelet's folder and Registration service.

    A second start() acts as another kubelet, which empties the folder first.
    """

    def __init__(self, folder: Path, made: Path) -> None:
        self.folder = folder
        self.folder.mkdir(exist_ok=True)
        self.api, self.services = compiled(made)
        self.resources: dict[str, Resource] = {}
        self.registrations: list[Any] = []
        self.refusing = ""
        self._server: Any = None

    def start(self) -> None:
        """Empty the folder and listen, as kubelet's plugin manager does."""
        for path in self.folder.iterdir():
            path.unlink()
        kubelet = self

        class Registration(self.services.RegistrationServicer):
            def Register(self, request: Any, context: Any) -> Any:
                if kubelet.refusing:
                    context.abort(grpc.StatusCode.INVALID_ARGUMENT, kubelet.refusing)
                kubelet._registered(request)
                return kubelet.api.Empty()

        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        self.services.add_RegistrationServicer_to_server(Registration(), self._server)
        self._server.add_insecure_port(f"unix:{self.folder}/kubelet.sock")
        self._server.start()

    def _registered(self, request: Any) -> None:
        self.registrations.append(request)
        before = self.resources.pop(request.resource_name, None)
        self.resources[request.resource_name] = Resource(self, request)
        if before:
            before.close()

    def stop(self) -> None:
        """Stop the server. Its socket stays."""
        if self._server:
            self._server.stop(0).wait(10)
            self._server = None
        for resource in self.resources.values():
            resource.close()
        self.resources.clear()

    def resource(self, name: str, seconds: float = 30) -> Resource:
        """Return a resource that has registered and sent its first list."""
        return eventually(
            lambda: (found := self.resources.get(f"fgpu.dev/{name}")) and found.lists and found, seconds, name
        )


class Plugin:
    """The process `fgpu device-plugin`, as a DaemonSet's container runs it: root, without any capability."""

    def __init__(self, folder: Path, log: Path, *options: str, run_dir: Path = RUN_DIR) -> None:
        command = [*BARE, *FGPU, "--run-dir", run_dir, "device-plugin", "--kubelet-dir", folder, *options]
        self.log = log
        with open(log, "ab") as said:
            environment = {k: v for k, v in host.ENVIRONMENT.items() if k != "LD_LIBRARY_PATH"}
            self.process = subprocess.Popen([str(word) for word in command], stdout=said, stderr=said, env=environment)

    def said(self) -> str:
        """Return all lines of its output."""
        return self.log.read_text()

    def stop(self) -> float:
        """Send SIGTERM. Return the seconds until it has exited."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        assert code == 0, self.said()
        assert "Traceback" not in self.said(), self.said()
        return time.monotonic() - began

    def kill(self) -> None:
        """Send SIGKILL, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(20)


def doctor(folder: Path) -> str:
    """Return the line of `fgpu doctor` about the device plugin. `folder` is mounted at kubelet's usual path."""
    script = f"""
mount -t tmpfs tmpfs /var/lib && mkdir -p /var/lib/kubelet/device-plugins &&
mount --bind {folder} /var/lib/kubelet/device-plugins && exec "$@"
"""
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *FGPU, "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=host.ENVIRONMENT)
    return "".join(line for line in done.stdout.splitlines(True) if "device plugin" in line)
