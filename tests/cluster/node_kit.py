"""A node's namespaces, the files that NVIDIA's tools write there, its processes' memory. Imports nothing of fgpu."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from tests import world
from tests.support.host import SIM, cgroup_root

ADDRESS, SUBNET, BRIDGE = "10.88.0.1", "10.88.0.0/16", "cni0"
SERVICES_SUBNET, API_ADDRESS = "10.96.0.0/16", "10.96.0.1"  # the API server has the first address of services
OWN_FOLDERS = ("/var/lib", "/var/log")
LIBRARIES = "/usr/lib/x86_64-linux-gnu"
DRIVER = {f"{LIBRARIES}/{name}": SIM / "lib" / name for name in ("libcuda.so.1", "libnvidia-ml.so.1")}
DRIVER |= {"/usr/bin/nvidia-smi": SIM / "nvidia-smi"}


def become_a_node(folder: Path) -> str:
    """Give the calling thread the namespaces of a node. Return the path of the node's cgroup.

    Its cgroup namespace is the host's, as on a node. The tests' world has its own copies of the driver and the shim.
    """
    world.as_host()
    world.call("unshare", world.CLONE_NEWNET)
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    (path,) = [line.removeprefix("0::") for line in lines if line.startswith("0::")]
    own = cgroup_root() / path.lstrip("/") / "daemons"  # a cgroup with processes could not share out controllers
    own.mkdir()
    (own / "cgroup.procs").write_text("0")
    for hierarchy in world.hierarchies_of_version_1():  # kubelet requires its own folder in each
        (hierarchy / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
    for place in mounts_below("/run", "/var/lib"):  # the world's, which would be hidden
        run("umount", "--lazy", place)
    for place in OWN_FOLDERS:
        (folder / place.lstrip("/")).mkdir(parents=True)
        run("mount", "--bind", folder / place.lstrip("/"), place)
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    run("mount", "--make-rshared", "/")  # as systemd does: a mount on the node appears in pods that ask for it
    for name in ("lib/kubelet", "lib/containerd", "log/pods", "log/containers"):
        Path("/var", name).mkdir()
    for name in ("fgpu-sim", "containerd"):
        Path("/run", name).mkdir()
    run("ip", "link", "set", "lo", "up")
    # A bridge without an address of its own takes one of its pods', and packets of other pods are lost when that ends.
    run("ip", "link", "add", "name", BRIDGE, "address", "0a:58:0a:58:00:01", "type", "bridge")
    run("ip", "address", "add", f"{ADDRESS}/16", "dev", BRIDGE)
    # Pods reach the API server at the address of its service. The server listens there, at the service's port: there is
    # no kube-proxy.
    run("ip", "address", "add", f"{API_ADDRESS}/32", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    return path


def mounts_below(*folders: str) -> list[str]:
    """Return what is mounted in folders, the last mount first."""
    places = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return [place for place in reversed(places) if place.startswith(tuple(f"{folder}/" for folder in folders))]


def run(*command: str | Path) -> None:
    """Run a command, which must succeed."""
    subprocess.run([str(word) for word in command], check=True, timeout=60)


def write_driver_specification() -> None:
    """Write the file that `nvidia-ctk cdi generate` would write for this driver, which has no device nodes."""
    shown = subprocess.run(
        [SIM / "nvidia-smi", "-L"],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
        env={"LD_LIBRARY_PATH": str(SIM / "lib")},
    ).stdout
    (uuid,) = re.findall(r"UUID: (GPU-[0-9a-f-]+)", shown)
    mounts = [
        {"hostPath": str(path), "containerPath": place, "options": ["ro", "nosuid", "nodev", "rbind"]}
        for place, path in DRIVER.items()
    ]
    device = {"mounts": [{"hostPath": "/run/fgpu-sim", "containerPath": "/run/fgpu-sim", "options": ["rbind", "rw"]}]}
    devices = [{"name": name, "containerEdits": device} for name in ("0", uuid, "all")]
    edits = {"mounts": mounts, "env": ["NVIDIA_VISIBLE_DEVICES=void"]}
    file = {"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": devices, "containerEdits": edits}
    Path("/etc/cdi").mkdir(exist_ok=True)
    Path("/etc/cdi/nvidia.json").write_text(json.dumps(file))


class Memory:
    """The largest sum of the memory of all processes in a cgroup and below it, without the page cache."""

    def __init__(self, cgroup: Path) -> None:
        self.peak_bytes = 0
        self._cgroup, self._ended = cgroup, threading.Event()
        self._thread = threading.Thread(target=self._measure, daemon=True)
        self._thread.start()

    def _measure(self) -> None:
        while not self._ended.wait(2):
            self.peak_bytes = max(self.peak_bytes, sum(map(_proportional_bytes, self._pids())))

    def _pids(self) -> Iterator[int]:
        for folder, _, _ in os.walk(self._cgroup):
            with contextlib.suppress(OSError):
                yield from map(int, Path(folder, "cgroup.procs").read_text().split())

    def end(self) -> None:
        """Stop measuring."""
        self._ended.set()
        self._thread.join()


def _proportional_bytes(pid: int) -> int:
    """Return the memory of a process, with its part of each shared page."""
    with contextlib.suppress(OSError):  # it has ended
        found = re.search(r"^Pss: +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        return int(found[1]) << 10 if found else 0
    return 0
