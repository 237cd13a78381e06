"""Random lives: programs that take and give back in every way, and die; the ledger equals the driver at every check."""

from __future__ import annotations

import itertools
import os
import random

import pytest
from harness import BUILD, CONTEXT, GIB, MIB, Program, Service, Tenant, eventually, fgpu

LIMIT = 6 * GIB


class Life(Program):
    """tests/e2e/life.c, two threads."""

    _numbers = itertools.count(1)

    def __init__(self, tenant: Tenant, seed: int) -> None:
        super().__init__(tenant, f"life{next(self._numbers)}", f"{BUILD}/e2e/life {seed} 2")
        said = self.receive(30)
        assert said == "ready 0", said

    def begin(self, operations: int) -> None:
        """So many operations of each thread."""
        self.send(str(operations))

    def end(self) -> tuple[int, int]:
        """Operations done, and refusals so far."""
        word, done, refused = self.receive(60).split()
        assert word == "ok"
        return int(done), int(refused)


def happen(chance: random.Random, service: Service, one: Tenant, lives: list[Life]) -> None:
    """Between two rounds, now and then: a death, another limit, a new agent."""
    what = chance.randrange(8)
    if what == 0:
        victim = chance.randrange(len(lives))
        pids = one.pids()
        for pid in pids:
            if os.path.basename(os.readlink(f"/proc/{pid}/exe")) == "life":
                os.kill(pid, 9)
                break
        else:
            raise AssertionError(f"no life in {pids}")
        eventually(lambda: sum(_is_life(p) for p in one.pids()) == len(lives) - 1, 5, "its death")
        dead = next(i for i, life in enumerate(lives) if not _answers(life))
        lives[dead].close()
        lives[dead] = Life(one, chance.randrange(1 << 30))
        assert victim < len(lives)
    if what == 1:
        fgpu("set", one.path, "--memory", f"{chance.randrange(2, 6)}GiB")
    if what == 2:
        service.kill_agent()
        service.start_agent()
    if what == 3:
        service.kill_gatekeeper()
        eventually(service.gatekeepers, 3, "another gatekeeper")


def _is_life(pid: int) -> bool:
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")) == "life"
    except OSError:
        return False


def _answers(life: Life) -> bool:
    try:
        life.begin(0)
        life.end()
    except (AssertionError, OSError):
        return False
    return True


@pytest.mark.places("host")
def test_random_lives(service: Service, tenant, scale) -> None:
    seed = int(os.environ.get("FGPU_TEST_SEED", random.SystemRandom().randrange(1 << 30)))
    print(f"FGPU_TEST_SEED={seed}")
    chance = random.Random(seed)
    one = tenant(LIMIT)
    one.assert_enforced()
    lives = [Life(one, chance.randrange(1 << 30)) for _ in range(3)]
    operations = refused = 0
    for _ in range(scale(5, 25, 1000)):
        for life in lives:
            life.begin(170)
        for life in lives:
            done, more = life.end()
            operations += done
            refused = max(refused, more)
        assert one.assert_exact(5) >= len(lives) * CONTEXT
        happen(chance, service, one, lives)
    memory = one.memory()
    assert operations >= scale(5, 25, 1000) * 3 * 2 * 170
    assert refused > 0
    assert memory["peak_bytes"] <= LIMIT + 16 * MIB
