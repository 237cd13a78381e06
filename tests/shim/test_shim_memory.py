"""Admission: the requested sizes, and the effect of the answers. The driver stand-in counts its calls."""

import subprocess
from pathlib import Path

import pytest

from tests.shim.shim_kit import PREAMBLE, SYSTEM_PYTHON, Agent, Build

MEMORY, CONTEXT, HELLO, VMM = 0, 2, 3, 4
MIB = 1 << 20
MOST = 1 << 48
OBSERVE = 1
OOM = 2
HELLO_ROUNDS = 4  # FGPU_HELLO_ROUNDS of link.h


def test_allocations_are_admitted_up_to_the_limit_and_not_beyond(held: Agent) -> None:
    script = "out(*[alloc(256 * MiB) for _ in range(6)], L.fake_calls())"
    assert held.python(script) == [[0, 0, 0, 0, OOM, OOM, 4]]
    assert held.do("look")["used"] == 1 << 30


@pytest.mark.parametrize("device", [0, 1])
def test_a_request_names_the_ledger_s_index_of_the_current_device(held: Agent, device: int) -> None:
    held.do("limit", device=3 + device, limit=1 << 30)
    held.python(f"L.fake_context({device + 1}); out(alloc(1))")
    assert [c["device"] for c in held.calls(MEMORY)] == [3 + device]


SIZES = {
    1: 512,
    512: 512,
    513: 1024,
    64 << 10: 64 << 10,
    MIB: MIB,
    MIB + 1: 2 * MIB,
    3 * MIB: 4 * MIB,
    4 * MIB: 4 * MIB,
    MOST - 1: MOST,
    MOST: MOST,
    MOST + 1: MOST + 1,
    (1 << 63) + 5: MOST + 1,
    (1 << 64) - 1: MOST + 1,
    (1 << 64) - 4096: MOST + 1,
}


def test_a_requested_size_is_rounded_to_the_driver_s_granules_and_capped(held: Agent) -> None:
    held.python(f"for n in {list(SIZES)}: alloc(n)")
    assert [c["bytes"] for c in held.calls(MEMORY)] == list(SIZES.values())


def test_a_pitch_is_rounded_and_cannot_overflow(held: Agent) -> None:
    held.python(
        """
p, pitch = C.c_uint64(), C.c_size_t()
for w, h in ((1000, 2000), (1 << 40, 1 << 40), (2**64 - 1, 1), (1, 2**64 - 1), (2**64 - 512, 2), (512, 1 << 40)):
    L.cuMemAllocPitch_v2(C.byref(p), C.byref(pitch), C.c_size_t(w), C.c_size_t(h), 4)
"""
    )
    assert [c["bytes"] for c in held.calls(MEMORY)] == [2 * MIB, *[MOST + 1] * 4, MOST + 1]


def test_managed_memory_is_requested_like_other_memory(held: Agent) -> None:
    script = "p = C.c_uint64(); out(*[L.cuMemAllocManaged(C.byref(p), C.c_size_t(n * MiB), 1) for n in (600, 600)])"
    assert held.python(script) == [[0, OOM]]
    assert [c["bytes"] for c in held.calls(MEMORY)] == [600 * MIB] * 2


VMM_SCRIPT = """
class Prop(C.Structure):
    _fields_ = [("type", C.c_int), ("handles", C.c_int), ("where", C.c_int), ("id", C.c_int), ("rest", C.c_uint64 * 8)]
def create(where, device, size):
    h, prop = C.c_uint64(), Prop(1, 0, where, device)
    return L.cuMemCreate(C.byref(h), C.c_size_t(size), C.byref(prop), C.c_uint64(0))
"""


def test_vmm_memory_is_requested_for_its_own_device_and_never_for_the_host(held: Agent) -> None:
    held.do("limit", device=4, limit=1 << 30)
    script = VMM_SCRIPT + "out(create(1, 1, 4 * MiB), create(2, 0, 4 * MiB), create(1, 1, 2 << 30), L.fake_calls())"
    assert held.python(script) == [[0, 0, OOM, 2]]
    assert [(c["device"], c["bytes"]) for c in held.calls(VMM)] == [(4, 4 * MIB), (4, 2 << 30)]


def test_a_context_is_requested_without_a_size_and_its_second_reference_not_at_all(held: Agent) -> None:
    script = """
c = C.c_void_p()
out(L.cuDevicePrimaryCtxRetain(C.byref(c), 0), L.cuDevicePrimaryCtxRetain(C.byref(c), 0),
    L.cuCtxCreate_v2(C.byref(c), 0, 0), L.cuCtxCreate_v3(C.byref(c), None, 0, 0, 0),
    L.cuCtxCreate_v4(C.byref(c), None, 0, 0))
"""
    assert held.python(script) == [[0, 0, 0, 0, 0]]
    assert [(c["device"], c["bytes"]) for c in held.calls(CONTEXT)] == [(3, 0)] * 4


