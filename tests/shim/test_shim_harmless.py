"""The shim has no effect on programs without CUDA, or with a driver and no agent."""

import shutil
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.shim.shim_kit import HERE, PREAMBLE, SYSTEM_PYTHON, Agent, Build, Libc

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    "command",
    [
        ["true"],
        ["false"],
        ["sh", "-c", "echo out; echo err >&2; exit 7"],
        ["python3", "-I", "-c", "import ssl, ctypes, subprocess; print(subprocess.check_output(['echo', 'hi']))"],
        ["cc", "--version"],
        ["sort", "/etc/passwd"],
        ["sh", "-c", "umask; pwd; ls /proc/self/fd; trap; ulimit -a"],
    ],
)
def test_programs_without_cuda_run_unchanged(plain: Run, command: list[str]) -> None:
    bare, with_shim = plain(*command, preload=()), plain(*command)
    assert (with_shim.returncode, with_shim.stdout, with_shim.stderr) == (bare.returncode, bare.stdout, bare.stderr)


@pytest.mark.skipif(not shutil.which("musl-gcc"), reason="no musl-tools")
@pytest.mark.parametrize("flags", [["-static"], []])
def test_musl_programs_run_unchanged_with_ld_so_preload(build: Build, tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "m.c").write_text('#include <stdio.h>\nint main(void) { puts("fine"); return 5; }\n')
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "upper" / "ld.so.preload").write_text(f"{build.shim}\n")
    subprocess.run(["musl-gcc", *flags, "-o", tmp_path / "m", tmp_path / "m.c"], check=True, timeout=20)
    layers = f"lowerdir=/etc,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    script = 'mount -t overlay none -o "$1" /etc && cat /proc/self/maps && exec "$2"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", layers, tmp_path / "m"], capture_output=True, text=True, timeout=20
    )
    assert "libfgpu.so" in done.stdout, "the preload was not in force"
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (5, "fine", "")


@pytest.mark.parametrize("order", ["before", "after"])
def test_other_preloaded_libraries_still_find_the_next_definition(build: Build, plain: Run, order: str) -> None:
    other = build.folder / "next.so"
    preload = (other, build.shim) if order == "before" else (build.shim, other)
    script = "import ctypes; l = ctypes.CDLL(None); print(l.puts(b'x') >= 0, l.next_calls(), flush=True)"
    done = plain(SYSTEM_PYTHON, "-c", script, preload=preload)
    assert (done.returncode, sorted(done.stdout.split())) == (0, ["1", "True", "x"]), done


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_allocator_that_finds_the_next_one_by_dlsym_does_not_recurse(libc: Libc, plain: Run, order: str) -> None:
    heap, shim = libc.build.library("heap.c", "heap.so"), libc.build.shim
    done = plain(*libc.python("print('fine')"), preload=(heap, shim) if order == "before" else (shim, heap))
    assert (done.returncode, done.stdout) == (0, "fine\n"), done


def test_a_library_that_the_shim_calls_stays_loaded(build: Build, plain: Run) -> None:
    """The driver's functions are found by the loader, in a plugin that is closed and opened again."""
    linked = ("-Wl,--no-as-needed", f"-L{build.folder / 'driver'}", "-l:libcuda.so.1", "-ldl")
    plugin = build.library("plugin.c", "unloaded.so", *linked)
    script = f"""
    import mmap
    dl.dlclose.argtypes = [C.c_void_p]
    for _ in range(2):
        plugin = dl.dlopen(b"{plugin}", 2)
        alloc = C.CFUNCTYPE(C.c_int, C.c_size_t)(dl.dlsym(C.c_void_p(plugin), b"plugin_alloc"))
        print(alloc(1 << 20))
        dl.dlclose(plugin)
        keep = [mmap.mmap(-1, 1 << 14) for _ in range(20)]
        dl.dlopen(b"{build.folder}/fault.so", 2)
    """
    assert plain_python(plain, LOOKUPS + script) == "0\n0\n"


def test_a_preloaded_wrapper_of_a_hooked_function_calls_the_shim(build: Build, held: Agent) -> None:
    program = build.compile("linked.c", "linked", f"-L{build.folder / 'driver'}", "-l:libcuda.so.1")
    out, _ = held.run(program, preload=(build.folder / "next.so",))
    assert out.split()[:3] == ["0", "2", "1"]


def test_the_shim_provides_both_versions_of_dlsym(build: Build, plain: Run) -> None:
    program = build.compile("versions.c", "versions")
    assert plain(program).stdout.split() == ["libfgpu.so", "libfgpu.so", "libcuda.so.1", "none"]


