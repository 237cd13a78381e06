"""Lookups that bypass the shim's exports end at the driver's own symbol table, which has the hooks."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.shim.shim_kit import HERE, Agent, Libc

MEMORY = 0
MIB = 1 << 20
OOM = 2
POOLS = str(HERE / "programs" / "pools.c")

PREAMBLE = """
import ctypes as C, os, json, sys, threading
DEEP = os.RTLD_NOW | os.RTLD_DEEPBIND
MiB = 1 << 20
def out(*a): os.write(1, (json.dumps(a) + "\\n").encode())
def driver(): return C.CDLL("libcuda.so.1")
def plugin(path, mode=DEEP):
    P = C.CDLL(path, mode)
    P.plugin_alloc.argtypes, P.plugin_total.restype = [C.c_size_t], C.c_size_t
    return P
def mapped(name): return sorted({l.split()[5] for l in open("/proc/self/maps") if name in l})
"""


@dataclass(frozen=True, slots=True)
class Share:
    """A tenant with 1 GiB. Its programs use one of the C libraries."""

    agent: Agent
    libc: Libc

    def script(self, script: str, driver: str = "driver", **more: Any) -> list[list[Any]]:
        """Run a script that has not opened the driver yet. Return what it passes to out()."""
        where = self.libc.build.folder / driver
        said, _ = self.agent.run(*self.libc.python(PREAMBLE + script, driver), driver=where, **more)
        return [json.loads(line) for line in said.splitlines()]


@pytest.fixture
def share(held: Agent, libc: Libc) -> Share:
    return Share(held, libc)


@pytest.fixture(scope="module")
def plugins(libc: Libc) -> dict[str, Path]:
    build = libc.build
    linked = ("-Wl,--no-as-needed", f"-L{build.folder / 'driver'}", "-l:libcuda.so.1", "-ldl")
    return {
        "linked": build.library("plugin.c", "plugins/linked.so", *linked),
        "opens": build.library("plugin.c", "plugins/opens.so", "-DOPENS"),
        "wrapper": build.library("next.c", "plugins/wrapper.so", *linked),
        "stub": build.library("stub.c", "plugins/stub.so"),
    }


@pytest.mark.parametrize("how", ["linked", "opens"])
@pytest.mark.parametrize("before", ["", "driver()", "driver().cuInit(0)"], ids=["first", "mapped", "used"])
def test_a_deep_bound_plugin_has_the_limit(share: Share, plugins: dict[str, Path], how: str, before: str) -> None:
    script = f"""
{before}
P = plugin("{plugins[how]}")
out(P.plugin_alloc(600 * MiB), P.plugin_alloc(600 * MiB), P.plugin_total(), driver().fake_calls())
"""
    assert share.script(script) == [[0, OOM, 1 << 30, 1]]
    assert [c["bytes"] for c in share.agent.calls(MEMORY)] == [600 * MIB] * 2


# The symbol table is in the code segment. The names of a real driver fill the pages behind it.
ONE_SEGMENT = ("-Wl,-z,noseparate-code",)
LAYOUTS = {
    "gnu": ("-Wl,--hash-style=gnu",),
    "sysv": ("-Wl,--hash-style=sysv",),
    "both": ("-Wl,--hash-style=both",),
    "one segment": (*ONE_SEGMENT, "names.c"),
    "lazy": ("-Wl,-z,lazy", "-Wl,-z,norelro"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deep_bound_plugins_have_the_limit_with_drivers_of_every_layout(
    share: Share, plugins: dict[str, Path], layout: str
) -> None:
    folder = f"layout-{layout.replace(' ', '-')}"
    names = "".join(f"void fake_{'of_a_long_name' * 5}_{i}(void) {{}}\n" for i in range(100))
    build = share.libc.build
    (build.folder / "names.c").write_text(names)
    flags = ("-Wl,-Bsymbolic,-soname,libcuda.so.1", *LAYOUTS[layout])
    flags = [str(build.folder / flag) if flag == "names.c" else flag for flag in flags]
    made = build.library("libcuda.c", f"{folder}/libcuda.so.1", POOLS, *flags)
    script = f"""
