"""Tests of files that tenants choose: the agent opens the mapped file, and no file prevents the probes of others."""

from __future__ import annotations

import os
import random
import resource
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fgpu_ebpf.driver import cuda_mappings, library_files, probe_plan
from fgpu_ebpf.driver.discovery import Discovery
from fgpu_ebpf.linux import breakpoints, elf, mapped_files, process_setup, procfs
from tests.unit.driver.discovery_kit import Stage, quiet, settled
from tests.unit.root_kit import needs_root

as_root = needs_root("it opens files in /proc/PID/map_files")

NAMES = list(probe_plan.REQUIRED)
HOLD = """
import mmap, os, sys
held = []
for path in sys.argv[1:]:
    fd = os.open(path, os.O_RDONLY)
    held.append(mmap.mmap(fd, 0, prot=mmap.PROT_READ | mmap.PROT_EXEC, flags=mmap.MAP_PRIVATE))
    os.close(fd)
print("mapped", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a library with every function that a driver must have."""
    folder = tmp_path_factory.mktemp("library")
    source, made = folder / "cuda.c", folder / "libcuda.so.1"
    source.write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in NAMES))
    subprocess.run(["gcc", "-shared", "-fPIC", "-s", "-o", made, source], check=True, timeout=30)
    return made


Mapper = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def mapper() -> Iterator[Mapper]:
    """Return a function that starts processes which map files as executable."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*paths: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", HOLD, *map(str, paths)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == b"mapped\n"
        return process

    yield start
    for process in started:
        process.communicate()


def copy(library: Path, to: Path) -> Path:
    to.write_bytes(library.read_bytes())
    return to


def within(seconds: float, what: Callable[[], object]) -> None:
    """Check that a call returns in time. A thread that hangs is abandoned."""
    thread = threading.Thread(target=what, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"the call has not returned within {seconds} s"


def put_fifo(place: Path, _: Path) -> None:
    os.mkfifo(place)


def put_link(place: Path, library: Path) -> None:
    place.symlink_to(library)


def put_junk(place: Path, _: Path) -> None:
    place.write_bytes(b"x" * 100)


def put_device(place: Path, _: Path) -> None:
    os.mknod(place, 0o20666, os.makedev(1, 3))


def put_nothing(place: Path, library: Path) -> None:
    pass


@as_root
@pytest.mark.parametrize("put", [put_fifo, put_link, put_junk, put_device, put_nothing])
def test_the_agent_opens_the_mapped_file_and_not_its_replacement(
    tmp_path: Path, library: Path, mapper: Mapper, put
) -> None:
    path = copy(library, tmp_path / "libcuda.so.1")
    was = mapped_files.as_mapped(str(path))
    pid = mapper(path).pid
    path.unlink()
    put(path, library)
    opened = []

    def look() -> None:
        (mapped,) = cuda_mappings.fgpu_mappings(pid) or ()
        fd = library_files.target_of(pid, mapped, {}).open()
        opened.append((mapped_files.mapped_as(fd), len(elf.function_offsets(fd, NAMES))))
        os.close(fd)

    within(5, look)
    assert opened == [(was, len(NAMES))]


@as_root
@pytest.mark.parametrize("put", [put_fifo, put_device])
def test_only_regular_files_are_opened(tmp_path: Path, library: Path, put) -> None:
    put(tmp_path / "there", library)
    failed = []

    def look() -> None:
        try:
            mapped_files.open_regular(str(tmp_path / "there"))
        except OSError as error:
            failed.append(error)

    within(5, look)
    assert failed


def parse(path: Path) -> dict[str, int]:
    fd = mapped_files.open_regular(str(path))
    try:
        return elf.function_offsets(fd, NAMES)
    finally:
        os.close(fd)


def test_function_offsets_equal_those_of_nm_and_readelf(library: Path) -> None:
    shown = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout.splitlines()
    addresses = {line.split()[2]: int(line.split()[0], 16) for line in shown if " T " in line}
    segments = subprocess.run(["readelf", "-lW", library], capture_output=True, text=True, check=True).stdout
    load = next(line.split() for line in segments.splitlines() if "LOAD" in line and " R E " in line)
    shift = int(load[1], 16) - int(load[2], 16)
    assert parse(library) == {name: addresses[name] + shift for name in NAMES}


def test_a_broken_library_is_parsed_or_refused_within_one_second(tmp_path: Path, library: Path) -> None:
    whole = library.read_bytes()
    (sections_at,) = struct.unpack_from("<Q", whole, 0x28)
    chance, broken = random.Random(1009), tmp_path / "libcuda.so.1"
    for _ in range(2003):
        text = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            at = chance.choice([chance.randrange(64), chance.randrange(64, 64 + 56 * 8), chance.randrange(len(whole))])
            if sections_at < len(whole) and chance.random() < 0.5:
                at = chance.randrange(sections_at, len(whole))
            text[at] = chance.choice([0, 255, chance.randrange(256)])
        broken.write_bytes(text[: chance.choice([len(text), len(text), chance.randrange(len(text))])])
        begun = time.process_time()
        try:
            offsets = parse(broken)
        except elf.ElfError:
            offsets = {}
        assert all(0 <= offset < 1 << 63 for offset in offsets.values())
        assert time.process_time() - begun < 1


def segments_of(text: bytes) -> Iterator[tuple[int, int]]:
    """Yield the offset and the type of each program header."""
    (at,), (count,) = struct.unpack_from("<Q", text, 0x20), struct.unpack_from("<H", text, 56)
    for row in range(at, at + 56 * count, 56):
        yield row, struct.unpack_from("<I", text, row)[0]


@pytest.mark.parametrize("what", ["dynamic", "segments"])
def test_an_oversized_table_is_not_read(tmp_path: Path, library: Path, what: str) -> None:
    text = bytearray(library.read_bytes())
    if what == "dynamic":
        (row,) = [row for row, kind in segments_of(text) if kind == 2]
        struct.pack_into("<Q", text, row + 32, 24 << 40)
    else:
        struct.pack_into("<H", text, 56, 65535)
    broken = tmp_path / "libcuda.so.1"
    broken.write_bytes(text)
    os.truncate(broken, 1 << 40)  # sparse: the file has this size
    with pytest.raises(elf.ElfError, match=r"longer than|more than"):
        parse(broken)


def test_an_endless_chain_of_symbols_is_abandoned(tmp_path: Path, library: Path) -> None:
    """The hash table has one endless chain, in which each hash equals the hash of the wanted name."""
    text = bytearray(library.read_bytes())
    (row,) = [row for row, kind in segments_of(text) if kind == 2]
    offset, _, _, size = struct.unpack_from("<4Q", text, row + 8)
    at = next(n for n in range(offset, offset + size, 16) if struct.unpack_from("<Q", text, n)[0] == 0x6FFFFEF5)
    wanted = elf.gnu_hash(NAMES[0].encode()) & ~1
    table = len(text) + -len(text) % 4096
    spare = next(row for row, kind in segments_of(text) if kind == 0x6474E551)  # the header of the stack
    struct.pack_into("<IIQQQQQ", text, spare, 1, 4, table, 1 << 30, 1 << 30, 1 << 20, 1 << 20)
    struct.pack_into("<Q", text, at + 8, 1 << 30)
    text += bytes(table - len(text)) + struct.pack("<5I", 1, 1, 0, 0, 1) + struct.pack("<I", wanted) * 100_003
    (tmp_path / "libcuda.so.1").write_bytes(text + bytes(table + (1 << 20) - len(text)))
    begun = time.process_time()
    with pytest.raises(elf.ElfError, match=f"a chain of the hash table has more than {elf.MOST_SYMBOLS} symbols"):
        parse(tmp_path / "libcuda.so.1")
    assert time.process_time() - begun < 1


def test_a_library_is_read_as_its_loader_does(tmp_path: Path, library: Path) -> None:
    """The reader needs no section headers, ignores false ones, and uses either hash table, as the loader does."""
    text, expected = bytearray(library.read_bytes()), parse(library)
    struct.pack_into("<Q", text, 0x28, 0)
    struct.pack_into("<3H", text, 58, 0, 0, 0)
    bare = tmp_path / "libcuda.so.1"
    bare.write_bytes(text)
    load = [sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", bare]
    subprocess.run(load, check=True, timeout=60)  # the loader accepts the file
    assert parse(bare) == expected
    source = tmp_path / "cuda.c"
    source.write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in NAMES))
    for style in ("sysv", "gnu"):
        made = tmp_path / f"{style}.so"
        flags = ["-shared", "-fPIC", f"-Wl,--hash-style={style},-soname,libcuda.so.1"]
        subprocess.run(["gcc", *flags, "-o", made, source], check=True, timeout=30)
        assert sorted(parse(made)) == sorted(NAMES)
        with made.open("rb") as file:
            assert elf.Library(file.fileno()).name == "libcuda.so.1"
            assert elf.Library(file.fileno()).offset("cuMemAllocHost_v2") is None


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every process appear to have its breakpoints, because the test double attaches no probes."""
    monkeypatch.setattr(breakpoints, "is_set", lambda *_: True)


