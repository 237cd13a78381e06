"""The whole shim and the simulated driver under sanitizers: programs/storm.c uses all functions at once.

A gatekeeper, if there is one, runs inside that program and writes the pages in the mapping that the shim reads, because
ThreadSanitizer treats two mappings of one page as different memory.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.shim.shim_kit import HERE
from tests.support.sanitizers import ADDRESS, ROOT, THREAD, UNRANDOM, Sanitizer, reported

pytestmark = [
    pytest.mark.skipif(bool(os.geteuid()), reason="mount namespaces need root"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="probe symbols are diverted in x86-64"),
    pytest.mark.slow,
    pytest.mark.flaky(reruns=0),  # an error that was found once is real
]
PROGRAMS = HERE / "programs"
THREADS, DEADLINE = 6, 120
HELLO_MS, NEVER = 1000, 1 << 30
IS_FULL = os.environ.get("FGPU_TEST_SCALE") == "full"
Scale = Callable[[int, int, int], int]


@dataclass(frozen=True)
class Under:
    """One sanitizer and the parts that are built with it."""

    by: Sanitizer
    storm: Path
    early: Path

    def run(
        self, shim: Path, reports: Path, milliseconds: int, image: str | None = None, late: bool = False
    ) -> dict[str, int]:
        """Run a storm.

        `image` is a limit in the image, without a gatekeeper. Without `image`, the program contains a gatekeeper.

        `late`: the driver now and then takes longer than a turn lasts. Pages are then given only once, because
        otherwise pages of a thread that is in the driver for so long would be given to another process.
        """
        inside = [] if image else [shim, NEVER if late else HELLO_MS]
        variables = {
            "LD_LIBRARY_PATH": str(self._late() if late else self.by.folder / "sim" / "lib"),
            "LD_PRELOAD": ":".join(map(str, (self.by.runtime, self.early, shim))),
        }
        with self._driver(reports, image) as there:
            words = [f"{name}={value}" for name, value in variables.items()]
            command = [*there, *UNRANDOM, "env", *words, self.storm, milliseconds, THREADS, *inside]
            done = subprocess.run(
                [str(word) for word in command],
                capture_output=True,
                text=True,
                timeout=DEADLINE,
                env={**os.environ, **self.by.environment(reports)},
                check=False,
            )
        assert not (text := reported(reports)), text
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        return dict(json.loads(done.stdout))

    def _late(self) -> Path:
        folder = self.by.folder / "late"
        folder.mkdir(exist_ok=True)
        libraries = self.by.folder / "sim" / "lib"
        shutil.copy(libraries / "libnvidia-ml.so.1", folder)
        driver = (libraries / "libcuda.so.1").read_bytes()
        (folder / "libcudX.so.1").write_bytes(driver.replace(b"libcuda.so.1\0", b"libcudX.so.1\0"))
        linked = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1,--no-as-needed", folder / "libcudX.so.1", "-ldl"]
        self.by.compile(folder / "libcuda.so.1", PROGRAMS / "slow_driver.c", "-w", *linked)
        return folder

    @contextmanager
    def _driver(self, reports: Path, image: str | None) -> Iterator[list[str]]:
        """Run a simulated driver in a mount namespace. Yield the start of a command line in it.

        Errors of the driver are reported too.
        """
        setup = "mount -t tmpfs -o mode=755 none /run; "
        if image:
            etc = reports / "etc"
            (etc / "fgpu").mkdir(parents=True, mode=0o755)
            (etc / "fgpu" / "limit").write_text(image)
            shutil.copy("/etc/ld.so.cache", etc)
            setup += f"mount --bind {etc} /etc; "
        server = subprocess.Popen(
            ["unshare", "--mount", *UNRANDOM, "sh", "-c", f'{setup} exec "$0"', self.by.folder / "sim" / "fgpu-simd"],
            env={**os.environ, **self.by.environment(reports), "FGPU_SIM_GPUS": "2", "FGPU_SIM_MODEL": "t4"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout
        try:
            assert server.stdout.readline() == "ready\n"
            yield ["nsenter", f"--mount=/proc/{server.pid}/ns/mnt", "--"]
        finally:
            server.terminate()
            server.communicate(timeout=20)
        assert server.returncode == 0, reported(reports)


def built(by: Sanitizer) -> Under:
    for part in ("sim", "shim"):
        by.make(part)
    sources = [PROGRAMS / "storm.c", PROGRAMS / "storm_world.c", f"-I{ROOT}/bpf", "-ldl", "-pthread"]
    early = by.folder / "early.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", PROGRAMS / "early.c", "-o", early], check=True, timeout=60)
    return Under(by, by.compile(by.folder / "storm", *sources), early)


@pytest.fixture(scope="module", params=[ADDRESS, THREAD], ids=lambda by: by.name)
def under(request: pytest.FixtureRequest) -> Under:
    return built(request.param)


def test_sanitizers_find_no_error_while_pages_change(under: Under, tmp_path: Path, scale: Scale) -> None:
    """Limits, gates, budgets and lists change every few milliseconds, and each hello gives new pages."""
    counts = under.run(under.by.folder / "shim" / "libfgpu.so", tmp_path, scale(0, 4000, 60_000))
    print(under.by.name, counts)
    assert counts["hellos"] > counts["forks"] + 1
    assert all(counts.values())


def test_sanitizers_find_no_error_with_an_image_s_limit(under: Under, tmp_path: Path, scale: Scale) -> None:
    counts = under.run(under.by.folder / "shim" / "libfgpu.so", tmp_path, scale(0, 3000, 60_000), "2GiB")
    print(under.by.name, counts)
    assert all(counts[what] for what in ("calls", "forks", "launches", "graphs"))


@pytest.mark.skipif(not IS_FULL, reason="takes a minute: ./dev test full")
def test_sanitizers_find_no_error_with_a_slow_driver(under: Under, tmp_path: Path) -> None:
    """A thread's turn ends while it is in the driver. Then two threads handle the work in flight."""
    counts = under.run(under.by.folder / "shim" / "libfgpu.so", tmp_path, 60_000, late=True)
    assert counts["launches"]


