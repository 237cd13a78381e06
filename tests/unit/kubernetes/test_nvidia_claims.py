"""Tests of claims of NVIDIA's DRA driver: what a pod gets, and that an unknown claim gets nothing."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.check import Check
from fgpu_ebpf.kubernetes import nvidia_claims
from fgpu_ebpf.kubernetes.nvidia_claims import Claim, NvidiaClaims
from fgpu_ebpf.policy.share_name import parse
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.explain import explain
from fgpu_ebpf.tenancy.gone_tenants import GoneTenants
from fgpu_ebpf.tenancy.manager import Manager
from fgpu_ebpf.tenancy.overrides import Overrides
from fgpu_ebpf.tenancy.pinned_levels import take_up
from fgpu_ebpf.workloads.cgroup_names import Engine
from fgpu_ebpf.workloads.cgroups import Workloads
from fgpu_ebpf.workloads.workload import Booking, Subject, Workload
from tests.support.kubernetes.nvidia_node import DRIVER, NvidiaNode
from tests.unit.policy_kit import GIB, Gpu, policies
from tests.unit.tenancy.books_kit import Books, PinnedBooks

FILES = Path(__file__).parent / "nvidia"
POD = "139cdb46-f989-4f17-9561-ca10cfb509a6"
OTHER_POD = "239cdb46-f989-4f17-9561-ca10cfb509a7"
A, B = "0b8f5b1e-9a64-4b44-8a2b-6c1f0f3d2a10", "1c9f5b1e-9a64-4b44-8a2b-6c1f0f3d2a11"
C = "2d0f5b1e-9a64-4b44-8a2b-6c1f0f3d2a12"
GPUS = ["GPU-4f1d0a52-6c3b-4b0e-9d57-2f0c5a3b7e11", "GPU-5f1d0a52-6c3b-4b0e-9d57-2f0c5a3b7e12"]
PATH, OTHER_PATH = f"/kubepods/pod{POD}", f"/kubepods/pod{OTHER_POD}"
CONTAINER = f"{PATH}/{'a' * 64}"
POLICY = "{selector: {cgroup: 'kubepods/**'}, memory: {limit: 8GiB, max: 16GiB}}"


class Names:
    """An engine that has not answered. Whatever the user that runs the tests, the folders count as root's."""

    def named(self, workload: Workload) -> Workload:
        is_pod = workload.container is None
        id_ = workload.pod_uid if is_pod else workload.container
        return replace(workload, subject=Subject(id_, Engine.CRI, is_pod)) if id_ else workload

    def missing(self, _: Workload) -> str:
        return ""


@pytest.fixture
def node(tmp_path: Path) -> NvidiaNode:
    return NvidiaNode(tmp_path / "kubelet", GPUS)


class Agent:
    """The part of an agent that decides, with two devices. `books` outlives an agent, as the kernel does."""

    def __init__(self, tmp_path: Path, books: Books, *specs: str) -> None:
        root, devices = tmp_path / "cgroups", [Gpu(0, GPUS[0], usable_bytes=40 * GIB), Gpu(1, GPUS[1])]
        for path in (CONTAINER, f"{OTHER_PATH}/{'b' * 64}", "/system.slice"):
            (root / path[1:]).mkdir(parents=True, exist_ok=True)
        self.failed_checks: dict[str, Check] = {}
        self.claims = NvidiaClaims(tmp_path / "kubelet", Names(), self.failed_checks)
        self.books = books
        books.orphans = SimpleNamespace(of_level=lambda _: [])
        workloads = Workloads(root, self.claims)
        self.enforcer = Enforcer(books, workloads, devices, overcommit=False)
        overrides, gone = Overrides(tmp_path / "overrides.json"), GoneTenants(books)
        self.manager = Manager(workloads, self.enforcer, overrides, devices, EventLog(), gone)
        self.enforcer.answered.forget_earlier()
        self.manager.policies = policies(*specs)
        take_up(PinnedBooks(books), self.manager, gone)

    def round(self) -> None:
        """Do what the agent's loop does once a second, and when the claims wake the loop."""
        self.claims.look()
        self.manager.consider(self.claims.take())

    def new_pod(self) -> str:
        """Make the cgroup of a pod that has no container yet, and return its path."""
        path = f"/kubepods/pod{OTHER_POD[:-1]}0"
        (self.manager.workloads.root / path[1:]).mkdir()
        return path

    def limits(self, path: str) -> dict[int, float | None] | None:
        """Return the limits in the kernel in GiB; None: there is no limit."""
        tenant = self.enforcer.at(path)
        found = tenant and self.books.limits[tenant.cgroup][0]
        return found and {index: None if size == abi.NO_LIMIT else size / GIB for index, size in found.items()}

    def explained(self, path: str) -> list[str]:
        lines: list[str] = explain(path, self.manager, ExplainedBooks(self.books))["lines"]
        return [line.strip() for line in lines]


