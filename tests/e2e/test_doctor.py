"""`doctor` and the agent report each defect of a host with its fix in one line, without a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.commands import fgpu, metrics_page
from tests.support.host import ENVIRONMENT, FGPU, LISTEN, RUN_DIR, SHIM, SIM, cgroup_root, free_port
from tests.support.service import Service
from tests.support.wait import eventually


@dataclass(frozen=True)
class Host:
    """A host with a defect: how to run a command on this host, and fgpu's options."""

    before: tuple[str, ...] = ()
    loader: str = "/usr/bin/python3 -I"
    driver: Path = SIM

    def call(self, work: Path, *words: str | Path) -> list[str]:
        """Return a command line of fgpu on this host, with its own run folder."""
        return [*self.before, *FGPU, "--run-dir", str(work / "run"), *map(str, words)]

    def options(self) -> list[str]:
        """Return the options of both doctor and agent."""
        return ["--driver-root", str(self.driver), "--loader", self.loader]

    def doctor(self, work: Path) -> subprocess.CompletedProcess[str]:
        """Run `fgpu doctor`."""
        return run(self.call(work, "doctor", *self.options()))

    def agent(self, work: Path) -> subprocess.CompletedProcess[str]:
        """Run `fgpu agent`, which must fail."""
        listen = f"127.0.0.1:{free_port()}"
        return run(self.call(work, "agent", "--shim", SHIM, "--pins", pins(work), "--listen", listen, *self.options()))


def pins(work: Path) -> Path:
    """Return the folder where an agent of this test pins its maps."""
    return Path("/sys/fs/bpf") / f"fgpu-{work.name}"


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command until it exits. Compiling may take long on a busy machine."""
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=ENVIRONMENT, cwd="/")


def in_private_mounts(script: str) -> tuple[str, ...]:
    """Return the start of a command line that runs the script, and then the command, in a new mount namespace."""
    return ("unshare", "--mount", "sh", "-c", f'{script} && exec "$@"', "sh")


def empty_environment(work: Path) -> Path:
    """Make a virtual environment without the system's packages, and return its interpreter."""
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", work / "venv"], check=True, timeout=30)
    return work / "venv/bin/python"


def no_bcc(work: Path) -> Host:
    return Host(loader=f"{empty_environment(work)} -I")


def wrong_bcc(work: Path) -> Host:
    """Make an environment with another package named bcc, like the PyPI project bcc, which is not about BPF."""
    python = empty_environment(work)
    package = next((work / "venv/lib").glob("python3*")) / "site-packages/bcc"
    package.mkdir()
    (package / "__init__.py").write_text('"""Body-centred cubic."""\n__version__ = "1.0"\n')
    return Host(loader=f"{python} -I")


def no_interpreter(work: Path) -> Host:
    return Host(loader=f"{work}/no/such/python -I")


def not_root(work: Path) -> Host:
    return Host(before=("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"))


def no_driver(work: Path) -> Host:
    (work / "empty").mkdir()
    return Host(driver=work / "empty")


def driver_without_a_function(work: Path) -> Host:
    """Make a driver with a complete NVML, whose libcuda lacks cuMemCreate and all other functions but one."""
    lib = work / "driver/lib"
    lib.mkdir(parents=True)
    (lib / "libnvidia-ml.so.1").symlink_to(SIM / "lib/libnvidia-ml.so.1")
    source = work / "cuda.c"
    source.write_text("int cuInit(unsigned flags) { return (int)flags; }\n")
    flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["gcc", *flags, "-o", lib / "libcuda.so.1", source], check=True, timeout=30)
    return Host(driver=work / "driver")


def cgroup_v1_only(work: Path) -> Host:
    return Host(
        before=in_private_mounts(
            "for m in $(awk '$3 == \"cgroup2\" { print $2 }' /proc/mounts); do umount -l $m || exit 99; done"
        )
    )


def old_kernel(work: Path) -> Host:
    return Host(before=("setarch", "--uname-2.6"))


def no_uprobes(work: Path) -> Host:
    return Host(before=in_private_mounts("mount -t tmpfs none /sys/bus/event_source/devices"))


SPOIL = """#!/bin/sh
copy=$(mktemp -d)
trap 'rm -r "$copy"' EXIT
cp -r "$2/." "$copy"
echo 'int out_of_bounds(struct pt_regs *ctx) { return *(volatile int *)ctx->sp; }' >>"$copy/fgpu.bpf.c"
/usr/bin/python3 -I "$1" "$copy"
"""


def verifier_refuses(work: Path) -> Host:
    """Add a BPF program with a read that the verifier refuses."""
    loader = work / "loader"
    loader.write_text(SPOIL)
    loader.chmod(0o755)
    return Host(loader=str(loader))


