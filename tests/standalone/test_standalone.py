"""A host without an agent and an image with a limit: its containers limit themselves, each separately."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable

import pytest

from tests.support import standalone as kit
from tests.support.host import BUILD, MIB, REFUSED, SIM, new_seed
from tests.support.standalone import CONTEXT, LIMIT
from tests.support.tenant import Client, Program, Tenant
from tests.support.wait import eventually

Scale = Callable[[int, int, int], int]
THREADS, OPERATIONS = 2, 170


def fill(tenant: Tenant) -> Client:
    """Return a program that has allocated the whole limit of its container, to the byte."""
    client = kit.assert_live(tenant)
    left = client.ok("info")[0]
    client.ok(f"alloc {left}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert kit.used(client) == kit.held(tenant) == LIMIT
    return client


def test_the_limit_holds_for_all_programs_of_a_container_together(images: kit.Images) -> None:
    tenant = images.tenant(None)
    one, two = kit.assert_live(tenant), kit.assert_live(tenant)
    assert two.ok("info")[0] == LIMIT - 2 * CONTEXT
    one.ok(f"alloc {LIMIT - 2 * CONTEXT - 4 * MIB}")
    two.ok(f"alloc {4 * MIB}")
    assert [client.do(f"alloc {2 * MIB}") for client in (one, two)] == [REFUSED] * 2
    assert kit.used(one) == kit.used(two) == kit.held(tenant) == LIMIT
    assert kit.said(tenant) == {kit.TOGETHER}


def test_each_program_reads_only_the_figures_of_its_container(images: kit.Images) -> None:
    tenant, other = images.tenant(None), images.tenant(None)
    client, _ = fill(tenant), fill(other)
    table = tenant.run(f"{SIM}/nvidia-smi")
    assert f"{LIMIT >> 20}MiB /   {LIMIT >> 20}MiB" in table
    rows = [line.split() for line in table.splitlines() if "N/A  N/A" in line]
    assert [row[4] for row in rows] == [str(client.inner_pid)]


def test_the_environment_does_not_change_the_limit(images: kit.Images) -> None:
    tenant = images.tenant(None)
    client = tenant.client(before="env GPU_MEM_LIMIT_GB=12 FGPU_SHARE=12gib FGPU_LIMIT=12GiB LD_PRELOAD=")
    assert client.ok("info") == [LIMIT - CONTEXT, LIMIT]


@pytest.mark.parametrize("shared", [(), ("pid",), ("pid", "ipc")], ids=lambda spaces: "-".join(spaces) or "none")
def test_two_containers_of_an_image_have_separate_limits(images: kit.Images, shared: tuple[str, ...]) -> None:
    images.shared = set(shared)
    one, two = images.tenant(None), images.tenant(None)
    first, second = fill(one), fill(two)
    first.kill()
    kit.buried(first)
    assert kit.used(second) == LIMIT, "memory of the other container's exited processes is counted here"
    fill(one)


def test_a_killed_container_starts_with_an_empty_ledger(images: kit.Images) -> None:
    """The new container has the same root, with the ledger, and its pids are reused."""
    for shared in (set[str](), {"ipc"}):
        images.shared, images.root = shared, None
        old = images.tenant(None)
        fill(old)
        images.end(old)
        images.tenants.remove(old)
        images.root = images.rootfs(old)
        assert (images.root / "run/fgpu/books").exists()
        fill(images.tenant(None))


def test_a_container_with_a_read_only_root_and_its_own_run_has_one_limit(images: kit.Images) -> None:
    images.read_only = images.run_is_tmpfs = True
    tenant = images.tenant(None)
    fill(tenant)
    assert tenant.client().do("info") == REFUSED, "a second program gets its own limit"


def test_programs_with_a_read_only_root_and_no_run_are_limited_separately(images: kit.Images) -> None:
    """The programs have no place to share a ledger. Each of them reports that."""
    images.read_only = True
    tenant = images.tenant(None)
    for _ in range(2):
        client = kit.assert_live(tenant)
        client.ok(f"alloc {LIMIT - CONTEXT}")
        assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert kit.said(tenant) == {kit.BY_ITSELF}


@pytest.mark.parametrize("how", ["own", "open", "link"])
def test_a_neighbour_that_poses_as_a_gatekeeper_is_ignored(images: kit.Images, how: str) -> None:
    """A process can put a folder and a socket that never answers into /run/fgpu if all users may write there."""
    tenant = images.tenant(None)
    run = images.rootfs(tenant) / "run/fgpu"
    place = run / "shim" if how != "link" else run.parent / "elsewhere"
    for folder in (run, place):
        folder.mkdir()
        folder.chmod(0o1777 if how != "own" or folder is run else 0o755)
    if how == "own":
        os.chown(place, 1000, 1000)
    if how == "link":
        (run / "shim").symlink_to("/run/elsewhere")
    descriptor = os.open(place, os.O_PATH)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"/proc/self/fd/{descriptor}/shim.sock")
        os.close(descriptor)
        (place / "shim.sock").chmod(0o666)
        listener.listen(64)
        fill(tenant)
    assert kit.said(tenant) == {kit.TOGETHER}


PROGRAM = """
import ctypes as C
L, MiB = C.CDLL("libcuda.so.1"), 1 << 20
class Prop(C.Structure):
    _fields_ = [(n, C.c_int) for n in ("type", "handles", "where", "id")] + [("rest", C.c_uint64 * 2)]