class ExplainedBooks:
    """A ledger that explain() can read."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self.opens = SimpleNamespace(of=lambda _: SimpleNamespace(denied=0))
        self.times = SimpleNamespace(turns=dict)

    def usage(self, cgroup: int, devices: list[int]) -> list[Any]:
        limits = self._books.limits[cgroup][0]
        return [SimpleNamespace(limit=limits[index], used=0, parked=0, refused=0) for index in devices]

    def processes(self) -> dict[int, Any]:
        return {}

    def counters(self) -> dict[Any, int]:
        return {}


@pytest.fixture
def agent(tmp_path: Path, node: NvidiaNode) -> Agent:
    return Agent(tmp_path, Books())


# -- the files, as their own programs write them ---------------------------------------------------------------------


def test_kubelet_s_own_file_names_the_pods_of_a_claim() -> None:
    """The code of kubelet 1.36.3 wrote it: two claims of NVIDIA's driver, one not prepared yet, and one of another."""
    found = {POD: [Claim(A, "default/train-gpu"), Claim(C, "default/early")]}
    assert nvidia_claims.of_pods((FILES / "dra_manager_state").read_bytes()) == found


def test_a_kubelet_without_claims_has_a_valid_file() -> None:
    assert nvidia_claims.of_pods((FILES / "empty_state").read_bytes()) == {}


def test_the_driver_s_own_file_has_what_each_prepared_claim_has_consumed() -> None:
    """Its code wrote it (commit 95932046 of kubernetes-sigs/dra-driver-nvidia-gpu).

    One claim has 4Gi, one has a whole device, and one is not prepared yet.
    """
    assert nvidia_claims.booked((FILES / "checkpoint.json").read_bytes()) == {A: {GPUS[0]: 4 * GIB}, B: {}}


def test_a_driver_that_has_prepared_nothing_has_a_valid_file() -> None:
    assert nvidia_claims.booked((FILES / "empty_checkpoint.json").read_bytes()) == {}


def claim_with(result: dict[str, Any], device: dict[str, Any]) -> bytes:
    """Return the driver's file with one claim. `result` and `device` change the only allocation and its device."""
    result = {"request": "gpu", "driver": DRIVER, "pool": "n", "device": "gpu-0"} | result
    device = device or {"gpu": {"info": {"uuid": GPUS[0]}, "device": {"DeviceName": "gpu-0"}}}
    status = {"allocation": {"devices": {"results": [result]}}}
    claim = {"status": status, "preparedDevices": [{"devices": [device]}], "checkpointState": "PrepareCompleted"}
    return json.dumps({"v2": {"preparedClaims": {A: claim}}}).encode()


