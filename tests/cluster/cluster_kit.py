"""A cluster of one node: Kubernetes' own programs, etcd and containerd, in a mount and a network namespace.

The node's folders (/etc, /run, /var/lib, /var/log), its network and its bpffs are not those of this machine. Its
processes are in the initial pid namespace, which the agent requires, and in the cgroup of the tests' world. So the end
of the run (`tests.world.clear`) ends them all. Imports nothing of fgpu.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.node_kit import (
    ADDRESS,
    BRIDGE,
    SERVICES_SUBNET,
    SUBNET,
    Memory,
    mounts_below,
    run,
    write_driver_specification,
)
from tests.support.host import BUILD, cgroup_root
from tests.support.wait import eventually

PROGRAMS = BUILD / "cluster/bin"
# Another version of Kubernetes' programs, which precede those of `bin`.
VERSION = os.environ.get("FGPU_TEST_KUBERNETES", "")
PATH = f"{PROGRAMS}-{VERSION}:{PROGRAMS}:/usr/sbin:/usr/bin:/sbin:/bin"
NODE = "node-1"
API = "https://127.0.0.1"
SOCKET = Path("/run/containerd/containerd.sock")
SERVICES = ("kubelet", "containerd")  # of the node
PAUSE = "docker.io/library/fgpu-pause:1"
READY = '{.status.conditions[?(@.type=="Ready")].status}'
USERS = {"admin": ("admin", "system:masters"), "kubelet": (f"system:node:{NODE}", "system:nodes")}
USERS |= {name: (f"system:{name}", "") for name in ("kube-controller-manager", "kube-scheduler")}
CONTAINERD = """
version = 3
[grpc]
address = "{socket}"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{pause}"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{programs}"]
conf_dir = "/etc/cni/net.d"
[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.nvidia]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.nvidia.options]
BinaryName = "{programs}/nvidia-container-runtime"
"""
NVIDIA = """
[nvidia-container-runtime]
mode = "cdi"
runtimes = ["runc"]
[nvidia-container-runtime.modes.cdi]
spec-dirs = ["/etc/cdi", "/var/run/cdi"]
default-kind = "nvidia.com/gpu"
"""
NETWORK = {
    "cniVersion": "1.0.0",
    "name": "pods",
    "plugins": [
        {
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": True,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": SUBNET}]], "routes": [{"dst": "0.0.0.0/0"}]},
        }
    ],
}


class Cluster:
    """The control plane, and a node. Each program's output is in the file of its name in `logs`."""

    logs = BUILD / "cluster/logs"

    def __init__(self, work: Path, cgroup: str) -> None:
        self.work, self.cgroup = work, cgroup
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir()
        self.memory = Memory(cgroup_root() / cgroup.lstrip("/"))
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = {"PATH": PATH, "HOME": str(work), "KUBECONFIG": str(work / "admin.conf")}
        self._write()

    # -- the node's files

    def _write(self) -> None:
        """Write the settings of all programs."""
        tokens = [f'{name}-token,{user},{name},"{groups}"' for name, (user, groups) in USERS.items()]
        (self.work / "tokens.csv").write_text("\n".join(tokens) + "\n")
        for name in USERS:
            self._write_access(name)
        run("openssl", "genrsa", "-out", self.work / "sa.key", "2048")
        for path, text in {
            "/etc/containerd/config.toml": CONTAINERD.format(socket=SOCKET, pause=PAUSE, programs=PROGRAMS),
            "/etc/nvidia-container-runtime/config.toml": NVIDIA,
            "/etc/cni/net.d/10-pods.conflist": json.dumps(NETWORK),
            str(self.work / "kubelet.json"): json.dumps(self._kubelet_settings()),
        }.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text)

    def _write_access(self, name: str) -> None:
        cluster = {"name": "c", "cluster": {"server": API, "insecure-skip-tls-verify": True}}
        user = {"name": name, "user": {"token": f"{name}-token"}}
        context = {"name": "c", "context": {"cluster": "c", "user": name}}
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "c"}
        config |= {"clusters": [cluster], "users": [user], "contexts": [context]}
        (self.work / f"{name}.conf").write_text(json.dumps(config))

    def _kubelet_settings(self) -> dict[str, Any]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": f"unix://{SOCKET}",
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},  # only this network namespace reaches it
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": self.cgroup,
            # On a hybrid host kubelet and runc use the controllers of version 1, and runc also makes each container's
            # cgroup of version 2, which the ledger charges.
            "failCgroupV1": False,
            "failSwapOn": False,
            "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%"},
            "syncFrequency": "2s",  # a changed ConfigMap is installed within this time, and not within a minute
            "configMapAndSecretChangeDetectionStrategy": "Watch",
            "shutdownGracePeriod": "0s",
        }

    # -- programs

    def start(self, *images: Path) -> None:
        """Start every program, with images on the node. Returns when the node is ready."""
        etcd = ["--data-dir", str(self.work / "etcd"), "--unsafe-no-fsync", "--log-level", "warn"]
        self.begin("etcd", *etcd)
        keys = self.work / "sa.key"
        self.begin(
            "kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--secure-port=443",
            f"--advertise-address={ADDRESS}", f"--cert-dir={self.work}/certs",
            f"--service-cluster-ip-range={SERVICES_SUBNET}",
            "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={keys}",
            f"--service-account-signing-key-file={keys}", f"--token-auth-file={self.work}/tokens.csv",
            "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged",
            "--kubelet-preferred-address-types=InternalIP", "--profiling=false",
        )  # fmt: skip
        self._await("kube-apiserver", lambda: self.kubectl("get", "--raw", "/readyz", check=False) == "ok")
        access = [f"--{kind}kubeconfig={self.work}/" for kind in ("", "authentication-", "authorization-")]
        local = ["--leader-elect=false", "--bind-address=127.0.0.1"]
        self.begin("kube-scheduler", *(f"{one}kube-scheduler.conf" for one in access), *local)
        self.begin(
            "kube-controller-manager", *(f"{one}kube-controller-manager.conf" for one in access), *local,
            f"--service-account-private-key-file={keys}", f"--root-ca-file={self.work}/certs/apiserver.crt",
            "--use-service-account-credentials",
            "--kube-api-qps=200", "--kube-api-burst=400",  # 20 requests a second by default
        )  # fmt: skip
        self.kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=60s")
        self.begin_containerd()
        for image in images:
            self.load(image)
        self.begin_kubelet()
        self.kubectl("label", "node", NODE, "nvidia.com/gpu.present=true")  # as NVIDIA's feature discovery does
        runtime = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "nvidia"}}
        self.apply(runtime | {"handler": "nvidia"})
        write_driver_specification()

    def begin_containerd(self) -> None:
        """Start containerd. Returns when it answers."""
        log = self.logs / "containerd"
        said = log.stat().st_size if log.exists() else 0
        self.begin("containerd", "--config", "/etc/containerd/config.toml")
        # It answers before: kubelet exits if the part for kubelet is not ready.
        self._await("containerd", lambda: b"containerd successfully booted" in log.read_bytes()[said:])

    def load(self, image: Path) -> None:
        """Load an image into containerd."""
        self.ctr("images", "import", image)
        image.unlink()

    def begin_kubelet(self) -> None:
        """Start kubelet. Returns when the node is ready."""
        self.begin(
            "kubelet", f"--config={self.work}/kubelet.json", f"--kubeconfig={self.work}/kubelet.conf",
            f"--hostname-override={NODE}", f"--node-ip={ADDRESS}", f"--cert-dir={self.work}/kubelet-certs", "--v=2",
            "--vmodule=dra_plugin=4",  # the calls of a DRA driver, with their times
        )  # fmt: skip
        words = ("get", "node", NODE, "--output", f"jsonpath={READY}")
        health = ("get", "--raw", f"/api/v1/nodes/{NODE}/proxy/healthz")  # the node seems ready while a boot is short
        self._await("kubelet", lambda: self.kubectl(*health, check=False) == "ok")
        self._await("kubelet", lambda: self.kubectl(*words, check=False) == "True")
        version = self.get("node", NODE)["status"]["nodeInfo"]["kubeletVersion"]
        assert version.startswith(f"v{VERSION or '1.36'}."), version

    def _await(self, name: str, is_ready: Callable[[], bool]) -> None:
        """Wait until a program is ready. Fails if it has ended."""

        def look() -> bool:
            assert self._running[name].poll() is None, f"{name} has ended: see {self.logs / name}"
            return is_ready()

        eventually(look, 120, f"{name}: see {self.logs / name}")

    def begin(self, name: str, *options: str, program: str = "") -> None:
        """Start a program: that of this name, or another one."""
        with open(self.logs / name, "ab") as log:
            self._running[name] = subprocess.Popen(
                [program or shutil.which(name, path=PATH) or name, *options],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment,
            )

    def end(self, name: str, number: int = signal.SIGTERM) -> None:
        """Stop a program."""
        program = self._running.pop(name)
        program.send_signal(number)
        program.wait(120)

    def restart_services(self) -> None:
        """Restart containerd and kubelet, as systemd does: containers go on."""
        for name in SERVICES:
            self.end(name)
        self.begin_containerd()
        self.begin_kubelet()

    def boot(self) -> None:
        """Kill all processes of the node, and empty the file systems that are in memory. Then start its services."""
        for name in SERVICES:
            self.end(name, signal.SIGKILL)
        for pid in self._shims():
            os.kill(pid, signal.SIGKILL)
        pods = cgroup_root() / self.cgroup.lstrip("/") / "kubepods"
        (pods / "cgroup.kill").write_text("1")
        eventually(lambda: "populated 0" in (pods / "cgroup.events").read_text(), 30, "the end of all pods")
        for place in mounts_below("/run", "/var/lib"):
            run("umount", "--lazy", place)
        for entry in Path("/run").iterdir():
            if entry.name != "fgpu-sim":  # the driver goes on
                run("rm", "-r", entry)
        run("umount", "/sys/fs/bpf")
        run("mount", "-t", "bpf", "bpf", "/sys/fs/bpf")
        self.begin_containerd()
        self.begin_kubelet()

    def _shims(self) -> list[int]:
        """Return the pids of containerd's shims, which outlive it."""
        own = cgroup_root() / self.cgroup.lstrip("/") / "daemons/cgroup.procs"
        pids = [int(line) for line in own.read_text().split()]
        return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().startswith("containerd-shim")]

    def stop(self) -> None:
        """Stop every program, the last one first. Containers end with the tests' world."""
        self.memory.end()
        for name in reversed(list(self._running)):
            self.end(name)

    # -- commands

    def call(self, *words: str | Path, check: bool = True, seconds: float = 180, given: str | None = None) -> str:
        """Run a command on the node, and return its output. `check`: it must succeed."""
        command = [str(word) for word in words]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds, input=given, env=self._environment
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout + ("" if check else done.stderr)

    def kubectl(self, *words: str, **more: Any) -> str:
        """Run kubectl as an administrator."""
        return self.call("kubectl", *words, **more)

    def helm(self, *words: str | Path, **more: Any) -> str:
        """Run helm as an administrator."""
        return self.call("helm", *words, **more)

    def ctr(self, *words: str | Path, **more: Any) -> str:
        """Run containerd's client for the images and containers of kubelet."""
        return self.call("ctr", "--namespace", "k8s.io", *words, **more)

    def fgpu(self, *words: str, **more: Any) -> str:
        """Run `fgpu` in the agent's pod."""
        return self.kubectl("--namespace", "fgpu-system", "exec", "daemonset/fgpu-agent", "--", "fgpu", *words, **more)

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Apply objects."""
        self.kubectl("apply", "--filename", "-", given=yaml.safe_dump_all(objects))

    def get(self, *words: str) -> Any:
        """Return an object or a list of objects."""
        return json.loads(self.kubectl("get", *words, "--output", "json"))

    def pods_of_fgpu(self) -> dict[str, str]:
        """Return the image of each pod of the chart."""
        pods = self.get("pod", "--namespace", "fgpu-system")["items"]
        return {pod["metadata"]["name"]: pod["spec"]["containers"][0]["image"] for pod in pods}