def call(name, *args):
    r = getattr(L, name)(*args)
    assert not r, (name, r)
def used():
    f, t = C.c_size_t(), C.c_size_t()
    call("cuMemGetInfo_v2", C.byref(f), C.byref(t))
    return (t.value - f.value) // MiB - 512
def alloc(n):
    p = C.c_uint64()
    call("cuMemAlloc_v2", C.byref(p), C.c_size_t(n * MiB))
    return p
primary, made = C.c_void_p(), C.c_void_p()
call("cuInit", 0), call("cuDevicePrimaryCtxRetain", C.byref(primary), 0), call("cuCtxSetCurrent", primary)
"""
MAPPED = """
handle, again, at, prop = C.c_uint64(), C.c_uint64(), C.c_uint64(), Prop(1, 0, 1, 0)
call("cuMemCreate", C.byref(handle), C.c_size_t(4 * MiB), C.byref(prop), C.c_uint64())
call("cuMemAddressReserve", C.byref(at), C.c_size_t(4 * MiB), C.c_size_t(), C.c_uint64(), C.c_uint64())
call("cuMemMap", at, C.c_size_t(4 * MiB), C.c_size_t(), handle, C.c_uint64())
call("cuMemRetainAllocationHandle", C.byref(again), at)
print(used())
call("cuMemUnmap", at, C.c_size_t(4 * MiB)); print(used())
call("cuMemRelease", handle); print(used())
call("cuMemMap", at, C.c_size_t(4 * MiB), C.c_size_t(), again, C.c_uint64())
call("cuMemRelease", again); print(used())
print(L.cuMemRelease(again) != 0, used())
call("cuMemUnmap", at, C.c_size_t(4 * MiB)); print(used())
"""
CONTEXTS = """
p = alloc(2); call("cuCtxCreate_v2", C.byref(made), 0, 0); alloc(4); print(used())
call("cuCtxDestroy_v2", made); call("cuCtxSetCurrent", primary); print(used())
call("cuDevicePrimaryCtxRetain", C.byref(primary), 0); print(used())
call("cuDevicePrimaryCtxRelease_v2", 0); print(used())
call("cuDevicePrimaryCtxReset_v2", 0)
call("cuDevicePrimaryCtxRetain", C.byref(primary), 0); call("cuCtxSetCurrent", primary); print(used())
"""
FREES = """
p, stream, graph = alloc(2), C.c_void_p(), C.c_void_p()
call("cuStreamCreate", C.byref(stream), 1), call("cuStreamBeginCapture_v2", stream, 0)
failed = L.cuMemFree_v2(p); L.cuStreamEndCapture(stream, C.byref(graph)); print(failed != 0, used())
call("cuMemFree_v2", p); print(used()); print(L.cuMemFree_v2(p) != 0, used())
"""

POOLS = """
def new():
    p = C.c_uint64()
    return L.cuMemAllocAsync(C.byref(p), C.c_size_t(2 * MiB), None) or p
