"""The entry of a container in the snapshot of the agent."""

from __future__ import annotations

from tests.support.commands import ask


def seen() -> dict:
    """The one tenant that holds something, in the Snapshot of this moment."""
    (tenant,) = [t for t in ask(verb="snapshot")["tenants"] if t["processes"]]
    return tenant["devices"][0]
