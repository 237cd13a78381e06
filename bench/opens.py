"""Record which calls of libcuda and libnvidia-ml open NVIDIA's device nodes, in programs that run one after the other.

For each program prints a line `== NAME: END` and a table. A row is a number of opens with the same process, path,
innermost and outermost exported function that the thread was in, thread and result:

    COUNT FIRST_SECONDS PROCESS main|other PATH RESULT INNERMOST < OUTERMOST

FIRST_SECONDS counts from the start of the program. Without an exported function the row ends with `none: THREAD`, and
the next line has the files with return addresses on the stack, innermost first (see bench/lib/open_recorder.py). A
program that the host does not have is `absent`. At the end come the functions that had opens in any program: innermost
and outermost ones. Then figures `opens_PROGRAM COUNT`.

With `--refuse` prints instead what cuInit and nvmlInit return if the open of one node, or of all, fails with EPERM:
a line of results while the node is refused, and one of the same process after the refusal has ended, each with the
opens. A case `none` refuses nothing.

Writes build/bench/opens.json with all opens of all programs, or build/bench/opens-refused.json. Without `--refuse`,
exits with 1 if the kernel lost an open. Needs root, cgroup v2, Linux 6.6 and x86-64. TORCH_PYTHON is a Python
interpreter with torch.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import glob
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.lib.service import ROOT, BenchError, end_in_order
from bench.lib.tenants import Program, cgroup_root, ending, remove_cgroup

PREFIXES = "/dev/nvidia,/dev/dri,/dev/char"
LIBRARIES = "libcuda.so.1,libnvidia-ml.so.1"
NODES = ("nvidiactl", "nvidia0", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset", "nvidia[0-9]*", "nvidia-caps/*")
ABSENT = 77  # the exit status of a program that the host does not have
TOOLS = f"{os.environ.get('PATH', os.defpath)}:/usr/local/cuda/bin"
DRIVER = [sys.executable, str(ROOT / "bench/lib/open_driver.py")]
MODULES = {
    "torch": """
x = torch.rand(1024, 1024, device="cuda")
(x @ x).sum().item()
torch.cuda.synchronize()""",
    "jax": """
import jax.numpy
x = jax.numpy.ones((1024, 1024))
(x @ x).block_until_ready()""",
    "cupy": """
x = cupy.ones((1024, 1024))
(x @ x).sum().get()""",
    "numba": """
from numba import cuda
cuda.to_device([1.0] * 1024).copy_to_host()
cuda.jit("void(float64[:])")(lambda x: None)[1, 1](cuda.device_array(1))
cuda.synchronize()""",
}
TWO_THREADS = """
import threading
def work():
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.rand(1024, 1024, device="cuda")
        (x @ x).sum().item()
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()"""
MPS = """
export CUDA_MPS_PIPE_DIRECTORY="$0/pipe" CUDA_MPS_LOG_DIRECTORY="$0/log"
mkdir "$0/pipe" "$0/log" && nvidia-cuda-mps-control -d && "$@"
echo quit | timeout 20 nvidia-cuda-mps-control
cat "$0/log/"*.log"""
CHECKPOINT = """
"$@" & pid=$!
sleep 5
cuda-checkpoint --toggle --pid $pid && cuda-checkpoint --toggle --pid $pid
kill $pid"""


def importing(module: str, text: str) -> list[str]:
    """Return a command that imports a module and runs `text`, or exits with ABSENT."""
    head = (
        f"import sys\ntry:\n    import {module}\nexcept ImportError as error:\n    print(error)\n    sys.exit({ABSENT})"
    )
    return [os.environ.get("TORCH_PYTHON", "python3"), "-c", head + text]


def programs(work: str) -> dict[str, list[str]]:
    """Return the commands of all programs by name. `work` is a folder for their files."""
    return {
        **{module: importing(module, text) for module, text in MODULES.items()},
        "torch-two-threads": importing("torch", TWO_THREADS),
        "nvidia-smi": ["nvidia-smi"],
        "nvidia-smi-q": ["nvidia-smi", "-q"],
        "nvml": [*DRIVER, "nvml"],
        "driver": [*DRIVER, "driver"],
        "nvitop": ["nvitop", "-1"],
        "mps": ["nvidia-cuda-mps-control", "sh", "-c", MPS, work, *DRIVER, "client", "1"],
        "compute-sanitizer": ["compute-sanitizer", *DRIVER, "client"],
        "cuda-gdb": ["cuda-gdb", "--batch", "-ex", "run", "--args", *DRIVER, "client"],
        "cuda-checkpoint": ["cuda-checkpoint", "sh", "-c", CHECKPOINT, "sh", *DRIVER, "hold", "30"],
        "nsys": ["nsys", "profile", "--output", f"{work}/nsys", *DRIVER, "client"],
        "ncu": ["ncu", *DRIVER, "client"],
    }


class Recorder:
    """A running bench/lib/open_recorder.py."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.probes = json.loads(program.hear())

    def ask(self, *words: object) -> dict[str, Any]:
        """Send a command, and return the answer. Raises BenchError."""
        self._program.say(" ".join(map(str, words)))
        return dict(json.loads(self._program.hear()))