taken = []
while isinstance(p := new(), C.c_uint64): taken.append(p)
print(len(taken), p, used())
for p in taken: call("cuMemFreeAsync", p, None)
call("cuCtxSynchronize"); print(used())
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (MAPPED, ["4", "4", "4", "4", "True 4", "0"]),
        (CONTEXTS, [str(512 + 6), "2", "2", "2", "0"]),
        (FREES, ["True 2", "0", "True 0"]),
        (POOLS, [f"{(LIMIT - CONTEXT) // (2 * MIB)} 2 {(LIMIT - CONTEXT) // MIB}", "0"]),
    ],
    ids=["mapped", "contexts", "frees", "pools"],
)
def test_used_memory_is_exact_after_mappings_contexts_frees_and_pools(
    images: kit.Images, code: str, said: list[str]
) -> None:
    tenant = images.tenant(None)
    (tenant.folder / "program.py").write_text(PROGRAM + code)
    assert tenant.run(f"/usr/bin/python3 {tenant.folder}/program.py").splitlines() == said, kit.said(tenant)


@pytest.mark.timeout(3600)
def test_exactly_one_program_gets_the_last_piece(images: kit.Images, scale: Scale) -> None:
    tenant = images.tenant(None)
    clients = [kit.assert_live(tenant) for _ in range(4)]
    for _ in range(scale(5, 30, 1000)):
        piece = clients[0].ok("info")[0]
        for client in clients:
            client.send(f"alloc {piece}")
        answers = [client.receive() for client in clients]
        assert sorted(answer.split()[0] for answer in answers) == [REFUSED] * 3 + ["ok"], answers
        (winner,) = [i for i, answer in enumerate(answers) if answer != REFUSED]
        clients[winner].ok(f"free {answers[winner].split()[1]}")


@pytest.mark.timeout(3600)
def test_killed_processes_leave_no_charge(images: kit.Images, scale: Scale) -> None:
    tenant = images.tenant(None)
    stays = kit.assert_live(tenant)
    stays.ok(f"alloc {256 * MIB}")
    mine = CONTEXT + 256 * MIB
    for _ in range(scale(3, 12, 200)):
        victim = tenant.client()
        victim.ok(f"alloc {victim.ok('info')[0]}")
        assert kit.used(stays) == LIMIT
        victim.kill()
        kit.buried(victim)
        assert kit.used(stays) == kit.held(tenant) == mine


class Life(Program):
    """The program tests/programs/life.c with two threads and whole granules.

    The driver allocates exactly these sizes.
    """

    def __init__(self, tenant: Tenant, number: int, seed: int) -> None:
        super().__init__(tenant, f"life{number}", f"{BUILD}/e2e/life {seed} {THREADS} whole")
        word, result, self.inner = self.receive(30).split()
        assert (word, result) == ("ready", "0")

    def end(self) -> tuple[int, int]:
        """Return the operations of this round, and the refusals so far."""
        word, done, refused, _ = self.receive(60).split()
        assert word == "ok"
        return int(done), int(refused)


@pytest.mark.timeout(7200)
def test_the_ledger_equals_the_driver_s_bytes_after_random_operations_and_kills(
    images: kit.Images, scale: Scale
) -> None:
    seed = int(os.environ.get("FGPU_TEST_SEED", new_seed()))
    print(f"FGPU_TEST_SEED={seed}")
    chance = random.Random(seed)
    tenant = images.tenant(None)
    reader = kit.assert_live(tenant)
    numbers = iter(range(1 << 20))
    lives = [Life(tenant, next(numbers), chance.randrange(1 << 30)) for _ in range(3)]
    operations = refused = 0
    checks = scale(5, 20, 1000)
    for _ in range(checks):
        for life in lives:
            life.send(str(OPERATIONS))
        for life in lives:
            done, refusals = life.end()
            operations, refused = operations + done, max(refused, refusals)
        assert kit.used(reader) == kit.held(tenant)
        if not chance.randrange(5):
            victim = lives.pop(chance.randrange(3))
            os.kill(eventually(lambda: tenant.host_pid(int(victim.inner)), 5), 9)  # noqa: B023
            eventually(lambda: not tenant.host_pid(int(victim.inner)), 5, "the end of the killed process")  # noqa: B023
            victim.close()
            lives.append(Life(tenant, next(numbers), chance.randrange(1 << 30)))
    print(f"{operations} operations, {refused} refused by one, {checks} checks")
    assert operations >= checks * 3 * THREADS * OPERATIONS
    for life in lives:
        life.close()
