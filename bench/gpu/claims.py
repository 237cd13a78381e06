"""Helpers for claims on a real GPU: output of figures, assertions, and a sampler of NVML.

The module sets up the support library of the end-to-end tests for the real driver.
"""

from __future__ import annotations

import os
import threading

os.environ.setdefault("DRIVER_ROOT", "/")
from bench.lib import nvml
from tests.support import host
from tests.support.host import MIB
from tests.support.tenant import Tenant

host.ENVIRONMENT = dict(os.environ)
PYTHON = os.environ.get("TORCH_PYTHON", "python3")
GRANULE = 2 * MIB
MODULE = 128 * MIB  # the maximum size of a lazily loaded module, which is charged only after it was loaded


def say(name: str, value: object, unit: str = "") -> None:
    """Print one figure as a line `NAME VALUE UNIT`."""
    print(f"{name} {value} {unit}".rstrip(), flush=True)


def need(held: bool, what: str) -> None:
    """Print `what` if the condition holds. Raises AssertionError with `what` otherwise."""
    if not held:
        raise AssertionError(what)
    print(f"ok   {what}", flush=True)


class Skip(Exception):
    """This machine lacks something that the claim needs. The text has the reason."""


class Sampler(threading.Thread):
    """A thread that records the maximum bytes that NVML shows for each tenant, sampled every 10 ms."""

    def __init__(self, *tenants: Tenant) -> None:
        super().__init__(daemon=True)
        self.tenants = tenants
        self.most = dict.fromkeys((t.name for t in tenants), 0)
        self.samples = 0
        self._ended = threading.Event()
        self._is_complete = False  # False: the sampling has failed

    def run(self) -> None:
        while not self._ended.wait(0.01):
            for tenant in self.tenants:
                self.most[tenant.name] = max(self.most[tenant.name], nvml.bytes_of(set(tenant.pids())))
            self.samples += 1
        self._is_complete = True

    def end(self, limits: dict[str, int]) -> None:
        """Stop, and print the maximum and the excess of each tenant.

        Raises AssertionError if a maximum exceeds the tenant's limit by more than MODULE bytes, if NVML has shown no
        memory of a tenant, or if the sampling has failed.
        """
        self._ended.set()
        self.join()
        say("nvml_samples", self.samples)
        need(self._is_complete, "NVML was sampled until the end")
        for name, most in self.most.items():
            say(f"{name}_nvml_most", most, "bytes")
            say(f"{name}_nvml_excess", max(0, most - limits[name]), "bytes")
            need(most > 0, f"{name}: NVML has shown memory")
            need(most <= limits[name] + MODULE, f"{name}: NVML never above the limit plus a module load")
