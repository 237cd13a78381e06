"""Variables of device code are requested before the driver allocates them, and released when the code is unloaded."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from tests.shim.area_kit import MIB, asked, said
from tests.shim.cubin_kit import cubin
from tests.shim.shim_kit import DEADLINE, ROOT, Build, Simulator

OOM, INVALID_HANDLE, GIB = 2, 400, 1 << 30
LARGE = 2 << 30

LOADS = {
    "cuModuleLoadData": "L.cuModuleLoadData(C.byref(m), data(n).encode())",
    "cuModuleLoadDataEx": "L.cuModuleLoadDataEx(C.byref(m), data(n).encode(), 0, None, None)",
    "cuModuleLoadFatBinary": "L.cuModuleLoadFatBinary(C.byref(m), data(n).encode())",
    "cuModuleLoad": "L.cuModuleLoad(C.byref(m), file(n))",
}
BEGIN = """
import tempfile
m = C.c_void_p()
def file(n):
    global kept
    kept = tempfile.NamedTemporaryFile(); kept.write(data(n).encode()); kept.flush(); return kept.name.encode()
"""


@pytest.mark.parametrize("way", LOADS)
def test_variables_of_a_module_are_requested_and_released(simulator: Simulator, way: str) -> None:
    script = f"n = 5 * MiB; out({LOADS[way]}, L.cuModuleUnload(m)); n = 100; out({LOADS[way]}, L.cuModuleUnload(m))"
    assert said(simulator, BEGIN + script) == [[0, 0], [0, 0]]
    assert asked(simulator.agent) == [6 * MIB, -6 * MIB]


@pytest.mark.parametrize("way", LOADS)
def test_a_module_that_does_not_fit_is_refused(simulator: Simulator, way: str) -> None:
    script = f"n = 2 * GiB; out({LOADS[way]}, m.value); n = 4 * MiB; out({LOADS[way]})"
    assert said(simulator, BEGIN + script) == [[OOM, None], [0]]
    assert asked(simulator.agent) == [LARGE, 4 * MIB]


USES = {
    "cuLibraryGetModule": "L.cuLibraryGetModule(C.byref(m), l)",
    "cuLibraryGetGlobal": 'L.cuLibraryGetGlobal(C.byref(p), C.byref(size), l, b"big")',
    "cuKernelGetFunction": "L.cuKernelGetFunction(C.byref(m), k)",
    "cuLaunchKernel": "launch(k)",
}
MADE = {
    "data": "l = library(data(n))",
    "file": """
l = C.c_void_p(); need("cuLibraryLoadFromFile", C.byref(l), file(n), None, None, 0, None, None, 0)
""",
}


@pytest.mark.parametrize("way", USES)
@pytest.mark.parametrize("made", MADE)
def test_the_first_use_of_a_library_in_each_context_is_requested(simulator: Simulator, way: str, made: str) -> None:
    """Each context requests it, although the source of the library has been freed by then."""
    script = f"""
p, size, n = C.c_uint64(), C.c_size_t(), 5 * MiB; {MADE[made]}
k = entry(l, "glob"); out(1); out(*[{USES[way]} for _ in range(2)])
inner = another(); out({USES[way]}); need("cuCtxDestroy_v2", inner); need("cuCtxSetCurrent", c)
out({USES[way]}, L.cuLibraryUnload(l))
"""
    assert said(simulator, BEGIN + script) == [[1], [0, 0], [0], [0, 0]]
    assert asked(simulator.agent) == [6 * MIB, 6 * MIB, -6 * MIB, -6 * MIB]


@pytest.mark.parametrize("way", USES)
def test_a_library_that_does_not_fit_is_refused_at_its_first_use(simulator: Simulator, way: str) -> None:
    script = "p, size, n = C.c_uint64(), C.c_size_t(), 2 * GiB; l = library(data(n)); k = entry(l, 'glob')\n"
    assert said(simulator, BEGIN + script + f"out({USES[way]}, {USES[way]}, L.cuLibraryUnload(l))") == [[OOM, OOM, 0]]
    assert asked(simulator.agent) == [LARGE, LARGE]


def test_the_end_of_a_context_releases_the_memory_of_its_modules(simulator: Simulator) -> None:
    script = """