def nothing_allowed(work: Path) -> Host:
    """Run as root without capabilities, as in a container or under a lockdown."""
    return Host(before=("setpriv", "--bounding-set=-bpf,-perfmon,-sys_admin", "--inh-caps=-all"))


CASES = {
    # defect: (host, the failing check, the words in its lines and in the agent's line)
    "no-bcc": (no_bcc, "bcc", "apt-get install python3-bpfcc"),
    "wrong-bcc": (wrong_bcc, "bcc", "pip uninstall bcc"),
    "no-interpreter": (no_interpreter, "bcc", "--loader"),
    "not-root": (not_root, "privilege", "sudo fgpu"),
    "no-driver": (no_driver, "driver", "--driver-root"),
    "driver-without-a-function": (driver_without_a_function, "driver", "cuMemCreate"),
    "cgroup-v1-only": (cgroup_v1_only, "cgroup v2", "systemd.unified_cgroup_hierarchy=1"),
    "old-kernel": (old_kernel, "kernel", "or later"),
    "no-uprobes": (no_uprobes, "uprobes", "CONFIG_UPROBE_EVENTS"),
}


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that unprivileged users may enter too. Remove what an agent of the test has pinned."""
    tmp_path.chmod(0o755)
    yield tmp_path
    shutil.rmtree(pins(tmp_path), ignore_errors=True)


@pytest.mark.parametrize("case", CASES)
def test_doctor_names_each_defect_and_its_fix(service: Service, work: Path, case: str) -> None:
    make, check, fix = CASES[case]
    done = make(work).doctor(work)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stdout + done.stderr, done
    lines = done.stdout.splitlines()
    failed = [i for i, line in enumerate(lines) if line.startswith(f"FAIL  {check}: ")]
    assert len(failed) == 1, done
    assert lines[failed[0] + 1].startswith("      fix: "), done
    assert fix in "\n".join(lines[failed[0] : failed[0] + 2]), done


@pytest.mark.parametrize("case", CASES)
def test_the_agent_reports_each_defect_in_one_line(service: Service, work: Path, case: str) -> None:
    make, _, fix = CASES[case]
    done = make(work).agent(work)
    assert done.returncode == 1, done
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("fgpu: ")
    assert fix in lines[0], done.stderr


RELEASE = os.uname().release
OLD = subprocess.run(
    ["setarch", "--uname-2.6", "uname", "-r"], capture_output=True, text=True, check=True
).stdout.strip()
LINES = {
    # F12, word for word; WORK is the test's folder
    "verifier-refuses": (
        verifier_refuses,
        f"fgpu: Linux {RELEASE} rejects the program out_of_bounds (Permission denied): update the kernel, or fgpu",
    ),
    "nothing-allowed": (
        nothing_allowed,
        "fgpu: root may not use uprobes here ([Errno 13] perf_event_open: Permission denied): run fgpu outside "
        "a container, or give the container CAP_SYS_ADMIN, CAP_BPF and CAP_PERFMON",
    ),
    "no-uprobes": (
        no_uprobes,
        "fgpu: the kernel has no uprobe PMU: use a kernel with CONFIG_UPROBE_EVENTS=y, and sysfs at /sys",
    ),
    "old-kernel": (
        old_kernel,
        f"fgpu: Linux {OLD} is too old: Linux 6.1 or later is needed",
    ),
    "driver-without-a-function": (
        driver_without_a_function,
        "fgpu: WORK/driver/lib/libcuda.so.1 lacks cuCtxCreate_v2, cuCtxDestroy_v2, cuDevicePrimaryCtxRelease_v2, "
        "cuDevicePrimaryCtxRetain, cuMemAlloc_v2, cuMemCreate, cuMemFree_v2, cuMemMap, cuMemRelease, cuMemUnmap: "
        "fgpu supports no driver or shim without these functions",
    ),
    "no-interpreter": (
        no_interpreter,
        "fgpu: cannot run the compiler WORK/no/such/python (No such file or directory): name the system's Python with "
        "--loader",
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_the_agent_s_error_line_matches_the_expected_text_word_for_word(
    service: Service, work: Path, case: str
) -> None:
    make, line = LINES[case]
    done = make(work).agent(work)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.replace(str(work), "WORK") == f"{line}\n"


def is_anothers(cgroup: Path) -> bool:
    """Return whether the cgroup's name is that of a container. No test runs a container at this moment."""
    return re.fullmatch(r"([a-z-]+-)?[0-9a-f]{64}(\.scope)?", cgroup.name) is not None


