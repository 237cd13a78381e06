"""A node without a cluster: containerd, and kubelet's work for a manifest's pod: volumes, mounts, rights, order.

The module runs containerd for one test module, at its usual socket, and pods' volumes. The manifest is followed
exactly. Parts that are no field of the manifest are as on a node: the driver's files are at the paths where NVIDIA's
runtime puts them. Pods use the node's network, which is separate. Imports nothing of fgpu.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.support.containers import containerd
from tests.support.containers.containerd import HOST_NETWORK, PRIVATE_MOUNTS, Containerd, message
from tests.support.host import SIM, cgroup_root
from tests.support.wait import eventually

SOCKET = Path("/run/containerd/containerd.sock")
STATE = Path("/var/lib/fgpu")
OWN_FOLDERS = (Path("/run"), Path("/var/lib"))  # of the node; on this machine these folders belong to other programs
OWN_PIDS, HOST_PIDS = 1, 2  # NamespaceMode.CONTAINER, NODE
PROPAGATION = {"None": 0, "HostToContainer": 1, "Bidirectional": 2}
LIBRARIES = "/usr/lib/x86_64-linux-gnu"
# Files that NVIDIA's runtime adds to containers of its runtime class: libraries in the loader's folder, and the device.
DRIVER = ("libcuda.so.1", "libnvidia-ml.so.1")
# Kubelet's defaults for a container without its own procMount.
MASKED = ("asound", "acpi", "kcore", "keys", "latency_stats", "timer_list", "timer_stats", "sched_debug", "scsi")
READ_ONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger")
ENTER = ("unshare", "--mount", "--net", "sh", "-c", f"ip link set lo up; {PRIVATE_MOUNTS}", "sh")
# On a hybrid host the controllers are in the first version's hierarchy, where the memory limit is set.
RUNTIME = """#!/usr/bin/python3 -I
import json, os, sys
words = sys.argv[1:]
if "create" in words:
    file = words[words.index("--bundle") + 1] + "/config.json"
    spec = json.load(open(file))
    memory = spec["linux"].pop("resources", {}).get("memory", {}).get("limit")
    name = spec.get("annotations", {}).get("io.kubernetes.cri.container-name")
    if name and memory:
        folder = "%s/%s" % (MEMORY, words[-1])
        os.mkdir(folder)
        open(folder + "/memory.limit_in_bytes", "w").write(str(memory))
        open(folder + "/cgroup.procs", "w").write(str(os.getpid()))
    json.dump(spec, open(file, "w"))
os.execvp("runc", ["runc", *words])
"""


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a protobuf message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in itertools.count(0, 7):
            at += 1
            value |= (data[at - 1] & 0x7F) << shift
            if data[at - 1] < 0x80:
                return value
        raise AssertionError

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            length = varint()
            at += length
            yield key >> 3, data[at - length : at]


@dataclass
class Container:
    """A container of a pod; `id` is containerd's."""

    spec: Mapping[str, Any]
    id: str
    node: Node

    @property
    def status(self) -> dict[int, Any]:
        """Return fields of its ContainerStatus: 3 state (1 runs, 2 has exited), 7 exit code."""
        answer = dict(fields(self.node.ask("ContainerStatus", message((1, self.id)))))
        return {3: 0, 7: 0} | dict(fields(answer[1]))

    @property
    def log(self) -> str:
        """Return the output of containers of that name."""
        return (self.node.work / f"{self.spec['name']}.log").read_text()

    @property
    def pid(self) -> int:
        """Return the pid of the container's first process."""
        answer = self.node.ask("ContainerStatus", message((1, self.id), (2, 1)))
        for number, value in fields(answer):
            if number == 2 and dict(fields(value)).get(1) == b"info":
                pid = int(json.loads(dict(fields(value))[2])["pid"])
                # a signal to pid 0 would reach this process
                assert pid > 1, f"{self.spec['name']} has ended: {self.log}"
                return pid
        raise AssertionError("no pid")

    def facts(self) -> dict[str, str]:
        """Return the fields of /proc/PID/status."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def memory_peak_bytes(self) -> int:
        """Return the peak memory of the container's cgroup, including the kernel's memory."""
        return int((self.node.memory / self.id / "memory.max_usage_in_bytes").read_text())

    def ended(self) -> int:
        """Wait until it exits, and return its exit code."""
        eventually(lambda: self.status[3] == 2, 120, f"{self.spec['name']}: {self.log}")
        return int(self.status[7])

    def run(self, *words: str, seconds: int = 30) -> tuple[int, str]:
        """Run `kubectl exec`. Return exit code and output."""
        request = message((1, self.id), *((2, word) for word in words), (3, seconds))
        assert self.status[3] == 1, f"{self.spec['name']} has ended: {self.log}"
        found = {1: b"", 2: b"", 3: 0} | dict(fields(self.node.ask("ExecSync", request)))
        return int(found[3]), (found[1] + found[2]).decode()

    def kill(self) -> None:
        """Kill its first process, as the kernel's out-of-memory killer does."""
        os.kill(self.pid, 9)

    def probe(self, kind: str) -> bool:
        """Run a probe once, as kubelet does."""
        probe = self.spec[kind]
        if "exec" in probe:
            return self.run(*probe["exec"]["command"], seconds=probe["timeoutSeconds"])[0] == 0
        get = probe["httpGet"]
        port = next(port["containerPort"] for port in self.spec["ports"] if port["name"] == get["port"])
        return self.node.get(port, get["path"])[0] == 200


