"""No function of the driver that allocates, launches or shows memory without somebody having decided about it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shim_kit import ROOT, Build

SHIM = ROOT / "shim"
LISTS = sorted(p for p in (SHIM / "symbols").glob("*.txt") if p.name != "decided.txt")


def check(*arguments: object, shim: Path = SHIM) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SHIM / "check_hooks.py", "--shim", shim, *arguments]
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=20)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(SHIM / "symbols", tmp_path / "symbols")
    shutil.copy(SHIM / "shim.h", tmp_path)
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


def test_all_lists_at_once() -> None:
    assert len(LISTS) >= 6
    done = check()
    assert (done.returncode, done.stdout) == (0, "every name is hooked or decided about\n"), done


@pytest.mark.parametrize("path", LISTS, ids=lambda p: p.stem)
def test_each_list_has_what_matters(path: Path) -> None:
    names = set(path.read_text().split())
    wanted = (
        {"nvmlDeviceGetMemoryInfo"}
        if "nvml" in path.name
        else {"cuMemAlloc_v2", "cuMemAllocAsync_ptsz", "cuLaunchKernel"}
    )
    assert wanted <= names
    assert len(names) > 300


def test_simulated_libraries(build: Build, tmp_path: Path) -> None:
    made = [f"OUT={tmp_path}", f"HEADERS={build.headers}"]
    subprocess.run(["make", "-s", "-j2", "-C", ROOT / "sim", *made], check=True, timeout=120)
    done = check(*[(tmp_path / "lib" / n).resolve() for n in ("libcuda.so.1", "libnvidia-ml.so.1")])
    assert done.returncode == 0, done.stdout


def test_stand_ins(build: Build) -> None:
    """Exports are read from the file itself: this one has a name that is nobody's."""
    done = check(build.folder / "driver" / "libcuda.so.1")
    assert done.stdout == "libcuda.so.1: cuLaunchKernel_fake: neither hooked nor decided about\n"


def test_what_a_real_drivers_lookup_answered(tmp_path: Path) -> None:
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
        "nvmlDeviceGetMemoryInfo_v2",
    ],
)
def test_a_hook_that_is_taken_out_is_missed(copy: Path, name: str) -> None:
    text = (copy / "shim.h").read_text()
    (copy / "shim.h").write_text(text.replace(f"({name})", "(cuNothing)"))
    done = check(shim=copy)
    assert done.returncode == 1
    assert f": {name}: neither hooked nor decided about" in done.stdout
    assert "cuNothing: in no list" in done.stdout


@pytest.mark.parametrize(
    "name", ["cuMemHostAlloc", "cuLaunchKernel_ptsz", "cuIpcOpenMemHandle_v2", "nvmlSystemGetProcessName"]
)
def test_a_decision_that_is_taken_out_is_missed(copy: Path, name: str) -> None:
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
        ("cuMemHostAlloc: pinned host memory", "cuMemHostAlloc stands twice"),
        ("cuMemHostAllok: pinned host memory", "cuMemHostAllok: in no list"),
        ("cuMemHostAllok: pinned", "no reason"),
        ("cuMemHostAllok", "no reason"),
    ],
)
def test_the_decisions_are_held_to_their_form(copy: Path, line: str, complaint: str) -> None:
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
    ],
)  # fmt: skip
def test_a_name_of_tomorrow_is_noticed(tmp_path: Path, name: str) -> None:
    (tmp_path / "driver.txt").write_text(f"{name}\ncuDeviceGetCount\n")
    done = check(tmp_path / "driver.txt")
    assert done.stdout == f"driver.txt: {name}: neither hooked nor decided about\n"


def test_headers_are_read_as_they_are(build: Build) -> None:
    done = check("--names", build.headers / "cuda.h")
    names = set(done.stdout.split())
    assert {"cuMemAlloc", "cuMemAlloc_v2", "cuMemAllocAsync_ptsz", "cuMemcpyHtoD_v2_ptds", "cuCtxCreate_v4"} <= names
    assert not [n for n in names if not n.startswith("cu")]


def test_an_empty_file_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert check(tmp_path / "empty.txt").stdout == "empty.txt: no names\n"
