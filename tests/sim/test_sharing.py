"""Memory in several processes: which row shows it, how long it exists, and that its contents are the same."""

from __future__ import annotations

from subprocess import Popen

import pytest

from .conftest import MIB, Machine, say
from .sharing_kit import SHARING, hear


def bytes_of(machine: Machine, client: Popen[str]) -> dict[str, int]:
    return {kind: machine.process(client.pid)[f"{kind}_bytes"] // MIB for kind in ("block", "vmm")}


@pytest.mark.parametrize("size", [1000, 5 << 20])
def test_a_handle_opens_the_same_memory(machine: Machine, size: int) -> None:
    owner = f"start(); alloc(700); p = alloc({size}); put(p, b'first'); say(export(p)); ask(); say(get(p, 6)); ask()"
    guest = """
start(); result, p = opened(ask()); again, q = opened(input_ := ask())
say(result, again, p.value == q.value, get(p, 5)); put(p, b'second')
need("cuIpcCloseMemHandle", p); say(get(p, 6)); need("cuIpcCloseMemHandle", p); say(L.cuIpcCloseMemHandle(p)); ask()
"""
    with machine.spawn(SHARING + owner) as first, machine.spawn(SHARING + guest) as second:
        handle = hear(first)
        say(second, handle)
        say(second, handle)
        assert [hear(second) for _ in range(3)] == ["0 0 True first", "second", "1"]
        say(first)
        assert hear(first) == "second"
        physical = 2 if size == 1000 else 8
        assert bytes_of(machine, first) == {"block": physical, "vmm": 0}
        assert bytes_of(machine, second) == {"block": 0, "vmm": 0}
        for client in (first, second):
            say(client)


@pytest.mark.parametrize(
    "end", ["need('cuMemFree_v2', p)", "os._exit(0)", "need('cuDevicePrimaryCtxReset_v2', 0)", "os.closerange(3, 999)"]
)
def test_shared_memory_stays_for_the_importer_when_its_creator_frees_it_or_ends(machine: Machine, end: str) -> None:
    """The memory is in the row of its creator, then of its importer. It is freed when neither has it any longer."""
    owner = f"start(); p = alloc(100 << 20); put(p, b'kept'); say(export(p)); ask(); {end}; say('done'); ask()"
    guest = (
        "start(); result, p = opened(ask()); say(result); ask(); say(get(p, 4)); need('cuIpcCloseMemHandle', p)\nask()"
    )
    with machine.spawn(SHARING + owner) as first, machine.spawn(SHARING + guest) as second:
        say(second, hear(first))
        assert hear(second) == "0"
        both = machine.used()
        assert (bytes_of(machine, first)["block"], bytes_of(machine, second)["block"]) == (100, 0)
        say(first)
        hear(first)
        for _ in range(200):
            if bytes_of(machine, second)["block"] == 100:
                break
        assert bytes_of(machine, second)["block"] == 100
        assert machine.used() in (both, both - machine.dump()["devices"][0]["context_bytes"] - 5832704)
        say(second)
        assert hear(second) == "kept"
        for client in (first, second):
            client.kill()
    machine.settles_at(0)


def test_shared_memory_stays_when_the_importer_ends_first(machine: Machine) -> None:
    owner = "start(); p = alloc(100 << 20); say(export(p)); ask(); put(p, b'mine'); say(get(p, 4)); ask()"
    with machine.spawn(SHARING + owner) as first:
        handle = hear(first)
        with machine.spawn(SHARING + "start(); say(opened(ask())[0]); ask()") as second:
            say(second, handle)
            assert hear(second) == "0"
            assert machine.process(second.pid)["block_bytes"] == 0
            second.kill()
        say(first)
        assert hear(first) == "mine"
        assert bytes_of(machine, first)["block"] == 100
        say(first)
    machine.settles_at(0)


def test_invalid_handles_are_refused(machine: Machine) -> None:
    script = """
start(); p = alloc(1000); text = export(p); host = C.c_void_p(); handle = Handle()
need("cuMemAllocHost_v2", C.byref(host), C.c_size_t(10)); managed = C.c_uint64()
need("cuMemAllocManaged", C.byref(managed), C.c_size_t(10), 1)
say(opened(text)[0], opened(text, 0)[0], opened("00" * 64)[0], opened(text[:20] + "ff" * 8 + text[36:])[0])
say([L.cuIpcGetMemHandle(C.byref(handle), C.c_uint64(at)) for at in (0x1000, host.value, managed.value)])
say(L.cuIpcCloseMemHandle(p)); need("cuMemFree_v2", p)
say(text)
"""
    lines = machine.python(SHARING + script)
    assert lines[:3] == ["201 1 1 400", "[1, 1, 1]", "1"]
    assert machine.python(SHARING + f"start(); say(opened('{lines[3]}')[0])") == ["400"]
    machine.settles_at(0)


def test_the_end_of_a_context_closes_its_imported_memory(machine: Machine) -> None:
    owner = "start(); p = alloc(4 << 20); say(export(p)); ask(); need('cuMemFree_v2', p); say('freed'); ask()"
    guest = "start(); say(opened(ask())[0]); need('cuDevicePrimaryCtxReset_v2', 0); say('reset'); ask()"
    with machine.spawn(SHARING + owner) as first, machine.spawn(SHARING + guest) as second:
        say(second, hear(first))
        assert [hear(second), hear(second)] == ["0", "reset"]
        say(first)
        assert hear(first) == "freed"
        assert sum(p["block_bytes"] for p in machine.dump()["processes"]) == 0
        for client in (first, second):
            say(client)


def test_a_descriptor_opens_the_same_memory(machine: Machine) -> None:
    """The contents are the same before and after mappings. Each import is a separate handle."""
    owner = """
start(); h = create(6 << 20); p = mapped(h, 6 << 20); put(p, b"before"); fd = descriptor(h)
say(os.fstat(fd).st_mode > 0)
send_fd(fd, "fgpu-a"); ask(); say(get(p, 6)); ask()
"""
    guest = """
start(); fd = receive_fd("fgpu-a"); (one, h), (two, i) = imported(fd), imported(fd); os.close(fd)
p = mapped(h, 6 << 20); say(one, two, h.value != i.value, get(p, 6)); put(p, b"after!"); ask()
"""
    with machine.spawn(SHARING + owner) as first:
        assert [hear(first), hear(first)] == ["True", "up"]
        with machine.spawn(SHARING + guest) as second:
            assert hear(second) == "0 0 True before"
            assert bytes_of(machine, first) == {"block": 0, "vmm": 6}
            assert bytes_of(machine, second) == {"block": 0, "vmm": 0}
            say(first)
            assert hear(first) == "after!"
            first.kill()
            first.wait()
            start = machine.dump()["devices"][0]["used_bytes"]
            for _ in range(300):
                if bytes_of(machine, second)["vmm"] == 6:
                    break
            assert bytes_of(machine, second) == {"block": 0, "vmm": 6}
            assert start > 0
            say(second)
    machine.settles_at(0)


def test_an_open_descriptor_keeps_released_memory_allocated(machine: Machine) -> None:
    """The memory is in no row until all descriptors are closed. Then it is free, or in its importer's row."""
    script = """
start(); h = create(6 << 20); fd = descriptor(h); other = os.dup(fd); need("cuMemRelease", h); say("held"); ask()
os.close(fd); result, h = imported(other); os.close(other); say(result); ask()
fd = descriptor(h); need("cuMemRelease", h); os.close(fd); say("closed"); ask()
"""
    with machine.spawn(SHARING + script) as client:
        assert hear(client) == "held"
        base = machine.process(client.pid)["bytes"]
        driver = machine.dump()["devices"][0]["driver_bytes"]
        assert machine.dump()["devices"][0]["exported_bytes"] == 6 * MIB
        assert bytes_of(machine, client)["vmm"] == 0
        say(client)
        assert hear(client) == "0"
        assert machine.process(client.pid)["bytes"] == base + 6 * MIB
        assert machine.dump()["devices"][0]["driver_bytes"] == driver - 6 * MIB
        assert machine.dump()["devices"][0]["exported_bytes"] == 0
        say(client)
        assert hear(client) == "closed"
        machine.settles_at(base + driver - 6 * MIB)
        say(client)
    machine.settles_at(0)


def test_invalid_descriptors_are_refused(machine: Machine) -> None:
    script = """
start(); plain, h, fd = create(2 << 20, 0), create(2 << 20), C.c_int(-1)
def exported(handle, kind=1, flags=0):
    return L.cuMemExportToShareableHandle(C.byref(fd), handle, kind, C.c_uint64(flags))
say(exported(plain), exported(h, 2), exported(h, 1, 1), exported(C.c_uint64(7)), exported(h))
one, other = socket.socketpair()
say(imported(one.fileno())[0], imported(-1)[0], imported(os.open("/dev/null", 0))[0])
"""
    assert machine.python(SHARING + script) == ["1 1 1 1 0", "1 999 1"]


def test_shared_memory_leaves_no_descriptor_in_the_server(machine: Machine) -> None:
    before = machine.descriptors()
    script = """
start()
for _ in range(50):
    h = create(2 << 20); fd = descriptor(h); need("cuMemRelease", h); os.close(fd)
    p = alloc(3 << 20); export(p); need("cuMemFree_v2", p)
left = [descriptor(create(2 << 20)) for _ in range(20)]
"""
    machine.python(SHARING + script)
    machine.settles_at(0)
    machine.has_descriptors(before)


def test_numba_shares_an_array(machine: Machine) -> None:
    pytest.importorskip("numba_cuda")
    owner = """
import pickle, numpy, _numba_cuda_redirector
from numba import cuda
array = cuda.to_device(numpy.arange(1 << 18, dtype=numpy.float64))
say(pickle.dumps(array.get_ipc_handle()).hex()); sys.stdin.readline(); say(array.copy_to_host()[7])
"""
    guest = """
import pickle, numpy, _numba_cuda_redirector
from numba import cuda
handle = pickle.loads(bytes.fromhex(sys.stdin.readline()))
with handle as array:
    say(array.copy_to_host().sum() == (1 << 18) * ((1 << 18) - 1) / 2)
    array[7:8].copy_to_device(numpy.array([1009.0]))
"""
    with machine.spawn(owner) as first, machine.spawn(guest) as second:
        say(second, hear(first))
        assert hear(second) == "True"
        assert second.wait(timeout=20) == 0
        say(first)
        assert hear(first) == "1009.0"
