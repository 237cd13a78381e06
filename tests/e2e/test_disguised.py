"""Libraries with misleading names, and the class that fgpu assigns to each of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.doctored import with_other_names
from tests.support.commands import fgpu, metrics
from tests.support.host import BUILD, CONTEXT, MIB, SHIM, SIM
from tests.support.kernel import is_probed
from tests.support.service import Service
from tests.support.tenant import Client, Program, Tenant
from tests.support.wait import eventually

BYPASS = f"{BUILD}/e2e/bypass"
ROOM = 96 * MIB
DRIVER = (SIM / "lib/libcuda.so.1").resolve()
MEMORY = """
import os, sys
fd = os.memfd_create("x", 0)
os.write(fd, open(sys.argv[1], "rb").read())
os.execv(sys.argv[2], [*sys.argv[2:], f"/proc/self/fd/{fd}"])
"""


class Calls(Client):
    """A program that executes the command `alloc`. Any command line may start it."""

    def __init__(self, tenant: Tenant, name: str, command: str) -> None:
        Program.__init__(self, tenant, name, command)
        tenant._programs.append(self)
        self._hello()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder that every process of the test's tenants can read."""
    tmp_path.chmod(0o755)
    place = tmp_path / "own"
    place.mkdir()
    return place


def shortly(look, what: str) -> None:  # type: ignore[no-untyped-def]
    eventually(look, 5, what)


def log_of(service: Service, since: int = 0) -> str:
    return service.log.read_bytes()[since:].decode()


# -- T26: a library with the function names of driver and shim


@pytest.mark.places("host")
def test_memory_of_a_driver_with_the_shim_s_function_names_is_limited_and_charged(tenant, folder: Path) -> None:
    """The functions named like the shim's are driver functions.

    Only a library that this host has published is a shim.
    """
    names = {"cuDeviceGetLuid": "fgpu_admit", "cuDeviceGetByPCIBusId": "fgpu_release"}
    library = folder / "libcuda.so.1"
    library.write_bytes(with_other_names(DRIVER.read_bytes(), names))
    said = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    assert "T fgpu_admit" in said
    one = tenant(CONTEXT + ROOM)
    one.assert_enforced()
    client = one.client(before=f"env LD_LIBRARY_PATH={folder}")
    with one.growing(ROOM):
        assert client.ok(f"fill {2 * MIB} 0") == [ROOM // (2 * MIB)]
    assert one.assert_exact() == CONTEXT + ROOM
    assert not one.view()["bypassing"]


@pytest.mark.places("cgroups")
def test_a_copy_of_a_published_shim_is_a_shim_until_its_contents_change(service: Service, tenant, folder: Path) -> None:
    """An image may carry a copy. The contents of the file decide its class."""
    copy = Path(shutil.copy(SHIM, folder / "libfgpu.so"))
    one = tenant(CONTEXT + ROOM)
    one.assert_enforced()
    client = one.client(before=f"env LD_PRELOAD={copy}")
    with one.growing(ROOM):
        assert client.ok(f"fill {2 * MIB} 0") == [ROOM // (2 * MIB)]
    assert not one.view()["bypassing"]
    shortly(lambda: f"probed '{copy}' as SHIM" in log_of(service), "the class of the shim")
    with copy.open("ab") as file:
        file.write(b"\0")
    shortly(lambda: f"probed '{copy}' as UNKNOWN" in log_of(service), "the new class of the changed shim")


@pytest.mark.places("cgroups")
def test_a_process_with_a_shim_that_this_host_has_not_published_is_reported_as_foreign(tenant, folder: Path) -> None:
    """Admissions by such a shim do not count. The process counts as shimless, and the reason is shown."""
    source = folder / "foreign.c"
    source.write_text("void fgpu_admit(void) {}\nvoid fgpu_release(void) {}\n")
    foreign = folder / "libfgpu.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", foreign, source], check=True, timeout=30)
    one = tenant(CONTEXT + ROOM)
    client = Calls(one, "foreign", f"env LD_PRELOAD={foreign} {BYPASS} lies")
    assert client.do(f"alloc {10 * MIB}") == "ok"
    key = "fgpu_shimless_processes", frozenset({("tenant", one.name), ("reason", "foreign")})
    shortly(lambda: metrics().get(key) == 1, "the reason `foreign` in the metrics")
    shortly(lambda: one.view()["bypassing"] == {"no_admission": 1}, "the process as bypassing")
    assert one.assert_exact() == CONTEXT + 10 * MIB
    assert "foreign: this host has not published the loaded libfgpu.so" in fgpu("explain", one.path).stdout


# -- T25: a copy under another name


def renamed(folder: Path) -> str:
    return f"{BYPASS} symbols {shutil.copy(DRIVER, folder / 'x.so')}"


def renamed_within(folder: Path) -> str:
    """Rename the library's file, and change its soname from libcuda.so.1 to another name."""
    other = DRIVER.read_bytes().replace(b"\0libcuda.so.1\0", b"\0libother.so1\0")
    assert other != DRIVER.read_bytes()
    (folder / "x.so").write_bytes(other)
    return f"{BYPASS} symbols {folder}/x.so"


def without_sections(folder: Path) -> str:
    """Remove the sections. No linker makes such a file, but loaders accept it."""
    text = bytearray(DRIVER.read_bytes())
    text[0x28:0x30], text[58:64] = bytes(8), bytes(6)
    (folder / "x.so").write_bytes(text)
    return f"{BYPASS} symbols {folder}/x.so"


def in_memory(folder: Path) -> str:
    (folder / "memory.py").write_text(MEMORY)
    return f"{sys.executable} {folder}/memory.py {DRIVER} {BYPASS} symbols"


