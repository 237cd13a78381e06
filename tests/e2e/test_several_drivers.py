"""A container's own driver library in place of the host's, and several driver libraries in one process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.commands import fgpu, metrics
from tests.support.host import BUILD, CONTEXT, ENVIRONMENT, MIB, SHIM, SIM
from tests.support.place import Container
from tests.support.service import Service
from tests.support.tenant import Client, Program, Tenant
from tests.support.wait import eventually

COMPAT = "/usr/local/cuda/compat"
OUT_OF_MEMORY, NOT_SUPPORTED = 2, 801
ROOM = 96 * MIB  # three growth steps of a pool


def library(folder: Path) -> Path:
    """Copy the driver to another file."""
    folder.mkdir()
    return Path(shutil.copy((SIM / "lib/libcuda.so.1").resolve(), folder / "libcuda.so.1"))


@pytest.fixture
def compat(place: Container, tmp_path: Path) -> Path:
    """Add forward-compatibility libraries to the container's image."""
    made = library(tmp_path / "compat")
    place.mounts = [
        {"source": "tmpfs", "destination": "/usr/local", "type": "tmpfs"},
        {"source": str(made.parent), "destination": COMPAT, "type": "bind", "options": ["bind", "ro"]},
    ]
    return made


@pytest.mark.places("runc")
def test_the_limit_is_exact_with_forward_compatibility_libraries(compat: Path, tenant) -> None:
    """The loader finds the image's libcuda before the host's."""
    one = tenant(CONTEXT + ROOM)
    client = one.client(before=f"env LD_LIBRARY_PATH={COMPAT}:{SIM}/lib")
    client.ok("context")
    mapped = Path(f"/proc/{client.pid}/maps").read_text()
    assert {line.split()[5] for line in mapped.splitlines() if "libcuda" in line} == {f"{COMPAT}/libcuda.so.1"}
    assert str(compat.stat().st_ino) in mapped
    with one.growing(ROOM):
        assert client.ok(f"fill {2 * MIB} 0") == [ROOM // (2 * MIB)]
    client.ok("drop 5")
    assert one.assert_exact() == CONTEXT + ROOM - 10 * MIB
    assert not bypasses(one)
    client.kill()
    eventually(lambda: one.memory()["used_bytes"] == 0, 2, "the release of the memory")


def bypasses(one: Tenant) -> dict[str, float]:
    """Return how the tenant's processes bypass the shim, with the number of processes for each way."""
    mine = {k: v for k, v in metrics().items() if k[0] == "fgpu_bypassing_processes" and ("tenant", one.name) in k[1]}
    return {dict(labels)["how"]: value for (_, labels), value in mine.items() if value}


@pytest.mark.places("runc")
@pytest.mark.parametrize("contents", [b"", b"another"], ids=["the host's", "unknown"])
def test_a_program_that_fits_is_never_refused_with_a_listed_or_an_unknown_libcuda(
    service: Service, compat: Path, tenant, contents: bytes, scale
) -> None:
    """The program allocates 80 % of its limit and frees the memory, again and again.

    Memory freed by an unknown library counts as freed once NVML shows the free, so the next allocation waits.
    """
    with compat.open("ab") as file:
        file.write(contents)
    one = tenant(CONTEXT + ROOM)
    client = one.client(before=f"env LD_LIBRARY_PATH={COMPAT}:{SIM}/lib")
    client.ok("context")
    role = "UNKNOWN" if contents else "LISTED"
    eventually(
        lambda: f"probed '{COMPAT}/libcuda.so.1' as {role}" in service.log.read_text(), 5, "the class of the library"
    )
    for _ in range(scale(20, 100, 1000) if contents else 1000):
        (pointer,) = client.ok(f"alloc {ROOM // 5 * 4}")
        client.ok(f"free {pointer}")
    assert one.memory()["refused"] == 0
    assert not bypasses(one)
    eventually(lambda: one.assert_exact() == CONTEXT, 5, "the release of the freed memory")


class Several(Client):
    """The program tests/programs/pair.c, with several drivers."""

    def __init__(self, tenant: Tenant, name: str, libraries: list[Path], via: str = "") -> None:
        Program.__init__(self, tenant, name, " ".join([f"{BUILD}/e2e/pair {via}".strip(), *map(str, libraries)]))
        self._hello()


@pytest.fixture
def libraries(tmp_path: Path) -> list[Path]:
    return [SIM / "lib/libcuda.so.1", *(library(tmp_path / f"other{n}") for n in range(2))]


@pytest.fixture
def several(service: Service, tenant, libraries: list[Path]) -> Callable[..., tuple[Tenant, Several]]:
    """Return a tenant with room for ROOM and the contexts of these drivers, and its program with all contexts.

    The agent has read the libraries. Before that, their class is unknown, and their frees of managed memory do not
    count.
    """

    def make(n: int, via: str = "") -> tuple[Tenant, Several]:
        one = tenant(n * CONTEXT + ROOM)
        one.assert_enforced()
        client = Several(one, "several", libraries[:n], via)
        for which in range(n):
            client.ok(f"context {which} 0")
        for copy in libraries[1:n]:
            eventually(lambda copy=copy: f"probed '{copy}' as LISTED" in service.log.read_text(), 5, "the class")  # type: ignore[misc]
        assert one.assert_exact() == n * CONTEXT
        return one, client

    return make


def ends(one: Tenant, client: Several) -> None:
    client.kill()
    client.close()
    eventually(lambda: one.memory()["used_bytes"] == 0, 2, "the release of the memory")


@pytest.mark.places("host")
@pytest.mark.parametrize("via", ["", "proc"], ids=["dlsym", "cuGetProcAddress"])
@pytest.mark.parametrize("how", ["plain", "managed", "pitch", "create", "array"])
def test_the_limit_holds_for_both_drivers_of_a_process(several, how: str, via: str) -> None:
    one, client = several(2, via)
    pieces = ROOM // (2 * MIB)
    with one.growing(ROOM):
        assert client.ok(f"fill.{how} 1 {2 * MIB}") == [pieces, OUT_OF_MEMORY]
    for which in (0, 1):
        assert client.ok(f"fill.{how} {which} {2 * MIB}") == [0, OUT_OF_MEMORY]
    if how in ("plain", "managed", "pitch"):
        client.ok("drop 1 10")
        assert client.ok(f"fill.{how} 0 {2 * MIB}") == [10, OUT_OF_MEMORY]
        client.ok("drop 0 4")
        assert client.ok(f"fill.{how} 1 {2 * MIB}") == [4, OUT_OF_MEMORY]
    assert one.assert_exact() == 2 * CONTEXT + ROOM
    memory = one.memory()
    assert memory["peak_bytes"] <= memory["limit_bytes"]
    assert not bypasses(one)
    ends(one, client)


@pytest.mark.places("host")
def test_each_driver_shows_and_releases_its_own_memory(several) -> None:
    one, client = several(2)
    client.ok(f"fill.plain 1 {2 * MIB}")
    client.ok("drop 1 5")
    for which in (0, 1):
        assert client.ok(f"info {which} 0") == [10 * MIB, 2 * CONTEXT + ROOM]
    client.ok("leave 1 0")
    eventually(lambda: one.memory()["used_bytes"] == CONTEXT, 3, "the release of the destroyed context")
    assert client.ok(f"fill.plain 0 {2 * MIB}") == [(CONTEXT + ROOM) // (2 * MIB), OUT_OF_MEMORY]
    assert one.assert_exact() <= 2 * CONTEXT + ROOM
    ends(one, client)


@pytest.mark.places("host")
@pytest.mark.parametrize("via", ["", "proc"], ids=["dlsym", "cuGetProcAddress"])
def test_pools_of_a_second_driver_are_refused(several, via: str) -> None:
    """The shim counts the pools of one driver. It refuses pools of a second driver, which it could not limit."""
    one, client = several(2, via)
    assert client.ok(f"fill.async 1 {2 * MIB}") == [0, NOT_SUPPORTED]
    assert client.ok(f"fill.async 0 {2 * MIB}")[1] == OUT_OF_MEMORY
    assert client.ok(f"fill.plain 1 {2 * MIB}")[1] == OUT_OF_MEMORY
    assert one.assert_exact() <= 2 * CONTEXT + ROOM
    ends(one, client)


@pytest.mark.places("host")
def test_memory_of_a_third_driver_is_charged_and_its_process_is_named(several) -> None:
    """The shim has no hooks for this driver. The memory is charged to the byte."""
    one, client = several(3)
    before = one.memory()["witnessed_bytes"]
    client.ok(f"fill.plain 1 {ROOM}")
    assert one.memory()["witnessed_bytes"] == before + ROOM
    (taken, _) = client.ok(f"fill.plain 2 {40 * ROOM}")
    assert taken
    eventually(lambda: bypasses(one).get("no_admission") == 1, 3, "the process in fgpu_bypassing_processes")
    assert one.assert_exact() > 3 * CONTEXT + ROOM
    ends(one, client)


ELSEWHERE = """
import ctypes as C, sys
libc = C.CDLL(None)
libc.dlmopen.restype = libc.dlsym.restype = C.c_void_p
there = C.c_void_p(libc.dlmopen(C.c_long(-1), sys.argv[1].encode(), 2))  # LM_ID_NEWLM, RTLD_NOW
call = lambda name, *a: C.CFUNCTYPE(C.c_int)(libc.dlsym(there, name))(*a)
at, context = C.c_uint64(), C.c_void_p()
print(call(b"cuInit", 0), call(b"cuCtxCreate_v2", C.byref(context), 0, 0), flush=True)
print(call(b"cuMemAlloc_v2", C.byref(at), C.c_size_t(int(sys.argv[2]))), flush=True)
sys.stdin.readline()
"""


@pytest.mark.places("host")
def test_memory_of_a_driver_in_another_namespace_is_charged_and_its_process_is_named(
    tenant, libraries: list[Path], tmp_path: Path
) -> None:
    """The driver is in another linker namespace, where the shim has no hooks. The memory is charged to the byte."""
    one = tenant(CONTEXT + ROOM)
    one.assert_enforced()
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    command = f"{sys.executable} {tmp_path}/elsewhere.py {libraries[0]} {2 * ROOM}"
    program = Program(one, "elsewhere", command)
    assert program.receive() == "0 0"
    assert program.receive() == "0"
    eventually(lambda: bypasses(one).get("no_admission") == 1, 3, "the process in fgpu_bypassing_processes")
    assert one.assert_exact() == CONTEXT + 2 * ROOM
    program.close()
    eventually(lambda: one.memory()["used_bytes"] == 0, 2, "the release of the memory")


LATE = """
import ctypes, sys
dlsym = ctypes.CDLL(None).dlsym
dlsym.restype, dlsym.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_char_p)
bytes_, pointer = int(sys.argv[1]), ctypes.c_uint64()
for path in sys.argv[2:]:
    library = ctypes.CDLL(path)
    call = lambda name: ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong)(dlsym(library._handle, name))
    assert call(b"cuInit")(None, 0) == call(b"cuDevicePrimaryCtxRetain")(ctypes.addressof(pointer), 0) == 0
    assert call(b"cuCtxSetCurrent")(pointer.value, 0) == 0
    print(call(b"cuMemAlloc_v2")(ctypes.addressof(pointer), bytes_), flush=True)
    sys.stdin.readline()
"""


@pytest.mark.places("host")
def test_a_late_driver_without_probes_is_limited_by_the_shim_alone_and_reported(tenant, tmp_path: Path) -> None:
    """The process registers before it loads the driver. No function of this driver has a probe.

    The shim requests admission for each allocation of this driver.
    """
    odd = library(tmp_path / "odd")
    odd.write_bytes(odd.read_bytes().replace(b"\0cuMemRelease\0", b"\0cuMemReleasX\0"))
    one = tenant(2 * CONTEXT + ROOM)
    one.assert_enforced()
    (one.folder / "late.py").write_text(LATE)
    command = f"{sys.executable} {one.folder}/late.py {10 * MIB} {SIM}/lib/libcuda.so.1 {odd}"
    program = Program(one, "late", command)
    assert program.receive() == "0"
    assert one.view()["enforcement"] == "kernel"
    program.send("")
    assert program.receive() == "0"
    eventually(lambda: one.view()["enforcement"] == "cooperative", 3, "enforcement: cooperative")
    key = "fgpu_tenant_enforcement", frozenset({("tenant", one.name), ("mode", "cooperative")})
    assert metrics()[key] == 1
    assert bypasses(one) == {"unprobed": 1}
    said = fgpu("explain", one.path).stdout
    (pid,) = [pid for pid in one.pids() if b"late.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert "enforcement: cooperative" in said
    assert f"stronger: a libcuda of pid {pid} cannot be probed" in said
    assert "cooperative" in fgpu("status").stdout
    program.close()
    eventually(lambda: one.view()["enforcement"] == "kernel", 3, "enforcement: kernel")


def test_a_second_driver_works_fully_without_a_limit(service: Service, libraries: list[Path]) -> None:
    lines = f"fill.async 1 {MIB}\nfill.plain 1 {MIB}\nfill.async 0 {MIB}\n"
    program = [BUILD / "e2e/pair", *libraries[:2]]
    environment = ENVIRONMENT | {"LD_PRELOAD": str(SHIM)}
    done = subprocess.run(program, input=lines, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[1:] == ["ok 4096 0", "ok 0 0", "ok 4096 0"]