@dataclass
class Pod:
    """A pod with the template of a manifest."""

    node: Node
    spec: Mapping[str, Any]
    sandbox: str
    path: str
    volumes: dict[str, Path]
    config: bytes
    containers: dict[str, Container] = field(default_factory=dict)

    def start(self, name: str) -> Container:
        """Start or restart a container of that name, as kubelet does."""
        spec = next(c for c in (*self.spec.get("initContainers", ()), *self.spec["containers"]) if c["name"] == name)
        config = self.node.container_config(self, spec)
        id_ = self.node.call("CreateContainer", message((1, self.sandbox), (2, config), (3, self.config)))
        self.containers[name] = Container(spec, id_, self.node)
        self.node.call("StartContainer", message((1, id_)))
        return self.containers[name]

    def begin(self) -> None:
        """Start the init containers one after another, then the others."""
        for spec in self.spec.get("initContainers", ()):
            one = self.start(spec["name"])
            assert one.ended() == 0, f"{spec['name']}: {one.log}"
        for spec in self.spec["containers"]:
            self.start(spec["name"])
            eventually(lambda one=self.containers[spec["name"]]: self._is_up(one), 60, f"{spec['name']}")

    @staticmethod
    def _is_up(one: Container) -> bool:
        assert one.status[3] == 1, f"{one.spec['name']} has ended: {one.log}"
        kinds = [kind for kind in ("startupProbe", "readinessProbe") if kind in one.spec]
        return all(one.probe(kind) for kind in kinds)

    def end(self) -> None:
        """End the pod, as kubelet does."""
        grace = (2, self.spec["terminationGracePeriodSeconds"])
        for one in self.containers.values():
            self.node.stop("StopContainer", message((1, one.id), grace))
        self.node.end_pod(self.sandbox, self.path, 20)
        self.node.pods_of_manifests.remove(self)


