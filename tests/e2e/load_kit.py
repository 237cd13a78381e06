"""A load on a tenant that a restart of the service must not disturb."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.host import (
    GIB,
    MIB,
)
from tests.support.tenant import Client, Tenant


def load(one: Tenant) -> tuple[list[Client], Callable[[], None]]:
    """Start a client whose requests always fit, and a client whose requests never fit.

    Returns the clients, and a function that stops both and checks their results.
    """
    fits, hopeless = one.client(), one.client()
    fits.ok("context")
    hopeless.ok("context")
    fits.send(f"ask {2 * MIB} 0")
    hopeless.send(f"ask {GIB} 0")

    def stop() -> None:
        for client in (fits, hopeless):
            client.send("context")
        got, refused, other = fits.numbers(fits.receive(), "fits")
        assert (refused, other) == (0, 0), "a request that fits was not admitted"
        assert got > 0
        got, refused, other = hopeless.numbers(hopeless.receive(), "hopeless")
        assert (got, other) == (0, 0), "a request that does not fit was admitted"
        assert refused > 0
        assert fits.receive() == hopeless.receive() == "ok"

    return [fits, hopeless], stop