P, Q = plugin("{plugins["linked"]}"), plugin("{plugins["opens"]}")
out(P.plugin_alloc(600 * MiB), Q.plugin_alloc(600 * MiB), P.plugin_total(), Q.plugin_total(), driver().fake_calls())
out([l.split()[1] for l in open("/proc/self/maps") if "{made}" in l])
"""
    calls, rights = share.script(script, driver=folder)
    assert calls == [0, OOM, 1 << 30, 1 << 30, 1]
    assert not [right for right in rights if "w" in right and "x" in right]


def test_a_driver_with_its_symbol_table_in_a_code_page_works_and_dlsym_finds_the_hooks(
    share: Share, plugins: dict[str, Path]
) -> None:
    """A replacement would need anonymous memory that is executable."""
    share.libc.build.library(
        "libcuda.c", "small/libcuda.so.1", POOLS, "-Wl,-Bsymbolic,-soname,libcuda.so.1", *ONE_SEGMENT
    )
    script = f"""
P, L, p = plugin("{plugins["linked"]}"), driver(), C.c_uint64()
out(P.plugin_alloc(MiB), L.cuMemAlloc_v2(C.byref(p), C.c_size_t(2048 * MiB)), L.fake_calls())
"""
    assert share.script(script, driver="small") == [[0, OOM, 1]]


def test_a_wrapper_that_is_opened_later_finds_the_hooks(share: Share, plugins: dict[str, Path]) -> None:
    script = f"""
W, p = C.CDLL("{plugins["wrapper"]}"), C.c_uint64()
out([W.cuMemAlloc_v2(C.byref(p), C.c_size_t(600 * MiB)) for _ in range(2)], W.next_calls(), driver().fake_calls())
"""
    assert share.script(script) == [[[0, OOM], 200, 1]]
    assert [c["bytes"] for c in share.agent.calls(MEMORY)] == [600 * MIB] * 2


def test_a_program_that_is_linked_with_the_driver_has_the_limit(share: Share) -> None:
    build = share.libc.build
    program = build.compile("linked.c", "linked", f"-L{build.folder / 'driver'}", "-l:libcuda.so.1")
    said, _ = share.agent.run(*share.libc.command(program), driver=build.folder / "driver")
    assert said == f"0 2 1 {(1 << 30) - 4 * MIB} {1 << 30}\n"


def test_a_program_that_has_no_libdl_at_first_has_the_limit(share: Share, plugins: dict[str, Path]) -> None:
    """A module that libc loads for itself may load libdl and the driver. Since glibc 2.34, libdl is a part of libc."""
    build = share.libc.build
    program = build.compile("modules.c", "modules")
    for words, expected in (((), "nothing loaded\n"), ((plugins["linked"],), f"0 {OOM} loaded\n")):
        command = [*share.libc.command(program), *words]
        assert share.agent.run(*command, driver=build.folder / "driver")[0] == expected
    assert [c["bytes"] for c in share.agent.calls(MEMORY)] == [600 * MIB] * 2


@pytest.mark.parametrize("mode", ["os.RTLD_NOW", "DEEP"])
def test_a_preloaded_wrapper_is_called_at_most_once_and_its_memory_is_charged_once(
    share: Share, plugins: dict[str, Path], mode: str
) -> None:
    script = f"""