# Files whose programs preload no other library. It would be loaded before the sanitizer's library.
SUITE = ("array", "capture", "flight", "gate", "graph", "memory", "pool", "simulator", "view")


@pytest.mark.skipif(not IS_FULL, reason="the suite once more: ./dev test full")
@pytest.mark.timeout(1200)
def test_sanitizers_find_no_error_in_selected_files_of_the_shim_s_suite(under: Under, tmp_path: Path) -> None:
    files = [HERE / f"test_shim_{name}.py" for name in SUITE]
    command = [*UNRANDOM, sys.executable, "-m", "pytest", "-q", "--tb=short", "-k", "not undefined", *files]
    settings = {
        "FGPU_SHIM_UNDER": under.by.name,
        "FGPU_TEST_SCALE": "ci",
        **under.by.environment(tmp_path, leaks=False),
    }
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=1100,
        env={**os.environ, **settings},
        check=False,
    )
    assert not (text := reported(tmp_path)), text
    assert done.returncode == 0, done.stdout[-4000:]


@dataclass(frozen=True)
class Plant:
    """An error that is added to a copy of the shim, and the report that it must cause."""

    by: Sanitizer
    file: str
    was: str
    becomes: str
    said: str
    image: str | None = None
    late: bool = False


NOWHERE = "    CUdevice device;\n    int index = -1;\n"
PLANTS = {
    "freed": Plant(
        ADDRESS,
        "hooks/view.c",
        NOWHERE,
        NOWHERE + "char *volatile gone = __builtin_malloc(8); __builtin_free(gone); gone[0] = 1;\n",
        "heap-use-after-free",
    ),
    "overflow": Plant(
        ADDRESS,
        "hooks/view.c",
        NOWHERE,
        NOWHERE + "volatile int n = 0x7fffffff; n = n + 1;\n",
        "signed integer overflow",
    ),
    # Errors that sanitizers have found in the shim.
    "flags": Plant(
        THREAD,
        "account/admit.c",
        "if (!fgpu_observes(&view.usage[level])) return true;",
        "if (!(view.usage[level].flags & FGPU_OBSERVE)) return true;",
        "data race",
    ),
    "rows": Plant(
        THREAD, "hooks/processes.c", "= read_row(&page->rows[j]);", "= ((void)read_row, page->rows[j]);", "data race"
    ),
    "note": Plant(
        THREAD,
        "link/link.c",
        "seen.epoch != note->epoch",
        "seen.epoch != *(volatile uint64_t *)&note->epoch",
        "data race",
    ),
    "owner": Plant(
        THREAD,
        "standalone/allocations.c",
        "atomic_load_explicit(&entries[i].owner, memory_order_relaxed)",
        "entries[i].grant.owner",
        "data race",
        "2GiB",
    ),
    "uuid": Plant(
        THREAD,
        "account/device.c",
        "if (is_uuid(control->devices[i].uuid, uuid))",
        "if (((void)is_uuid, !memcmp(control->devices[i].uuid, uuid, 16)))",
        "data race",
        "2GiB",
    ),
    "turn": Plant(THREAD, "gate/flight.h", "_Atomic uint64_t base_ns;", "uint64_t base_ns;", "data race", late=True),
}


@pytest.mark.skipif(not IS_FULL, reason="each builds a shim: ./dev test full")
@pytest.mark.parametrize("name", PLANTS)
def test_sanitizers_find_planted_errors(name: str, tmp_path: Path) -> None:
    plant = PLANTS[name]
    under = built(plant.by)
    for part in ("shim", "bpf"):
        shutil.copytree(ROOT / part, tmp_path / part)
    shutil.copytree(plant.by.folder / "shim", tmp_path / "out")
    file = tmp_path / "shim" / plant.file
    text = file.read_text()
    assert text.count(plant.was) == 1
    file.write_text(text.replace(plant.was, plant.becomes))
    out = plant.by.make("shim", tmp_path / "shim", tmp_path / "out")
    (tmp_path / "reports").mkdir()
    with pytest.raises(AssertionError, match=plant.said):
        under.run(out / "libfgpu.so", tmp_path / "reports", 30_000, plant.image, plant.late)