@pytest.mark.parametrize(
    ("result", "found"),
    [
        ({"consumedCapacity": {"memory": "4Gi"}}, {GPUS[0]: 4 * GIB}),
        ({"consumedCapacity": {"memory": "1"}}, {GPUS[0]: 1}),
        ({"consumedCapacity": {"memory": "500m"}}, {GPUS[0]: 1}),
        ({"consumedCapacity": {"memory": "0", "shares": "1"}}, {}),
        ({"consumedCapacity": {"shares": "1"}}, {}),
        ({}, {}),
        ({"device": "gpu-9"}, {}),
        ({"consumedCapacity": {"memory": "4Gi"}, "adminAccess": True}, {}),
        ({"consumedCapacity": {"memory": "4Gi"}, "driver": "gpu.fgpu.dev", "device": "x"}, {}),
    ],
)
def test_only_memory_that_the_scheduler_counts_is_booked(result: dict[str, Any], found: dict[str, int]) -> None:
    assert nvidia_claims.booked(claim_with(result, {})) == {A: found}


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param("[" * 100_000 + "]" * 100_000, id="deep"),
        pytest.param("[" + "{}," * 500_000 + "{}]", id="long"),
        pytest.param('{"text": "' + '\\\\\\"]}' * 1000 + '"}', id="brackets in a string"),
    ],
)
def test_parameters_that_a_user_has_written_into_a_claim_cost_nothing(parameters: str) -> None:
    """The API server copies them from the claim to its allocation, and the driver copies the allocation."""
    found = json.loads(claim_with({"consumedCapacity": {"memory": "4Gi"}}, {}))
    devices = found["v2"]["preparedClaims"][A]["status"]["allocation"]["devices"]
    devices["config"] = [{"source": "FromClaim", "opaque": {"driver": DRIVER, "parameters": "MARK"}}]
    text = json.dumps(found).replace('"MARK"', parameters).encode()
    tracemalloc.start()
    try:
        assert nvidia_claims.booked(text) == {A: {GPUS[0]: 4 * GIB}}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_requests_of_a_claim_are_added_up_on_each_device() -> None:
    """Two requests have parts of one device, one has a device of its own, one has a device only to watch it."""
    sizes = [("gpu-0", {"consumedCapacity": {"memory": size}}) for size in ("4Gi", "512Mi")]
    found = json.loads(claim_with({}, {}))
    claim = found["v2"]["preparedClaims"][A]
    claim["status"]["allocation"]["devices"]["results"] = [
        {"request": f"request-{number}", "driver": DRIVER, "pool": "n", "device": device} | more
        for number, (device, more) in enumerate([*sizes, ("gpu-1", {}), ("gpu-0", {"adminAccess": True})])
    ]
    claim["preparedDevices"] = [
        {"devices": [{"gpu": {"info": {"uuid": GPUS[number]}, "device": {"DeviceName": f"gpu-{number}"}}}]}
        for number in (0, 0, 1, 0)
    ]
    assert nvidia_claims.booked(json.dumps(found).encode()) == {A: {GPUS[0]: 4.5 * GIB}}


@pytest.mark.parametrize("kind", ["mig", "vfio", "vgpu"])
def test_a_device_of_another_kind_is_not_booked(kind: str) -> None:
    device = {"gpu": None, kind: {"concrete": {}, "device": {"DeviceName": "gpu-0-part"}}}
    result = {"device": "gpu-0-part", "consumedCapacity": {"memory": "4Gi"}}
    assert nvidia_claims.booked(claim_with(result, device)) == {A: {}}


def test_a_claim_of_an_unknown_kind_of_device_has_no_known_size() -> None:
    device = {"later": {"device": {"DeviceName": "gpu-0"}}}
    assert nvidia_claims.booked(claim_with({"consumedCapacity": {"memory": "4Gi"}}, device)) == {A: None}
    assert nvidia_claims.booked(claim_with({}, device)) == {A: {}}


