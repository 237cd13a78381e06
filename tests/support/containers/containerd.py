"""A containerd that one test starts, with pods and containers by the container runtime interface, as from kubelet."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from tests.support.containers.docker import ENGINES, PATH
from tests.support.host import BUILD, ENVIRONMENT, ROOT, SHIM, cgroup_root
from tests.support.place import HUB, PRIVATE_MOUNTS, Place
from tests.support.tenant import Tenant
from tests.support.wait import eventually, remove_cgroup

IMAGE = "docker.io/library/fgpu-e2e:1"
# This runtime removes `resources` from the configuration: on a host with both versions of cgroups the controllers are
# not in the hierarchy of version 2.
RUNTIME = """#!/usr/bin/python3 -I
import json, os, sys
words = sys.argv[1:]
if "create" in words:
    file = words[words.index("--bundle") + 1] + "/config.json"
    spec = json.load(open(file))
    spec["linux"].pop("resources", None)
    json.dump(spec, open(file, "w"))
os.execvp("runc", ["runc", *words])
"""
CONFIG = """
version = 2
root = "{work}/root"
state = "{work}/state"
[grpc]
address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
disable_apparmor = true
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = "{work}/runtime"
"""
OWN_MOUNTS = ("unshare", "-m", "sh", "-c", PRIVATE_MOUNTS, "sh")
HOST_NETWORK = 2  # NamespaceMode.NODE


def message(*fields: tuple[int, Any]) -> bytes:
    """Encode a protobuf message from pairs of a field's number and its value.

    A value is a text, an integer, the bytes of a message, or a mapping of texts.
    """
    return b"".join(_field(number, value) for number, value in fields)


def _field(number: int, value: Any) -> bytes:
    if isinstance(value, Mapping):
        return b"".join(_field(number, message((1, key), (2, of))) for key, of in value.items())
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


class Pod:
    """A pod: its sandbox, in the pod's cgroup. The cgroup is created first, as by kubelet."""

    def __init__(self, place: Containerd, name: str, labels: Mapping[str, str], notes: Mapping[str, str]) -> None:
        number = next(place.pods)
        self.place, self.name = place, name
        self.uid = f"{os.getpid():08x}-1111-2222-3333-{number:012x}"
        self.path = f"{place.group}/pod{self.uid}"
        self._own = {f"io.kubernetes.pod.{k}": v for k, v in (("uid", self.uid), ("name", name), ("namespace", "dev"))}
        (cgroup_root() / self.path.lstrip("/")).mkdir(parents=True)
        security = message((1, message((1, HOST_NETWORK))))
        linux = message((1, self.path), (2, security))
        self.config = message(
            (1, message((1, name), (2, self.uid), (3, "dev"))), (3, str(place.work)), (6, {**labels, **self._own}),
            (7, notes), (8, linux),
        )  # fmt: skip
        self.sandbox = place.call("RunPodSandbox", message((1, self.config)))

    def container(self, name: str) -> Tenant:
        """Start a container that is a tenant."""
        self._container = name
        self.place.pod = self
        return self.place.tenant(None)

    def container_config(self, folder: Path) -> bytes:
        read_only = {str(path): str(path) for path in (BUILD, ROOT / ".venv", "/run/fgpu-sim", "/usr")}
        read_only |= {"/etc/ld.so.cache": "/etc/ld.so.cache", **self.place.shim}
        mounts = [(7, message((1, to), (2, path), (3, 1))) for to, path in read_only.items()]
        mounts += [(7, message((1, str(folder)), (2, str(folder))))]
        command = [(3, word) for word in ("sh", "-c", f"exec <{folder}/hub; {HUB}")]
        environment = [(6, message((1, key), (2, value))) for key, value in ENVIRONMENT.items()]
        return message(
            (1, message((1, self._container))), (2, message((1, IMAGE))), *command, (5, str(folder)), *environment,
            *mounts, (9, {**self._own, "io.kubernetes.container.name": self._container}), (11, "log"),
        )  # fmt: skip


class Hub:
    """The container's first process. It reads the lines that are written to this object."""

    def __init__(self, fifo: Path) -> None:
        self.stdin = open(os.open(fifo, os.O_RDWR), "wb", buffering=0)  # noqa: SIM115


