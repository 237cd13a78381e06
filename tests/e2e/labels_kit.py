"""Policies that select tenants by labels."""

from __future__ import annotations

from tests.support.commands import metrics
from tests.support.service import Service
from tests.support.tenant import Tenant
from tests.support.wait import eventually

HEAD = "apiVersion: fgpu.dev/v1alpha1\nkind: GpuPolicy\n"


def write(service: Service, text: str) -> None:
    """Write the policies, which replace all earlier ones. Return when they are in force."""

    def reloads() -> float:
        return metrics()["fgpu_config_last_reload_success_timestamp_seconds", frozenset()]

    before = reloads()
    (service.policies / "50.yaml").write_text(text)
    eventually(lambda: reloads() > before, 5, "the policies in force")


def limit_of(one: Tenant) -> tuple[str, int]:
    """Return the name of the tenant's policy, and its limit."""
    view = one.view()
    return view["policy"], view["devices"][0]["limit_bytes"]