@pytest.mark.parametrize(
    "result",
    [
        {"consumedCapacity": {"memory": "much"}}, {"consumedCapacity": {"memory": "-1"}}, {"consumedCapacity": "4Gi"},
        {"device": "gpu-9", "consumedCapacity": {"memory": "4Gi"}},
    ],
)  # fmt: skip
def test_a_claim_in_an_unknown_form_has_no_known_size(result: dict[str, Any]) -> None:
    assert nvidia_claims.booked(claim_with(result, {})) == {A: None}


@pytest.mark.parametrize(
    ("version", "claim", "found"),
    [
        ("v1", [{"devices": []}], {}),
        ("v1", {"preparedDevices": []}, {}),
        ("v1", {"status": {}, "preparedDevices": []}, {}),
        ("v2", [{"devices": []}], None),
        ("v2", {"status": {}, "preparedDevices": []}, None),
    ],
)
def test_a_claim_of_a_driver_that_divides_no_device_is_not_booked(
    version: str, claim: object, found: dict[str, int] | None
) -> None:
    assert nvidia_claims.booked(json.dumps({version: {"preparedClaims": {A: claim}}}).encode()) == {A: found}


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"Data": "{}"}', b'{"Data": "{\\"Entries\\": [{}]}"}'])
def test_an_unknown_form_of_kubelet_s_file_is_an_error(text: bytes) -> None:
    with pytest.raises(ValueError, match="has an unknown form"):
        nvidia_claims.of_pods(text)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"v3": {}}', b'{"v2": 1}'])
def test_an_unknown_form_of_the_driver_s_file_is_an_error(text: bytes) -> None:
    with pytest.raises(ValueError, match="has an unknown form"):
        nvidia_claims.booked(text)


# -- the limit of a pod ----------------------------------------------------------------------------------------------


def test_a_pod_gets_what_its_claim_has_consumed_without_a_policy(agent: Agent, node: NvidiaNode) -> None:
    """The other pod and the other device have no limit by the claim."""
    node.use(A, POD)
    node.prepare(A, "4Gi")
    agent.manager.consider([PATH, CONTAINER, OTHER_PATH])
    assert agent.limits(PATH) == {0: 4, 1: None}
    assert agent.limits(CONTAINER) is agent.limits(OTHER_PATH) is None  # the pod's limit holds in it
    said = agent.explained(CONTAINER)
    assert f"note: claim dev/gpu-0b8f of {DRIVER}: 4GiB of device 0" in said
    assert any(line.endswith("(claim)") for line in said)


def test_a_pod_folder_that_is_older_than_its_claim_gets_the_limit_with_its_first_container(
    agent: Agent, node: NvidiaNode
) -> None:
    agent.manager.consider([PATH])
    assert agent.limits(PATH) is None
    node.use(A, POD)
    agent.round()
    assert agent.limits(PATH) == {0: 0, 1: 0}  # kubelet has it, the driver has not answered
    node.prepare(A, "4Gi", state="PrepareStarted")
    agent.round()
    assert agent.limits(PATH) == {0: 0, 1: 0}
    node.prepare(A, "4Gi")
    agent.manager.consider([CONTAINER])
    agent.manager.consider(agent.claims.take())
    assert agent.limits(PATH) == {0: 4, 1: None}


def test_a_claim_that_the_driver_does_not_have_gives_nothing_and_explain_says_why(
    agent: Agent, node: NvidiaNode
) -> None:
    node.use(A, POD)
    agent.manager.consider([PATH])
    assert agent.limits(PATH) == {0: 0, 1: 0}
    why = f"{node.claims_file} does not have the claim as prepared"
    text = f"note: the size of dev/gpu-0b8f of {DRIVER} is not known: {why}"
    assert text in agent.explained(PATH)