def test_doctor_finds_no_defect_on_a_host_with_a_running_agent(service: Service) -> None:
    """All checks pass, except `labels` if other containers run here: doctor cannot reach the tests' sockets."""
    strangers = any(is_anothers(folder) for folder in cgroup_root().rglob("*") if folder.is_dir())

    def settled() -> subprocess.CompletedProcess[str] | None:  # an earlier test may have just restarted the agent
        done = fgpu("doctor", check=False)  # the running agent has recorded the driver's path
        return None if re.search("^FAIL  (gatekeeper|reconcile): ", done.stdout, re.MULTILINE) else done

    done = eventually(settled, 10, "answers of gatekeeper and NVML")
    assert done
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    wrong = [line for line in lines if not line.startswith("ok ")]
    assert not wrong or (strangers and all(line.startswith("FAIL  labels: ") for line in wrong)), done.stdout
    assert done.returncode == (1 if wrong else 0)
    assert len(lines) >= 5


def failures(*options: str) -> dict[str, dict[str, str]]:
    """Return the failures that `fgpu doctor --json` reports, by name. The exit status is 1 if there are any."""
    done = fgpu("doctor", "--json", *options, check=False)
    found = {one["name"]: one for one in json.loads(done.stdout) if not one["ok"]}
    assert done.returncode == (1 if found else 0)
    assert all(one["found"] and one["fix"] and one["mend"] == one["fix"] for one in found.values()), found
    return found


def test_doctor_names_a_gatekeeper_that_hangs(service: Service) -> None:
    eventually(lambda: "gatekeeper" not in failures(), 10, "an answer of the gatekeeper")
    (pid,) = service.gatekeepers()
    os.kill(pid, signal.SIGSTOP)
    try:
        found = failures()["gatekeeper"]
        assert f"pid {pid} does not answer" in found["found"]
        assert f"kill -9 {pid}" in found["fix"]
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: "gatekeeper" not in failures(), 10, "an answer of the gatekeeper")


def test_doctor_names_a_shim_that_some_users_cannot_read(service: Service) -> None:
    before = SHIM.stat().st_mode
    SHIM.chmod(0o700)
    try:
        assert str(SHIM) in failures()["preload"]["found"]
    finally:
        SHIM.chmod(before)
    assert "preload" not in failures()


def test_doctor_reads_the_policies_without_an_agent(work: Path) -> None:
    (work / "policy.d").mkdir()
    (work / "policy.d/bad.yaml").write_text("spec: {memory: {limit: 8GB}}\n")
    (work / "agent.yaml").write_text(f"policyFolder: {work}/policy.d\n")
    command = [*FGPU, "--run-dir", str(work / "run"), "doctor", "--json", "--config", str(work / "agent.yaml")]
    done = run([*command, "--driver-root", str(SIM)])
    found = {one["name"]: one for one in json.loads(done.stdout)}
    assert done.returncode == 1
    assert "bad.yaml:1" in found["policies"]["found"]
    assert found["policies"]["fix"] == f"fgpu policy check {work}/policy.d"
    assert not found["agent"]["ok"]
    (work / "policy.d/bad.yaml").unlink()
    found = {one["name"]: one for one in json.loads(run([*command, "--driver-root", str(SIM)]).stdout)}
    assert found["policies"]["ok"]


def test_doctor_names_a_device_in_mig_mode(service: Service, fault: Callable[[str], None]) -> None:
    def said() -> list[str]:
        done = fgpu("doctor", "--json", "--driver-root", SIM, check=False)
        return [one["found"] for one in json.loads(done.stdout) if one["name"] == "mig" and not one["ok"]]

    assert said() == []
    fault("mig")
    (found,) = said()
    assert "MIG mode is on: device 0 (NVIDIA H200" in found
    fault("reset")
    assert said() == []


def test_a_second_agent_exits_with_an_error(service: Service) -> None:
    done = fgpu("agent", "--driver-root", SIM, "--shim", SHIM, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "fgpu: an agent is already running on this host"


def test_limits_are_enforced_if_the_metrics_address_is_in_use(service: Service, unharmed: None) -> None:
    """The agent must not exit because of this error.

    If it exited, it would be restarted each second, and new containers would get no limit or no memory.
    """
    host, port = LISTEN.split(":")
    service.kill_agent()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, int(port)))
        taken.listen()
        service.start_agent()
        found = failures()["metrics"]
        assert f"cannot listen at {LISTEN}" in found["found"]
        assert "agent.yaml" in found["fix"]
        done = fgpu("run", "--memory", "1GiB", "--", "nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader")
        assert done.stdout == "1024 MiB\n"
    eventually(lambda: "metrics" not in failures(), 5, "the metrics at the freed address")
    assert "fgpu_build_info" in metrics_page()