@contextlib.contextmanager
def cgroup(path: Path) -> Iterator[Path]:
    """Make a cgroup, and remove it at the end with all processes in it."""
    path.mkdir()
    try:
        yield path
    finally:
        remove_cgroup(path)


def entered(folder: Path, command: list[str]) -> list[str]:
    """Return a command that runs this one in a cgroup."""
    return ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(folder), *command]


def ran(command: list[str], folder: Path, environment: dict[str, str], seconds: float) -> tuple[str, str]:
    """Run a command in a cgroup. Return its end (`exit status N` and similar) and its output."""
    found = shutil.which(command[0], path=TOOLS)
    if not found:
        return "absent", f"no {command[0]}"
    # A shell with a script comes after the name of the tool that the script uses.
    words = command[1:] if command[1:2] == ["sh"] else [found, *command[1:]]
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        process = subprocess.Popen(
            entered(folder, words),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
            ended = "absent" if process.returncode == ABSENT else f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"killed after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        out.seek(0)
        return ended, out.read()


def result(value: int) -> str:
    """Return `ok`, or the name of an errno."""
    return "ok" if value >= 0 else errno.errorcode.get(-value, str(value))


def files(callers: list[str]) -> str:
    """Return the first files of a stack, each once in immediate succession."""
    names: list[str] = []
    for caller in callers:
        name = caller.partition("+")[0].partition(":")[0]
        if names[-1:] != [name]:
            names.append(name)
    return " < ".join(names[:8]) or "unknown, the process has exited"


def table(opens: list[dict[str, Any]], begun_ns: int) -> None:
    """Print a row for each kind of open."""
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for one in opens:
        thread = "main" if one["pid"] == one["tid"] else "other"
        inside = one["functions"]
        where = f"{inside[-1]} < {inside[0]}" if inside else f"none: {one['thread']}"
        rows.setdefault((one["process"], thread, one["path"], result(one["result"]), where), []).append(one)
    for key, found in rows.items():
        print(f"{len(found):5} {(found[0]['ns'] - begun_ns) / 1e9:9.4f}", *key, flush=True)
        if not found[0]["functions"]:
            print(f"{'':15} stack: {files(found[0]['callers'])}")


def report(taken: dict[str, Any], begun_ns: int) -> None:
    """Print the opens of a program, and what may be missing in them."""
    table(taken["opens"], begun_ns)
    if taken["lost"]:
        print(f"# {taken['lost']} opens lost")
    for path in taken["unprobed"]:
        print(f"# {path} is not probed: its functions count as none")


def every_function(found: dict[str, dict[str, Any]]) -> None:
    """Print the functions with successful opens in any program, by path."""
    for what, index in (("innermost", -1), ("outermost", 0)):
        counts: dict[str, Counter[str]] = {}
        for taken in found.values():
            for one in taken["opens"]:
                if one["result"] >= 0:
                    functions = one["functions"] or ["none"]
                    counts.setdefault(one["path"], Counter())[functions[index]] += 1
        print(f"\n== {what} functions of successful opens")
        for path, names in sorted(counts.items()):
            print(f"{path}:", ", ".join(f"{name} ({count})" for name, count in names.most_common()), flush=True)


def record_opens(given: argparse.Namespace, recorder: Recorder, parent: Path, found: dict[str, Any]) -> None:
    """Run the programs, print their tables, and add the opens of each to `found`."""
    environment = {**given.environment, "PATH": TOOLS}
    with tempfile.TemporaryDirectory() as work:
        commands = programs(work)
        if given.command:
            commands = {"command": given.command}
        elif given.only:
            commands = {name: commands[name] for name in given.only.split(",")}
        for name, command in commands.items():
            with cgroup(parent / name) as folder:
                recorder.ask("watch", folder.stat().st_ino)
                begun_ns = time.monotonic_ns()
                ended, output = ran(command, folder, environment, given.seconds)
                time.sleep(0.1)  # threads that are about to open
            taken = recorder.ask("take")  # after the end of all processes
            last = "" if ended == "exit status 0" else f" ({output.strip().splitlines()[-1:]})"
            print(f"\n== {name}: {ended}{last}", flush=True)
            if given.verbose:
                print(output)
            report(taken, begun_ns)
            found[name] = {"end": ended, "output": output[-4000:], "begun_ns": begun_ns, **taken}


def nodes(folder: str) -> dict[str, list[str]]:
    """Return the device numbers (MAJOR:MINOR) to refuse by case: nothing, each node, all."""
    cases: dict[str, list[str]] = {"none": []}
    for pattern in NODES:
        for path in sorted(glob.glob(f"{folder}/{pattern}")) or [f"{folder}/{pattern}"]:
            if os.path.exists(path) and stat.S_ISCHR(os.stat(path).st_mode):
                number = os.stat(path).st_rdev
                cases[path] = [f"{os.major(number)}:{os.minor(number)}"]
            elif "*" not in path:
                print(f"{path} absent")
    return {**cases, "all": sorted({number for numbers in cases.values() for number in numbers})}


def one_refusal(recorder: Recorder, folder: Path, kind: str, devices: list[str], environment: dict[str, str]) -> Any:
    """Start a program that tries the driver while the devices are refused, and again while they are allowed.

    Return the results and opens of both attempts.
    """
    found = {}
    words = ["env", *(f"{name}={environment[name]}" for name in ("LD_LIBRARY_PATH",) if name in environment)]
    with cgroup(folder), ending() as running:
        recorder.ask("refuse", *devices)
        for when in ("refused", "allowed"):
            recorder.ask("watch", folder.stat().st_ino)
            begun_ns = time.monotonic_ns()
            try:
                if when == "refused":
                    running.append(Program(entered(folder, [*words, *DRIVER, f"refused-{kind}"]), name=kind))
                else:
                    recorder.ask("refuse")
                    running[0].say("again")
                results = running[0].hear(60)
            except BenchError as error:
                results = str(error)
            taken = recorder.ask("take")
            print(f"  {kind} {when}: {results}", flush=True)
            report(taken, begun_ns)
            found[when] = {"results": results, "begun_ns": begun_ns, **taken}
    return found


def refuse(given: argparse.Namespace, recorder: Recorder, parent: Path, found: dict[str, Any]) -> None:
    """Refuse each node in turn, print the results, and add them to `found`."""
    recorder.ask("gate", parent)
    for case, devices in nodes(given.nodes).items():
        print(f"\n== refused: {case} {' '.join(devices)}", flush=True)
        for kind in ("cuda", "nvml"):
            at = one_refusal(recorder, parent / kind, kind, devices, given.environment)
            found.setdefault(case, {})[kind] = at


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--driver-root", default="/")
    parser.add_argument("--only", help="names of programs, separated by commas (all)")
    parser.add_argument("--seconds", type=float, default=60, help="the time limit of a program (60)")
    parser.add_argument("--prefix", default=PREFIXES, help=f"the begin of paths, separated by commas ({PREFIXES})")
    parser.add_argument("--library", default=LIBRARIES, help=f"names or paths ({LIBRARIES})")
    parser.add_argument("--refuse", action="store_true", help="refuse nodes, instead of running all programs")
    parser.add_argument("--nodes", default="/dev", help="the folder with the nodes to refuse (/dev)")
    parser.add_argument("--verbose", action="store_true", help="print the programs' output")
    parser.add_argument("--python", default="/usr/bin/python3", help="an interpreter that can import BCC")
    parser.add_argument("command", nargs="*", help="a program to run instead of the list; after `--`")
    given = parser.parse_args()
    given.environment = dict(os.environ)
    if given.driver_root != "/":
        given.environment["LD_LIBRARY_PATH"] = f"{given.driver_root}/lib"
    return given


def main() -> int:
    """Record or refuse, and write the file."""
    given = arguments()
    end_in_order()
    script = [given.python, "-I", str(ROOT / "bench/lib/open_recorder.py"), given.prefix, *given.library.split(",")]
    environment = [f"LD_LIBRARY_PATH={path}" for path in [given.environment.get("LD_LIBRARY_PATH")] if path]
    found: dict[str, Any] = {}
    try:
        with cgroup(cgroup_root() / "fgpu-bench-opens") as parent, ending() as running:
            running.append(Program(["env", *environment, *script], name="recorder"))
            recorder = Recorder(running[0])
            print(f"# probes: {json.dumps(recorder.probes)}")
            (refuse if given.refuse else record_opens)(given, recorder, parent, found)
    finally:
        out = ROOT / f"build/bench/{'opens-refused' if given.refuse else 'opens'}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
    if given.refuse:
        return 0
    every_function(found)
    for name, taken in found.items():
        print(f"opens_{name} {len(taken['opens'])} opens")
    return int(any(taken["lost"] for taken in found.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench opens: {error}")