P, W = plugin("{plugins["linked"]}", {mode}), C.CDLL(None)
out(P.plugin_alloc(600 * MiB), P.plugin_alloc(600 * MiB), W.next_calls() // 100, driver().fake_calls())
"""
    wrapped = 2 if mode == "os.RTLD_NOW" else 0  # a deep-bound plugin bypasses every preloaded library
    assert share.script(script, preload=(share.libc.build.folder / "next.so",)) == [[0, OOM, wrapped, 1]]
    assert [c["bytes"] for c in share.agent.calls(MEMORY)] == [600 * MIB] * 2


def test_a_stub_behind_the_shim_is_called_once_without_recursion(share: Share, plugins: dict[str, Path]) -> None:
    script = """
S, p = C.CDLL(None), C.c_uint64()
out([S.cuMemAlloc_v2(C.byref(p), C.c_size_t(300 * MiB)) for _ in range(2)], S.stub_calls(), driver().fake_calls())
"""
    assert share.script(script, libraries=(share.libc.build.shim, plugins["stub"])) == [[[0, 0], 1, 2]]


def test_threads_that_look_up_at_the_same_time_find_the_hooks(
    share: Share, plugins: dict[str, Path], tmp_path: Path
) -> None:
    """Some threads replace the table while others read it. A child that is forked at that time has the hooks too.

    The child opens no library, because the loaders of old versions of glibc (seen with 2.19 to 2.27, without the shim)
    end a child that does so after a fork in the middle of a dlopen: `Inconsistency detected by ld.so`.
    """
    opened_before = shutil.copy(plugins["linked"], tmp_path)
    script = f"""
before = plugin("{opened_before}")
dl = C.CDLL(None); dl.dlsym.restype = dl.dlopen.restype = C.c_void_p
names = [b"cuInit", b"cuMemAlloc_v2", b"cuLaunchKernel", b"cuMemGetInfo_v2"]
start, got, wrong = threading.Barrier(12), [], []
def work(i):
    start.wait()
    if i % 3 == 0: got.append(plugin("{plugins["linked"]}").plugin_alloc(MiB))
    if i % 3 == 1: got.append(plugin("{plugins["opens"]}").plugin_alloc(MiB))
    handle = C.c_void_p(dl.dlopen(b"libcuda.so.1", 2))
    for _ in range(50):
        for name in names:
            if dl.dlsym(handle, name) != C.cast(getattr(dl, name.decode()), C.c_void_p).value: wrong.append(name)
threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
[t.start() for t in threads]
pid = os.fork()
if not pid: os._exit(before.plugin_alloc(MiB))
[t.join() for t in threads]
out(got, len(wrong), os.waitpid(pid, 0)[1])
"""
    for _ in range(5):
        assert share.script(script) == [[[0] * 8, 0, 0]]


def test_the_table_is_read_only_and_names_without_a_hook_are_still_found(
    share: Share, plugins: dict[str, Path]
) -> None:
    """Absent names are not found, and the driver's own error is returned."""
    script = f"""
P, L = plugin("{plugins["opens"]}"), driver()
dl = C.CDLL(None); dl.dlsym.restype = C.c_void_p
out([bool(dl.dlsym(C.c_void_p(L._handle), n)) for n in (b"cuCtxGetDevice", b"fake_calls", b"cuNothing", b"")])
L.fake_result(719); out(P.plugin_alloc(MiB)); L.fake_result(0)
lines = [l.split() for l in open("/proc/self/maps")]
first = next(int(l[0].split("-")[0], 16) for l in lines if l[5:] == [mapped("libcuda")[0]])
out([l[1] for l in lines if first - (1 << 16) <= int(l[0].split("-")[0], 16) < first and len(l) == 5])  # without a file
"""
    [found], [failed], [rights] = share.script(script)
    assert (found, failed) == ([True, True, False, False], 719)
    assert "r--p" in rights
    assert not [r for r in rights if "x" in r]


def test_lookups_in_nvml_by_libc_s_own_dlsym_find_the_hooks(share: Share) -> None:
    script = f"""
hidden = C.CDLL("libdl.so.2"); look = hidden.dlvsym; look.restype = C.c_void_p
C.CDLL("libm.so.6", DEEP)
version = b"{share.libc.dlsym_version}"
libc_dlsym = C.CFUNCTYPE(C.c_void_p, C.c_void_p, C.c_char_p)(look(C.c_void_p(hidden._handle), b"dlsym", version))
shim = C.CDLL(None)
N, names = C.CDLL("libnvidia-ml.so.1"), ("nvmlInit_v2", "nvmlDeviceGetMemoryInfo")
found = [libc_dlsym(N._handle, n.encode()) for n in names]
out([address == C.cast(getattr(shim, n), C.c_void_p).value for address, n in zip(found, names)])
"""
    assert share.script(script) == [[[True, True]]]


Run = Callable[..., Any]


def plain_lines(plain: Run, libc: Libc, script: str, **more: Any) -> list[Any]:
    done = plain(*libc.python(PREAMBLE + script), **more)
    assert (done.returncode, done.stderr) == (0, ""), done
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_without_a_driver_the_shim_loads_and_prints_nothing(libc: Libc, plain: Run, plugins: dict[str, Path]) -> None:
    script = f"""
os.environ.clear()
P = C.CDLL("{plugins["opens"]}", DEEP)
P.plugin_open_deep.restype = C.c_void_p
out(mapped("libcuda.so"), bool(P.plugin_open_deep(b"libm.so.6")))
"""
    done = plain("env", "-u", "LD_LIBRARY_PATH", *libc.python(PREAMBLE + script, driver=""))
    assert (done.returncode, done.stdout, done.stderr) == (0, "[[], true]\n", ""), done


@pytest.mark.parametrize("preload", [None, ()], ids=["shim", "bare"])
def test_errno_and_dlerror_are_those_of_the_program_s_own_call(
    libc: Libc, plain: Run, plugins: dict[str, Path], preload: tuple[()] | None
) -> None:
    script = f"""
P = C.CDLL("{plugins["opens"]}")  # its calls are the program's: it is not deep-bound
P.plugin_open_deep.restype = C.c_void_p
number = lambda name: C.c_int.in_dll(P, name).value
for path in (b"libm.so.6", b"/no/such/file"):
    out(bool(P.plugin_open_deep(path)), number("plugin_opened_dlerror"), number("plugin_opened_errno") == 77)
"""
    first, second = plain_lines(plain, libc, script, preload=preload)
    assert first == [True, 0, True]
    assert second[:2] == [False, 1]


@pytest.mark.parametrize("flags", ["os.RTLD_NOW", "DEEP"])
def test_dlopen_uses_the_runpath_of_its_caller(libc: Libc, plain: Run, flags: str) -> None:
    libc.build.library("next.c", "inner/leaf.so")
    caller = libc.build.library("plugin.c", "caller.so", "-DLEAF", "-Wl,--enable-new-dtags,-rpath,$ORIGIN/inner")
    assert plain_lines(plain, libc, f'out(C.CDLL("{caller}").plugin_open({flags}))') == [[1]]


def test_a_directly_opened_driver_is_the_only_copy_in_the_process(libc: Libc, plain: Run) -> None:
    path = f"{libc.build.folder}/old/libcuda.so.1"
    script = f"""
D, p = C.CDLL("{path}", DEEP), C.c_uint64()
D.cuMemAlloc_v2(C.byref(p), C.c_size_t(1))
out(mapped("libcuda.so"), D.fake_calls())
"""
    done = plain(*libc.python(PREAMBLE + script))
    assert (done.returncode, json.loads(done.stdout)) == (0, [[path], 1]), done


def test_a_driver_that_a_deep_bound_plugin_closes_stays_loaded_with_its_hooks(
    share: Share, plugins: dict[str, Path]
) -> None:
    """The plugin closes the driver after each lookup. A newly loaded driver would not have the hooks in time."""
    script = f"""
P = plugin("{plugins["opens"]}")
out([P.plugin_alloc(300 * MiB) for _ in range(4)], driver().fake_calls())
"""
    assert share.script(script) == [[[0, 0, 0, OOM], 3]]
