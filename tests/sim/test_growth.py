"""Memory that the driver allocates by itself: for code, its heap and output, data, streams, graphs, page tables."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from .conftest import MIB, Machine, say
from .growth_kit import CODE
from .lifetime_kit import compute_rows
from .sharing_kit import hear

CONTEXT = 518
THREADS = 132 * 2048
FIRST = 1024  # bytes of a thread in a new context


def area_mib(bytes_per_thread: int) -> int:
    return round(bytes_per_thread * THREADS / (2 * MIB)) * 2


def parts(machine: Machine, pid: int) -> dict[str, int]:
    """Return the memory that the driver has allocated by itself, in MiB, without zeros."""
    row = machine.process(pid)
    kinds = ("context", "module", "local", "runtime", "launch", "pages")
    return {kind: row[f"{kind}_bytes"] // MIB for kind in kinds if row[f"{kind}_bytes"]}


def test_the_stack_limit_sets_the_size_of_the_local_memory(machine: Machine) -> None:
    """The local memory of one context gets that size at once. Below the first size the context itself is smaller."""
    sizes = [8192, 1024, 512, 0, 3000]
    script = f"""
say(); wait()
for size in {sizes}:
    say(limit(STACK, size), limit(STACK)); wait()
need("cuCtxDestroy_v2", another()); say(limit(STACK, (512 << 10) + 1), limit(STACK), taken())
"""
    with machine.spawn(CODE + script) as client:
        hear(client)
        for size in sizes:
            say(client)
            rounded = (size + 15) // 16 * 16
            assert hear(client) == f"0 {rounded}"
            more = area_mib(rounded) - area_mib(FIRST)
            expected = {"context": CONTEXT + min(more, 0), "local": more}
            assert parts(machine, client.pid) == {kind: mib for kind, mib in expected.items() if mib > 0}
            assert compute_rows(machine) == {client.pid: CONTEXT + more}
        say(client)
        assert hear(client) == f"1 3008 {float(area_mib(3008) - area_mib(FIRST))}"
    machine.settles_at(0)


def test_a_launch_of_a_larger_kernel_enlarges_the_local_memory(machine: Machine) -> None:
    """Only a kernel whose local memory does not fit enlarges it, and no later launch makes it smaller."""
    script = """
_, small, s = load(local(512), "lmem"); _, large, l = load(local(5000), "lmem"); inner = another()
_, module, i = load(local(2000), "lmem"); say(taken() - 523.5625)
say(run(i), attribute(i), limit(STACK), taken() - 523.5625); need("cuCtxDestroy_v2", inner); say(taken())
say(run(s), taken(), run(l), attribute(l), taken(), limit(STACK))
need("cuModuleUnload", large); say(run(s), taken(), limit(STACK, 1024), taken())
"""
    inner, outer = area_mib(2000) - area_mib(FIRST), area_mib(5008) - area_mib(FIRST)
    assert machine.python(CODE + script) == [
        "0.0",
        f"0 2000 1024 {float(inner)}",
        "0.0",
        f"0 0.0 0 5008 {float(outer)} 1024",
        f"0 {float(outer)} 0 0.0",
    ]


def test_graph_cooperative_and_old_launches_allocate_local_memory(machine: Machine) -> None:
    """A captured launch allocates it when the graph is launched."""
    script = """
_, _, l = load(local(4096), "lmem"); s = stream(); graph, execute = C.c_void_p(), C.c_void_p()
need("cuStreamBeginCapture_v2", s, 0); need("cuLaunchKernel", l, 1, 1, 1, 1, 1, 1, 0, s, None, None)
need("cuStreamEndCapture", s, C.byref(graph))
need("cuGraphInstantiateWithFlags", C.byref(execute), graph, C.c_uint64(0))
say(taken()); need("cuGraphLaunch", execute, s); say(taken()); limit(STACK, 1024)
need("cuLaunchCooperativeKernel", l, 1, 1, 1, 1, 1, 1, 0, None, None); say(taken()); limit(STACK, 1024)
need("cuFuncSetBlockShape", l, 1, 1, 1); need("cuLaunch", l); say(taken())
"""
    assert machine.python(CODE + script) == ["0.0"] + [f"{float(area_mib(4096) - area_mib(FIRST))}"] * 3


def test_a_change_of_the_stack_limit_is_refused_during_a_capture_and_breaks_it(machine: Machine) -> None:
    script = """
