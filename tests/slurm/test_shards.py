"""The scripts of deploy/slurm in a real cluster: each job gets the part of a GPU's memory that its shards are."""

from __future__ import annotations

import json
import os
import re
import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import slurm_kit as kit
from tests.support.commands import fgpu, output
from tests.support.containers import engines
from tests.support.host import CONTEXT, GIB, MIB, REFUSED, ROOT
from tests.support.service import Service
from tests.support.tenant import PROGRAM
from tests.support.wait import eventually

PAGE = (ROOT / "docs/slurm.md").read_text()
BLOCK = re.compile(r'^ *```\w+ title="(.+?)"\n(.*?)^ *```', re.MULTILINE | re.DOTALL)
LINES = next(textwrap.dedent(text) for name, text in BLOCK.findall(PAGE) if name == "/etc/slurm/slurm.conf")
POLICY = Path("/etc/fgpu/policy.d/30-slurm.yaml")  # in this world's /etc
in_full = pytest.mark.skipif(os.environ.get("FGPU_TEST_SCALE") != "full", reason="downloads packages of Debian's sid")
NOTHING = f"cuDevicePrimaryCtxRetain: {REFUSED}\n"
# Variables by which a job could claim to be another job, or to have more shards.
CLAIMS = {
    "SLURM_JOB_ID": "1", "SLURM_JOBID": "1", "SLURM_SHARDS_ON_NODE": "4", "SLURM_GPUS_ON_NODE": "2",
    "SLURM_JOB_GPUS": "0,1", "SLURM_STEP_GPUS": "0,1", "SLURM_TRES_PER_TASK": "gres:shard:4",
}  # fmt: skip


