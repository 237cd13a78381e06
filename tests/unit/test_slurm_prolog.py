"""Tests of what Slurm's prolog reads in the text of slurmctld. `./dev test slurm` runs the prolog in a real cluster."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

GIB = 1 << 30
SHIM = "/var/lib/fgpu/shim/current/libfgpu.so"
PROLOG = Path(__file__).parents[2] / "deploy/slurm/prolog.py"
JOB = "JobId=7 JobName={name} UserId=a(1) NodeList=gpu[1-2] JOB_GRES=shard:3 {lines} MinCPUsNode=1 Comment={comment}"


@pytest.fixture
def prolog(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the prolog of job 7 on the node gpu2."""
    for name, value in {"SLURMD_NODENAME": "gpu2", "SLURM_JOB_ID": "7", "SLURM_CONF": "/none"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = importlib.util.spec_from_file_location("prolog", PROLOG)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line(gres: str, nodes: str = "gpu[1-2]") -> str:
    return f"Nodes={nodes} CPU_IDs=0-1 Mem=100 GRES={gres}"


def job(*lines: str, name: str = "train", comment: str = "") -> str:
    return JOB.format(name=name, lines=" ".join(lines), comment=comment)


@pytest.mark.parametrize(
    ("nodes", "is_listed"),
    [
        ("gpu2", True),
        ("gpu[1-3]", True),
        ("gpu[1,3]", False),
        ("big1,gpu[0,2-3],big[7-9]", True),
        ("g[o-p]u2", False),
        ("gpu20", False),
        ("agpu2", False),
        ("gpu[2", False),
        ("gpu[2-]", False),
        ("gpu[" + 9 * "1" + "]", False),
        ("gpu[" + 5000 * "2" + "]", False),
        ("gpu" + 30 * "[0-9]", False),
    ],
)
def test_the_node_is_found_in_lists(prolog: ModuleType, nodes: str, is_listed: bool) -> None:
    assert prolog.is_this_node(nodes) == is_listed


def test_the_node_is_found_in_lists_of_several_ranges(prolog: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prolog, "NODE", "rack3-n017")
    assert prolog.is_this_node("rack[1-4]-n[016-018]")
    assert not prolog.is_this_node("rack[1-4]-n[018-020]")
    assert not prolog.is_this_node("rack[1-2]-n[016-018]")


@pytest.mark.parametrize(
    ("gres", "found"),
    [
        ("shard:2(IDX:1)", {1: 50.0}),
        ("shard:a100:3(IDX:0)", {0: 75.0}),
        ("gpu:1(IDX:1)", {1: 100.0}),
        ("gpu:a100:2(IDX:0-1)", {0: 100.0, 1: 100.0}),
        ("gpu:a100:2(IDX:0,3)", {0: 100.0, 3: 100.0}),
        ("shard:2(0/8,2/8)", {1: 25.0}),  # from Slurm 24.05
        ("shard:a100:9(8/8,1/4)", {0: 100.0, 1: 25.0}),
        ("gpu:1(IDX:0),shard:1(IDX:0)", {0: 25.0}),
        ("shard:1(IDX:0),gpu:1(IDX:0)", {0: 25.0}),
        ("gpu:1(IDX:1),shard:2(2/4,0/4)", {1: 100.0, 0: 50.0}),
        ("shard:9(IDX:0)", {0: 100.0}),
        ("shard:2(CNT:2)", {}),
        ("shard:6(IDX:0-1)", {0: 50.0, 1: 50.0}),  # 4 and 2, or 2 and 4, or 3 and 3
        ("shard:3(IDX:0-1)", {0: 25.0, 1: 25.0}),
        ("shard:2(5/0)", {}),
        ("mps:50(IDX:0)", {}),
        ("", {}),
    ],
)
def test_parts_of_gpus(prolog: ModuleType, gres: str, found: dict[int, float]) -> None:
    assert prolog.parts(gres, 4) == found


def test_shards_of_a_node_that_has_none_are_nothing(prolog: ModuleType) -> None:
    assert prolog.parts("shard:2(IDX:1)", 0) == {}


def test_only_the_line_of_this_node_counts(prolog: ModuleType) -> None:
    lines = line("shard:4(IDX:0)", "gpu1"), line("shard:1(IDX:1)", "gpu2")
    assert prolog.granted(job(*lines), 4) == {1: 25.0}


FORGED = "x Nodes=gpu2 CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1)"


@pytest.mark.parametrize("text", [FORGED, FORGED.replace(" ", "\n"), f"{FORGED},shard:4(IDX:0)", f"{FORGED} {FORGED}"])
def test_a_job_s_name_and_comment_get_it_nothing_more(prolog: ModuleType, text: str) -> None:
    real = line("shard:1(IDX:1)")
    assert prolog.granted(job(real, name=text), 4) == {1: 25.0}
    assert prolog.granted(job(real, comment=text), 4) == {1: 25.0}
    assert prolog.granted(job(real, name=text, comment=text), 4) == {1: 25.0}


ENDS = "Nodes=", "x Nodes=gpu2 CPU_IDs=0 Mem=0 GRES=", "x Nodes=gpu2 CPU_IDs="


@pytest.mark.parametrize("end", [*ENDS, 9999 * "Nodes="])
def test_an_incomplete_line_in_a_job_s_name_gets_it_nothing_more(prolog: ModuleType, end: str) -> None:
    assert prolog.granted(job(line("shard:1(IDX:1)"), name=end), 4) in ({}, {1: 25.0})


def test_a_job_without_a_gpu_has_no_part(prolog: ModuleType) -> None:
    assert prolog.granted(job(line("")), 4) == {}


def test_without_a_line_of_this_node_the_job_is_refused(prolog: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prolog.subprocess, "run", lambda *_, **__: None)
    with pytest.raises(SystemExit, match=r"fgpu: job 7 is refused: .* has on gpu2"):
        prolog.granted(job(line("shard:1(IDX:1)", "gpu1")), 4)


MORE = ["fgpu:memory=9GiB", "fgpu:memory=100%", f"x\n{line('gpu:2(IDX:0-1)', 'gpu2')} fgpu:memory=99%"]


@pytest.mark.parametrize("comment", MORE)
def test_a_job_s_comment_that_asks_for_more_gets_it_nothing_more(prolog: ModuleType, comment: str) -> None:
    found = prolog.limits({0: 25.0}, prolog.asked(comment), {0: 16 * GIB, 1: 16 * GIB})
    assert found == ["--memory=25.0000%", "--weight=25", "--device=0"]


@pytest.mark.parametrize(
    ("comment", "found"),
    [
        ("", (100, 2**47, 100, ())),
        ("(null)", (100, 2**47, 100, ())),
        ("see fgpu.dev and the fgpu page", (100, 2**47, 100, ())),
        ("fgpu:memory=6GiB", (100, 6 * GIB, 100, ())),
        ("run 7, fgpu:memory=1.5Gi\nfgpu:compute=12.5%", (100, 1.5 * GIB, 12.5, ())),
        ("fgpu:memory=4194304B fgpu:memory=1TiB", (100, 4 << 20, 100, ())),
        ("fgpu:memory=10%\tfgpu:memory=20%", (10, 2**47, 100, ())),
        ("fgpu:memory=6GB", (100, 2**47, 100, ("fgpu:memory=6GB",))),
        ("fgpu:memory=6 GiB", (100, 2**47, 100, ("fgpu:memory=6",))),
        ("'fgpu:memory=6GiB'", (100, 2**47, 100, ("fgpu:memory=6GiB'",))),
        ("fgpu:memory=6GiB,fgpu:compute=9%", (100, 2**47, 100, ("fgpu:memory=6GiB,fgpu:compute=9%",))),
        ("fgpu:memory=1MiB fgpu:compute=5%", (100, 2**47, 5, ("fgpu:memory=1MiB",))),
        ("fgpu:memory=0% fgpu:memory=101%", (100, 2**47, 100, ("fgpu:memory=0%", "fgpu:memory=101%"))),
        ("fgpu:memory=-1GiB", (100, 2**47, 100, ("fgpu:memory=-1GiB",))),
        ("fgpu:memory=\u0667GiB", (100, 2**47, 100, ("fgpu:memory=\u0667GiB",))),
        ("fgpu:memory=99999TiB", (100, 2**47, 100, ("fgpu:memory=99999TiB",))),
        ("fgpu:compute=6GiB fgpu:weight=9 fgpu:", (100, 2**47, 100, ("fgpu:compute=6GiB", "fgpu:weight=9", "fgpu:"))),
    ],
)
def test_requests_in_a_comment(prolog: ModuleType, comment: str, found: tuple[object, ...]) -> None:
    assert prolog.asked(comment) == found


@pytest.mark.parametrize(
    ("comment", "options"),
    [
        ("fgpu:memory=3GiB", ["--memory=3221225472B", "--weight=50"]),
        ("fgpu:memory=10%", ["--memory=10.0000%", "--weight=50"]),
        ("fgpu:memory=10% fgpu:memory=1GiB", ["--memory=1073741824B", "--weight=50"]),
        ("fgpu:memory=10% fgpu:memory=3GiB", ["--memory=1717567488B", "--weight=50"]),  # 10% of 16 GiB, whole 2 MiB
        ("fgpu:memory=14GiB", ["--memory=8589934592B", "--weight=50"]),  # the least of 8 and 16 GiB, and of 14 GiB
        ("fgpu:memory=16GiB", ["--memory=50.0000%", "--weight=50"]),
        ("fgpu:compute=12.5%", ["--memory=50.0000%", "--weight=50", "--compute=12.5000%"]),
    ],
)
def test_a_job_gets_the_least_of_its_share_and_its_requests(
    prolog: ModuleType, comment: str, options: list[str]
) -> None:
    found = prolog.limits({0: 50.0, 1: 75.0}, prolog.asked(comment), {0: 16 * GIB, 1: 32 * GIB})
    assert found == [*options, "--device=0", "--device=1"]


def test_bytes_that_are_no_text_in_a_job_s_comment_are_read(prolog: ModuleType) -> None:
    text = prolog.said("printf", r"fgpu:\377 fgpu:memory=10%%")
    assert prolog.asked(text) == (10, 2**47, 100, ("fgpu:\ufffd",))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("batch|train\n", ("batch", "train\n")),
        ("normal|fgpu:compute=5% a|b|c\n", ("normal", "fgpu:compute=5% a|b|c\n")),
        ("low|x\nhigh|y\n", ("low", "x\nhigh|y\n")),
        ("(null)|(null)\n", ("", "(null)\n")),
        ("N/A|\n", ("", "\n")),
        ("|\n", ("", "\n")),
        ("", ("", "")),
    ],
)
def test_a_job_s_comment_cannot_change_its_quality_of_service(
    prolog: ModuleType, monkeypatch: pytest.MonkeyPatch, line: str, found: tuple[str, str]
) -> None:
    monkeypatch.setattr(prolog, "said", lambda *_: line)
    assert prolog.quality_and_comment("7") == found


