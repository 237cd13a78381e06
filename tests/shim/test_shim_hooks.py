"""Every function of the driver that allocates, launches or shows memory has a decision."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shim.shim_kit import ROOT, Build

SHIM = ROOT / "shim"
LISTS = sorted(p for p in (SHIM / "symbols").glob("*.txt") if p.name != "decided.txt")


def check(*arguments: object, shim: Path = SHIM) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SHIM / "check_hooks.py", "--shim", shim, *arguments]
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=20)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(SHIM / "symbols", tmp_path / "symbols")
    (tmp_path / "core").mkdir()
    shutil.copy(SHIM / "core/hook_table.h", tmp_path / "core")
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


def test_every_function_of_all_lists_has_a_decision() -> None:
    done = check()
    assert (done.returncode, done.stdout) == (0, "every name is hooked or decided about\n"), done


def test_the_lists_cover_seven_driver_branches_six_headers_and_three_lookups() -> None:
    """The lists cover headers and libraries from CUDA 11 on, including the first driver with limits of its own."""
    for kind in ("cuda-driver", "nvml-driver"):
        branches = {path.stem.split("-")[2].split(".")[0] for path in LISTS if path.name.startswith(kind)}
        assert branches >= {"470", "535", "550", "570", "580", "595", "615"}
    assert len([path for path in LISTS if "header" in path.name]) >= 6
    assert len([path for path in LISTS if "lookup" in path.name]) >= 3


def listed(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("path", LISTS, ids=lambda p: p.stem)
def test_each_list_is_complete_and_contains_the_essential_functions(path: Path) -> None:
    lines = listed(path)
    names = {name for line in lines for name in line}
    wanted = (
        {"nvmlDeviceGetMemoryInfo"}
        if "nvml" in path.name
        else {"cuMemAlloc_v2", "cuMemAllocAsync_ptsz", "cuLaunchKernel"}
    )
    assert wanted <= names
    assert len(lines) == len({line[0] for line in lines})
    if "header" in path.name:
        assert len(lines) > 300
        return
    about, source = path.read_text().splitlines()[:2]
    assert about.startswith(f"# {len(lines)} ")  # the list is complete: it has as many lines as were written
    assert path.stem.split("-")[2] in about
    assert re.fullmatch(r"# from [\w.]+/\S+\.deb", source)


@pytest.mark.parametrize("path", [p for p in LISTS if "lookup" in p.name], ids=lambda p: p.stem)
def test_lookup_lists_contain_only_exports_that_match_the_requested_name(path: Path) -> None:
    """The program lookup.c identifies a function that cuGetProcAddress returns by the address of an export."""
    exports = {line[0] for line in listed(path.with_name(path.name.replace("lookup", "driver")))}
    lines = listed(path)
    assert {given for line in lines for given in line[1:]} <= exports
    assert ["cuMemAllocAsync", "cuMemAllocAsync", "cuMemAllocAsync_ptsz"] in lines
    for asked, *given in lines:
        assert given
        assert all(name == asked or name.startswith(f"{asked}_") for name in given)


def test_the_check_finds_a_hook_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "lookup.txt").write_text("# 1 name\ncuMemTake cuMemAlloc_v2\n")
    assert "lookup.txt: cuGetProcAddress returns cuMemAlloc_v2 for cuMemTake\n" in check(tmp_path / "lookup.txt").stdout


def test_simulated_exports_have_decisions_and_simulated_lookups_match_the_real_ones(
    build: Build, tmp_path: Path
) -> None:
    made = [f"OUT={tmp_path}", f"HEADERS={build.headers}"]
    subprocess.run(["make", "-s", "-j2", "-C", ROOT / "sim", *made], check=True, timeout=120)
    libraries = [(tmp_path / "lib" / n).resolve() for n in ("libcuda.so.1", "libnvidia-ml.so.1")]
    done = check(*libraries)
    assert done.returncode == 0, done.stdout
    has = set(check("--names", libraries[0]).stdout.split())
    lines = [line.split() for line in check("--lookup", libraries[0]).stdout.splitlines()]
    real = {asked: set(given) for asked, *given in listed(SHIM / "symbols" / "cuda-lookup-580.178.04.txt")}
    assert len(lines) > 150
    assert {asked: set(given) for asked, *given in lines} == {
        asked: real.get(asked, set()) & has for asked, *_ in lines
    }


def test_the_check_finds_the_one_undecided_export_of_the_driver_stand_in(build: Build) -> None:
    """Exports are read from the file itself, whose name is in no list."""
    done = check(build.folder / "driver" / "libcuda.so.1")
    assert done.stdout == "libcuda.so.1: cuLaunchKernel_fake: neither hooked nor decided about\n"


def test_every_function_that_a_real_driver_s_lookup_returned_has_a_decision(tmp_path: Path) -> None:
    lines = (ROOT / "tests" / "sim" / "conformance_h200.txt").read_text().splitlines()
    names = {line.split()[-1] for line in lines if line.startswith("lookup.") and line.split()[-1].startswith("cu")}
    assert "cuMemAllocAsync_ptsz" in names
    (tmp_path / "lookup.txt").write_text("\n".join(sorted(names)))
    assert check(tmp_path / "lookup.txt").returncode == 0


@pytest.mark.parametrize(
    "name",
    [
        "cuMemAlloc_v2",
        "cuMemAllocAsync_ptsz",
        "cuArray3DCreate",
        "cuCtxCreate_v3",
        "cuGraphLaunch",
        "cuLaunchKernelEx_ptsz",
        "cuLaunchGridAsync",
        "nvmlDeviceGetMemoryInfo_v2",
    ],
)
def test_the_check_finds_a_missing_hook(copy: Path, name: str) -> None:
    text = (copy / "core/hook_table.h").read_text()
    (copy / "core/hook_table.h").write_text(text.replace(f"({name})", "(cuNothing)"))
    done = check(shim=copy)
    assert done.returncode == 1
    assert f": {name}: neither hooked nor decided about" in done.stdout
    assert "cuNothing: in no list" in done.stdout


@pytest.mark.parametrize(
    "name", ["cuMemHostAlloc", "cuLaunchHostFunc_ptsz", "cuIpcOpenMemHandle_v2", "nvmlSystemGetProcessName"]
)
def test_the_check_finds_a_missing_decision(copy: Path, name: str) -> None:
    path = copy / "symbols" / "decided.txt"
    path.write_text(
        "\n".join(
            line.replace(f" {name}:", ":").replace(f"{name} ", "").replace(f"{name}:", "#:")
            for line in path.read_text().splitlines()
        )
    )
    done = check(shim=copy)
    assert done.returncode == 1
    assert f": {name}: neither hooked nor decided about" in done.stdout


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("cuMemAlloc_v2: it is hooked though", "cuMemAlloc_v2: hooked, and in decided.txt"),
        ("cuMemHostAlloc: pinned host memory", "cuMemHostAlloc is listed twice"),
        ("cuMemHostAllok: pinned host memory", "cuMemHostAllok: in no list"),
        ("cuMemHostAllok: pinned", "no reason"),
        ("cuMemHostAllok", "no reason"),
    ],
)
def test_the_check_finds_an_invalid_decision(copy: Path, line: str, complaint: str) -> None:
    with (copy / "symbols" / "decided.txt").open("a") as file:
        file.write(f"{line}\n")
    done = check(shim=copy)
    assert done.returncode == 1
    assert complaint in done.stdout


@pytest.mark.parametrize(
    "name",
    [
        "cuMemAllocSomethingNew_v9", "cuArray4DCreate", "cuCtxCreate_v7", "cuLaunchKernelNext_ptsz",
        "cuDeviceTotalMem_v3",
        "cuMemGetInfo_v3", "cuGraphInstantiateAgain", "cuMemPoolAnything", "cuDevicePrimaryCtxRetain_v2",
        "nvmlDeviceGetMemoryInfo_v3", "nvmlDeviceGetComputeRunningProcesses_v4", "nvmlInit_v3",
        "nvmlDeviceGetEncoderSessions_v2", "nvmlDeviceGetAccountingStats_v3", "nvmlDeviceGetSamples_v2",
    ],
)  # fmt: skip
def test_the_check_finds_an_unknown_future_function(tmp_path: Path, name: str) -> None:
    (tmp_path / "driver.txt").write_text(f"{name}\ncuDeviceGetCount\n")
    done = check(tmp_path / "driver.txt")
    assert done.stdout == f"driver.txt: {name}: neither hooked nor decided about\n"


def test_the_check_finds_functions_by_the_structs_of_a_header(build: Build, tmp_path: Path) -> None:
    """A function that writes a pid or an amount of memory is found by its structs, under any name."""
    header = (build.headers / "nvml.h").read_text(errors="replace")
    (tmp_path / "nvml.h").write_text(header)
    assert check(tmp_path / "nvml.h").returncode == 0
    new = """
typedef struct { unsigned int pid; } nvmlOne_v1_t;
typedef nvmlOne_v1_t nvmlOne_t;
typedef struct { nvmlOne_t *ones; } nvmlMany_t;
nvmlReturn_t DECLDIR nvmlDeviceGetGuests(nvmlDevice_t device, nvmlMany_t *many);
nvmlReturn_t DECLDIR nvmlDeviceGetSpeedOfLight(nvmlDevice_t device, unsigned int *speed);
"""
    (tmp_path / "nvml.h").write_text(header + new)
    assert check(tmp_path / "nvml.h").stdout == "nvml.h: nvmlDeviceGetGuests: neither hooked nor decided about\n"


def test_the_check_reads_versioned_and_unversioned_names_from_a_header(build: Build) -> None:
    done = check("--names", build.headers / "cuda.h")
    names = set(done.stdout.split())
    assert {"cuMemAlloc", "cuMemAlloc_v2", "cuMemAllocAsync_ptsz", "cuMemcpyHtoD_v2_ptds", "cuCtxCreate_v4"} <= names
    assert not [n for n in names if not n.startswith("cu")]


def test_the_check_reports_an_empty_list(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert check(tmp_path / "empty.txt").stdout == "empty.txt: no names\n"
