"""Programs of a tenant that bypass the shim."""

from __future__ import annotations

from tests.support.host import BUILD
from tests.support.tenant import Client, Program, Tenant

BYPASS = f"{BUILD}/e2e/bypass"
RAW = f"{BUILD}/e2e/raw"  # needs no library of the driver


class Bypass(Client):
    """A program that executes the command `alloc`. Any command line may start it."""

    def __init__(self, tenant: Tenant, name: str, command: str) -> None:
        Program.__init__(self, tenant, name, command)
        tenant._programs.append(self)
        self._hello()