def test_a_refused_context_returns_out_of_memory(held: Agent) -> None:
    held.do("knobs", fixed=1)
    script = """
c = C.c_void_p()
out(L.cuDevicePrimaryCtxRetain(C.byref(c), 0), L.cuCtxCreate_v2(C.byref(c), 0, 0), L.fake_calls())
"""
    assert held.python(script) == [[OOM, OOM, 0]]


def test_requests_without_a_limit_are_admitted(held: Agent) -> None:
    held.do("knobs", fixed=4)
    assert held.python("out(alloc(64 * GiB), L.fake_calls())") == [[0, 1]]


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("alloc(0)", 1),  # the driver's own error
        ("(L.fake_context(0), alloc(1 << 20))[1]", 0),  # no context: a real driver refuses the call
        ("L.cuCtxCreate_v2(C.byref(C.c_void_p()), 0, 77)", 0),
        ("create(1, 77, 4 * MiB)", 0),
    ],
)
def test_calls_that_allocate_nothing_are_not_requested(held: Agent, call: str, result: int) -> None:
    assert held.python(f"{VMM_SCRIPT}out({call})") == [[result]]
    assert [c["kind"] for c in held.calls() if c["kind"] != HELLO] == []


def test_a_device_outside_the_policy_has_no_memory(held: Agent) -> None:
    assert held.python("L.fake_context(3); out(alloc(1), L.fake_calls())") == [[OOM, 0]]


def test_a_device_beyond_the_table_has_no_memory(held: Agent) -> None:
    assert held.python(f"{VMM_SCRIPT}L.fake_last_device(40); out(create(1, 30, 4 * MiB))") == [[OOM]]


@pytest.mark.parametrize(("flags", "result"), [(0, OOM), (OBSERVE, 0)])
def test_only_observed_tenants_have_memory_on_a_device_without_a_page(held: Agent, flags: int, result: int) -> None:
    held.do("set", uuids=["77" * 16])
    held.do("limit", limit=1 << 30, flags=flags)
    assert held.python("out(L.cuDevicePrimaryCtxRetain(C.byref(C.c_void_p()), 0), alloc(1))") == [[result, result]]


def test_the_shim_returns_the_driver_s_own_error(held: Agent) -> None:
    assert held.python("L.fake_result(719); out(alloc(1))") == [[719]]


def test_a_request_is_repeated_with_the_same_ticket_after_a_lost_update(held: Agent) -> None:
    held.python("L.cuInit(0)\nos.read(0, 0)")
    held.do("reset")
    held.do("start")
    process = held.start_python("L.cuInit(0); out(1); sys.stdin.readline(); out(alloc(1))")
    process.stdout.readline()
    held.do("knobs", again=5)
    assert process.communicate("\n", timeout=10)[0] == "[0]\n"
    tickets = [c["ticket"] for c in held.calls(MEMORY)]
    assert len(tickets) == 6
    assert len(set(tickets)) == 1


def test_an_unanswered_request_repeats_the_hello_and_is_then_refused(held: Agent) -> None:
    process = held.start_python(
        "L.cuInit(0); out(1); sys.stdin.readline(); time.sleep(1.05); out(alloc(1), L.fake_calls())"
    )
    process.stdout.readline()
    held.do("knobs", mute=1)
    assert process.communicate("\n", timeout=10)[0] == f"[{OOM}, 0]\n"
    assert len(held.calls(MEMORY)) == 128
    assert len({c["ticket"] for c in held.calls(MEMORY)}) == 1
    assert 2 <= held.do("look")["hellos"] <= 1 + HELLO_ROUNDS  # as many as fit before the deadline


@pytest.mark.parametrize("lease", ["valid", "over"])
@pytest.mark.parametrize("how", ["remove", "detach"])
def test_a_detach_lifts_the_limit_of_a_running_program(held: Agent, how: str, lease: str) -> None:
    seconds = {"valid": 1.05, "over": 2.1}[lease]
    process = held.start_python(
        f"L.cuInit(0); out(1); sys.stdin.readline(); time.sleep({seconds}); out(alloc(8 * GiB), info()[2] >> 30)"
    )
    process.stdout.readline()
    held.do("knobs", mute=1)
    held.do("set", beats=lease == "valid")
    held.do(how)
    assert process.communicate("\n", timeout=10)[0] == "[0, 16]\n"


