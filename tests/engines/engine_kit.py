"""The engine tests' hands: Docker and Podman of this distribution, unpacked and never installed, and bare bundles.

Owns: build/engines, made once; a mount namespace in which engines find a /run of their own; containers of both kinds.
What cannot be downloaded is a failure that says so, never a test left out. Imports nothing of fgpu.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness

ENGINES = harness.BUILD / "engines"
HELPER = harness.BUILD / "oci/fgpu-oci"
PACKAGES = ("podman", "docker.io")
FILL = "/opt/build/examples/fill --step 2MiB --hold 60"
ANSWER = re.compile(r"admitted (\d+) bytes, then CUDA_ERROR_OUT_OF_MEMORY")

MADE = (Path("/opt/containerd"), Path("/var/lib/containers"))  # by engines, wherever they are told to keep their things
# A /run of one's own, but for what the agent and the simulated driver have there; cgroup v2 where engines look for it.
CAVE = """
set -eu
mkdir -p "$1/a" "$1/b" "$1/cdi" /var/lib/fgpu
mount --bind /run/fgpu "$1/a"
mount --bind /run/fgpu-sim "$1/b"
mount -t tmpfs tmpfs /run
mkdir /run/fgpu /run/fgpu-sim /run/cdi
mount --move "$1/a" /run/fgpu
mount --move "$1/b" /run/fgpu-sim
mount --bind "$1/cdi" /run/cdi
mount -t tmpfs tmpfs /var/lib/fgpu
[ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ] || mount -t cgroup2 none /sys/fs/cgroup
echo ready
exec sleep 600
"""


def unpacked() -> Path:
    """The engines' packages, and those that they need and this machine has not, as a root of their own."""
    root = ENGINES / "root"
    if root.exists():
        return root
    aside, archives = ENGINES / ".root", ENGINES / "archives"
    shutil.rmtree(ENGINES, ignore_errors=True)
    aside.mkdir(parents=True)
    (archives / "partial").mkdir(parents=True)
    command = ["apt-get", "install", "-y", "-q", "--download-only", "--no-install-recommends", "--reinstall"]
    command += ["-o", f"Dir::Cache::archives={archives}", "-o", "APT::Sandbox::User=root", *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:  # perhaps the lists are old
        subprocess.run(["apt-get", "update", "-q"], capture_output=True, timeout=60, check=False)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"no engines from this distribution: {done.stdout[-500:]}{done.stderr[-500:]}"
    for archive in archives.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, aside], check=True, timeout=60)
    shutil.rmtree(archives)
    aside.rename(root)
    return root


def libraries(*programs: str | Path) -> set[str]:
    """What those programs load, as the dynamic linker finds it."""
    said = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=True, timeout=10).stdout
    return {path for path in re.findall(r"(?:=> |^\s+)(/\S+)", said, re.M) if not path.startswith(str(harness.ROOT))}


def make_root(root: Path) -> Path:
    """A root file system with glibc, a shell and `cat`: what an image is made of."""
    for folder in ("bin", "etc", "tmp", "proc", "dev", "sys", "run", "opt/build"):
        (root / folder).mkdir(parents=True)
    for program in ("/bin/sh", "/bin/cat", "/bin/sleep"):
        shutil.copy2(os.path.realpath(program), root / "bin" / Path(program).name)
    for path in libraries("/bin/sh", "/bin/cat", harness.BUILD / "examples/fill"):
        place = root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(os.path.realpath(path), place)
    return root


class Cave:
    """A mount namespace; what is done in it leaves nothing outside but cgroups."""

    def __init__(self, work: Path, cdi: Path) -> None:
        (work / "cave").mkdir()
        (work / "cave/cdi").symlink_to(cdi)
        command = ["unshare", "--mount", "sh", "-c", CAVE, "sh", str(work / "cave")]
        self._made = [path for path in MADE if not path.exists()]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout
        assert self._holder.stdout.readline() == "ready\n", "no mount namespace"
        self.prefix = ["nsenter", f"--target={self._holder.pid}", "--mount"]

    def close(self) -> None:
        """The namespace goes when the last in it has gone."""
        self._holder.kill()
        self._holder.wait(5)
        for path in self._made:
            shutil.rmtree(path, ignore_errors=True)


