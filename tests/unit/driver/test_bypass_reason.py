"""Tests of the reason for which a process has no shim, with programs of each kind, and of the report."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf.api import health
from fgpu_ebpf.driver import bypass_reason
from fgpu_ebpf.driver.bypass_reason import LIST, NIX_LIST, IsShim, Reason, Reasons, loader_of, reason, search
from fgpu_ebpf.driver.discovery import Discovery
from fgpu_ebpf.linux import mapped_files
from tests.support import loaders
from tests.unit.driver.discovery_kit import Stage, settled

SHIM = Path(__file__).parents[3] / "build/shim/libfgpu.so"
SOURCE = '#include <stdio.h>\nint main(void) { puts("up"); fflush(stdout); return getchar(); }\n'
MOUNTED = f'mount -t tmpfs none /etc && touch "$1" {LIST} && mount --bind "$1" {LIST} && exec "$2"'


def at_once(is_shim: IsShim = lambda *_: True, hidden: Callable[[], set[int]] = set) -> Reasons:
    """Return Reasons that search in the calling thread."""

    def explain(pid: int, then: bypass_reason.Then) -> bool:
        then(*search(pid, is_shim))
        return True

    return Reasons(explain, hidden)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that compiles a program, which prints a line when it has started and waits."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "wait.c").write_text(SOURCE)

    def compiled(compiler: str, *flags: str) -> str:
        path = folder / "-".join(["wait", compiler, *(os.path.basename(flag) for flag in flags)])
        subprocess.run([compiler, *flags, "-o", path, folder / "wait.c"], check=True, timeout=30)
        return str(path)

    return compiled


@pytest.fixture
def reason_of() -> Iterator[Any]:
    """Return a function that starts a command and returns the reason why its process has no shim."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str, **environment: str) -> Reason | None:
        process = subprocess.Popen(command, stdin=-1, stdout=-1, env={"PATH": "/usr/sbin:/usr/bin:/bin", **environment})
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        return reason(process.pid)

    yield start
    for process in started:
        process.communicate(b"\n", timeout=30)


@pytest.mark.parametrize("flags", [["-static"], ["-static-pie"]])
def test_a_static_program_has_the_reason_static(program: Any, reason_of: Any, flags: list[str]) -> None:
    assert reason_of(program("gcc", *flags)) is Reason.STATIC


def test_a_program_with_musl_has_the_reason_musl(program: Any, reason_of: Any) -> None:
    assert reason_of(program("musl-gcc")) is Reason.MUSL
    assert reason_of(program("musl-gcc", "-static")) is Reason.STATIC


def test_a_program_without_the_mount_has_the_reason_not_mounted(program: Any, reason_of: Any) -> None:
    assert reason_of(program("gcc")) is Reason.NOT_MOUNTED
    assert "in no container, start it by fgpu run" in Reason.NOT_MOUNTED.words, "this program is in no container"
    loader = subprocess.run(["readelf", "-p", ".interp", program("gcc")], capture_output=True, text=True, check=True)
    assert reason_of(loader.stdout.split()[-1], program("gcc")) is Reason.NOT_MOUNTED, "its loader was started"


def test_a_preload_list_without_the_shim_gives_the_reason_not_loaded(
    program: Any, reason_of: Any, tmp_path: Path
) -> None:
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", MOUNTED, "sh", str(tmp_path / "list")]
    assert reason_of(*inside, program("gcc")) is Reason.NOT_LOADED


IN_A_ROOT = """
cd "$1"
mkdir usr etc
ln -s usr/lib lib
ln -s usr/lib64 lib64
mount --bind /usr usr
touch list
for place in $3; do touch ".$place" && mount --bind list ".$place"; done
exec chroot . "$2"
"""


@pytest.mark.parametrize(
    ("lists", "why"),
    [("", Reason.NOT_MOUNTED), (LIST, Reason.OTHER_LOADER), (f"{LIST} {NIX_LIST}", Reason.NOT_LOADED)],
)
def test_a_program_of_nix_has_the_reason_of_its_preload_list(
    program: Any, reason_of: Any, tmp_path: Path, lists: str, why: Reason
) -> None:
    loaders.of_nix(tmp_path / loaders.NIX_GLIBC)
    path = program("gcc", f"-Wl,--dynamic-linker=/{loaders.NIX_GLIBC}")
    shutil.copy(path, tmp_path / "nix/store/wait")
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-ec", IN_A_ROOT, "sh", str(tmp_path)]
    assert reason_of(*inside, "/nix/store/wait", lists) is why