class Node(Containerd):
    """containerd, and the actions of kubelet. `manifests` has the files that `kubectl apply` would get."""

    def __init__(self, work: Path, manifests: Sequence[Mapping[str, Any]]) -> None:
        self.memory, self.pods_of_manifests = work / "memory", list[Pod]()
        self.objects = {(one["kind"], one["metadata"]["name"]): one for one in manifests}
        self.beneath: tuple[str, ...] = ()  # of this machine, for an image without these files
        self._mounted: list[Path] = []
        self._attempts = itertools.count(1)  # all containers of a pod have different numbers
        (work / "sim").mkdir()
        subprocess.run(["mount", "--bind", "/run/fgpu-sim", str(work / "sim")], check=True, timeout=10)
        for folder in OWN_FOLDERS:
            self._mount("tmpfs", folder, "-t", "tmpfs", "-o", "mode=755")
        for folder in (Path("/run/fgpu-sim"), SOCKET.parent):
            folder.mkdir()
        self._mount(str(work / "sim"), Path("/run/fgpu-sim"), "--move")
        self.memory.mkdir()
        self._mount("none", self.memory, "-t", "cgroup", "-o", "memory")
        self.memory /= f"fgpu-kubernetes-{os.getpid()}"
        self.memory.mkdir()
        try:
            super().__init__(work, SOCKET, {}, ENTER)
        except BaseException:
            self._unmount()
            raise
        self.shim = {
            str(STATE / "shim/current/libfgpu.so"): str(STATE / "shim/current/libfgpu.so"),
            "/run/fgpu/shim": "/run/fgpu/shim",
            "/etc/ld.so.preload": "/run/fgpu/container.preload",
            "/etc/ld-nix.so.preload": "/run/fgpu/container.preload",
            "/var/lib/fgpu/run": "/run/fgpu/shim",
        }

    def _mount(self, source: str, target: Path, *options: str) -> None:
        subprocess.run(["mount", *options, source, str(target)], check=True, timeout=10)
        self._mounted.append(target)

    def _unmount(self) -> None:
        for folder in (*sorted(self.memory.glob("*/")), self.memory):
            with contextlib.suppress(OSError):
                folder.rmdir()
        for target in reversed(self._mounted):
            subprocess.run(["umount", "--lazy", str(target)], check=False, timeout=10)

    def settle(self) -> None:
        """See Containerd. Set layers as nodes have them, and the limits of memory."""
        config = self.work / "config.toml"
        config.write_text(config.read_text().replace('"native"', '"overlayfs"'))
        (self.work / "runtime").write_text(RUNTIME.replace("MEMORY,", f'"{self.memory}",'))

    def load(self, archive: Path) -> None:
        """Load an image as `docker save` writes it."""
        command = [containerd.ENGINES / "usr/bin/ctr", "--address", SOCKET, "--namespace", "k8s.io"]
        subprocess.run([*map(str, command), "images", "import", str(archive)], check=True, timeout=170)

    def ask(self, method: str, request: bytes) -> bytes:
        """Call a function of RuntimeService, and return the whole answer."""
        return bytes(self._channel.unary_unary(f"/runtime.v1.RuntimeService/{method}")(request, timeout=60))

    def get(self, port: int, path: str) -> tuple[int, str]:
        """Send an HTTP request from the node. Return status (0: no listener) and text."""
        script = (
            "import sys, urllib.request as r\n"
            "try:\n with r.urlopen(sys.argv[1], timeout=5) as page: print(page.status, page.read().decode())\n"
            "except r.HTTPError as error: print(error.code, '')\n"
            "except OSError: print(0, '')"
        )
        command = ["nsenter", f"--target={self._daemon.pid}", "--net", sys.executable, "-I", "-c", script]
        done = subprocess.run([*command, f"http://127.0.0.1:{port}{path}"], capture_output=True, text=True, timeout=30)
        code, _, text = done.stdout.partition(" ")
        return int(code or 0), text

    # -- the work of kubelet

    def apply(self, name: str) -> Pod:
        """Start a DaemonSet's pod, and wait until its containers are up."""
        pod = self.make(name)
        pod.begin()
        return pod

    def make(self, name: str) -> Pod:
        """Make a DaemonSet's pod without starting a container."""
        template = self.objects["DaemonSet", name]["spec"]["template"]
        spec, number = template["spec"], next(self.pods)
        uid = f"{os.getpid():08x}-3333-2222-1111-{number:012x}"
        path = f"{self.group}/pod{uid}"
        (cgroup_root() / path.lstrip("/")).mkdir(parents=True)
        own = {f"io.kubernetes.pod.{k}": v for k, v in (("uid", uid), ("name", name), ("namespace", "fgpu-system"))}
        pid = HOST_PIDS if spec.get("hostPID") else OWN_PIDS
        security = message((1, message((1, HOST_NETWORK), (2, pid))))
        config = message(
            (1, message((1, name), (2, uid), (3, "fgpu-system"))), (3, str(self.work)),
            (6, {**template["metadata"]["labels"], **own}), (8, message((1, path), (2, security))),
        )  # fmt: skip
        sandbox = self.call("RunPodSandbox", message((1, config)))
        volumes = {volume["name"]: self._volume(volume) for volume in spec["volumes"]}
        pod = Pod(self, spec, sandbox, path, volumes, config)
        self.pods_of_manifests.append(pod)
        return pod

    def _volume(self, volume: Mapping[str, Any]) -> Path:
        if "configMap" in volume:
            name = volume["configMap"]["name"]
            folder = self.work / "configmaps" / name
            self.publish(name)
            return folder
        path, kind = Path(volume["hostPath"]["path"]), volume["hostPath"]["type"]
        if kind == "DirectoryOrCreate":
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
        assert path.is_dir(), f"{kind} {path}"
        return path

    def publish(self, name: str, data: Mapping[str, str] | None = None) -> None:
        """Write a ConfigMap's files as kubelet does: to another folder, whose link is renamed over the last one."""
        data = self.objects["ConfigMap", name].get("data", {}) if data is None else data
        folder = self.work / "configmaps" / name
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)  # kubelet's folders have this mode too
        aside = folder / f"..{time.time_ns()}"
        aside.mkdir(mode=0o755)
        for file, text in data.items():
            (aside / file).write_text(text)
        (folder / "..data_tmp").symlink_to(aside.name)
        (folder / "..data_tmp").rename(folder / "..data")
        for file in data:
            if not (folder / file).is_symlink():
                (folder / file).symlink_to(f"..data/{file}")
        for link in folder.iterdir():
            if not link.name.startswith("..") and link.name not in data:
                link.unlink()

    def container_config(self, pod: Pod, spec: Mapping[str, Any]) -> bytes:
        """Return a container's configuration for the container runtime interface."""
        mounts = [message((1, path), (2, path), (3, 1)) for path in self.beneath]
        mounts += [self._mount_of(pod, mount) for mount in spec.get("volumeMounts", ())]
        env = {one["name"]: one["value"] for one in spec.get("env", ())}
        if pod.spec.get("runtimeClassName") == "nvidia" and env.get("NVIDIA_VISIBLE_DEVICES"):
            folder = "" if self.beneath else LIBRARIES  # nothing can be added to this machine's own folder
            mounts += [message((1, f"{folder}/{name}"), (2, str(SIM / "lib" / name)), (3, 1)) for name in DRIVER]
            mounts += [message((1, "/run/fgpu-sim"), (2, "/run/fgpu-sim"), (3, 1))]
        limit = spec["resources"]["limits"]["memory"]
        assert limit.endswith("Mi")
        resources = message((4, int(limit[:-2]) << 20))
        host = f"/proc/{os.getpid()}/ns/cgroup"  # the node's cgroup namespace is that of the tests
        command = [word.replace("/proc/2/ns/cgroup", host) for word in spec.get("command", ())]
        return message(
            (1, message((1, spec["name"]), (2, next(self._attempts)))),
            (2, message((1, f"docker.io/library/{spec['image']}"))),
            *((3, word) for word in command), *((4, word) for word in spec.get("args", ())),
            *((6, message((1, key), (2, value))) for key, value in env.items()), *((7, mount) for mount in mounts),
            (11, f"{spec['name']}.log"), (15, message((1, resources), (2, _security(pod, spec["securityContext"])))),
        )  # fmt: skip

    @staticmethod
    def _mount_of(pod: Pod, mount: Mapping[str, Any]) -> bytes:
        propagation = PROPAGATION[mount.get("mountPropagation", "None")]
        is_config = "configmaps" in str(pod.volumes[mount["name"]])
        read_only = int(bool(mount.get("readOnly")) or is_config)  # kubelet's ConfigMaps are always read-only
        return message((1, mount["mountPath"]), (2, str(pod.volumes[mount["name"]])), (3, read_only), (5, propagation))

    def end_tenants(self) -> None:
        """End every pod that belongs to no manifest."""
        for pod in self._running:
            self.end_pod(pod.sandbox, pod.path, 20)
        self._running.clear()

    def close(self) -> None:
        """End every pod, and the engine."""
        try:
            self.end_tenants()
            for pod in list(self.pods_of_manifests):
                pod.end()
            super().close()
        finally:
            self._unmount()