def test_a_file_that_cannot_be_probed_does_not_prevent_other_probes_and_is_reported_once(
    tmp_path: Path, library: Path, mapper: Mapper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    seen: None,
) -> None:  # fmt: skip
    bad, good = (copy(library, tmp_path / name) for name in ("libcuda.so.bad\n1", "libcuda.so.1"))
    pids = [mapper(bad).pid, mapper(good).pid]
    monkeypatch.setattr(procfs, "pids", lambda: pids)
    stage = Stage("libcuda.so.bad")
    looks = Discovery(stage, {})  # type: ignore[arg-type]
    for n in range(3):
        looks.look_around()
        settled(looks, lambda n=n: looks.refusals == n + 1 and stage.attached)
    assert stage.attached == [str(good)]
    assert looks.unprobed() == {pids[0]}
    assert looks.reasons() == {pids[0]: "an unexpected error of a file"}
    assert looks.refusals == 3
    (said,) = [record.getMessage() for record in caplog.records if "not probed" in record.getMessage()]
    assert "an unexpected error of a file" in said
    assert "\n" not in said


def test_probed_files_of_a_cgroup_are_bounded(
    tmp_path: Path, library: Path, mapper: Mapper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    seen: None,
) -> None:  # fmt: skip
    greedy = [mapper(*(copy(library, tmp_path / f"libcuda.so.{n}.{k}") for k in range(7))) for n in range(2)]
    other = mapper(copy(library, tmp_path / "libcuda.so.1"))
    cgroups = {process.pid: "/greedy" for process in greedy} | {other.pid: "/other"}
    monkeypatch.setattr(procfs, "pids", lambda: list(cgroups))
    monkeypatch.setattr(procfs, "cgroup_path", cgroups.get)
    stage = Stage()
    looks = Discovery(stage, {}, most_files=5)  # type: ignore[arg-type]
    for _ in range(3):
        looks.look_around()
        settled(looks, lambda: len(stage.attached) == 5 + 1)
    assert looks.unprobed() == {process.pid for process in greedy}
    assert len([record for record in caplog.records if "/greedy" in record.getMessage()]) == 1
    for process in greedy:
        process.communicate()
    quiet(looks)
    looks.let_go()
    settled(looks, lambda: len(stage.known) == 1)
    again = mapper(*(copy(library, tmp_path / f"libcuda.so.again.{k}") for k in range(5)))
    cgroups[again.pid] = "/greedy"
    looks.look_at(again.pid)
    settled(looks, lambda: len(stage.known) == 1 + 5)
    assert again.pid not in looks.unprobed()


def test_the_soft_limit_of_descriptors_is_raised_to_the_hard_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    put = []
    monkeypatch.setattr(process_setup, "resource", SimpleNamespace(
        RLIMIT_NOFILE=resource.RLIMIT_NOFILE, getrlimit=lambda _: (1024, 4096), setrlimit=lambda *a: put.append(a)
    ))  # fmt: skip
    process_setup.raise_descriptor_limit()
    assert put == [(resource.RLIMIT_NOFILE, (4096, 4096))]
