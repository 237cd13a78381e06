"""The entry of a container in the snapshot of the agent."""

from __future__ import annotations

from tests.support.commands import ask


def seen() -> dict:
    """Return the only tenant with memory in use, from the current Snapshot."""
    (tenant,) = [t for t in ask(verb="snapshot")["tenants"] if t["processes"]]
    return tenant["devices"][0]
