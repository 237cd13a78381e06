"""Small steps that hypothesis chooses, and shrinks after a failure, compared with a model that tracks every byte.

Sizes are whole granules. The model can therefore predict exactly which requests are admitted or refused, and what
remains.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.support.commands import fgpu
from tests.support.host import CONTEXT, MIB, REFUSED, new_seed
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually

GRANULE = 2 * MIB
LIMIT = 3 * CONTEXT + 128 * MIB
MOST_CLIENTS, MOST_LIMITS = 4, 3
granules = st.integers(1, 48)


@dataclass(eq=False)
class Life:
    """A process in the model."""

    client: Client
    ready: bool = False  # whether it has its context
    pieces: set[Piece] = field(default_factory=set)  # its other memory

    @property
    def held(self) -> int:
        """Return the bytes that it holds on the device."""
        return (CONTEXT if self.ready else 0) + sum(piece.bytes for piece in self.pieces)

    def lose_all(self) -> None:
        """Drop its memory and its context."""
        self.ready = False
        self.pieces.clear()


@dataclass(frozen=True, eq=False)
class Piece:
    """Memory of a process, with its address or handle. It is in the `pieces` of the process until it is freed."""

    life: Life
    at: int
    bytes: int
    how: str

    def give(self) -> str:
        """Return the command that frees it."""
        words = {"vmm": f"unmap {self.at} {self.bytes}", "create": f"release {self.at}"}
        return words.get(self.how, f"free {self.at}")


class Machine(RuleBasedStateMachine):
    """The processes of one tenant."""

    lives = Bundle("lives")
    pieces = Bundle("pieces")
    tenant: ClassVar[Tenant]
    steps: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Life] = []
        self.limits = 0
        self._limit_to(LIMIT)

    def _limit_to(self, bytes_: int) -> None:
        fgpu("set", self.tenant.path, "--memory", f"{bytes_}B")
        self.limit = bytes_

    @property
    def used(self) -> int:
        """Return the bytes that the ledger must show."""
        return sum(life.held for life in self.all)

    def _ask(self, life: Life, command: str, bytes_: int) -> list[int] | None:
        """Run a command that allocates. It must succeed if the bytes fit, and otherwise fail with out-of-memory."""
        fits = self.used + bytes_ <= self.limit
        said = life.client.do(command)
        self.steps[f"{command.split()[0]} {'granted' if fits else 'refused'}"] += 1
        assert said.startswith("ok") if fits else said == REFUSED, f"{command} at {self.used} of {self.limit}: {said}"
        return Client.numbers(said, command) if fits else None

    def _ready(self, life: Life) -> bool:
        """Return whether the process has a context. Create a context if it fits."""
        if not life.ready and self._ask(life, "context", CONTEXT) is not None:
            life.ready = True
        return life.ready

    # -- processes

    @initialize(target=lives)
    def begin_one(self) -> object:
        """Start the first process."""
        return self.begin()

    @precondition(lambda self: len(self.all) < MOST_CLIENTS)
    @rule(target=lives)
    def begin(self) -> object:
        """Start another process, with a context if that fits."""
        self.all.append(Life(self.tenant.client()))
        self._ready(self.all[-1])
        return self.all[-1]

    @rule(life=consumes(lives))
    def kill(self, life: Life) -> None:
        """Kill a process with SIGKILL."""
        life.client.kill()
        life.lose_all()
        self.all.remove(life)
        eventually(lambda: life.client.pid not in self.tenant.pids(), 5, "the exit of the process")
        self.tenant.assert_exact()
        life.client.close()

    @rule(life=lives)
    def execute(self, life: Life) -> None:
        """Execute another program. Its memory is freed, but the driver still shows this memory for a moment."""
        life.client.execute_again()
        life.lose_all()
        eventually(lambda: self.tenant.driver() == self.used, 5, "the driver's free of the previous program's memory")
        self.tenant.assert_exact()

    @rule(life=lives)
    def fork(self, life: Life) -> None:
        """Fork a child that exits."""
        life.client.ok("fork")

    @rule(life=lives)
    def make_context(self, life: Life) -> None:
        """Create a second context, and destroy it."""
        made = self._ask(life, "newcontext", CONTEXT) if self._ready(life) else None
        if made is not None:
            assert self.tenant.memory()["used_bytes"] == self.used + CONTEXT == self.tenant.driver()
            life.client.ok(f"endcontext {made[0]}")

    # -- memory

    @rule(target=pieces, life=lives, size=granules, how=st.sampled_from(["alloc", "vmm", "managed", "create"]))
    def take(self, life: Life, size: int, how: str) -> object:
        """Allocate memory of any kind."""
        got = self._ask(life, f"{how} {size * GRANULE}", size * GRANULE) if self._ready(life) else None
        if got is None:
            return multiple()
        piece = Piece(life, got[0], size * GRANULE, how)
        life.pieces.add(piece)
        return piece

    @rule(target=pieces, life=lives)
    def take_all(self, life: Life) -> object:
        """Allocate the rest, to the last granule. The next granule is refused."""
        left = (self.limit - self.used) // GRANULE
        return self.take(life, left, "alloc") if self._ready(life) and left > 0 else multiple()

    @rule(piece=pieces)
    def give(self, piece: Piece) -> None:
        """Free a piece, or try to free it again."""
        life = piece.life
        if piece in life.pieces:
            life.client.ok(piece.give())
            life.pieces.remove(piece)
        elif life in self.all and piece.at not in {other.at for other in life.pieces}:
            assert not life.client.do(piece.give()).startswith("ok")

    @rule(life=lives, size=granules, brief=st.booleans())
    def leap(self, life: Life, size: int, brief: bool) -> None:
        """Leave an admitted call with longjmp.

        Its bytes stay charged until NVML shows that the driver allocated nothing.
        """
        if self._ready(life) and self.used + size * GRANULE <= self.limit:
            assert life.client.do(f"{'brieflyleap' if brief else 'leap'} {size * GRANULE}") == "ok"
            if not brief:
                assert not life.client.do("free 4096").startswith("ok")
            self.tenant.assert_exact()

    # -- limits

    @precondition(lambda self: self.limits < MOST_LIMITS)
    @rule(size=st.integers(0, 2 * CONTEXT // GRANULE))
    def limit_to(self, size: int) -> None:
        """Set another limit, perhaps below the bytes in use."""
        self.limits += 1
        self._limit_to(2 * CONTEXT + size * GRANULE)

    @invariant()
    def books_balance(self) -> None:
        """Check that ledger and driver equal the model at once."""
        self.steps["all"] += 1
        memory = self.tenant.memory()
        assert memory["used_bytes"] == self.used, f"the ledger {memory}, the model {self.used}"
        assert self.tenant.driver() == self.used

    def teardown(self) -> None:
        """End all processes."""
        for life in self.all:
            life.client.kill()
        eventually(lambda: self.tenant.memory()["used_bytes"] == 0, 2, "the release of all memory")
        for life in self.all:
            life.client.close()


@pytest.mark.timeout(3600)
@pytest.mark.places("runc")
def test_the_ledger_equals_the_model_after_every_step(
    tenant: Callable[[int], Tenant], scale: Callable[[int, int, int], int]
) -> None:
    Machine.tenant = tenant(LIMIT)
    Machine.tenant.assert_enforced()
    number = int(os.environ.get("FGPU_TEST_SEED", new_seed()))
    print(f"FGPU_TEST_SEED={number}")
    chosen = settings(
        max_examples=scale(4, 20, 1000),
        stateful_step_count=30,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(number)(Machine), settings=chosen)
    print(dict(Machine.steps))
    assert Machine.steps["all"] > scale(40, 200, 10_000), "too few steps: nothing was tested"
