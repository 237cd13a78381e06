"""Probes of a driver whose functions begin with a comparison, like those of most real drivers; return probes.

The probes are attached after the comparison, and record calls as on any other driver. The self-test of return probes
detects a kernel on which a return probe kills the process.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fgpu_ebpf.driver import probe_plan, start_checks
from fgpu_ebpf.driver.library_class import Role
from fgpu_ebpf.driver.library_files import Target
from tests.bpf.conftest import HERE, MIB, Client, Kernel, Level

BEGINNING = """
    .globl {0}
    .type {0}, @function
{0}:
    cmpl $0x321cba00, ended(%rip)
    je 1f
    jmp *real_{0}@GOTPCREL(%rip)
1:  ret
    .size {0}, . - {0}
"""


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tests' driver. Each call reaches it by a jump after such a beginning, as in the drivers 535 to 570."""
    folder = tmp_path_factory.mktemp("prologues")
    made = folder / "libcuda.so.1"
    flags = ["-O1", "-fPIC", "-w", "-fno-omit-frame-pointer", "-fcf-protection=none"]
    run("gcc", *flags, "-c", "-o", folder / "real.o", HERE / "driver.c")
    names = [line.split()[2] for line in run("nm", folder / "real.o").splitlines() if line.split()[1:2] == ["T"]]
    calls = [name for name in names if name.startswith("cu")]
    run("objcopy", *[f"--redefine-sym={name}=real_{name}" for name in calls], folder / "real.o")
    text = ".data\nended: .long 0\n.text\n" + "".join(BEGINNING.format(name) for name in calls)
    (folder / "beginnings.S").write_text(text + '.section .note.GNU-stack,"",@progbits\n')
    run("gcc", "-shared", "-pthread", "-o", made, folder / "real.o", folder / "beginnings.S")
    return made


@pytest.fixture
def other(kernel: Kernel, library: Path) -> Iterator[Kernel]:
    target = Target.of(str(library))
    kernel.probes.attach(target, Role.HOST)
    yield replace(kernel, driver=library)
    kernel.probes.let_go((target.dev, target.ino))


def test_probes_are_attached_after_the_comparison(library: Path) -> None:
    symbols = {
        line.split()[2]: int(line.split()[0], 16) for line in run("nm", "-D", library).splitlines() if " T " in line
    }
    found = probe_plan.symbol_offsets(str(library), ["cuMemAlloc_v2", "cuMemFree_v2"])
    assert found["cuMemFree_v2"] - found["cuMemAlloc_v2"] == symbols["cuMemFree_v2"] - symbols["cuMemAlloc_v2"]
    code = library.read_bytes()
    for at in found.values():
        assert code[at - 10 : at - 8] == b"\x81\x3d"
        assert code[at] == 0x74


def test_probes_record_the_arguments_and_results_of_calls(other: Kernel, level: Level) -> None:
    client = Client(other, level)
    client(f"alloc(0x1000, {4 * MIB})")
    client(f"alloc(0x2000, {6 * MIB}, 2)")  # this call fails
    assert level.used == 4 * MIB
    client(f"create(7, {2 * MIB})")
    client(f"map_(0x100000, {2 * MIB}, 7)")
    client("release(7)")
    assert level.used == 6 * MIB
    client("free(0x1000)")
    client(f"unmap(0x100000, {2 * MIB})")
    assert level.used == 0
    client.kill()


def test_the_selftest_of_return_probes_passes(kernel: Kernel) -> None:
    """A selftest that failed early would accept every kernel."""
    assert start_checks.return_probes_survive_seccomp(str(kernel.shim))
    with pytest.raises(OSError, match="the check failed"):
        start_checks.return_probes_survive_seccomp(str(kernel.shim), -1)


def test_a_process_that_dies_at_a_return_probe_makes_the_kernel_unfit(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process under such a seccomp profile gets SIGILL at the probe's return, from Linux 6.11 to early 6.13."""
    monkeypatch.setattr(start_checks, "_CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert start_checks.unfit(str(kernel.shim)) == start_checks.KILLS
    monkeypatch.undo()
    assert start_checks.unfit(str(kernel.shim)) == ""
