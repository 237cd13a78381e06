"""Programs bypass the shim in various ways. Their limit holds, or they are charged and named."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.bypass_kit import BYPASS, RAW, Bypass
from tests.support.commands import events, fgpu, metrics
from tests.support.host import BUILD, CONTEXT, GIB, MIB, REFUSED, SIM
from tests.support.service import Service
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually

NOBODY = 65534
LIMIT = CONTEXT + 400 * MIB


def static(folder: Path) -> str:
    """Build the program without a dynamic loader, which could preload the shim. It still loads the driver."""
    source, out = Path(__file__).parents[1] / "programs/bypass.c", folder / "static"
    flags = ["-std=gnu11", "-static", "-w", f"-I{BUILD}/headers"]
    subprocess.run(["gcc", *flags, "-o", out, source], check=True, timeout=60)
    return f"{out} handles"


def private_copy(folder: Path) -> str:
    """Copy the driver's library to a folder in which fgpu does not look for it."""
    (folder / "copy").mkdir()
    shutil.copy(SIM / "lib/libcuda.so.1", folder / "copy/libcuda.so.1")
    return f"env -u LD_PRELOAD LD_LIBRARY_PATH={folder}/copy:{SIM}/lib {BYPASS} plain"


def setuid(folder: Path) -> str:
    """Build a setuid program, whose loader ignores environment variables."""
    out = folder / "setuid"
    shutil.copy(BYPASS, out)
    os.chown(out, NOBODY, NOBODY)
    out.chmod(0o4755)
    return f"{out} plain {SIM}/lib/libcuda.so.1"


WAYS: dict[str, Callable[[Path], str]] = {
    "unset": lambda _: f"env -u LD_PRELOAD {BYPASS} plain",
    "dlvsym": lambda _: f"{BYPASS} dlvsym",
    "symbols": lambda _: f"{BYPASS} symbols",
    "deepbind": lambda _: f"{BYPASS} deepbind",
    "procaddress": lambda _: f"{BUILD}/e2e/client via",
    "static": static,
    "copy": private_copy,
    "setuid": setuid,
    "lies": lambda _: f"{BYPASS} lies",
    "registers": lambda _: f"{BYPASS} registers",
    "raw": lambda _: RAW,
}
HELD = ("deepbind", "procaddress")


TOLD = ("bypass", "adopted")


def is_named(tenant: Tenant) -> bool:
    """Return whether the metrics name the tenant's process."""
    return any(
        name == "fgpu_bypassing_processes" and ("tenant", tenant.name) in labels and value == 1
        for (name, labels), value in metrics().items()
    )


def assert_named(tenant: Tenant, client: Client) -> None:
    """Check that metrics and events name the process, all memory is charged, and the tenant gets no more."""
    eventually(lambda: is_named(tenant), 3, "the process in fgpu_bypassing_processes")

    def told() -> bool:
        found = [event for what in TOLD for event in events(what)]
        return any((e["tenant"], e.get("pid")) == (tenant.name, client.pid) for e in found)

    eventually(told, 5, "the event of the process")
    eventually(lambda: str(client.pid) in fgpu("ps").stdout, 3, "the process in `fgpu ps`")
    assert tenant.assert_exact(5) >= 700 * MIB
    assert tenant.client().do("context").startswith("CUDA_ERROR_OUT_OF_MEMORY")


@pytest.mark.places("cgroups")
@pytest.mark.parametrize("way", WAYS)
def test_a_program_that_bypasses_the_shim_is_limited_or_named(
    service: Service, tenant, tmp_path: Path, way: str
) -> None:
    one = tenant(LIMIT)
    tmp_path.chmod(0o755)
    client = Bypass(one, "bypass", WAYS[way](tmp_path))
    assert client.do(f"alloc {100 * MIB}").startswith("ok")
    second = client.do(f"alloc {600 * MIB}")
    if way in HELD:
        assert not second.startswith("ok")
        assert one.assert_exact() == CONTEXT + 100 * MIB
        assert one.memory()["refused"] == 1
        assert not is_named(one)
    else:
        assert second.startswith("ok"), "the shim's limit holds: this is no way around the shim"
        assert_named(one, client)


@pytest.mark.timed
@pytest.mark.places("cgroups")
def test_an_admission_that_is_never_settled_hides_no_memory(service: Service, tenant) -> None:
    """The ledger counts the process as inside a call all the time.

    The program uses no library of the driver, so no probe reports what it allocates in that time.
    """
    one = tenant(GIB)
    one.assert_enforced()
    client = Bypass(one, "unsettled", RAW)
    assert client.do(f"admit {2 * MIB}") == "ok"
    assert one.memory()["admitted_bytes"] == 2 * MIB
    assert client.do(f"alloc {9 * GIB}") == "ok"
    eventually(lambda: one.memory()["used_bytes"] >= one.driver() > 9 * GIB and is_named(one), 1, "charge and report")
    assert one.client().do("context") == REFUSED
    assert one.memory()["used_bytes"] >= one.driver()


@pytest.mark.places("runc")
def test_a_program_executed_into_a_container_has_its_limit(place, tenant) -> None:
    one = tenant(LIMIT)
    one.assert_enforced()
    script = f"echo 'alloc {600 * MIB}' | {BYPASS} plain"
    environment = [f"--env=LD_LIBRARY_PATH={SIM}/lib", f"--env=PATH={os.environ['PATH']}"]
    done = subprocess.run(
        place._command("exec", *environment, one.name, "sh", "-c", script), capture_output=True, text=True, timeout=60
    )
    assert "CUDA_ERROR_2" in done.stdout, done
    assert one.memory()["refused"] == 1
    assert one.memory()["peak_bytes"] <= LIMIT