def test_a_claim_in_an_unknown_form_gives_nothing_and_is_a_failed_check(agent: Agent, node: NvidiaNode) -> None:
    node.use(A, POD)
    node.prepare(A, "much")
    agent.manager.consider([PATH])
    agent.round()
    assert agent.limits(PATH) == {0: 0, 1: 0}
    why = f"{node.claims_file} has the claim in an unknown form"
    text = f"note: the size of dev/gpu-0b8f of {DRIVER} is not known: {why}"
    assert text in agent.explained(PATH)
    assert "unknown form of dev/gpu-0b8f" in agent.failed_checks[nvidia_claims.NAME].found
    node.prepare(A, "4Gi")
    agent.round()
    assert (agent.limits(PATH), agent.failed_checks) == ({0: 4, 1: None}, {})


def test_claims_of_a_pod_are_added_up_on_each_device(agent: Agent, node: NvidiaNode) -> None:
    node.use(A, POD)
    node.use(B, POD)
    node.prepare(A, "4Gi", "2Gi")
    node.prepare(B, "1536Mi")
    agent.manager.consider([PATH])
    assert agent.limits(PATH) == {0: 5.5, 1: 2}


def test_a_pod_gets_nothing_until_all_of_its_claims_are_known(agent: Agent, node: NvidiaNode) -> None:
    """The driver prepares one claim after the other. The second is a whole device, which has no limit."""
    node.use(A, POD)
    node.use(B, POD)
    node.prepare(A, "4Gi")
    agent.manager.consider([PATH])
    assert agent.limits(PATH) == {0: 0, 1: 0}
    why = f"{node.claims_file} does not have the claim as prepared"
    text = f"note: the size of dev/gpu-1c9f of {DRIVER} is not known: {why}"
    assert text in agent.explained(PATH)
    node.prepare(B, "0", None)
    agent.round()
    assert agent.limits(PATH) == {0: 4, 1: None}
    assert f"note: claims dev/gpu-0b8f, dev/gpu-1c9f of {DRIVER}: 4GiB of device 0" in agent.explained(PATH)


def test_a_whole_device_is_no_limit(agent: Agent, node: NvidiaNode) -> None:
    node.use(A, POD)
    node.prepare(A, None)
    agent.manager.consider([PATH])
    assert agent.limits(PATH) is None


def test_a_claim_of_more_than_tenants_can_get_is_the_device(agent: Agent, node: NvidiaNode) -> None:
    """The driver publishes all memory of the device, including what it needs itself."""
    node.use(A, POD)
    node.prepare(A, "41Gi")
    agent.manager.consider([PATH])
    assert agent.limits(PATH) == {0: 40, 1: None}


def test_the_last_claim_of_a_full_device_gets_what_is_left_and_more_when_there_is_room(
    agent: Agent, node: NvidiaNode
) -> None:
    """The scheduler counts 41 GiB, of which tenants can get 40."""
    for claim, pod, size in ((A, POD, "24Gi"), (B, OTHER_POD, "17Gi")):
        node.use(claim, pod)
        node.prepare(claim, size)
    agent.manager.consider([PATH, OTHER_PATH])
    for path in (PATH, OTHER_PATH):
        tenant = agent.enforcer.at(path)
        assert tenant
        agent.enforcer.use(tenant.cgroup)
    assert (agent.limits(PATH), agent.limits(OTHER_PATH)) == ({0: 24, 1: None}, {0: 16, 1: None})
    lacks = f"note: 16GiB of device 0 are in force: 17GiB for pod{OTHER_POD} do not fit"
    assert any(lacks in line for line in agent.explained(OTHER_PATH)), agent.explained(OTHER_PATH)
    node.end(A)
    agent.round()
    assert agent.limits(OTHER_PATH) == {0: 17, 1: None}
    assert not any("in force" in line for line in agent.explained(OTHER_PATH))


