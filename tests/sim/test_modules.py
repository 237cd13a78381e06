"""Code uses device memory, but only from its first use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Machine, say

HELD = """
before = None
def held():
    return (before - info()[0]) / (1 << 20)
"""


def test_small_modules_use_no_memory(machine: Machine) -> None:
    script = """
start(); state = C.c_int(); before = info()[0]
module, function = kernel("one"); need("cuFuncIsLoaded", C.byref(state), function); say(held(), state.value)
others = [kernel("two") for _ in range(40)]; say({launch(f) for _, f in others}, held())
[need("cuModuleUnload", m) for m, _ in others]; need("cuModuleUnload", module); say(held())
"""
    assert machine.python(HELD + script) == ["0.0 1", "{0} 0.0", "0.0"]


def test_a_large_module_uses_memory_from_the_first_request_of_a_function(machine: Machine) -> None:
    """The memory counts as memory of modules, not of allocations."""
    script = """
start(); before = info()[0]; module, function = C.c_void_p(), C.c_void_p()
need("cuModuleLoadData", C.byref(module), b"fgpu-module 301MiB\\nmore"); say(held())
need("cuModuleGetFunction", C.byref(function), module, b"f"); say(held(), launch(function)); say("up"); wait()
need("cuModuleUnload", module); say(held())
say([L.cuModuleLoadData(C.byref(C.c_void_p()), image) for image in (b"fgpu-module xMiB", b"fgpu-module 1GiB", None)])
"""
    with machine.spawn(HELD + script) as client:
        assert client.stdout is not None
        assert [client.stdout.readline() for _ in range(3)] == ["0.0\n", "301.0 0\n", "up\n"]
        process = machine.process(client.pid)
        assert process["module_bytes"] == 301 << 20
        assert process["block_bytes"] == 0
        say(client)
        assert [client.stdout.readline() for _ in range(2)] == ["0.0\n", "[0, 0, 1]\n"]


def test_a_module_has_the_kernels_of_its_assembly(machine: Machine, tmp_path: Path) -> None:
    """Assembly is read from memory, from a file and in a library. Linked code is not read."""
    text = b"// .entry remark\n\n.version 8.0\n.visible .entry one(\n.param .u64 p) { }\n.entry\ttwo$x() { ret; }\n"
    path = tmp_path / "module.ptx"
    path.write_bytes(text * 20)
    script = f"""
start(); text, path = {text!r}, {bytes(path)!r}; k, library, state, cubin = (C.c_void_p() for _ in range(4))
names = (b"one", b"two$x", b"tw", b"entry", b"spin_1us")
def has(module):
    say([L.cuModuleGetFunction(C.byref(k), module, name) for name in names])
def load(call, image):
    module = C.c_void_p(); need(call, C.byref(module), image); return module
has(load("cuModuleLoadData", text)); has(load("cuModuleLoad", path))
has(load("cuModuleLoadData", b"\\x7fELF .version"))
need("cuLibraryLoadFromFile", C.byref(library), path, None, None, 0, None, None, 0)
say([L.cuLibraryGetKernel(C.byref(k), library, name) for name in names])
need("cuLibraryGetModule", C.byref(k), library); has(C.c_void_p(k.value))
need("cuLinkCreate_v2", 0, None, None, C.byref(state))
need("cuLinkAddData_v2", state, 1, text, C.c_size_t(len(text)), b"name", 0, None, None)
need("cuLinkComplete", state, C.byref(cubin), None); has(load("cuModuleLoadData", cubin))
say(L.cuModuleLoad(C.byref(k), b"/"), L.cuModuleLoad(C.byref(k), b"/dev/null"), L.cuModuleLoad(C.byref(k), b"/nowhere"))
"""
    some, everything = "[0, 0, 500, 500, 500]", "[0, 0, 0, 0, 0]"
    assert machine.python(script) == [some, some, everything, some, some, everything, "200 200 301"]


def test_eager_loading_allocates_code_at_the_load(machine: Machine) -> None:
    script = "start(); before = info()[0]; mode = C.c_int(); "
    script += "need('cuModuleLoadData', C.byref(C.c_void_p()), b'fgpu-module 2MiB'); "
    script += "need('cuModuleGetLoadingMode', C.byref(mode)); say(held(), mode.value)"
    assert machine.python(HELD + script) == ["0.0 2"]
    eager = "os.environ['CUDA_MODULE_LOADING'] = 'EAGER'; L = C.CDLL('libcuda.so.1')\n"
    assert machine.python(HELD + eager + script) == ["2.0 1"]


def test_code_without_room_is_refused(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(FGPU_SIM_MEMORY="2GiB")
    script = """
start(); before = info()[0]; module, function = C.c_void_p(), C.c_void_p()
need("cuModuleLoadData", C.byref(module), b"fgpu-module 4000MiB")
say(L.cuModuleGetFunction(C.byref(function), module, b"f"), function.value, held(), launch(kernel("g")[1]), held())
"""
    assert machine.python(HELD + script) == ["2 None 0.0 0 0.0"]


def test_the_end_of_a_context_frees_its_code(machine: Machine) -> None:
    script = """
start(); before = info()[0]; context = C.c_void_p()
need("cuCtxCreate_v2", C.byref(context), 0, 0); launch(kernel("f", b"fgpu-module 100MiB")[1])
need("cuCtxDestroy_v2", context); say(held()); kernel("g", b"fgpu-module 2MiB"); say(held())
"""
    assert machine.python(HELD + script) == ["0.0", "2.0"]
    again = "image = b'fgpu-module 2MiB'; start(); kernel('f', image); need('cuDevicePrimaryCtxReset_v2', 0); start(); "
    assert machine.python(HELD + again + "before = info()[0]; kernel('g', image); say(held())") == ["2.0"]


def test_a_library_is_loaded_in_each_context_that_uses_its_kernels(machine: Machine) -> None:
    """A context that uses none of its kernels does not load it."""
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


def test_linked_code_can_be_loaded(machine: Machine) -> None:
    script = """
start(); before = info()[0]; state, cubin, size = C.c_void_p(), C.c_void_p(), C.c_size_t(); text = b"fgpu-module 6MiB"
need("cuLinkCreate_v2", 0, None, None, C.byref(state))
say(L.cuLinkComplete(state, C.byref(cubin), C.byref(size)))
need("cuLinkAddData_v2", state, 1, text, C.c_size_t(len(text)), b"name", 0, None, None)
need("cuLinkComplete", state, C.byref(cubin), C.byref(size))
launch(kernel("f", cubin)[1]); say(held()); need("cuLinkDestroy", state); say(L.cuLinkDestroy(state))
"""
    assert machine.python(HELD + script) == ["1", "6.0", "400"]


def test_cuda_bindings_load_a_library(machine: Machine) -> None:
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