s = stream(); need("cuStreamBeginCapture_v2", s, 0)
say(limit(STACK, 2048), limit(STACK), L.cuStreamEndCapture(s, C.byref(C.c_void_p())), taken())
"""
    assert machine.python(CODE + script) == ["900 1024 901 0.0"]


def test_a_call_that_does_not_fit_fails_and_allocates_nothing(make_machine: Callable[..., Machine]) -> None:
    """Each call fails with its own error. A request that fits is granted afterwards."""
    machine = make_machine(FGPU_SIM_MEMORY="4GiB")
    script = """
_, _, small = load(local(100), "lmem"); _, _, l = load(local(8192), "lmem"); _, _, m = load(MALLOC, "mal")
ballast = alloc((info()[0] - (40 << 20)) >> 21 << 21); before = taken()
say(limit(STACK, 8192), limit(STACK), run(l), run(small), taken() == before)
say(limit(HEAP, 1 << 30), run(m), load(data(60 << 20), "glob")[0], load(PRINTF, "pr")[0], taken() == before)
library, kernel = C.c_void_p(), C.c_void_p()
need("cuLibraryLoadData", C.byref(library), data(60 << 20).encode(), None, None, 0, None, None, 0)
need("cuLibraryGetKernel", C.byref(kernel), library, b"glob"); say(run(kernel), taken() == before)
made = [L.cuStreamCreate(C.byref(C.c_void_p()), 1) for _ in range(100)]; say(made.count(0), set(made))
need("cuMemFree_v2", ballast); say(run(kernel), run(m), limit(STACK, 2048), load(PRINTF, "pr")[0])
"""
    assert machine.python(CODE + script) == [
        "2 1024 2 0 True",
        "0 701 2 2 True",
        "2 True",
        "76 {0, 2}",
        "0 0 0 0",
    ]
    machine.settles_at(0)


def test_a_context_allocates_heap_and_output_of_device_code_once(machine: Machine) -> None:
    """Code that calls malloc or printf takes memory at its first load.

    The heap is allocated at the first launch. Its limit can change until then.
    """
    script = """
say(limit(HEAP, 20 << 20), limit(FIFO, 1 << 30), taken()); wait()
_, one, f = load(MALLOC, "mal"); _, two, g = load(MALLOC, "mal"); say(taken()); wait()
say(limit(HEAP, (30 << 20) + 1), limit(HEAP), run(f), run(g), limit(HEAP, 1 << 20)); wait()
_, _, p = load(PRINTF, "pr"); load(PRINTF, "pr"); say(limit(FIFO, 1 << 20), run(p), limit(FIFO, 2 << 20)); wait()
need("cuModuleUnload", one); need("cuModuleUnload", two); say(taken()); wait()
"""
    with machine.spawn(CODE + script) as client:
        for words, runtime in (
            ("0 0 0.0", 0),
            ("138.0", 138),
            (f"0 {30 * MIB + 65536} 0 0 1", 138 + 32),
            ("0 0 1", 138 + 32 + 62),
            ("232.0", 232),
        ):
            assert hear(client) == words
            assert parts(machine, client.pid).get("runtime", 0) == runtime
            assert compute_rows(machine) == {client.pid: CONTEXT + runtime}
            say(client)


def test_data_of_modules_exists_from_the_load(machine: Machine) -> None:
    """The data can be written and read from the load on, in separate granules. It cannot be freed as an allocation."""
    script = """