def test_a_claim_that_got_a_part_gets_more_before_all_of_it_fits(agent: Agent, node: NvidiaNode) -> None:
    """The scheduler can count less than the agent, for example a claim of two pods once."""
    third = agent.new_pod()
    for claim, pod, size in ((A, POD, "20Gi"), (B, OTHER_POD, "19.5Gi"), (C, third.rpartition("pod")[2], "21Gi")):
        node.use(claim, pod)
        node.prepare(claim, size)
    agent.manager.consider([PATH, OTHER_PATH, third])
    for path in (PATH, OTHER_PATH, third):
        tenant = agent.enforcer.at(path)
        assert tenant
        agent.enforcer.use(tenant.cgroup)
    assert agent.limits(third) == {0: 0.5, 1: None}
    node.end(A)
    agent.round()
    assert agent.limits(third) == {0: 20.5, 1: None}
    node.end(B)
    agent.round()
    assert agent.limits(third) == {0: 21, 1: None}


def test_each_pod_of_a_shared_claim_has_its_limit(agent: Agent, node: NvidiaNode) -> None:
    node.use(A, POD)
    node.prepare(A, "4Gi")
    agent.manager.consider([PATH])
    node.use(A, OTHER_POD)
    agent.manager.consider([OTHER_PATH])
    assert agent.limits(PATH) == agent.limits(OTHER_PATH) == {0: 4, 1: None}
    node.leave(A, POD)
    agent.round()
    assert (agent.limits(PATH), agent.limits(OTHER_PATH)) == (None, {0: 4, 1: None})


def test_the_limit_ends_with_the_claim(agent: Agent, node: NvidiaNode) -> None:
    node.use(A, POD)
    node.prepare(A, "4Gi")
    agent.manager.consider([PATH])
    node.end(A)
    agent.round()
    assert agent.limits(PATH) is None


# -- with policies, and by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "spec", "limits", "note"),
    [
        ("12Gi", POLICY, {0: 12, 1: 8}, ""),
        ("4Gi", POLICY, {0: 4, 1: 8}, ""),
        ("20Gi", POLICY, {0: 16, 1: 8}, "note: the policy allows 16GiB of device 0"),
        ("4Gi", "{selector: {cgroup: 'kubepods/**'}, compute: {limit: 50%}}", {0: 4, 1: None}, ""),
        ("4Gi", "{selector: {cgroup: 'system.slice/**'}, memory: {limit: 1GiB}}", {0: 4, 1: None}, ""),
    ],
)
def test_a_policy_bounds_a_claim(
    tmp_path: Path, node: NvidiaNode, size: str, spec: str, limits: dict[int, float], note: str
) -> None:
    node.use(A, POD)
    node.prepare(A, size)
    agent = Agent(tmp_path, Books(), spec)
    assert agent.limits(PATH) == limits
    assert agent.limits(CONTAINER) == (limits if "kubepods" in spec else None)
    assert note in ["", *agent.explained(PATH)]


def test_a_policy_s_mode_and_devices_apply_to_a_claim(tmp_path: Path, node: NvidiaNode) -> None:
    node.use(A, POD)
    node.prepare(A, "4Gi", "2Gi")
    agent = Agent(tmp_path, Books(), "{selector: {cgroup: 'kubepods/**'}, mode: observe, devices: [1]}")
    assert agent.limits(PATH) == {1: 2}  # the kernel refuses a device without a value
    tenant = agent.enforcer.at(PATH)
    assert tenant
    assert tenant.observe


def test_an_unknown_claim_gets_nothing_from_a_policy_either(tmp_path: Path, node: NvidiaNode) -> None:
    node.use(A, POD)
    agent = Agent(tmp_path, Books(), POLICY)
    assert agent.limits(PATH) == agent.limits(CONTAINER) == {0: 0, 1: 0}
    assert agent.limits(OTHER_PATH) == {0: 8, 1: 8}


@pytest.mark.parametrize(("share", "limit"), [("2gib", 2), ("6gib", 4)])
def test_a_share_of_a_container_does_not_raise_the_limit_of_the_claim(
    tmp_path: Path, node: NvidiaNode, share: str, limit: int
) -> None:
    """The other device has no claim: there the policy and its `max` apply."""
    node.use(A, POD)
    node.prepare(A, "4Gi")
    agent = Agent(tmp_path, Books(), POLICY)
    agent.manager.share(CONTAINER, parse(share))
    agent.manager.consider([PATH])
    assert agent.limits(PATH) == {0: 4, 1: 8}
    assert agent.limits(CONTAINER) == {0: limit, 1: int(share[0])}