class Engine:
    """An engine's command line: run, logs and rm are the same for both. `settings`: what `fgpu setup` edits."""

    group = ""
    settings: Path
    before: str | None = None

    def __init__(self, cave: Cave, work: Path) -> None:
        self.work = work
        self._cave = cave
        root = unpacked()
        folders = [str(root / folder) for folder in ("usr/bin", "usr/sbin")]
        found = [str(path) for path in root.glob("usr/lib/*-linux-gnu")]
        self.environment = {
            "PATH": ":".join([*folders, "/usr/sbin", "/usr/bin", "/sbin", "/bin"]),
            "LD_LIBRARY_PATH": ":".join(found),
            "HOME": str(work),
        }
        self.root = root

    def words(self) -> list[str | Path]:
        """The command before its verb."""
        raise NotImplementedError

    def call(self, *words: str | Path, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
        """One command of the engine's."""
        command = [str(word) for word in (*self._cave.prefix, *self.words(), *words)]
        more = {"env": self.environment, "capture_output": True, "text": True, "timeout": 60} | more
        done = subprocess.run(command, check=False, **more)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done

    def fgpu(self, *words: str | Path) -> str:
        """`fgpu …`, where the engine is."""
        command = [*self._cave.prefix, *harness.FGPU, *map(str, words)]
        path = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=path)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def setup(self, *options: str) -> None:
        """`fgpu setup` of this engine."""
        self.fgpu("setup", type(self).__name__.lower(), *options, "--file", self.settings)

    def load(self, root: Path, name: str) -> None:
        """An image of a root file system."""
        archive = self.work / f"{name}.tar"
        subprocess.run(["tar", "-C", root, "-cf", archive, "."], check=True, timeout=30)
        self.call("import", archive, f"{name}:1")

    def run(self, name: str, *options: str, image: str = "plain", command: str = FILL) -> Any:
        """`ENGINE run` in the background; what it printed if it did not start."""
        words = ["run", "--detach", "--name", name, "--network", "none", "--pids-limit", "-1"]
        words += [
            "--ulimit",
            "nproc=100:100",
            "--ulimit",
            "nofile=1024:1024",
            "--volume",
            f"{harness.BUILD}:/opt/build:ro",
        ]
        words += ["--volume", "/run/fgpu-sim:/run/fgpu-sim", "--env", "LD_LIBRARY_PATH=/opt/build/sim/lib"]
        return self.call(*words, *options, f"{image}:1", "sh", "-c", command, check=False)

    @contextlib.contextmanager
    def filled(self, name: str, *options: str, image: str = "plain") -> Iterator[int]:
        """A container that has taken all that it gets, and holds it; how many bytes that were."""
        try:
            done = self.run(name, *options, image=image)
            assert done.returncode == 0, done.stderr
            found = harness.eventually(lambda: ANSWER.search(self.call("logs", name).stdout), 30, name)
            yield int(found[1])
        finally:
            self.remove(name)

    def remove(self, name: str) -> None:
        """Kills a container, if it is there, and forgets it."""
        self.call("kill", "--signal", "KILL", name, check=False)
        self.call("rm", "--force", name, check=False)

    def apply(self) -> None:
        """The engine reads its settings again."""

    def close(self) -> None:
        """Ends the engine; its cgroups go."""
        folder = harness.cgroup_root() / self.group
        command = ["find", folder, "-depth", "-type", "d", "-exec", "rmdir", "{}", "+"]
        subprocess.run(command, capture_output=True, check=False)