def test_each_thread_has_its_own_tickets(held: Agent) -> None:
    script = """
got = []
def work():
    for _ in range(20): got.append(alloc(64 * 512))
ts = [threading.Thread(target=work) for _ in range(16)]
[t.start() for t in ts]; [t.join() for t in ts]
out(len(got), sum(got))
"""
    assert held.python(script) == [[320, 0]]
    tickets = [c["ticket"] for c in held.calls(MEMORY)]
    assert len(tickets) == len(set(tickets)) == 320
    assert all(0 < t < 1 << 62 for t in tickets)
    assert held.do("look")["hellos"] == 1


def test_an_older_driver_works_and_dlerror_reports_nothing(held: Agent) -> None:
    script = """
dl = C.CDLL(None); dl.dlerror.restype = C.c_char_p
L.cuMemAlloc_v2; L.fake_calls; dl.dlerror()
out(alloc(1), dl.dlerror(), L.fake_calls())
"""
    assert held.python(script, driver="old") == [[0, None, 1]]


def test_a_wrapper_that_is_loaded_later_finds_the_driver_by_rtld_next(build: Build, held: Agent) -> None:
    """RTLD_NEXT of a hooked name is the driver for the wrapper, and the wrapper for the shim."""
    script = f"""
G = C.CDLL("libcuda.so.1", C.RTLD_GLOBAL); W = C.CDLL("{build.folder}/next.so"); p = C.c_uint64()
out(W.cuMemAlloc_v2(C.byref(p), C.c_size_t(8)), L.fake_calls(), W.next_calls())
"""
    later = (build.shim, build.folder / "next.so")
    assert held.python(script, libraries=later) == [[0, 1, 100]]


def test_a_linked_program_calls_the_hooks(build: Build, held: Agent) -> None:
    program = build.compile("linked.c", "linked2", f"-L{build.folder / 'driver'}", "-l:libcuda.so.1")
    assert held.run(program)[0] == f"0 2 1 {(1 << 30) - (4 << 20)} {1 << 30}\n"


def test_cu_get_proc_address_returns_the_hooks(held: Agent) -> None:
    script = """
dl = C.CDLL(None); dl.dlsym.restype = C.c_void_p
def ask(name, version):
    f = C.c_void_p()
    return L.cuGetProcAddress_v2(name, C.byref(f), version, C.c_uint64(0), None), f.value
def sym(name): return dl.dlsym(C.c_void_p(L._handle), name)
out(ask(b"cuMemAlloc", 12000) == (0, sym(b"cuMemAlloc_v2")),
    ask(b"cuCtxCreate", 10000) == (0, sym(b"cuCtxCreate_v2")),
    ask(b"cuCtxCreate", 12000) == (0, sym(b"cuCtxCreate_v3")),
    ask(b"cuGetProcAddress", 12000)[1] == sym(b"cuGetProcAddress_v2"),
    ask(b"cuLaunchKernel", 12000)[1] == sym(b"cuLaunchKernel_fake"),
    ask(b"nosuch", 1), ask(b"cuMem", 12000)[1] != sym(b"cuMemCreate"),
    ask(b"cuMemAlloc", 2000)[1] == sym(b"cuMemAlloc"))
f = C.CFUNCTYPE(C.c_int, C.c_void_p, C.c_size_t)(ask(b"cuMemAlloc", 12000)[1])
p = C.c_uint64()
out(f(C.addressof(p), 1 << 20), f(C.addressof(p), 2 << 30), L.fake_calls())
"""
    assert held.python(script) == [[True, True, True, True, True, [500, None], True, True], [0, OOM, 1]]


def test_computations_of_sizes_are_free_of_undefined_behaviour(build: Build, held: Agent, tmp_path: Path) -> None:
    """A library that aborts at the first undefined operation computes sizes up to the largest values."""
    trapping = build.make(tmp_path, "CFLAGS=-O2 -g -fsanitize=undefined -fsanitize-undefined-trap-on-error")
    script = f"""
p, pitch = C.c_uint64(), C.c_size_t()
for n in {list(SIZES)}:
    alloc(n)
    for h in (0, 1, 3, 2**32, 2**63, 2**64 - 1):
        L.cuMemAllocPitch_v2(C.byref(p), C.byref(pitch), C.c_size_t(n), C.c_size_t(h), 16)
out(info()[0])
"""
    environment = f"LD_PRELOAD={trapping}"
    where = [f"--mount=/proc/{held.process.pid}/ns/mnt", "--", "env", environment]
    done = subprocess.run(
        ["nsenter", *where, f"LD_LIBRARY_PATH={build.folder / 'driver'}", SYSTEM_PYTHON, "-c", PREAMBLE + script],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.returncode, done.stdout) == (0, "[0]\n"), done