class Containerd(Place):
    """containerd with the cgroupfs driver, at the socket that the agent uses."""

    group = "/kubepods/burstable"
    pods = itertools.count(1)  # for their uids, which must all differ

    def __init__(self, work: Path, where: Path, labels: Mapping[str, str], enter: Sequence[str] = OWN_MOUNTS) -> None:
        """Start the engine.

        `labels` are those of the image. `enter` is a command that runs the engine in a namespace with its cgroups.
        """
        super().__init__(work)
        self._running: list[Pod] = []
        preload = work / "ld.so.preload"
        preload.write_text(f"{SHIM}\n")
        # The mounts that every container gets: its path in the container, and the host's path.
        self.shim = {str(SHIM): str(SHIM), "/run/fgpu/shim": "/run/fgpu/shim", "/etc/ld.so.preload": str(preload)}
        (work / "runtime").write_text(RUNTIME)
        (work / "runtime").chmod(0o755)
        (work / "config.toml").write_text(CONFIG.format(work=work, socket=where, image=IMAGE))
        self.settle()
        self._words = [*enter, "containerd", "--config", str(work / "config.toml")]
        self._begin()
        options = [("grpc.default_authority", "localhost")]
        self._channel = grpc.insecure_channel(f"unix:{where}", options=options)
        try:
            grpc.channel_ready_future(self._channel).result(30)
            archive = self._image(labels)
            load = [ENGINES / "usr/bin/ctr", "--address", where, "--namespace", "k8s.io", "images", "import", archive]
            subprocess.run([str(word) for word in load], check=True, capture_output=True, timeout=60)
        except BaseException:
            self._stop()
            raise

    def _begin(self) -> None:
        with open(self.work / "containerd.log", "ab") as log:
            environment = {**os.environ, "PATH": PATH}
            self._daemon = subprocess.Popen(self._words, stdout=log, stderr=log, env=environment)

    def kill_daemon(self) -> None:
        """Kill containerd with SIGKILL. Containers continue."""
        self._daemon.kill()
        self._daemon.wait(10)

    def start_daemon(self) -> None:
        """Start another containerd after one was killed. Returns when it serves pods."""
        self._begin()

        def serves() -> bool:
            with contextlib.suppress(grpc.RpcError):
                self._channel.unary_unary("/runtime.v1.RuntimeService/ListPodSandbox")(b"", timeout=5)
                return True
            return False

        eventually(serves, 30, "containerd")

    def settle(self) -> None:
        """Prepare the engine before it reads its settings, `config.toml`."""

    def call(self, method: str, request: bytes) -> str:
        """Call a function of RuntimeService. Return the id of the new pod or container, or an empty text."""
        answer = self._channel.unary_unary(f"/runtime.v1.RuntimeService/{method}")(request, timeout=60)
        return answer[2 : 2 + answer[1]].decode() if answer else ""

    def stop(self, method: str, request: bytes) -> None:
        """Stop a container or pod.

        A container and its containerd-shim may exit during the call. Then the call is repeated, as by kubelet.
        """

        def is_done() -> bool:
            try:
                self.call(method, request)
            except grpc.RpcError as error:
                if "ttrpc: closed" not in str(error):
                    raise
                return False
            return True

        eventually(is_done, 20, method)

    def end_pod(self, sandbox: str, path: str, seconds: float) -> None:
        """End a pod with all that still runs in it, and remove its folder."""
        self.stop("StopPodSandbox", message((1, sandbox)))
        self.call("RemovePodSandbox", message((1, sandbox)))
        remove_cgroup(cgroup_root() / path.lstrip("/"), seconds)

    def _image(self, labels: Mapping[str, str]) -> Path:
        """Write an archive as `docker save` does: one static program, which waits, and the links of this host."""
        root, out = self.work / "image", self.work / "archive"
        (root / "usr").mkdir(parents=True)
        out.mkdir()
        source = b"#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"
        subprocess.run(["gcc", "-static", "-xc", "-", "-o", root / "pause"], input=source, check=True, timeout=60)
        for link in ("bin", "sbin", "lib", "lib64"):
            if Path("/", link).is_symlink():
                (root / link).symlink_to(os.readlink(Path("/", link)))
        with tarfile.open(out / "layer.tar", "w") as layer:
            layer.add(root, ".")
        digest = hashlib.sha256((out / "layer.tar").read_bytes()).hexdigest()
        config = {"architecture": "amd64", "os": "linux", "config": {"Cmd": ["/pause"], "Labels": dict(labels)}}
        config["rootfs"] = {"type": "layers", "diff_ids": [f"sha256:{digest}"]}
        (out / "config.json").write_text(json.dumps(config))
        manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
        (out / "manifest.json").write_text(json.dumps(manifest))
        with tarfile.open(self.work / "image.tar", "w") as archive:
            for name in ("manifest.json", "config.json", "layer.tar"):
                archive.add(out / name, name)
        return self.work / "image.tar"

    def run(self, name: str, labels: Mapping[str, str], notes: Mapping[str, str]) -> Pod:
        """Start a pod without containers."""
        pod = Pod(self, name, labels, notes)
        self._running.append(pod)
        return pod

    def _make(self, name: str, folder: Path, memory: int | None) -> Tenant:
        os.mkfifo(folder / "hub")
        hub = Hub(folder / "hub")
        request = message((1, self.pod.sandbox), (2, self.pod.container_config(folder)), (3, self.pod.config))
        id_ = self.call("CreateContainer", request)
        self.call("StartContainer", message((1, id_)))
        return Tenant(self, f"dev/{self.pod.name}/{self.pod._container}", f"{self.pod.path}/{id_}", folder, hub)  # type: ignore[arg-type]

    def end(self, tenant: Tenant) -> None:
        """Do nothing: close() ends the tenant with its pod."""

    def close(self) -> None:
        """End every pod, remove its folder, and stop the engine."""
        try:
            for pod in self._running:
                self.end_pod(pod.sandbox, pod.path, 5)
        finally:
            self._stop()

    def _stop(self) -> None:
        self._channel.close()
        self._daemon.terminate()
        self._daemon.wait(30)
