"""Measure the agent's processor time for pods with requests of schedulers, with the adapters on and off.

A containerd of this benchmark runs --pods pods (default: 100) of one container each. The pods have, in turn, the
annotations of KAI, HAMi and Volcano, and claims of NVIDIA's DRA driver in kubelet's files. A policy limits the pods, so
that the agent reads each request. Prints `adapters_WHICH_PODS` for WHICH `on` and `off`, and no or all pods: the
processor time of agent and gatekeeper in percent of one processor while the pods are idle. Each figure is the median of
--rounds agents; agents with and without adapters follow one another. Writes build/bench/adapters.json. Exits with 1 if
a bar is missed. Starts and stops the agent, with the driver at --driver-root.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.lib.service import BenchError, agent, end_in_order
from bench.lib.tenants import ask, cpu_ms, record, service_pids
from tests.support.containers.containerd import Containerd, Pod
from tests.support.host import SHIM
from tests.support.kubernetes.nvidia_node import NvidiaNode

BAR_PERCENT = 0.5  # of one processor, for the agent with adapters and all pods
SETTLE_SECONDS = 15  # after the agent's start: the engines have answered
MIB = 100  # of each request
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: pods}
spec: {selector: {namespace: dev}, memory: {limit: 50MiB, max: 1GiB}}
"""
# The requests of a pod: its labels, and its annotations. The last kind of pod has a claim.
REQUESTS: Sequence[tuple[dict[str, str], dict[str, str]]] = (
    ({"kai.scheduler/queue": "team"}, {"gpu-memory": f"{MIB}"}),
    ({}, {"hami.io/vgpu-devices-allocated": f"GPU-1,NVIDIA,{MIB},0:;"}),
    ({}, {"volcano.sh/vgpu-ids-new": f"GPU-1,NVIDIA,{MIB},0:;"}),
    ({}, {}),
)


def start_pods(containerd: Containerd, node: NvidiaNode, count: int) -> list[Pod]:
    """Start pods with a container each."""
    pods = []
    for number in range(count):
        pod = containerd.run(f"pod-{number}", *REQUESTS[number % len(REQUESTS)])
        if number % len(REQUESTS) == len(REQUESTS) - 1:
            claim = f"{number:08x}-9a64-4b44-8a2b-6c1f0f3d2a10"
            node.use(claim, pod.uid)
            node.prepare(claim, f"{MIB}Mi")
        pod.container("main")
        pods.append(pod)
    return pods


def check(pods: Sequence[Pod], is_on: bool) -> None:
    """Check that each pod has the limit of its request, or of the policy if the adapters are off. Raises BenchError."""
    limits = {tenant["path"]: tenant["devices"][0]["limit_bytes"] >> 20 for tenant in ask(verb="snapshot")["tenants"]}
    found = {limits.get(pod.path) for pod in pods}
    if pods and found != {MIB if is_on else 50}:
        raise BenchError(f"the pods have limits of {found} MiB with adapters {'on' if is_on else 'off'}")


def idle_percent(seconds: float) -> float:
    """Return the processor time of agent and gatekeeper, in percent of one processor."""
    pids, begun = service_pids().values(), time.monotonic()
    before = sum(map(cpu_ms, pids))
    time.sleep(seconds)
    return 100 * (sum(map(cpu_ms, pids)) - before) / (1e3 * (time.monotonic() - begun))


def measure(config: Path, options: list[str], pods: Sequence[Pod], is_on: bool, seconds: float) -> float:
    """Run an agent with or without adapters, and return its processor time in percent of one processor."""
    said = json.loads(config.read_text())
    said.pop("adapters", None)
    config.write_text(json.dumps(said if is_on else said | {"adapters": []}))
    with agent(options):
        time.sleep(SETTLE_SECONDS)
        check(pods, is_on)
        return idle_percent(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--pods", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30)
    given = parser.parse_args()
    end_in_order()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for folder in ("containerd", "policy.d", "cdi"):
            (work / folder).mkdir()
        (work / "policy.d/pods.yaml").write_text(POLICY)
        socket, config = work / "cri.sock", work / "agent.yaml"
        said = {"overcommit": "allow", "engines": [f"cri:{socket}"], "cdiFolder": f"{work}/cdi"}
        config.write_text(json.dumps(said | {"kubeletFolder": f"{work}/kubelet"}))
        options = ["--driver-root", given.driver_root, "--listen", "127.0.0.1:0", "--shim", str(SHIM)]
        options += ["--config", str(config), "--policies", str(work / "policy.d")]
        containerd, found = Containerd(work / "containerd", socket, {}), dict[str, list[float]]()
        try:
            pods: list[Pod] = []
            for count in (0, given.pods):
                with agent(options):
                    node = NvidiaNode(work / "kubelet", [device["uuid"] for device in ask(verb="snapshot")["devices"]])
                    pods = start_pods(containerd, node, count)
                for is_on in (True, False) * given.rounds:
                    name = f"adapters_{'on' if is_on else 'off'}_{count}"
                    found.setdefault(name, []).append(measure(config, options, pods, is_on, given.seconds))
                    print(f"{name} {found[name][-1]:.3f} %", flush=True)
        except BenchError as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            containerd.close()
    medians = {name: statistics.median(values) for name, values in found.items()}
    record("adapters", {name: (value, "%") for name, value in medians.items()})
    return int(medians[f"adapters_on_{given.pods}"] > BAR_PERCENT)


if __name__ == "__main__":
    sys.exit(main())