def test_another_loader_is_named_and_cannot_forge_a_line(program: Any, tmp_path: Path) -> None:
    """The program has chosen a path with a control character and more characters than are shown."""
    loader = tmp_path / "a\nb" / ("long" * 40) / "ld.so"
    loader.parent.mkdir(parents=True)
    shutil.copy(loaders.USUAL, loader)
    path = program("gcc", f"-Wl,--dynamic-linker={loader}")
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", MOUNTED, "sh", str(tmp_path / "list"), path]
    with subprocess.Popen(inside, stdin=-1, stdout=-1) as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        reasons = at_once()
        assert reasons.of(process.pid, 1) is Reason.OTHER_LOADER
        assert reasons.loader(process.pid, 1) == loader_of(process.pid) == ascii(f"{str(loader)[:160]}...")
        assert "\n" not in loader_of(process.pid)
        process.communicate(b"\n", timeout=30)


EXIT_32_BIT = """
.globl _start
_start: mov $4, %eax; mov $1, %ebx; mov $line, %ecx; mov $3, %edx; int $0x80
mov $3, %eax; xor %ebx, %ebx; mov $line, %ecx; mov $1, %edx; int $0x80
mov $1, %eax; xor %ebx, %ebx; int $0x80
.data
line: .ascii "up\\n"
"""


def test_a_32_bit_program_has_the_reason_bits_32(reason_of: Any, tmp_path: Path) -> None:
    """The test needs no 32-bit C library. The auxiliary vector of such a program has entries of half the size."""
    (tmp_path / "wait.s").write_text(EXIT_32_BIT)
    command = ["gcc", "-m32", "-nostdlib", "-static", "-o", tmp_path / "wait", tmp_path / "wait.s"]
    subprocess.run(command, check=True, timeout=30)
    assert reason_of(str(tmp_path / "wait")) is Reason.BITS_32


def test_a_loaded_shim_without_hooks_in_use_has_the_reason_unused(program: Any, reason_of: Any) -> None:
    assert reason_of(program("gcc"), LD_PRELOAD=str(SHIM)) is Reason.UNUSED


def test_an_unknown_shim_has_the_reason_foreign_and_a_hidden_process_the_reason_hidden(
    program: Any, tmp_path: Path
) -> None:
    """A shim is identified by its file, not by the file's name."""
    copy = Path(shutil.copy(SHIM, tmp_path / "libfgpu.so"))
    environment = {"LD_PRELOAD": str(copy)}
    with subprocess.Popen([program("gcc")], stdin=-1, stdout=-1, env=environment) as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        ours = mapped_files.as_mapped(str(SHIM))
        assert reason(process.pid, lambda *file: file == ours) is Reason.FOREIGN
        assert at_once(lambda *file: file == mapped_files.as_mapped(str(copy))).of(process.pid, 1) is Reason.UNUSED
        hidden: set[int] = set()
        reasons = at_once(hidden=lambda: hidden)
        assert reasons.of(process.pid, 1) is Reason.UNUSED
        hidden.add(process.pid)
        assert reasons.of(process.pid, 1) is Reason.HIDDEN, "the hidden state was not detected"
        process.communicate(b"\n", timeout=30)


def test_an_ended_process_has_no_reason() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert reason(ended.pid) is None


def test_a_reason_is_looked_up_once_for_each_process(program: Any) -> None:
    """The process executes another program after the first lookup: a second lookup would find another reason."""
    reasons, ended = at_once(), subprocess.Popen(["true"])
    shell = 'echo up; read _; exec "$1"'
    with subprocess.Popen(["sh", "-c", shell, "sh", program("gcc", "-static")], stdin=-1, stdout=-1) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        assert reasons.of(process.pid, 1) is Reason.NOT_MOUNTED
        os.write(process.stdin.fileno(), b"\n")
        assert process.stdout.readline() == b"up\n"
        reasons.forget_ended({process.pid: SimpleNamespace(generation=1)})  # type: ignore[dict-item]
        assert reasons.of(process.pid, 1) is Reason.NOT_MOUNTED
        assert reasons.of(process.pid, 2) is Reason.STATIC, "the reason of an earlier process of this pid was used"
        reasons.forget_ended({process.pid: SimpleNamespace(generation=2)})  # type: ignore[dict-item]
        assert reasons.of(process.pid, 1) is Reason.STATIC, "the reason of an ended process was kept"
        reasons.forget_ended({})
        assert not reasons._found
        process.communicate(b"\n", timeout=30)
    ended.wait()
    assert reasons.of(ended.pid, 1) is None
    assert not reasons._found, "an unknown reason was kept"