@pytest.mark.parametrize(("quality", "more"), [("batch", ["--priority-class=batch"]), ("(null)", [])])
def test_the_prolog_gives_the_job_the_class_of_its_quality_of_service(
    prolog: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quality: str, more: list[str]
) -> None:
    """The name of the job, and its comment, have text of a user that looks like another quality of service."""
    (tmp_path / prolog.SCOPES[0]).mkdir(parents=True)
    answers = {
        "squeue --noheader --states=all --jobs=7 --format=%A": "7 7",
        "squeue --noheader --states=all --jobs=7 --format=%q|%k": f"{quality}|QOS=interactive fgpu:memory=6GiB",
        "scontrol --oneliner --details show job": job(line("shard:2(IDX:1)"), name="x QOS=interactive"),
        "scontrol --oneliner show node": "NodeName=gpu2 Gres=gpu:2,shard:8 State=IDLE",
        "fgpu status": '{"unenforced": "", "devices": [{"index": 1, "usable_bytes": 17179869184}]}',
    }
    commands: list[tuple[str, ...]] = []

    def said(*command: str) -> str:
        commands.append(command)
        return next((answer for begin, answer in answers.items() if " ".join(command).startswith(begin)), "")

    monkeypatch.setattr(prolog, "said", said)
    monkeypatch.setattr(prolog, "cgroup", lambda: tmp_path)
    monkeypatch.setattr(prolog, "NOTE", tmp_path / "note")
    prolog.main()
    place = f"/{prolog.SCOPES[0]}/job_7"
    limits = ["--memory=6442450944B", "--weight=50", "--device=1"]
    assert commands[-1] == ("fgpu", "set", place, *limits, *more)
    assert (tmp_path / place.lstrip("/")).is_dir()