@pytest.mark.timed
@pytest.mark.places("host")
@pytest.mark.parametrize("how", [renamed, renamed_within, without_sections, in_memory])
def test_a_copy_under_another_name_is_witnessed_once_nvml_shows_its_memory(
    service: Service, tenant, folder: Path, how
) -> None:  # type: ignore[no-untyped-def]
    one = tenant(2 * CONTEXT + 4 * ROOM)
    one.assert_enforced()
    said = service.log.stat().st_size
    client = Calls(one, "copy", how(folder))
    assert client.do(f"alloc {10 * MIB}") == "ok"
    shortly(lambda: re.search(r"probed '(\S+/x\.so|/memfd:x)' as", log_of(service, said)), "the probes of the copy")
    before = one.memory()["witnessed_bytes"]
    assert client.do(f"alloc {50 * MIB}") == "ok"
    assert one.memory()["witnessed_bytes"] == before + 50 * MIB
    shortly(lambda: one.view()["bypassing"] == {"no_admission": 1}, "the process as bypassing")
    assert one.assert_exact() == CONTEXT + 60 * MIB


@pytest.mark.places("host")
def test_a_copy_is_witnessed_although_its_process_has_called_the_genuine_library_before(
    service: Service, tenant, folder: Path
) -> None:
    """The process has the shim, and its first allocation was admitted."""
    one = tenant(3 * CONTEXT + 4 * ROOM)
    one.assert_enforced()
    said = service.log.stat().st_size
    client = Calls(one, "copy", f"{BYPASS} after {shutil.copy(DRIVER, folder / 'x.so')}")
    shortly(lambda: one.assert_exact() == CONTEXT + 2 * MIB, "the first allocation")
    assert not one.view()["bypassing"]
    assert client.do(f"alloc {10 * MIB}") == "ok"
    eventually(lambda: f"probed '{folder}/x.so' as" in log_of(service, said), 15, "the probes of the copy")
    before = one.memory()["witnessed_bytes"]
    assert client.do(f"alloc {50 * MIB}") == "ok"
    assert one.memory()["witnessed_bytes"] == before + 50 * MIB
    shortly(lambda: one.view()["bypassing"] == {"no_admission": 1}, "the process as bypassing")


@pytest.mark.places("host")
def test_a_deleted_copy_of_the_driver_is_probed_like_any_other_copy(service: Service, tenant, folder: Path) -> None:
    one = tenant(2 * CONTEXT + ROOM)
    said = service.log.stat().st_size
    client = Calls(one, "deleted", renamed(folder))
    (folder / "x.so").unlink()
    assert client.do(f"alloc {10 * MIB}") == "ok"
    shortly(lambda: f"probed '{folder}/x.so' as" in log_of(service, said), "the probes of the copy")
    assert client.do(f"alloc {10 * MIB}") == "ok"
    assert one.assert_exact() == CONTEXT + 20 * MIB


# -- classes


def doctor() -> dict[str, object]:
    """Return the line of `fgpu doctor` about libraries."""
    found = json.loads(fgpu("doctor", "--driver-root", SIM, "--json", check=False).stdout)
    return next(check for check in found if check["name"] == "libraries")


@pytest.fixture
def settings(service: Service):  # type: ignore[no-untyped-def]
    """Return the path of the host's settings, which are restored after the test."""
    before = service.config.read_text()
    yield service.config
    service.config.write_text(before)
    service.kill_agent()
    service.start_agent()


@pytest.mark.places("host")
def test_an_unknown_library_is_named_and_trusted_once_it_is_listed(
    service: Service, tenant, folder: Path, settings: Path
) -> None:
    library = folder / "libcuda.so.1"
    library.write_bytes(DRIVER.read_bytes() + b"another")
    one = tenant(CONTEXT + ROOM)
    client = one.client(before=f"env LD_LIBRARY_PATH={folder}")
    client.ok("context")
    digest = subprocess.run(["sha256sum", library], capture_output=True, text=True, check=True).stdout.split()[0]
    line = f'drivers: {{trusted: ["sha256:{digest}"]}}'
    shortly(lambda: line in str(doctor()["fix"]), "the line for agent.yaml")
    assert doctor()["found"] == f"'{library}' of process {client.pid} in {one.name}"
    shortly(lambda: f"probed '{library}' as UNKNOWN" in log_of(service), "the class of the library")
    settings.write_text(f"{settings.read_text()}{line}\n")
    service.kill_agent()
    said = service.log.stat().st_size
    service.start_agent()
    shortly(lambda: f"probed '{library}' as LISTED" in log_of(service, said), "the new class of the library")
    shortly(lambda: doctor()["ok"], "no unknown library in doctor's report")
    with one.growing(ROOM):
        assert client.ok(f"fill {2 * MIB} 0") == [ROOM // (2 * MIB)]
    service.kill_agent()
    said = service.log.stat().st_size
    service.start_agent()
    shortly(lambda: "1 trusted" in str(doctor()["found"]), "the trusted library in doctor's report after another start")
    assert "as LISTED" not in log_of(service, said), "the library was probed again although its links are pinned"
    with library.open("ab") as file:
        file.write(b"\0")
    shortly(lambda: f"probed '{library}' as UNKNOWN" in log_of(service, said), "the new class of the changed library")
    client.ok("drop 5")
    assert is_probed(library)


@pytest.mark.places("host")
def test_a_copy_of_the_host_s_driver_is_trusted(service: Service, tenant, folder: Path) -> None:
    library = Path(shutil.copy(DRIVER, folder / "libcuda.so.1"))
    one = tenant(CONTEXT + ROOM)
    one.client(before=f"env LD_LIBRARY_PATH={folder}").ok("context")
    shortly(lambda: f"probed '{library}' as LISTED" in log_of(service), "the class of the copy")
    shortly(lambda: doctor()["ok"], "no unknown library in doctor's report")
