"""Programs that are started by another loader than the distribution's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import loaders
from tests.support.commands import fgpu, metrics
from tests.support.host import CONTEXT, MIB
from tests.support.place import LISTS, Container, Place
from tests.support.tenant import Tenant
from tests.support.wait import eventually

ROOM = 40 * MIB


@pytest.mark.places("host")
@pytest.mark.parametrize("kind", ["nix", "prefix", "called"])
def test_fgpu_run_limits_programs_of_every_loader(
    place: Place, tenant: Callable[[int], Tenant], tmp_path: Path, kind: str
) -> None:
    """Run a program with each kind of loader at its limit.

    `nix`: a loader that reads /etc/ld-nix.so.preload. It is the host's loader with the change of nixpkgs' patch of
    glibc. `prefix`: glibc's loader in a separate folder. `called`: a loader that is executed with the program as
    argument.
    """
    loader = tmp_path / "ld-own.so"
    made = loaders.of_nix(loader) if kind == "nix" else Path(shutil.copy(loaders.USUAL, loader))
    program = loaders.client_of(made, tmp_path / "client")
    one = tenant(CONTEXT + ROOM)
    one.assert_enforced()
    one.assert_holds(ROOM, program, str(loader) if kind == "called" else "")


@pytest.mark.places("runc")
def test_a_loader_that_reads_another_preload_list_is_named(
    place: Container, tenant: Callable[[int], Tenant], tmp_path: Path
) -> None:
    """The program is charged, and each report has the reason. Doctor and explain also show the loader."""
    (tmp_path / "none").touch()
    loaders.client_of(loaders.of_nix(tmp_path / "opt/ld.so"), tmp_path / "opt/client", Path("/opt/ld.so"))
    bound = {"/opt": tmp_path / "opt", LISTS[1]: tmp_path / "none"}
    place.mounts = [
        {"destination": at, "type": "bind", "source": str(file), "options": ["rbind", "ro"]}
        for at, file in bound.items()
    ]
    one = tenant(CONTEXT + ROOM)
    one.assert_enforced()
    other = one.client(program=Path("/opt/client"))
    other.ok(f"alloc {2 * ROOM}")
    assert one.assert_exact() == CONTEXT + 2 * ROOM
    key = "fgpu_shimless_processes", frozenset({("tenant", one.name), ("reason", "other_loader")})
    eventually(lambda: metrics().get(key) == 1, 3, "the reason")
    checks = {check["name"]: check for check in json.loads(fgpu("doctor", "--json", check=False).stdout)}
    assert checks["shim"]["found"] == f"{one.name} (other_loader), loader '/opt/ld.so'"
    assert "no_admission (other_loader)" in " ".join(fgpu("ps").stdout.split())
    explained = fgpu("explain", one.path).stdout
    assert f"without the shim: pid {other.pid} (other_loader: '/opt/ld.so')" in explained
    assert "the program's loader did not load the shim from the list that is mounted at /etc/ld.so.preload" in explained
    other.kill()
    other.close()
    one.assert_holds(ROOM)
