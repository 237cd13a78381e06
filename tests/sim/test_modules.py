"""Code takes device memory, but not before it is used."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .conftest import Machine

HELD = """
before = None
def held():
    return (before - info()[0]) / (1 << 20)
"""


def test_a_module_takes_memory_at_its_first_use(machine: Machine) -> None:
    script = """
start(); state = C.c_int(); before = info()[0]
module, function = kernel("one"); need("cuFuncIsLoaded", C.byref(state), function); say(held(), state.value)
launch(function); need("cuFuncIsLoaded", C.byref(state), function); say(held(), state.value)
others = [kernel("two") for _ in range(31)]; [launch(f) for _, f in others]; say(held())
last, function = kernel("three"); need("cuFuncLoad", function); say(held())
need("cuModuleUnload", last); say(held())
[need("cuModuleUnload", m) for m, _ in others]; say(held()); need("cuModuleUnload", module); say(held())
"""
    assert machine.python(HELD + script) == ["0.0 0", "2.0 1", "2.0", "4.0", "2.0", "2.0", "0.0"]


def test_a_module_of_a_size(machine: Machine) -> None:
    """Seen by NVML, asked for by nobody's allocation."""
    script = """
start(); before = info()[0]
module, function = kernel("f", b"fgpu-module 301MiB\\nmore"); say(held())
say(launch(function), held()); say("up"); wait()
need("cuModuleUnload", module); say(held())
say([L.cuModuleLoadData(C.byref(C.c_void_p()), image) for image in (b"fgpu-module xMiB", b"fgpu-module 1GiB", None)])
"""
    with machine.spawn(HELD + script) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        assert [client.stdout.readline() for _ in range(3)] == ["0.0\n", "0 301.0\n", "up\n"]
        process = machine.process(client.pid)
        assert process["module_bytes"] == 301 << 20
        assert process["block_bytes"] == 0
        client.stdin.write("\n")
        client.stdin.flush()
        assert [client.stdout.readline() for _ in range(2)] == ["0.0\n", "[0, 0, 1]\n"]


def test_eager_loading(machine: Machine) -> None:
    script = "start(); before = info()[0]; mode = C.c_int(); kernel('f'); "
    script += "need('cuModuleGetLoadingMode', C.byref(mode)); say(held(), mode.value)"
    assert machine.python(HELD + script) == ["0.0 2"]
    eager = "os.environ['CUDA_MODULE_LOADING'] = 'EAGER'; L = C.CDLL('libcuda.so.1')\n"
    assert machine.python(HELD + eager + script) == ["2.0 1"]


def test_no_room_for_code(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(FGPU_SIM_MEMORY="2GiB")
    script = """
start(); module, function = kernel("f", b"fgpu-module 4000MiB"); before = info()[0]
say(launch(function), held(), launch(kernel("g")[1]), held())
"""
    assert machine.python(HELD + script) == ["2 0.0 0 2.0"]


def test_a_context_takes_its_code_with_it(machine: Machine) -> None:
    script = """
start(); before = info()[0]; context = C.c_void_p()
need("cuCtxCreate_v2", C.byref(context), 0, 0); launch(kernel("f", b"fgpu-module 100MiB")[1]); launch(kernel("g")[1])
need("cuCtxDestroy_v2", context); say(held()); launch(kernel("g")[1]); say(held())
"""
    assert machine.python(HELD + script) == ["0.0", "2.0"]
    again = "start(); launch(kernel('f')[1]); need('cuDevicePrimaryCtxReset_v2', 0); start(); before = info()[0]; "
    assert machine.python(HELD + again + "launch(kernel('g')[1]); say(held())") == ["2.0"]


def test_libraries(machine: Machine) -> None:
    """A library is in every context where one of its kernels was used, and in no other."""
    script = """
start(); before = info()[0]; library, k, f, g, m = (C.c_void_p() for _ in range(5)); name = C.c_char_p()
need("cuLibraryLoadData", C.byref(library), b"fgpu-module 10MiB", None, None, 0, None, None, 0)
need("cuLibraryGetKernel", C.byref(k), library, b"spin_0us"); need("cuKernelGetName", C.byref(name), k)
need("cuKernelGetFunction", C.byref(f), k); need("cuLibraryGetModule", C.byref(m), library)
need("cuFuncGetModule", C.byref(g), f)
say(held(), name.value, g.value == m.value, L.cuModuleUnload(m))
say(launch(f), held(), launch(k), held())
context = C.c_void_p(); need("cuCtxCreate_v2", C.byref(context), 0, 0); inside = info()[0]
say(launch(k), (inside - info()[0]) >> 20); need("cuCtxDestroy_v2", context); say(held())
need("cuLibraryUnload", library); say(held(), launch(k), L.cuLibraryUnload(library))
"""
    assert machine.python(HELD + script) == [
        "0.0 b'spin_0us' True 400",
        "0 10.0 0 10.0",
        "0 10",
        "10.0",
        "0.0 400 400",
    ]


def test_linking(machine: Machine) -> None:
    script = """
start(); before = info()[0]; state, cubin, size = C.c_void_p(), C.c_void_p(), C.c_size_t(); text = b"fgpu-module 6MiB"
need("cuLinkCreate_v2", 0, None, None, C.byref(state))
say(L.cuLinkComplete(state, C.byref(cubin), C.byref(size)))
need("cuLinkAddData_v2", state, 1, text, C.c_size_t(len(text)), b"name", 0, None, None)
need("cuLinkComplete", state, C.byref(cubin), C.byref(size))
launch(kernel("f", cubin)[1]); say(held()); need("cuLinkDestroy", state); say(L.cuLinkDestroy(state))
"""
    assert machine.python(HELD + script) == ["1", "6.0", "400"]


def test_cuda_bindings_library(machine: Machine) -> None:
    pytest.importorskip("cuda.bindings")
    script = """
from cuda.bindings import driver as D
def ok(answer):
    assert answer[0] == D.CUresult.CUDA_SUCCESS, answer
    return answer[1] if len(answer) == 2 else answer[1:]
ok(D.cuInit(0)); ok(D.cuCtxCreate(None, 0, 0))
library = ok(D.cuLibraryLoadData(b"fgpu-module 4MiB", [], [], 0, [], [], 0))
function = ok(D.cuKernelGetFunction(ok(D.cuLibraryGetKernel(library, b"k"))))
before = ok(D.cuMemGetInfo())[0]
ok(D.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0)); say((before - ok(D.cuMemGetInfo())[0]) >> 20)
ok(D.cuLibraryUnload(library)); say((before - ok(D.cuMemGetInfo())[0]) >> 20)
"""
    assert machine.python(script) == ["4", "0"]