_, module, f = load(data(5 << 20), "glob"); _, other, g = load(data(1), "glob"); say(taken()); wait()
result, at, size = variable(module, "big"); say(result, size, variable(module, "bi")[0], variable(other, "big")[2])
need("cuMemcpyHtoD_v2", C.c_uint64(at.value + 77), b"contents", C.c_size_t(8)); out = C.create_string_buffer(8)
need("cuMemcpyDtoH_v2", out, C.c_uint64(at.value + 77), C.c_size_t(8)); say(out.raw, L.cuMemFree_v2(at), run(f))
need("cuModuleUnload", module); say(taken(), L.cuMemcpyDtoH_v2(out, at, C.c_size_t(1)))
context = another(); load(data(9 << 20), "glob"); need("cuCtxDestroy_v2", context); say(taken())
"""
    with machine.spawn(CODE + script) as client:
        assert hear(client) == "8.0"
        assert parts(machine, client.pid) == {"context": CONTEXT, "module": 8}
        assert machine.process(client.pid)["module_requested_bytes"] == (5 << 20) + 1
        say(client)
        expected = [f"0 {5 << 20} 500 1", "b'contents' 1 0", "2.0 1", "2.0"]
        assert [hear(client) for _ in expected] == expected


@pytest.mark.parametrize(
    "use",
    [
        "run(kernel)",
        "L.cuLibraryGetModule(C.byref(C.c_void_p()), library)",
        "L.cuKernelGetFunction(C.byref(C.c_void_p()), kernel)",
        "L.cuLibraryGetGlobal(C.byref(C.c_uint64()), C.byref(C.c_size_t()), library, b'big')",
    ],
)
def test_data_of_libraries_exists_from_the_first_use_in_each_context(machine: Machine, use: str) -> None:
    """The data exists until the library is unloaded. Calls that need no context do not load it."""
    script = f"""
library, kernel, value = C.c_void_p(), C.c_void_p(), C.c_int()
need("cuLibraryLoadData", C.byref(library), data(64 << 20).encode(), None, None, 0, None, None, 0)
need("cuLibraryGetKernel", C.byref(kernel), library, b"glob")
need("cuKernelGetAttribute", C.byref(value), 3, kernel, 0)
say(L.cuFuncGetAttribute(C.byref(value), 3, kernel), taken())
say({use}, {use}, taken()); context = another(); here = taken(); say({use}, taken() - here)
need("cuCtxDestroy_v2", context); say(taken()); need("cuLibraryUnload", library); say(taken())
"""
    assert machine.python(CODE + script) == ["400 0.0", "0 0 64.0", "0 64.0", "64.0", "0.0"]


def test_memory_of_streams_and_graph_nodes_is_kept_until_the_context_ends(machine: Machine) -> None:
    """The row includes as many streams and nodes as ever existed at the same time, until the context ends."""
    script = """
context = another(); here = taken()
held = [stream() for _ in range(64)]; say(taken() - here); [need("cuStreamDestroy_v2", s) for s in held]
held = [stream() for _ in range(32)]; say(taken() - here)
def graph(n):
    made, execute, node = C.c_void_p(), C.c_void_p(), C.c_void_p()
    need("cuGraphCreate", C.byref(made), 0)
    for _ in range(n): need("cuGraphAddEmptyNode", C.byref(node), made, None, C.c_size_t(0))
    need("cuGraphInstantiateWithFlags", C.byref(execute), made, C.c_uint64(0)); return execute
one = graph(5000); say(taken() - here); need("cuGraphExecDestroy", one); one = graph(5000); say(taken() - here)
two = graph(5000); say(taken() - here); wait()
need("cuCtxDestroy_v2", context); say(taken())
need("cuGraphExecDestroy", one); need("cuGraphExecDestroy", two); start()
three = graph(1000); say(taken())
"""
    with machine.spawn(CODE + script) as client:
        assert [hear(client) for _ in range(5)] == ["34.0", "34.0", "44.0", "44.0", "56.0"]
        assert parts(machine, client.pid) == {"context": 2 * CONTEXT, "launch": 56}
        assert compute_rows(machine) == {client.pid: 2 * CONTEXT + 56}
        say(client)
        assert [hear(client), hear(client)] == ["0.0", "0.0"]


def test_page_tables_of_registered_host_memory_are_in_no_process_s_row_of_nvml(machine: Machine) -> None:
    """The page tables occupy 2 MiB of the device for each GiB, until the memory is unregistered or the context ends."""
    script = """