def _security(pod: Pod, context: Mapping[str, Any]) -> bytes:
    """Return LinuxContainerSecurityContext.

    An unknown field is an error, because it would be a right that is not tested.
    """
    known = {"runAsUser", "runAsGroup", "readOnlyRootFilesystem", "allowPrivilegeEscalation", "seccompProfile"}
    assert set(context) <= known | {"capabilities", "appArmorProfile"}, context
    assert context["allowPrivilegeEscalation"] is False
    capabilities = message(
        *((1, name) for name in context["capabilities"].get("add", ())),
        *((2, name) for name in context["capabilities"]["drop"]),
    )
    pid = HOST_PIDS if pod.spec.get("hostPID") else OWN_PIDS
    seccomp = {"RuntimeDefault": 0, "Unconfined": 1}[context["seccompProfile"]["type"]]
    masked = [*(f"/proc/{name}" for name in MASKED), "/sys/firmware", "/sys/devices/virtual/powercap"]
    return message(
        (1, capabilities), (3, message((1, HOST_NETWORK), (2, pid))), (5, message((1, context["runAsUser"]))),
        (7, int(context["readOnlyRootFilesystem"])), (11, 1), (12, message((1, context["runAsGroup"]))),
        *((13, path) for path in masked), *((14, f"/proc/{name}") for name in READ_ONLY),
        (15, message((1, seccomp))),
    )  # fmt: skip


def manifests(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file."""
    return [one for one in yaml.safe_load_all(path.read_text()) if one]
