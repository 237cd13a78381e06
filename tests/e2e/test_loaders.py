"""Programs that another loader than the distribution's starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import loaders
from tests.support.host import CONTEXT, MIB
from tests.support.place import Place
from tests.support.tenant import Tenant

ROOM = 40 * MIB


@pytest.mark.places("host")
def test_fgpu_run_holds_a_program_that_nix_built(place: Place, tenant: Callable[[int], Tenant], tmp_path: Path) -> None:
    """Its loader reads /etc/ld-nix.so.preload. The loader is the host's, changed as nixpkgs' patch changes glibc."""
    program = loaders.client_of(loaders.of_nix(tmp_path / "ld.so"), tmp_path / "client")
    one = tenant(CONTEXT + ROOM)
    one.assert_enforced()
    one.assert_holds(ROOM, program)