import mmap
maps = [mmap.mmap(-1, 1 << 30) for _ in range(3)]
ats = [C.addressof(C.c_char.from_buffer(m)) for m in maps]
def register(at, size): return L.cuMemHostRegister_v2(C.c_void_p(at), C.c_size_t(size), 0)
say(register(ats[0], 1 << 29), taken(), register(ats[1], 1 << 30), taken(), register(ats[2], 1 << 29), taken()); wait()
need("cuMemHostUnregister", C.c_void_p(ats[1])); say(taken())
need("cuMemHostUnregister", C.c_void_p(ats[0])); say(taken())
register(ats[0], 1 << 30); need("cuDevicePrimaryCtxReset_v2", 0); start(); say(taken()); os._exit(0)
"""
    with machine.spawn(CODE + script) as client:
        assert hear(client) == "0 0.0 0 2.0 0 4.0"
        assert parts(machine, client.pid) == {"context": CONTEXT, "pages": 4}
        assert compute_rows(machine) == {client.pid: CONTEXT}
        device, row = machine.dump()["devices"][0], machine.process(client.pid)
        assert row["bytes"] == CONTEXT * MIB
        assert device["used_bytes"] == row["bytes"] + device["driver_bytes"]
        say(client)
        assert [hear(client) for _ in range(3)] == ["2.0", "0.0", "0.0"]
    machine.settles_at(0)


ACTS = """
import random
chance, contexts = random.Random(SEED), [(None, [])]
def enter():
    context = C.c_void_p()
    if not L.cuCtxCreate_v2(C.byref(context), 0, 0): contexts.append((context, []))
def load_one():
    name, make = chance.choice([("lmem", local), ("glob", lambda size: data(size << 11)), ("mal", None), ("pr", None)])
    code = make(chance.randrange(20000)) if make else MALLOC if name == "mal" else PRINTF
    result, module, function = load(code, name)
    if not result: contexts[-1][1].append(module); run(function)
def act():
    kind, modules = chance.randrange(9), contexts[-1][1]
    if kind == 0 and len(contexts) < 4: enter()
    if kind == 1 and len(contexts) > 1: need("cuCtxDestroy_v2", contexts.pop()[0])
    if kind == 2: limit(STACK, chance.randrange(20000))
    if kind == 3: limit(HEAP, chance.randrange(1 << 26))
    if kind == 4 and modules: need("cuModuleUnload", modules.pop())
    if kind == 5: [L.cuStreamCreate(C.byref(C.c_void_p()), 1) for _ in range(chance.randrange(20))]
    if kind > 5: load_one()