def test_a_share_gets_nothing_from_an_unknown_claim(tmp_path: Path, node: NvidiaNode) -> None:
    node.use(A, POD)
    agent = Agent(tmp_path, Books(), POLICY)
    agent.manager.share(CONTAINER, parse("2gib"))
    agent.manager.consider([PATH])
    assert agent.limits(PATH) == agent.limits(CONTAINER) == {0: 0, 1: 0}


def test_a_limit_by_hand_has_precedence_and_compute_time_by_hand_keeps_the_claim(
    agent: Agent, node: NvidiaNode
) -> None:
    node.use(A, POD)
    node.prepare(A, "4Gi")
    agent.manager.set(PATH, {"weight": 50})
    assert agent.limits(PATH) == {0: 4, 1: None}
    agent.manager.set(PATH, {"memory_bytes": 6 * GIB})
    assert agent.limits(PATH) == {0: 6, 1: 6}
    agent.manager.unset(PATH)
    assert agent.limits(PATH) == {0: 4, 1: None}


# -- faults and restarts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"{", None])
def test_pods_keep_their_limits_and_new_pods_get_nothing_while_kubelet_s_file_is_unknown(
    agent: Agent, node: NvidiaNode, content: bytes | None
) -> None:
    node.use(A, POD)
    node.prepare(A, "4Gi")
    agent.manager.consider([PATH])
    node.pods_file.write_bytes(content) if content else node.pods_file.unlink()
    agent.round()
    new = agent.new_pod()
    agent.manager.consider([PATH, OTHER_PATH, new])
    assert (agent.limits(PATH), agent.limits(new)) == ({0: 4, 1: None}, {0: 0, 1: 0})
    assert agent.limits(OTHER_PATH) is None  # it had a container, and so all of its claims, when the file was known
    assert str(node.pods_file) in agent.failed_checks[nvidia_claims.NAME].found
    node.use(B, "another")
    agent.round()
    assert (agent.limits(PATH), agent.limits(new)) == ({0: 4, 1: None}, None)
    assert not agent.failed_checks


def test_a_pod_without_a_container_may_get_claims_while_kubelet_s_file_is_unknown(
    agent: Agent, node: NvidiaNode
) -> None:
    """kubelet makes the pod's folder before it writes the claims of the pod."""
    new = agent.new_pod()
    agent.manager.consider([new])
    assert agent.limits(new) is None
    node.pods_file.unlink()
    agent.round()
    assert agent.limits(new) == {0: 0, 1: 0}


@pytest.mark.parametrize("content", [b"{", None, b'{"v2": {"preparedClaims": {}}}'])
def test_claims_stay_known_while_the_driver_s_file_is_unknown(
    agent: Agent, node: NvidiaNode, content: bytes | None
) -> None:
    node.use(A, POD)
    node.prepare(A, "4Gi")
    agent.manager.consider([PATH])
    node.use(B, OTHER_POD)
    node.claims_file.write_bytes(content) if content else node.claims_file.unlink()
    agent.round()
    agent.manager.consider([PATH, OTHER_PATH])
    assert (agent.limits(PATH), agent.limits(OTHER_PATH)) == ({0: 4, 1: None}, {0: 0, 1: 0})
    node.prepare(B, "2Gi")
    agent.round()
    assert (agent.limits(PATH), agent.limits(OTHER_PATH)) == ({0: 4, 1: None}, {0: 2, 1: None})