def test_a_process_that_blocks_the_search_for_its_reason_does_not_block_the_main_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tenant can make a read of its process's mappings wait. The reason is not known until the read ends."""
    ends, searches = threading.Event(), list[int]()

    def blocked(pid: int, *_: object) -> Reason:
        searches.append(pid)
        ends.wait(10)
        return Reason.MUSL

    monkeypatch.setattr(bypass_reason, "reason", blocked)
    looks = Discovery(Stage(), {})  # type: ignore[arg-type]
    reasons, me = Reasons(looks.explain, looks.hidden), os.getpid()
    assert reasons.of(me, 1) is None, "the main thread has waited"
    assert reasons.of(me, 1) is None
    ends.set()
    settled(looks, lambda: reasons.of(me, 1))
    assert reasons.of(me, 1) is Reason.MUSL
    assert searches == [me], "one process was searched twice"


def test_a_search_that_is_not_queued_is_asked_for_again_and_its_late_result_belongs_to_no_other_program() -> None:
    queued: list[Any] = []
    is_full = [True, False, False]

    def explain(_: int, then: bypass_reason.Then) -> bool:
        queued.append(then)
        return not is_full.pop(0)

    reasons = Reasons(explain)
    assert [reasons.of(7, 1) for _ in range(3)] == [None] * 3
    assert len(queued) == 2, "the first search was not queued, and the second search runs"
    reasons.forget_ended({7: SimpleNamespace(generation=2)})  # type: ignore[dict-item]
    queued[1](Reason.STATIC, "")
    assert reasons.of(7, 2) is None, "the reason of the previous program"
    queued[2](Reason.MUSL, "")
    assert reasons.of(7, 2) is Reason.MUSL


def tenant(name: str, bypassing: dict[str, int], shimless: dict[str, int]) -> dict[str, Any]:
    return {"tenant": name, "bypassing": bypassing, "shimless": shimless, "processes": []}


def test_doctor_names_tenant_reason_and_fix() -> None:
    assert health._shims([tenant("a", {}, {})]).ok
    found = health._shims(
        [tenant("b", {"no_admission": 2}, {"musl": 1, "static": 1}), tenant("a", {"older": 1}, {}), tenant("c", {}, {})]
    )
    assert (found.ok, found.found) == (False, "a (older), b (musl, static)")
    assert f"musl: {Reason.MUSL.words}; run `fgpu explain" in found.fix
    assert "not_mounted" not in found.fix
    other = tenant("d", {"no_admission": 2}, {"other_loader": 2})
    other["processes"] = [{"loader": "'/opt/ld.so'"}, {"loader": ""}, {"loader": "'/opt/ld.so'"}, {}]
    assert health._shims([other]).found == "d (other_loader), loader '/opt/ld.so'"


def test_doctor_names_unknown_libraries_of_tenants_and_the_line_that_trusts_them() -> None:
    def library(role: str, owner: str, letter: str = "") -> dict[str, Any]:
        digest = f"sha256:{letter * 64}" if letter else ""
        return {"path": f"/{letter}", "digest": digest, "role": role, "tenant": owner, "pids": [7, 8]}

    assert health._libraries([], []).ok
    known = health._libraries([library("listed", "a", "a"), library("unknown", "", "b")], [])
    assert (known.ok, known.found) == (True, "the host's driver, and 1 trusted files"), "a library without a tenant"
    found = health._libraries(
        [library("unknown", "a", "c"), library("unknown", "b"), library("listed", "a", "a")], ["sha256:x"]
    )
    assert (found.ok, found.found) == (False, "'/c' of process 7 in a, '/' of process 7 in b")
    assert found.fix.endswith(f'write in agent.yaml: drivers: {{trusted: ["sha256:{"c" * 64}", "sha256:x"]}}')