def plain_python(plain: Run, script: str, **more: Any) -> str:
    done = plain(SYSTEM_PYTHON, "-c", textwrap.dedent(script), **more)
    assert done.returncode == 0, done
    return done.stdout


LOOKUPS = """
    import ctypes as C
    dl = C.CDLL(None)
    dl.dlsym.restype = dl.dlopen.restype = C.c_void_p
    dl.dlerror.restype = C.c_char_p
    def look(handle, name): return bool(dl.dlsym(C.c_void_p(handle), name)), bool(dl.dlerror())
"""


def test_dlsym_finds_no_driver_function_without_a_loaded_driver(build: Build, plain: Run) -> None:
    script = """
    maths = dl.dlopen(b"libm.so.6", 2)
    print(look(maths, b"cuMemAlloc_v2"), look(0, b"cuMemAlloc_v2"), look(maths, b"nvmlInit_v2"))
    """
    assert plain_python(plain, LOOKUPS + script) == "(False, True) (False, True) (False, True)\n"


def test_an_old_driver_gets_no_newer_functions(build: Build, plain: Run) -> None:
    script = f"""
    old = dl.dlopen(b"{build.folder}/old/libcuda.so.1", 2)
    print(look(old, b"cuCtxCreate_v4"), look(old, b"cuCtxCreate_v3"), look(old, b"cuMemAllocManaged"))
    """
    assert plain_python(plain, LOOKUPS + script) == "(False, True) (True, False) (False, True)\n"


def test_dlerror_reports_only_the_program_s_own_lookups(build: Build, plain: Run) -> None:
    script = f"""
    driver = dl.dlopen(b"{build.folder}/driver/libcuda.so.1", 2)
    print([look(driver, n) for n in (b"cuInit", b"cuMemAlloc_v2", b"cuCtxCreate", b"cuMemAlloc_v2")])
    """
    expected = "[(True, False), (True, False), (False, True), (True, False)]\n"
    assert plain_python(plain, LOOKUPS + script) == expected


def test_the_shim_finds_a_driver_that_is_closed_and_loaded_again(build: Build, plain: Run) -> None:
    script = f"""
    import mmap
    places = set()
    for i in range(3):
        driver = dl.dlopen(b"{build.folder}/driver/libcuda.so.1", 2)
        alloc = C.CFUNCTYPE(C.c_int, C.c_void_p, C.c_size_t)(dl.dlsym(C.c_void_p(driver), b"cuMemAlloc_v2"))
        p = C.c_uint64()
        print(alloc(C.addressof(p), 1 << 20), hex(p.value))
        dl.dlclose.argtypes = [C.c_void_p]
        places.add(dl.dlsym(C.c_void_p(driver), b"cuCtxGetDevice"))
        dl.dlclose(driver)
        keep = [mmap.mmap(-1, 1 << 14) for _ in range(20)]
        dl.dlopen(f"{build.folder}/fault.so".encode(), 2) if i else dl.dlopen(f"{build.folder}/next.so".encode(), 2)
    """
    assert plain_python(plain, LOOKUPS + script) == "0 0xd00000\n" * 3


def test_without_an_agent_no_limit_applies_and_one_line_reports_that(plain: Run) -> None:
    script = PREAMBLE + "L.cuInit(0); print(alloc(8 * GiB), alloc(8 * GiB), info(), L.fake_calls())"
    done = plain(SYSTEM_PYTHON, "-c", script)
    assert done.stdout == f"0 0 (0, {10 << 30}, {16 << 30}) 2\n"
    assert done.stderr == "fgpu: no agent on this host: limits are not enforced\n"


@pytest.mark.parametrize("state", ["2>&-", "2>/dev/full", "2>/dev/null"])
def test_a_stderr_that_cannot_be_written_does_not_affect_the_program(plain: Run, state: str) -> None:
    script = PREAMBLE + "L.cuInit(0); os.write(1, str(alloc(1)).encode())"
    done = plain("sh", "-c", f'exec "$@" {state}', "sh", SYSTEM_PYTHON, "-c", script)
    assert (done.returncode, done.stdout) == (0, "0")


def test_a_stderr_that_is_a_closed_pipe_does_not_affect_the_program(plain: Run) -> None:
    script = (
        PREAMBLE
        + """
r, w = os.pipe(); os.dup2(w, 2); os.close(r)
import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL)
L.cuInit(0); os.write(1, str(alloc(1)).encode())"""
    )
    done = plain(SYSTEM_PYTHON, "-c", script)
    assert (done.returncode, done.stdout) == (0, "0")


def test_helper_programs_exist() -> None:
    assert {p.name for p in (HERE / "programs").iterdir()} >= {"libcuda.c", "libnvml.c", "fault.c", "next.c"}