@pytest.mark.parametrize(
    ("version", "sluid", "config", "name"),
    [
        ("22.05.8", "", "", "job_7"),
        ("25.11.7", "sEKNKTV3WPV500", "CgroupJobIdPaths        = no", "job_7"),  # slurmctld is of a later release
        ("26.05.0", "sEKNKTV3WPV500", "CgroupMountpoint        = /x", "sEKNKTV3WPV500"),
        ("26.05.2", "sEKNKTV3WPV500", "CgroupJobIdPaths        = no", "sEKNKTV3WPV500"),
        ("26.05.2", "sEKNKTV3WPV500", "CgroupJobIdPaths        = yes", "job_7"),
        ("26.11.0-0rc1", "sEKNKTV3WPV500", "", "sEKNKTV3WPV500"),
    ],
)
def test_the_cgroup_has_the_name_that_slurm_gives_it(
    prolog: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str, sluid: str, config: str, name: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_SLUID", sluid)
    monkeypatch.setattr(prolog, "said", lambda *_: f"SLURM_VERSION           = 26.11.0\n{config}\n")
    assert prolog.folder(f"NodeName=gpu2 NodeHostName=gpu2 Version={version} OS=Linux Comment=Version=1.1") == name


def test_a_note_has_the_words_in_ascii_and_is_removed_by_the_next_prolog(
    prolog: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(prolog, "NOTE", tmp_path / "notes/7")
    prolog.note(("fgpu:\x1b[2J\u202e", "fgpu:" + 99 * "x", *9 * ["fgpu:"]))
    text = (tmp_path / "notes/7").read_text(encoding="ascii")
    assert text.startswith(r"fgpu: ignored in the job's comment: 'fgpu:\x1b[2J\u202e', 'fgpu:xxx")
    assert text.count("\n") == 1
    assert len(text) < 300
    prolog.note(())
    assert not (tmp_path / "notes/7").exists()


@pytest.fixture
def host(prolog: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Return host(codes): an `fgpu` that exits with these codes, one for each call. The last code is repeated."""

    def make(codes: str) -> Path:
        (tmp_path / "codes").write_text("\n".join(codes) + "\n")
        call = f"code=$(head -n1 {tmp_path}/codes); echo $code >>{tmp_path}/exits; sed -i '$!{{1d}}' {tmp_path}/codes"
        for name, script in {"fgpu": f"{call}; echo said; exit $code", "scontrol": f"touch {tmp_path}/drained"}.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setitem(prolog.ENVIRONMENT, "PATH", f"{tmp_path}:/usr/bin:/bin")
        return tmp_path

    return make


def test_an_agent_that_restarts_is_waited_for_and_drains_no_node(
    prolog: ModuleType, host: Callable[[str], Path]
) -> None:
    folder = host("330")
    assert prolog.said("fgpu", "status", "--json") == "said\n"
    assert (folder / "exits").read_text() == "3\n3\n0\n"
    assert not (folder / "drained").exists()


def test_a_node_without_an_agent_is_drained_after_a_while(
    prolog: ModuleType, host: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, clock = host("3"), iter(range(1000))
    monkeypatch.setattr(prolog.time, "sleep", lambda _: None)
    monkeypatch.setattr(prolog.time, "monotonic", lambda: prolog.UNTIL - 2 + next(clock))
    with pytest.raises(SystemExit, match="job 7 is refused"):
        prolog.said("fgpu", "status", "--json")
    assert (folder / "exits").read_text() == "3\n3\n3\n"
    assert (folder / "drained").exists()


@pytest.mark.parametrize("code", "1245")
def test_another_failure_of_fgpu_drains_the_node_at_once(
    prolog: ModuleType, host: Callable[[str], Path], code: str
) -> None:
    folder = host(code)
    with pytest.raises(SystemExit, match="job 7 is refused"):
        prolog.said("fgpu", "set")
    assert (folder / "exits").read_text() == f"{code}\n"
    assert (folder / "drained").exists()


@pytest.mark.parametrize(
    ("rows", "name"),
    [("7 7\n", "7"), ("7 5_3\n", "5_3"), ("8 7_0\n9 7_1\n7 7_2\n", "7_2"), ("7 7+0\n8 7+1\n", "7+0"), ("", "7")],
)
def test_the_prolog_asks_only_for_its_own_part_of_a_job(
    prolog: ModuleType, monkeypatch: pytest.MonkeyPatch, rows: str, name: str
) -> None:
    monkeypatch.setattr(prolog, "said", lambda *_: rows)
    assert prolog.own_name() == name


def test_options_of_fgpu_set(prolog: ModuleType) -> None:
    def limits(of: dict[int, float]) -> object:
        return prolog.limits(of, prolog.asked(""), dict.fromkeys(of, 16 * GIB))

    assert limits({0: 25.0}) == ["--memory=25.0000%", "--weight=25", "--device=0"]
    third = 100 / 3
    assert limits({2: third, 0: 100.0}) == ["--memory=33.3333%", "--weight=33", "--device=0", "--device=2"]
    assert limits({0: 0.3}) == ["--memory=0.3000%", "--weight=1", "--device=0"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", SHIM),
        ("libmemusage.so", f"{SHIM}:libmemusage.so"),
        ("libm.so.6 libc.so.6", f"{SHIM}:libm.so.6 libc.so.6"),
        (SHIM, None),
        (f"libm.so.6:{SHIM}", None),
    ],
)
def test_a_task_has_the_shim_before_the_libraries_that_the_job_preloads(before: str, after: str | None) -> None:
    task = Path(__file__).parents[2] / "deploy/slurm/task.sh"
    script = f'LD_PRELOAD="$1"; . {task}'  # without the preloads in this shell
    done = subprocess.run(["sh", "-c", script, "sh", before], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == ("" if after is None else f"export LD_PRELOAD={after}\n")
