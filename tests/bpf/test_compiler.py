"""The compiler of the BPF programs: two processes compile half of the programs each."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from fgpu_ebpf.driver import programs
from tests.bpf.compile_kit import REPOSITORY
from tests.support.wait import eventually


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return shutil.copytree(REPOSITORY / "bpf", tmp_path / "bpf")


def start(sources: Path) -> subprocess.Popen[str]:
    command = [*programs.LOADER, str(programs.COMPILER_FILE), str(sources)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("file", "argument"), [("calls.bpf.h", "struct pt_regs"), ("adjust.bpf.h", "struct bpf_raw_tracepoint_args")]
)
def test_an_error_in_either_half_ends_the_compiler_with_the_error(sources: Path, file: str, argument: str) -> None:
    """The error is in an additional program, which the other half does not compile."""
    wrong = f"\nint wrong({argument} *ctx)\n"
    with (sources / file).open("a") as end:
        end.write(wrong + "{\n    return not_there.delete(&ctx);\n}\n")
    done = start(sources)
    output, errors = done.communicate(timeout=60)
    assert (done.returncode, output) == (1, "")
    assert errors.strip().splitlines()[-1].startswith("fgpu compiler: BCC cannot compile")


def test_both_halves_have_the_same_maps_and_together_all_programs(sources: Path) -> None:
    output, _ = start(sources).communicate(timeout=60)
    image = json.loads(output)
    text = "".join(path.read_text() for path in sources.glob("*.bpf.h"))
    assert {name for name in image["programs"] if f"\nint {name}(" in text} == set(image["programs"])
    assert len(image["programs"]) == text.count("\nint ")


def test_no_process_of_a_killed_compiler_stays(sources: Path) -> None:
    compiler = start(sources)
    children = Path(f"/proc/{compiler.pid}/task/{compiler.pid}/children")
    eventually(lambda: children.read_text().split(), 10, "the second process of the compiler")
    (child,) = map(int, children.read_text().split())
    compiler.kill()
    compiler.communicate()
    assert compiler.returncode == -signal.SIGKILL
    eventually(lambda: not os.path.exists(f"/proc/{child}"), 10, "the end of the second process")