class Podman(Engine):
    """No daemon; hooks from a folder."""

    group = "libpod_parent"

    def __init__(self, cave: Cave, work: Path) -> None:
        super().__init__(cave, work)
        (work / "hooks").mkdir()
        self.settings = work / "hooks/fgpu.json"
        (work / ".config/containers").mkdir(parents=True)
        (work / ".config/containers/policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')

    def words(self) -> list[str | Path]:
        """See Engine."""
        places = ["--root", self.work / "store", "--runroot", self.work / "state", "--hooks-dir", self.work / "hooks"]
        kinds = ["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]
        programs = [
            "--runtime",
            shutil.which("runc"),
            "--conmon",
            shutil.which("conmon", path=self.environment["PATH"]),
        ]
        return ["podman", *places, *kinds, *programs]


class Docker(Engine):
    """A daemon of our own, without network."""

    group = "docker"

    def __init__(self, cave: Cave, work: Path) -> None:
        super().__init__(cave, work)
        self.settings = work / "daemon.json"
        self.before = '{\n  "log-level": "warn",\n  "debug": false\n}'
        self.settings.write_text(self.before)
        self._start()

    def _start(self) -> None:
        work = self.work
        places = ["--data-root", work / "data", "--exec-root", work / "exec", "--pidfile", work / "pid"]
        kinds = ["--iptables=false", "--bridge=none", "--storage-driver=vfs", "--config-file", self.settings]
        command = ["dockerd", *places, *kinds, "--host", f"unix://{work}/docker.sock"]
        with open(work / "dockerd.log", "ab") as log:
            words = [str(word) for word in (*self._cave.prefix, *command)]
            self._daemon = subprocess.Popen(words, stdout=log, stderr=log, env=self.environment)

        def answers() -> bool:
            assert self._daemon.poll() is None, (work / "dockerd.log").read_text()
            return self.call("version", check=False).returncode == 0

        harness.eventually(answers, 20, "dockerd")

    def words(self) -> list[str | Path]:
        """See Engine."""
        return ["docker", "--host", f"unix://{self.work}/docker.sock"]

    def apply(self) -> None:
        """What `fgpu setup` asks for: a reload, and a restart where the default runtime goes from the file."""
        default = json.loads(self.settings.read_text()).get("default-runtime")
        if default:
            os.kill(int((self.work / "pid").read_text()), signal.SIGHUP)
        else:
            self._stop()
            self._start()
        shown = ["info", "--format", "{{.DefaultRuntime}}"]
        harness.eventually(lambda: self.call(*shown).stdout.strip() == (default or "runc"), 10, f"runtime {default}")

    def _stop(self) -> None:
        self._daemon.terminate()
        self._daemon.wait(20)

    def close(self) -> None:
        """See Engine."""
        self._stop()
        super().close()


# -- bundles -------------------------------------------------------------------------------------------------------


class Bundles(harness.Container):
    """Containers of runc or crun without a mount of ours: what they get, somebody edits in."""

    def __init__(self, work: Path, runtime: str, run_dir: Path = harness.RUN_DIR) -> None:
        super().__init__(work, runtime)
        self.spec: dict[str, Any] = {}  # what an engine would take from CDI, for the next container
        self.device = ""
        self.wrapped = False
        self.before: list[Path] = []

    def _bundle(self, bundle: Path, name: str, folder: Path) -> None:
        super()._bundle(bundle, name, folder)
        path = bundle / "config.json"
        config = json.loads(path.read_text())
        ours = {str(harness.SHIM), "/run/fgpu/shim", "/etc/ld.so.preload"}
        config["mounts"] = [mount for mount in config["mounts"] if mount["destination"] not in ours]
        inject(config, self.spec, self.device)
        path.write_text(json.dumps(config))

    def _command(self, *words: str | Path) -> list[str | Path]:
        command = super()._command(*words)
        if self.wrapped:
            command[command.index(self._runtime)] = HELPER
            at = command.index(HELPER) + 1
            command[at:at] = ["runtime", self._runtime]
        return command


def inject(config: dict[str, Any], spec: dict[str, Any], device: str) -> None:
    """What the CDI library of an engine does with a device: its edits, and those of its specification."""
    if not device:
        return
    (chosen,) = [found["containerEdits"] for found in spec["devices"] if found["name"] == device]
    for edits in (chosen, spec["containerEdits"]):
        config["process"]["env"] += edits.get("env", [])
        for mount in edits.get("mounts", []):
            config["mounts"].append(
                {"source": mount["hostPath"], "destination": mount["containerPath"], "options": mount["options"]}
            )
        for hook in edits.get("hooks", []):
            made = {key: hook[key] for key in ("path", "args", "timeout")}
            config.setdefault("hooks", {}).setdefault(hook["hookName"], []).append(made)