def test_the_agent_moves_or_removes_folders_at_the_paths_of_its_sockets(service: Service, unharmed: None) -> None:
    """Docker creates folders for bind mounts of containers that it starts at boot, before the agent runs."""
    places = [RUN_DIR / name for name in ("control.sock", "discover.sock", "shim/shim.sock")]
    service.kill_agent()
    service.kill_gatekeeper()
    for place in places:
        place.unlink(missing_ok=True)
        place.mkdir()
    (places[0] / "something").touch()
    service.start_agent()
    assert all(place.is_socket() for place in places)
    assert fgpu("status").returncode == 0
    done = fgpu("run", "--memory", "1GiB", "--", "nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader")
    assert done.stdout == "1024 MiB\n"
    (moved,) = RUN_DIR.glob("control.sock.moved-*")
    assert (moved / "something").exists(), "the contents of the moved folder are lost"
    shutil.rmtree(moved)


@pytest.mark.slow
def test_the_agent_starts_without_a_bpffs_and_doctor_reports_the_missing_bpffs(service: Service, work: Path) -> None:
    """The agent also starts without BTF, which most eBPF programs need."""
    bare = in_private_mounts(
        "{ [ ! -d /sys/kernel/btf ] || mount -t tmpfs none /sys/kernel/btf; } && "
        "while umount /sys/fs/bpf 2>/dev/null; do :; done"
    )
    done = Host(before=bare).doctor(work)
    assert "FAIL  bpffs: " in done.stdout
    assert "mount -t bpf bpf /sys/fs/bpf" in done.stdout
    listen = f"127.0.0.1:{free_port()}"
    command = Host(before=bare).call(work, "agent", "--shim", SHIM, "--listen", listen, "--driver-root", SIM)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(work / "log", "wb"))
        agent = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, cwd="/")
        stack.callback(agent.wait, 30)
        stack.callback(agent.terminate)
        eventually(lambda: b"enforcing" in (work / "log").read_bytes() or agent.poll() is not None, 60, "the agent")
        assert agent.poll() is None, (work / "log").read_text()
    assert "Traceback" not in (work / "log").read_text()


def test_an_agent_started_under_a_strict_umask_serves_every_user(service: Service, unharmed: None) -> None:
    store = Path(f"/var/lib/fgpu-e2e-{os.getpid()}/shim")
    service.detach()
    before = os.umask(0o077)
    try:
        service.start_agent(None, "--store", str(store))
    finally:
        os.umask(before)
    try:
        user = {**ENVIRONMENT, "SUDO_UID": "65534", "SUDO_GID": "65534"}
        query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader"]
        done = fgpu("run", "--memory", "1GiB", "--", *query, env=user)
        assert (done.stdout, done.stderr) == ("1024 MiB\n", "")
        assert "preload" not in failures()
        for folder in (store, RUN_DIR):
            folder.chmod(0o700)
            try:
                found = failures()["preload"]
            finally:
                folder.chmod(0o755)
            assert str(folder) in found["found"]
            assert found["fix"] == f"chmod o+x {folder}"
        assert "preload" not in failures()
    finally:
        service.detach()
        shutil.rmtree(store.parent, ignore_errors=True)  # detach has removed it
        service.start_agent()


def test_limits_are_enforced_if_the_shim_store_cannot_be_written(service: Service, unharmed: None) -> None:
    """A full or read-only /var does not prevent enforcement.

    The agent uses the published version, or the package's own if no version is published.
    """
    store = Path(f"/var/lib/fgpu-e2e-{os.getpid()}/shim")
    newer = store.parent / "newer.so"
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader"]
    mount = ["mount", "--bind", store, store]
    ending = ["umount", "--lazy", store]

    def start(*options: str) -> str:
        service.start_agent(None, "--store", str(store), *options)
        assert fgpu("run", "--memory", "1GiB", "--", *query).stdout == "1024 MiB\n"
        found = failures().get("store", {}).get("found", "")
        service.kill_agent()
        return found

    service.detach()
    store.mkdir(parents=True)
    newer.write_bytes(SHIM.read_bytes() + b"newer")
    try:
        subprocess.run(mount, check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", store], check=True)
        assert "Read-only" in start(), "a first start did not report the read-only store"
        subprocess.run(["mount", "-o", "remount,bind,rw", store], check=True)
        assert start() == ""
        before = os.readlink(store / "current")
        subprocess.run(["mount", "-o", "remount,bind,ro", store], check=True)
        assert "Read-only" in start("--shim", str(newer)), "an upgrade did not report the read-only store"
        assert os.readlink(store / "current") == before
        subprocess.run(["mount", "-o", "remount,bind,rw", store], check=True)
        (store / "current").unlink()
        (store / "current/libfgpu.so").mkdir(parents=True)  # as Docker creates it for a bind mount
        assert start("--shim", str(newer)) == ""
        assert os.readlink(store / "current") != before
    finally:
        subprocess.run(ending, check=False)
        service.detach()
        shutil.rmtree(store.parent, ignore_errors=True)
        service.start_agent()