@pytest.fixture(
    scope="module", params=["", "trixie", pytest.param("sid", marks=in_full)], ids=["22.05", "24.11", "sid"]
)
def slurm(
    request: pytest.FixtureRequest, service: Service, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[kit.Slurm]:
    """A cluster after `fgpu setup slurm`, with the lines that the command has printed."""
    cluster = kit.Slurm(tmp_path_factory.mktemp("slurm"), request.param)
    try:
        first, what, *lines = cluster.call("fgpu", "setup", "slurm").stdout.splitlines()
        assert (first, what) == (f"{POLICY}: written", "add to slurm.conf, and restart slurmctld and slurmd:")
        assert "\n".join(lines).replace(str(ROOT), "/usr/lib/fgpu/site/fgpu_ebpf") == LINES.strip()
        with engines.policy(service, POLICY.name, POLICY.read_text()):
            cluster.start("\n".join(lines))
            yield cluster
    finally:
        cluster.stop()
        fgpu("setup", "slurm", "--undo")
        assert not POLICY.exists()


@pytest.fixture(autouse=True)
def _nothing_is_left(slurm: kit.Slurm) -> Iterator[None]:
    """Check after each test that its jobs have left neither a cgroup nor a tenant nor memory."""
    yield
    slurm.assert_nothing_is_left()


def is_part(got: int, shards: int) -> bool:
    """Return whether a program got the memory of that number of shards, besides its context."""
    return shards * 4 * GIB - 600 * MIB * shards // 4 < got + CONTEXT <= shards * 4 * GIB


def test_jobs_side_by_side_get_the_memory_of_their_shards(slurm: kit.Slurm) -> None:
    with slurm.holding(*kit.srun(3), *kit.fill(hold=600)) as held:
        assert is_part(held, 3)
        got, why = slurm.filled(*kit.srun(1), *kit.fill())
        assert is_part(got, 1)
        assert why == REFUSED


def test_a_job_on_the_second_gpu_gets_its_memory_there_and_nothing_on_the_first(slurm: kit.Slurm) -> None:
    """The simulated driver ignores CUDA_VISIBLE_DEVICES, so that the program names the device itself."""
    commands = f"device 0\\ndevice 1\\nfill {2 * MIB}\\n"
    two = [*kit.srun(2), "sh", "-c", f"printf '{commands}' | {PROGRAM}"]
    with slurm.holding(*kit.srun(3), *kit.fill(hold=600)), slurm.job(*two) as job:
        said = job.communicate(timeout=60)[0].splitlines()
    assert said[1:3] == [REFUSED, "ok"], said
    assert is_part(int(said[3].split()[1]) * 2 * MIB, 2)


def test_a_job_with_a_whole_gpu_gets_its_memory(slurm: kit.Slurm) -> None:
    got, why = slurm.filled(*kit.srun(0, "--gpus=1"), *kit.fill("64MiB"))
    assert is_part(got, 4)
    assert why == REFUSED


def test_a_job_without_a_gpu_gets_no_memory(slurm: kit.Slurm) -> None:
    with slurm.job(*kit.srun(0), *kit.fill()) as job:
        assert NOTHING in job.communicate(timeout=60)[0]


def test_a_job_without_a_gpu_takes_nothing_from_a_whole_gpu(slurm: kit.Slurm) -> None:
    """The first job has tried to use a GPU, and still runs while the second job starts."""
    script = f"{' '.join(kit.fill())}; echo tried; exec sleep 600"
    with slurm.job(*kit.srun(0), "sh", "-c", script) as job:
        try:
            assert job.stdout
            assert NOTHING in "".join(iter(job.stdout.readline, "tried\n"))
            for _ in range(2):  # each has all of a GPU, also just after the end of another job
                got, _ = slurm.filled(*kit.srun(0, "--gpus=2"), *kit.fill("64MiB"))
                assert is_part(got, 4)
            assert job.poll() is None
        finally:
            job.terminate()
    assert "drain" not in slurm.call("sinfo", "-ho", "%T").stdout


def test_variables_of_a_job_get_it_nothing_more(slurm: kit.Slurm) -> None:
    claims = [f"{name}={value}" for name, value in CLAIMS.items()]
    got, why = slurm.filled(*kit.srun(1, "--comment=fgpu:memory=100%"), "env", *claims, *kit.fill())
    assert is_part(got, 1)
    assert why == REFUSED
    read = ("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_TRES_PER_TASK")  # by srun, as its user's request
    asked = {name: value for name, value in CLAIMS.items() if name not in read}
    got, _ = slurm.filled(*kit.srun(1), *kit.fill(), **asked)
    assert is_part(got, 1)


def test_the_name_and_the_comment_of_a_job_get_it_nothing_more(slurm: kit.Slurm) -> None:
    """slurmctld prints both beside what the job was granted."""
    forged = f"x Nodes={kit.NODE} CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1)"
    for text in (forged, forged.replace(" ", "\n")):
        got, why = slurm.filled(*kit.srun(1, f"--job-name={text}", f"--comment={text}"), *kit.fill())
        assert is_part(got, 1)
        assert why == REFUSED


@pytest.mark.parametrize(
    ("comment", "part"),
    [
        ("fgpu:memory=1GiB", 0.25),
        ("project 7: fgpu:memory=12.5% fgpu:memory=3GiB", 0.5),
        ("fgpu:memory=4TiB", 1),
        ("fgpu:memory=100%\nfgpu:compute=100%", 1),
    ],
)
def test_a_job_gets_less_if_its_comment_asks_for_less(slurm: kit.Slurm, comment: str, part: float) -> None:
    got, why = slurm.filled(*kit.srun(1, f"--comment={comment}"), *kit.fill())
    assert (is_part(got, 1) and part == 1) or 4 * GIB * part - 100 * MIB < got + CONTEXT <= 4 * GIB * part
    assert why == REFUSED


def test_a_job_with_a_mistake_in_its_comment_gets_its_share_and_its_output_names_it_once(
    slurm: kit.Slurm, tmp_path: Path
) -> None:
    """A comment also may have bytes that are not UTF-8."""
    words = kit.srun(1, "--comment=\udcff fgpu:memory=1GB\tfgpu:x`id`\x1b[2J fgpu:compute=50%")
    with slurm.job(*words, *kit.fill()) as job:
        said = job.communicate(timeout=60)[0]
    note = "fgpu: ignored in the job's comment: 'fgpu:memory=1GB', 'fgpu:x`id`\\x1b[2J': write fgpu:memory=6GiB, "
    assert said.startswith(note), said
    assert is_part(kit.parsed(said)[0], 1)
    script = f"srun true; srun {' '.join(kit.fill())}; echo end"
    _, out = submitted(slurm, tmp_path, "--comment=fgpu:weight=9", script=script)
    eventually(lambda: out.exists() and "end" in out.read_text(), 60, "the job")
    assert re.findall("fgpu: ignored.*?: (.*?):", out.read_text()) == ["'fgpu"], out.read_text()
    assert is_part(kit.parsed(out.read_text())[0], 2)
    assert "drain" not in slurm.call("sinfo", "-ho", "%T").stdout


def test_a_job_on_two_gpus_gets_both(slurm: kit.Slurm) -> None:
    commands = f"device 0\\nfill {64 * MIB}\\ndevice 1\\nfill {64 * MIB}\\n"
    with slurm.job(*kit.srun(0, "--gpus=2"), "sh", "-c", f"printf '{commands}' | {PROGRAM}") as job:
        said = job.communicate(timeout=60)[0].splitlines()
    assert [is_part(int(said[line].split()[1]) * 64 * MIB, 4) for line in (2, 4)] == [True, True], said


def test_jobs_that_compete_for_a_gpu_have_weights_like_their_shards(slurm: kit.Slurm) -> None:
    words = kit.fill(chunks=1, hold=600)
    with slurm.holding(*kit.srun(3), *words), slurm.holding(*kit.srun(1), *words):
        jobs = [tenant for tenant in output("status")["tenants"] if kit.is_job(tenant["path"])]
        found = [device["compute"]["weight"] for job in jobs for device in job["devices"] if device["used_bytes"]]
        assert sorted(found) == [25, 75]


def test_each_task_of_an_array_gets_its_share(slurm: kit.Slurm, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    options = ["--parsable", "--array=0-1", "--gres=shard:2", f"--output={tmp_path}/%a"]
    with slurm.job("sbatch", *options, f"--wrap={' '.join(kit.fill(hold=600))}") as job:
        number = job.communicate(timeout=60)[0].strip()
    try:
        outs = [tmp_path / str(task) for task in range(2)]
        eventually(lambda: all(out.exists() and kit.FILLED.search(out.read_text()) for out in outs), 60, "both tasks")
        assert all(is_part(kit.parsed(out.read_text())[0], 2) for out in outs)
    finally:
        slurm.call("scancel", number)


def limits(path: str) -> list[int]:
    """Return the limits in force for a cgroup, on each device."""
    levels = json.loads(fgpu("explain", "--json", path).stdout)["levels"]
    return [device["limit_bytes"] for level in levels for device in level["devices"]]


def on_gpus() -> list[list[int]]:
    """Return for each job the GPUs of which it can get more than half of the memory."""
    jobs = [tenant for tenant in output("status")["tenants"] if kit.is_job(tenant["path"])]
    return sorted([one["gpu"] for one in job["devices"] if 8 * GIB < one["limit_bytes"] < 16 * GIB] for job in jobs)


def test_each_task_of_an_array_gets_its_share_on_its_gpu(slurm: kit.Slurm) -> None:
    """The last task of an array has the number of the whole array, with which slurmctld describes all of its tasks."""
    options = ["--parsable", "--array=0-1", "--gres=shard:3", "--output=/dev/null"]
    with slurm.job("sbatch", *options, "--wrap=sleep 600") as job:
        number = job.communicate(timeout=60)[0].strip()
    try:
        eventually(lambda: on_gpus() == [[0], [1]], 60, f"a limit on each GPU, not {on_gpus()}")
    finally:
        slurm.call("scancel", number)


def test_a_job_s_limit_counts_once(slurm: kit.Slurm) -> None:
    """The job's cgroup has the name in SLURM_JOB_SLUID only from 26.05 on."""
    with slurm.holding(*kit.srun(3), *kit.fill(chunks=1, hold=600)):
        number = slurm.call("squeue", "-ho", "%i").stdout.strip()
        (name,) = slurm.cgroups()
        (place,) = kit.SLICE.glob(f"*slurmstepd.scope/{name}")
        opaque = "sABCDEFGHJKMNP" if name == f"job_{number}" else name
        names = {"SLURMD_NODENAME": kit.NODE, "SLURM_JOB_ID": number, "SLURM_JOB_SLUID": opaque}
        words = ["env", *(f"{name}={value}" for name, value in names.items())]
        prolog, epilog = re.findall("^(?:Prolog|Epilog)=(.*)$", (slurm.work / "slurm.conf").read_text(), re.MULTILINE)
        slurm.call(*words, prolog)
        assert slurm.cgroups() == [name]
        assert sum(map(bool, limits(f"/system.slice/{place.parent.name}/{name}"))) == 1
        (place.parent / opaque).mkdir(exist_ok=True)
        slurm.call(*words, epilog)  # removes only a cgroup without processes
        assert slurm.cgroups() == [name]


def test_the_steps_of_a_job_share_its_limit(slurm: kit.Slurm) -> None:
    """The second step starts when the first has ended, so that no step keeps the job's cgroup between them."""
    alone, _ = slurm.filled(*kit.srun(1), *kit.fill())
    step = "srun --quiet --overlap"
    first, second = (" ".join((step, *words)) for words in (kit.fill("1GiB", 1, 600), kit.fill()))
    script = f"{step} true; {first} & sleep 3; {second}; kill $!; wait"
    with slurm.job("salloc", "--quiet", "--gres=shard:1", "sh", "-c", script) as job:
        said = job.communicate(timeout=60)[0]
    assert kit.FILLED.findall(said) == [(str(GIB), ""), (str(alone - GIB - CONTEXT), REFUSED)]


def test_a_limit_survives_restarts_of_slurmd_and_of_the_agent(slurm: kit.Slurm, service: Service) -> None:
    alone, _ = slurm.filled(*kit.srun(1), *kit.fill())
    with slurm.holding(*kit.srun(1), *kit.fill("1GiB", 1, 600)) as held:
        assert held == GIB
        slurm.restart_node()
        service.kill_agent(signal.SIGKILL)
        service.start_agent()
        job = slurm.call("squeue", "-ho", "%i").stdout.strip()
        got, why = slurm.filled("srun", "--quiet", "--overlap", f"--jobid={job}", *kit.fill())
        assert (got, why) == (alone - GIB - CONTEXT, REFUSED)


def submitted(slurm: kit.Slurm, folder: Path, *options: str, script: str = "") -> tuple[str, Path]:
    """Submit a job that fills its share and holds it. Return its number, and the file with its output."""
    folder.chmod(0o777)
    out = folder / "out"
    words = ["--parsable", "--requeue", "--gres=shard:2", f"--output={out}", *options]
    with slurm.job("sbatch", *words, f"--wrap={script or ' '.join(kit.fill(hold=600))}") as job:
        return job.communicate(timeout=60)[0].strip(), out


def test_a_cancelled_job_leaves_nothing(slurm: kit.Slurm, tmp_path: Path) -> None:
    number, out = submitted(slurm, tmp_path)
    eventually(lambda: out.exists() and kit.FILLED.search(out.read_text()), 30, "the job")
    assert is_part(kit.parsed(out.read_text())[0], 2)
    slurm.call("scancel", number)
    slurm.assert_nothing_is_left()


def test_the_epilog_removes_a_cgroup_that_slurm_does_not_remove(slurm: kit.Slurm, tmp_path: Path) -> None:
    """Slurm 24.11 sometimes leaves a step's cgroup: slurmstepd gets an error when it moves itself to another cgroup."""
    number, out = submitted(slurm, tmp_path)
    eventually(lambda: out.exists() and kit.FILLED.search(out.read_text()), 30, "the job")
    (scope,) = kit.SLICE.glob("*slurmstepd.scope")
    (scope / slurm.cgroups()[0] / "step_left/user").mkdir(parents=True)
    slurm.call("scancel", number)
    slurm.assert_nothing_is_left()


def test_a_requeued_job_leaves_nothing_and_gets_its_share_again(slurm: kit.Slurm, tmp_path: Path) -> None:
    number, out = submitted(slurm, tmp_path)
    eventually(lambda: out.exists() and kit.FILLED.search(out.read_text()), 30, "the job")
    slurm.call("scontrol", "requeuehold", number)
    eventually(lambda: slurm.call("squeue", "-ho", "%T").stdout == "PENDING\n", 20, "the job's end")
    slurm.assert_nothing_is_left()
    out.unlink()
    slurm.call("scontrol", "release", number)
    eventually(lambda: out.exists() and kit.FILLED.search(out.read_text()), 30, "the job")
    assert is_part(kit.parsed(out.read_text())[0], 2)
    slurm.call("scancel", number)


def test_a_job_is_refused_while_the_agent_does_not_run(slurm: kit.Slurm, service: Service, tmp_path: Path) -> None:
    service.kill_agent(signal.SIGKILL)
    number, out = submitted(slurm, tmp_path)
    try:
        said = eventually(lambda: slurm.call("sinfo", "-hRo", "%E").stdout, 30, "the node's reason")
        assert said.startswith("fgpu: no agent"), said
        assert "drain" in slurm.call("sinfo", "-ho", "%T").stdout
        assert not out.exists()
        assert not slurm.cgroups()
    finally:
        service.start_agent()
    slurm.call("scontrol", "update", f"nodename={kit.NODE}", "state=resume")
    slurm.call("scontrol", "release", number)
    eventually(lambda: out.exists() and kit.FILLED.search(out.read_text()), 30, "the job")
    slurm.call("scancel", number)