def test_a_start_with_an_unknown_claim_reports_a_doubt_so_that_the_pinned_limit_is_kept(
    agent: Agent, node: NvidiaNode
) -> None:
    node.use(A, POD)
    workload = agent.manager.workloads.identify(PATH)
    assert workload
    assert "is not known" in agent.manager.workloads.missing(workload)
    node.prepare(A, "4Gi")
    workload = agent.manager.workloads.identify(PATH)
    assert workload
    assert agent.manager.workloads.missing(workload) == ""


@pytest.mark.parametrize("lost", ["pods_file", "claims_file"])
def test_a_running_pod_without_a_limit_gets_none_from_a_start_with_unknown_claims(
    tmp_path: Path, agent: Agent, node: NvidiaNode, lost: str
) -> None:
    """It has a whole device, or no claim. The first program of the other pod has not registered before the start."""
    if lost == "claims_file":
        node.use(A, POD)
        node.use(A, OTHER_POD)
        node.prepare(A, None)
    agent.manager.consider([PATH, CONTAINER])
    agent.enforcer.answer(CONTAINER)
    assert agent.limits(PATH) is None
    getattr(node, lost).unlink()
    for _ in range(3):
        agent = Agent(tmp_path, agent.books)
        agent.round()
        agent.manager.consider_all()
        assert (agent.limits(PATH), agent.limits(OTHER_PATH)) == (None, {0: 0, 1: 0})
        assert "is not known" in " ".join(agent.explained(PATH)) or "are not known" in " ".join(agent.explained(PATH))
    node.use(A, POD)
    node.prepare(A, "4Gi")
    agent.round()
    assert agent.limits(PATH) == {0: 4, 1: None}


def test_a_node_without_nvidia_s_driver_has_no_bookings(tmp_path: Path) -> None:
    (tmp_path / "kubelet").mkdir()
    (tmp_path / "kubelet/dra_manager_state").write_text("{")
    agent = Agent(tmp_path, Books(), POLICY)
    assert agent.limits(PATH) == {0: 8, 1: 8}
    assert not agent.failed_checks


def test_a_wrong_folder_of_kubelet_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    agent = Agent(tmp_path, Books())
    for _ in range(2):
        agent.round()
    assert [str(tmp_path / "kubelet") in record.getMessage() for record in caplog.records] == [True]
    assert agent.limits(PATH) is None


def test_an_unknown_folder_of_the_driver_counts_as_one(tmp_path: Path) -> None:
    (tmp_path / "kubelet").mkdir()
    (tmp_path / "kubelet/plugins").symlink_to("plugins")  # too many links
    agent = Agent(tmp_path, Books(), POLICY)
    assert agent.limits(PATH) == {0: 0, 1: 0}
    agent.round()
    assert "dra_manager_state" in agent.failed_checks[nvidia_claims.NAME].found


def test_a_file_of_another_user_is_not_read(agent: Agent, node: NvidiaNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgpu_ebpf.kubernetes.nvidia_claims.os.geteuid", lambda: 12345)
    monkeypatch.setattr("fgpu_ebpf.kubernetes.nvidia_claims.ROOT", 12346)
    node.use(A, POD)
    node.prepare(A, "4Gi")
    new = agent.new_pod()
    agent.manager.consider([new])
    agent.round()
    assert agent.limits(new) == {0: 0, 1: 0}
    assert "is not root's" in agent.failed_checks[nvidia_claims.NAME].found


def test_cgroups_that_a_workload_makes_have_no_booking(agent: Agent, node: NvidiaNode) -> None:
    node.use(A, POD)
    node.prepare(A, "4Gi")
    inside = Workload(7, f"{CONTAINER}/inner", "inner", pod_uid=POD, container="a" * 64, inside=True)
    assert agent.claims.named(inside).booking is None
    plain = Workload(7, PATH, "pod", pod_uid=POD)
    found = agent.claims.named(plain).booking
    assert isinstance(found, Booking)
    agent.claims._names = SimpleNamespace(named=lambda workload: workload)  # type: ignore[assignment]
    assert agent.claims.named(plain).booking is None  # root does not own the folder around it
