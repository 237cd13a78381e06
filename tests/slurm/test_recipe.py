"""The files of the recipe for Slurm, in a real cluster: one limit for every job."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import slurm_kit as kit
from tests.support.containers import engines
from tests.support.host import CONTEXT, GIB, REFUSED, ROOT
from tests.support.service import Service
from tests.support.sim_driver import driver_books

PAGE = (ROOT / "docs/recipes.md").read_text()
FILES = dict(re.findall(r'^```\w+ title="(.+?)"\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL))
TASK = Path("/etc/slurm/fgpu.sh")  # in this world's /etc


@pytest.fixture(scope="module")
def slurm(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Slurm]:
    """A cluster with the page's policy and settings."""
    TASK.parent.mkdir(exist_ok=True)
    TASK.write_text(FILES[str(TASK)])
    TASK.chmod(0o755)
    (line,) = re.findall(r"`(TaskProlog=.*?)`", PAGE)
    cluster = kit.Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        with engines.policy(service, "30-slurm.yaml", FILES["/etc/fgpu/policy.d/30-slurm.yaml"]):
            cluster.start(line)
            yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(TASK.parent)


@pytest.fixture(autouse=True)
def _nothing_is_left(slurm: kit.Slurm) -> Iterator[None]:
    """Check after each test that its jobs have left neither a cgroup nor a tenant nor memory."""
    yield
    slurm.assert_nothing_is_left()


def test_a_job_gets_no_more_than_the_limit_and_does_not_affect_its_neighbour(slurm: kit.Slurm) -> None:
    with slurm.holding(*kit.srun(1), *kit.fill(chunks=1024, hold=600)) as held:
        got, why = slurm.filled(*kit.srun(1), *kit.fill())
        assert why == REFUSED
        assert 3 * GIB < got + CONTEXT <= 4 * GIB  # a quarter of the memory that tenants can get
        assert held == 2 * GIB
        assert 2 * GIB in [entry["block_bytes"] for entry in driver_books()]


def test_the_steps_of_a_job_share_one_limit(slurm: kit.Slurm) -> None:
    alone, _ = slurm.filled(*kit.srun(1), *kit.fill())
    step = "srun --quiet --overlap"
    first, second = (" ".join((step, *words)) for words in (kit.fill("1GiB", 1, 600), kit.fill()))
    script = f"{first} & sleep 3; {second}; kill $!; wait"
    with slurm.job("salloc", "--quiet", "--gres=shard:1", "sh", "-c", script) as job:
        said = job.communicate(timeout=60)[0]
    assert kit.FILLED.findall(said) == [(str(GIB), ""), (str(alone - GIB - CONTEXT), REFUSED)], said


def test_a_job_s_program_without_the_shim_is_killed_at_the_limit(slurm: kit.Slurm) -> None:
    with slurm.job(*kit.srun(1), "env", "-u", "LD_PRELOAD", *kit.fill("64MiB")) as job:
        said = job.communicate(timeout=60)[0]
    assert "Killed" in said
    assert "admitted" not in said