load(data(5 * MiB)); inner = another(); load(data(9 * MiB)); need("cuCtxDestroy_v2", inner); out(1)
need("cuDevicePrimaryCtxReset_v2", 0); out(1)
"""
    assert said(simulator, script) == [[1], [1]]
    assert asked(simulator.agent) == [6 * MIB, 10 * MIB, -10 * MIB, -6 * MIB]


def test_an_admission_whose_call_the_driver_refuses_is_released(simulator: Simulator) -> None:
    """The driver has no room. While a stream captures in the strictest mode, nothing is unloaded."""
    script = """
m = load(data(5 * MiB)); s, g, n = stream(), C.c_void_p(), C.c_void_p()
out(L.cuModuleLoadData(C.byref(n), data(100 * GiB).encode())); need("cuStreamBeginCapture_v2", s, 0)
out(L.cuModuleUnload(m)); L.cuStreamEndCapture(s, C.byref(g)); out(L.cuModuleUnload(m), L.cuModuleUnload(m))
"""
    simulator.agent.do("limit", limit=1 << 40)
    assert said(simulator, script) == [[OOM], [900], [0, 400]]
    assert asked(simulator.agent) == [6 * MIB, 100 * GIB, -100 * GIB, -6 * MIB]


LAST = """
ms = [load(data(2 * MiB)) for _ in range(1024)]; m, p = C.c_void_p(), C.c_void_p()
one = lambda n: L.cuModuleLoadData(C.byref(m), data(n).encode())
made = lambda n: L.cuLibraryLoadData(C.byref(p), data(n).encode(), None, None, 0, None, None, 0)
out(one(2 * MiB), one(100), made(2 * MiB), L.cuLibraryUnload(p), made(100))
"""


def test_code_with_data_is_refused_if_the_shim_s_table_of_code_is_full(simulator: Simulator) -> None:
    """Code with little data is loaded. Once a module is unloaded, another one can be loaded."""
    simulator.agent.do("limit", limit=1 << 40)
    script = LAST + "out(L.cuModuleUnload(ms[0]), one(2 * MiB), *{L.cuModuleUnload(x) for x in [*ms[1:], m]})"
    assert said(simulator, script) == [[OOM, 0, OOM, INVALID_HANDLE, 0], [0, 0, 0]]
    assert asked(simulator.agent) == [2 * MIB] * 1024 + [-2 * MIB, 2 * MIB] + [-2 * MIB] * 1024


@pytest.mark.parametrize("how", ["observed", "unmanaged"])
def test_no_variables_are_requested_without_an_enforced_limit(simulator: Simulator, how: str) -> None:
    agent = simulator.agent
    agent.do("limit", limit=GIB, flags=1) if how == "observed" else agent.do("set", answer="unmanaged")
    assert said(simulator, "m = load(data(2 * GiB)); out(L.cuModuleUnload(m))") == [[0]]
    assert asked(agent) == []


# -- sizes that the shim reads from code


def part(kind: int, content: bytes, flags: int = 0) -> bytes:
    return struct.pack("<HHIQIIHHIIIQQQ", kind, 0x101, 64, len(content), 0, 0, 0, 0, 90, 0, 0, flags, 0, 0) + content


def fatbin(*parts: bytes) -> bytes:
    whole = b"".join(parts)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(whole)) + whole


VERSION = b".version 7.0\n"


def text(mib: int) -> bytes:
    return VERSION + f".target sm_70\n.global .b8 a[{mib << 20}];\0".encode()


FOUR = cubin((".text.f", 9 << 20, 1), (".nv.global", 3 << 20, 16), (".nv.global.init", 1 << 20, 256))
IMAGES: dict[str, tuple[bytes, int]] = {
    "cubin": (FOUR, 4),
    "cubin without": (cubin((".text.f", 9 << 20, 1), (".nv.globals", 9 << 20, 1)), 0),
    "aligned": (cubin((".nv.global", 1, 1), (".nv.global.init", 2 << 20, 2 << 20)), 4),
    "fat": (fatbin(part(2, FOUR)), 4),
    "the least part": (fatbin(part(2, FOUR), part(1, text(6)), part(1, text(8))), 4),
    "compressed": (fatbin(part(2, b"\xf0\xff" * 32, 0x2011), part(1, b"\xf0\xff" * 32, 0x8011)), 0),
    "one compressed": (fatbin(part(1, b"\xf0\xff" * 32, 0x2011), part(2, FOUR)), 4),
    "assembly": (text(6), 6),
    "remarks": (b"// .global .b8 x[9999999];\n/* .global .b8 y[9999999]; */" + text(4), 4),
    "instructions": (VERSION + b".visible .entry f() { st.global.u32 [a], 1; ld.global.b8 b, [a]; }" + text(2), 2),
    "types": (VERSION + b".global .align 8 .f64 b[1024][512]; .global .v4 .f32 c[131072];" + text(2), 8),
    "values": (VERSION + b".global .align 1 .b8 a[4] = {0, 1, {2}, 3}, b[2097152], c = 7;" + text(2), 6),
    "elsewhere": (VERSION + b".extern .global .b8 a[8388608]; .global .b8 b[];" + text(2), 2),
    "numbers": (VERSION + b".global .b8 a[0x200000]; .global .b8 b[010000000];" + text(2), 6),
    "empty": (b"\0", 0),
    "no assembly": (b".global .b8 a[9999999];", 0),
    "a sign alone": (b"\x7fE\0", 0),
    "nonsense": (VERSION + b'.global ;;; .global .align .b8 } { ) ( [ [ ] " .global .b8 a[9999999];', 0),
}


@pytest.mark.parametrize("name", IMAGES)
def test_the_shim_reads_the_sizes_that_an_image_declares(simulator: Simulator, name: str) -> None:
    image, mib = IMAGES[name]
    script = f"m = C.c_void_p(); L.cuModuleLoadData(C.byref(m), bytes.fromhex('{(image + bytes(64)).hex()}')); out(1)"
    assert said(simulator, script) == [[1]]
    assert [size for size in asked(simulator.agent) if size > 0] == ([mib * MIB] if mib else [])


def test_the_shim_reads_no_byte_beyond_an_image(build: Build, tmp_path: Path) -> None:
    """Images with changed or missing bytes are read under sanitizers, in memory whose end is the end of the image."""
    folders = (f"-I{ROOT / 'shim'}", f"-I{ROOT / 'bpf'}")
    program = build.compile("image.c", "image", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *folders)
    for n, (image, _) in enumerate(IMAGES.values()):
        (tmp_path / f"{n:02}").write_bytes(image)
    command = [program, 1009, 3000, *sorted(tmp_path.iterdir())]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    read = [-(-int(size) // (2 * MIB)) * 2 for size in done.stdout.split()]
    assert read == [mib for _, mib in IMAGES.values()]


def test_the_shim_reads_a_fat_binary_in_its_wrapper(simulator: Simulator) -> None:
    script = f"""
inside = C.create_string_buffer(bytes.fromhex('{fatbin(part(2, FOUR)).hex()}'))
wrapper, m = (C.c_uint64 * 3)(1 << 32 | 0x466243B1, C.addressof(inside)), C.c_void_p()
out(L.cuModuleLoadFatBinary(C.byref(m), wrapper))
"""
    assert said(simulator, script) == [[0]]
    assert asked(simulator.agent) == [4 * MIB]