for _ in range(80): act()
say("held"); wait()
for context, _ in contexts[:0:-1]: need("cuCtxDestroy_v2", context)
need("cuDevicePrimaryCtxReset_v2", 0); say("ended"); wait()
"""


@pytest.mark.parametrize("seed", range(6))
def test_rows_and_the_driver_s_own_memory_add_up_to_the_total(make_machine: Callable[..., Machine], seed: int) -> None:
    """The device is often full. Contexts leave nothing behind."""
    machine = make_machine(FGPU_SIM_MEMORY="6GiB")
    with machine.spawn(CODE + f"SEED = {seed}\n" + ACTS) as client:
        assert hear(client) == "held"
        device, row = machine.dump()["devices"][0], machine.process(client.pid)
        assert device["used_bytes"] == row["bytes"] + device["driver_bytes"]
        assert compute_rows(machine) == {client.pid: row["bytes"] // MIB}
        say(client)
        assert hear(client) == "ended"
        assert machine.dump()["processes"] == []
        say(client)
    machine.settles_at(0)


TEXTS = {
    "comments": (
        "// .entry no()\n/* .global .b8 x[9]; */ .global .b8 a[4]; .entry f() { /* .local .b8 y[8]; */ }",
        0,
        {"a": 4},
    ),
    "types": (
        ".global .u16 a; .global .align 8 .f64 b[2][3]; .visible .global .v4 .f32 c; .global .b8 d, e[5];",
        None,
        {"a": 2, "b": 48, "c": 16, "d": 1, "e": 5},
    ),
    "values": (
        ".global .align 1 .b8 a[4] = {0, 1, 2, 3}, b[2] = {7, 8}; .global .u64 c = a; .entry f() {}",
        0,
        {"a": 4, "b": 2, "c": 8},
    ),
    "elsewhere": (
        ".extern .global .b8 a[4]; .extern .global .b8 b[]; .extern .shared .b8 c[]; .entry f() {}",
        0,
        {"a": 0, "b": 0},
    ),
    "textures": (".global .texref a; .global .surfref b; .entry f() {}", 0, {"a": 0, "b": 0}),
    "scopes": (".entry f() { .local .b8 a[3]; { .local .align 8 .b8 b[4]; } .reg .b32 %r<4>; }", 16, {}),
    "other functions": (
        ".func (.param .b32 r) g(.param .b32 a) { .local .b8 x[64]; ret; } .entry f() { .local .b32 y[2]; }",
        8,
        {},
    ),
    "directives": (
        ".visible .entry f(.param .align 8 .b8 p[16])\n.maxntid 1, 1, 1\n{ .local .align 4 .b8 a[6]; }",
        8,
        {},
    ),
    "sums": (".entry f() { .local .align 16 .b8 a[1]; .local .f64 b; .local .b8 c; }", 32, {}),
    "no end": (".entry f() { .local .b8 a[8]", 8, {}),
    "no number": (".global .b8 a[x]; .entry f() { .local .b8 b[]; }", 0, {"a": 0}),
    "nonsense": ('.global ;;; .local .entry } { ) ( .func " .align', None, {}),
}


@pytest.mark.parametrize(("text", "local", "variables"), TEXTS.values(), ids=TEXTS)
def test_the_driver_reads_the_declarations_of_assembly(
    machine: Machine, text: str, local: int | None, variables: dict[str, int]
) -> None:
    script = f"""
module, function = C.c_void_p(), C.c_void_p()
need("cuModuleLoadData", C.byref(module), (HEAD + {text!r}).encode())
found = {{name: variable(module, name)[2] for name in {list(variables)!r}}}
has = L.cuModuleGetFunction(C.byref(function), module, b"f") == 0
say(found == {variables!r}, has and attribute(function), taken() == (2 if any(found.values()) else 0))
"""
    assert machine.python(CODE + script) == [f"True {local is not None and local} True"]


def test_no_text_breaks_the_reader_of_assembly(machine: Machine) -> None:
    """Pieces of assembly in any order, with numbers of any size, are loaded or refused, and leave nothing behind."""
    words = [".version", ".global", ".local", ".entry", ".func", ".extern", ".align", ".v4", ".b8", ".u64", "f", "g"]
    words += ["malloc", "vprintf", "1", "16", "0x7fffffff", "99999999999999999999", "//", "\n", *'{}()[],;="/*<>']
    chance = random.Random(1009)
    texts = [" ".join(chance.choices(words, k=chance.randrange(60))) for _ in range(400)]
    script = f"""
results = set()
for text in {texts!r}:
    module = C.c_void_p(); result = L.cuModuleLoadData(C.byref(module), (HEAD + text).encode()); results.add(result)
    if not result: need("cuModuleUnload", module)
say(results <= {{0, 2}}, taken() in (0, 62, 138, 200))
"""
    assert machine.python(CODE + script) == ["True True"]
