"""Container engines for tests: Docker and Podman, unpacked and never installed, a newer Docker, and bare bundles.

The module creates build/engines/{root,newer,compose} once (`debian.py`), a mount namespace in which engines have a
separate /run, and containers. It imports nothing of fgpu.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.support import debian
from tests.support.commands import ask
from tests.support.host import BUILD, FGPU, ROOT, RUN_DIR, SHIM, cgroup_root
from tests.support.place import LISTS, Container
from tests.support.service import Service
from tests.support.wait import eventually

ENGINES = BUILD / "engines"
HELPER = BUILD / "oci/fgpu-oci"
PACKAGES = ("podman", "docker.io")
FIRST_WITH_CDI = 25  # of Docker; Debian 12 has 20.10
HOLD = "/opt/build/examples/fill --step 2MiB --hold"  # for this many seconds
FILL = f"{HOLD} 60"
# Options for containers of an engine that lacks privileges over the whole host.
ALLOWED = ("--network", "none", "--pids-limit", "-1", "--ulimit", "nproc=100:100", "--ulimit", "nofile=1024:1024")
ANSWER = re.compile(r"admitted (\d+) bytes, then CUDA_ERROR_OUT_OF_MEMORY")

MADE = (Path("/opt/containerd"), Path("/var/lib/containers"))  # created by engines, whatever their settings
# A separate /etc and /run with the files of the agent and the simulated driver, and cgroup v2 where engines look for
# it.
CAVE = """
set -eu
mkdir -p "$1/a" "$1/b" "$1/cdi" /var/lib/fgpu
cp -a /etc "$1/etc"
mount --bind "$1/etc" /etc
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
exec cat
"""

# A home for a user, and access to the programs and the shim if these are in another user's folder.
OWN = """
mkdir -p "$1/.config/containers" "$1/root"
cp "$3/.config/containers/policy.json" "$1/.config/containers"
chown -R "$2:$2" "$1"
closed='' at=${4%/*}
while [ -n "$at" ]; do
    [ -n "$(find "$at" -maxdepth 0 -perm -001)" ] || closed=$at
    at=${at%/*}
done
[ -n "$closed" ] || exit 0
mount --bind "$4" "$1/root"
mount -t tmpfs -o mode=755 tmpfs "$closed"
mkdir -p "$4"
mount --move "$1/root" "$4"
"""


@contextlib.contextmanager
def policy(service: Service, file: str, text: str) -> Iterator[None]:
    """Put an additional policy in force until the end of the block."""

    def in_force() -> int:
        return int(ask(verb="snapshot")["policies"]["count"])

    path, others = service.policies / file, in_force()
    path.write_text(text)
    try:
        eventually(lambda: in_force() == others + 1, 10, f"{file} in force")
        yield
    finally:
        path.unlink()
        eventually(lambda: in_force() == others, 10, f"{file} in force no more")


def unpacked() -> Path:
    """Return a root with the engines' packages, and the packages that they need and that this machine lacks."""
    return debian.unpacked(ENGINES / "root", PACKAGES)


def newer_docker() -> Path:
    """Return a root with a Docker that has CDI: this distribution's, or if it has none, that of the next Debian."""
    root = unpacked()
    said = subprocess.run([root / "usr/sbin/dockerd", "--version"], capture_output=True, text=True, check=True).stdout
    if int(re.findall(r"version (\d+)", said)[0]) >= FIRST_WITH_CDI:
        return root
    return debian.fetched(
        ENGINES / "newer", ["download", "docker.io", "docker-cli"], debian.suite(ENGINES, "newer", "trixie")
    )


def compose() -> Path:
    """Return Docker Compose of Debian's sid. Before 2.30, Compose does not know CDI; Debian 13 has 2.26."""
    root = debian.fetched(ENGINES / "compose", ["download", "docker-compose"], debian.suite(ENGINES, "compose", "sid"))
    return root / "usr/libexec/docker/cli-plugins/docker-compose"


def libraries(*programs: str | Path) -> set[str]:
    """Return the libraries that those programs load, as the dynamic linker finds them."""
    said = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=True, timeout=10).stdout
    return {path for path in re.findall(r"(?:=> |^\s+)(/\S+)", said, re.M) if not path.startswith(str(ROOT))}


def make_root(root: Path) -> Path:
    """Make a root file system with glibc, a shell and `cat`, for an image."""
    for folder in ("bin", "etc", "tmp", "proc", "dev", "sys", "run", "opt/build"):
        (root / folder).mkdir(parents=True)
    for program in ("/bin/sh", "/bin/cat", "/bin/sleep"):
        shutil.copy2(os.path.realpath(program), root / "bin" / Path(program).name)
    for path in libraries("/bin/sh", "/bin/cat", BUILD / "examples/fill"):
        place = root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(os.path.realpath(path), place)
    return root


class Cave:
    """A mount namespace. Its changes are not visible outside, except cgroups."""

    def __init__(self, work: Path, cdi: Path) -> None:
        (work / "cave").mkdir()
        (work / "cave/cdi").symlink_to(cdi)
        self.etc = work / "cave/etc"
        command = ["unshare", "--mount", "sh", "-c", CAVE, "sh", str(work / "cave")]
        self._made = [path for path in MADE if not path.exists()]
        self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout
        assert self._holder.stdout.readline() == "ready\n", "no mount namespace"
        self.prefix = ["nsenter", f"--target={self._holder.pid}", "--mount"]

    def close(self) -> None:
        """End the namespace with its last process."""
        self._holder.kill()
        self._holder.wait(5)
        for path in self._made:
            shutil.rmtree(path, ignore_errors=True)


class Engine:
    """An engine's command line.

    run, logs and rm are the same for all engines. `settings` is the file that setup edits.
    """

    kind = ""
    group = ""
    cdi = True  # whether it reads CDI specifications
    settings: Path
    named = True  # whether `fgpu setup` gets --file: `settings` is not the engine's usual path
    before: str | None = None

    def __init__(self, cave: Cave, work: Path) -> None:
        self.work = work
        self.cave = cave
        roots = self.roots()
        folders = [str(root / folder) for root in roots for folder in ("usr/bin", "usr/sbin")]
        found = [str(path) for root in roots for path in root.glob("usr/lib/*-linux-gnu")]
        self.environment = {
            "PATH": ":".join([*folders, "/usr/sbin", "/usr/bin", "/sbin", "/bin"]),
            "LD_LIBRARY_PATH": ":".join(found),
            "HOME": str(work),
        }

    def roots(self) -> list[Path]:
        """Return the roots with its programs, in the order of the search."""
        return [unpacked()]

    def words(self) -> list[str | Path]:
        """Return the command before its verb."""
        raise NotImplementedError

    def call(self, *words: str | Path, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run one command of the engine."""
        command = [str(word) for word in (*self.cave.prefix, *self.words(), *words)]
        more = {"env": self.environment, "capture_output": True, "text": True, "timeout": 60} | more
        done = subprocess.run(command, check=False, **more)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done

    def start(self, *words: str | Path) -> subprocess.Popen[bytes]:
        """Start one command in the background. Its stdin is a pipe."""
        command = [str(word) for word in (*self.cave.prefix, *self.words(), *words)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=self.environment)

    def fgpu(self, *words: str | Path) -> str:
        """Run `fgpu …` in the engine's mount namespace, and return its output."""
        command = [*self.cave.prefix, *FGPU, *map(str, words)]
        path = {"PATH": self.environment["PATH"]}  # where the command finds the engine
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=path)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def setup(self, *options: str) -> None:
        """Run `fgpu setup` for this engine."""
        self.fgpu("setup", self.kind, *options, *(["--file", self.settings] if self.named else []))

    def load(self, root: Path, name: str, labels: Mapping[str, str] | None = None) -> None:
        """Make an image of a root file system."""
        archive = self.work / f"{name}.tar"
        subprocess.run(["tar", "-C", root, "-cf", archive, "."], check=True, timeout=30)
        changes = [word for key, value in (labels or {}).items() for word in ("--change", f"LABEL {key}={value}")]
        with open(archive) as given:
            self.call("import", *changes, "-", f"{name}:1", stdin=given)

    def run(self, name: str, *options: str, image: str = "plain", command: str = FILL) -> Any:
        """Run `ENGINE run --detach`. Return the finished process, even if the container did not start."""
        words = ["run", "--detach", "--name", name, *ALLOWED, "--volume", f"{BUILD}:/opt/build:ro"]
        words += ["--volume", "/run/fgpu-sim:/run/fgpu-sim", "--env", "LD_LIBRARY_PATH=/opt/build/sim/lib"]
        return self.call(*words, *options, f"{image}:1", "sh", "-c", command, check=False)

    @contextlib.contextmanager
    def filled(self, name: str, *options: str, image: str = "plain") -> Iterator[int]:
        """Run a container that allocates as much as it can, and holds it. Yield the number of bytes."""
        try:
            done = self.run(name, *options, image=image)
            assert done.returncode == 0, done.stderr
            found = eventually(lambda: ANSWER.search(self.call("logs", name).stdout), 30, name)
            yield int(found[1])
        finally:
            self.remove(name)

    def remove(self, name: str) -> None:
        """Kill a container, if it exists, and remove it."""
        self.call("kill", "--signal", "KILL", name, check=False)
        self.call("rm", "--force", name, check=False)

    def apply(self) -> None:
        """Make the engine read its settings again."""

    def close(self) -> None:
        """End the engine and remove its cgroups."""
        folder = cgroup_root() / self.group
        command = ["find", folder, "-depth", "-type", "d", "-exec", "rmdir", "{}", "+"]
        subprocess.run(command, capture_output=True, check=False)


class Podman(Engine):
    """An engine without a daemon."""

    kind = "podman"
    group = "libpod_parent"
    named = False
    runtime: str | Path = shutil.which("runc") or "runc"

    def __init__(self, cave: Cave, work: Path) -> None:
        super().__init__(cave, work)
        self.settings = cave.etc / "containers/containers.conf.d/zz-fgpu.conf"
        (work / ".config/containers").mkdir(parents=True)
        (work / ".config/containers/policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self._state = Path(tempfile.mkdtemp(prefix="fgpu-"))  # short: Podman accepts at most 50 characters

    def words(self) -> list[str | Path]:
        """See Engine."""
        places = ["--root", self.work / "store", "--runroot", self._state]
        kinds = ["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]
        conmon = shutil.which("conmon", path=self.environment["PATH"])
        programs = ["--runtime", self.runtime, "--conmon", conmon]
        return ["podman", *places, *kinds, *programs]

    def close(self) -> None:
        """See Engine."""
        super().close()
        shutil.rmtree(self._state, ignore_errors=True)

    @contextlib.contextmanager
    def serving(self, place: Path) -> Iterator[None]:
        """Serve Podman's API on a socket, as podman.socket does."""
        service = self.start("system", "service", "--time", "0", f"unix://{place}")
        try:
            yield
        finally:
            service.terminate()
            service.wait(10)
            place.unlink(missing_ok=True)


class Rootless(Podman):
    """Podman of an unprivileged user, from a separate session. `group` is the user's slice."""

    user = 4711
    group = f"user.slice/user-{user}.slice"
    runtime = shutil.which("crun") or "crun"

    def __init__(self, cave: Cave, work: Path) -> None:
        super().__init__(cave, work)
        self.home = Path(f"/run/user/{self.user}")  # on the cave's own /run: other users cannot enter pytest's folders
        self.session = cgroup_root() / self.group / "session-1.scope"
        self.session.mkdir(parents=True)
        with open(cave.etc / "passwd", "a") as users:
            users.write(f"anna:x:{self.user}:{self.user}::{self.home}:/bin/sh\n")
        self.environment |= {"HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.home)}
        words = ["sh", "-euc", OWN, "sh", str(self.home), str(self.user), str(work), str(ROOT)]
        subprocess.run([*cave.prefix, *words], check=True, timeout=30)

    def words(self) -> list[str | Path]:
        """See Engine."""
        home = str(self.home)
        usual = (str(word).replace(str(self._state), f"{home}/state") for word in super().words())
        places = [word.replace(str(self.work), home) for word in usual]
        place = f"/sys/fs/cgroup/{self.group}/session-1.scope"
        session = ["sh", "-c", 'echo $$ >"$0"/cgroup.procs; cd /; exec "$@"', place]
        user = ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups", "--inh-caps=-all"]
        return [*session, *user, *places]

    def close(self) -> None:
        """See Engine. Processes that keep the user's namespaces are killed too."""
        (self.session / "cgroup.kill").write_text("1")
        eventually(lambda: not (self.session / "cgroup.procs").read_text(), 10, "the end of the session")
        super().close()
        with contextlib.suppress(OSError):  # sessions of other users are in it
            self.session.parent.parent.rmdir()


class Docker(Engine):
    """A separate daemon without network."""

    kind = "docker"
    group = "docker"
    cdi = False
    before = '{\n  "log-level": "warn",\n  "debug": false\n}'

    def __init__(self, cave: Cave, work: Path) -> None:
        super().__init__(cave, work)
        self.settings = work / "daemon.json"
        self.settings.write_text(self.before)
        self.begin()

    def begin(self) -> None:
        """Start the daemon. Returns when it answers."""
        work = self.work
        places = ["--data-root", work / "data", "--exec-root", work / "exec", "--pidfile", work / "pid"]
        kinds = ["--iptables=false", "--bridge=none", "--storage-driver=vfs", "--config-file", self.settings]
        command = ["dockerd", *places, *kinds, "--host", f"unix://{work}/docker.sock"]
        with open(work / "dockerd.log", "ab") as log:
            words = [str(word) for word in (*self.cave.prefix, *command)]
            self._daemon = subprocess.Popen(words, stdout=log, stderr=log, env=self.environment)

        def answers() -> bool:
            assert self._daemon.poll() is None, (work / "dockerd.log").read_text()
            return self.call("version", check=False).returncode == 0

        eventually(answers, 20, "dockerd")

    def words(self) -> list[str | Path]:
        """See Engine."""
        return ["docker", "--host", f"unix://{self.work}/docker.sock"]

    def apply(self) -> None:
        """Do what `fgpu setup` requires: a reload, or a restart if the default runtime is removed from the file."""
        default = json.loads(self.settings.read_text()).get("default-runtime")
        if default:
            os.kill(int((self.work / "pid").read_text()), signal.SIGHUP)
        else:
            self.end()
            self.begin()
        shown = ["info", "--format", "{{.DefaultRuntime}}"]
        eventually(lambda: self.call(*shown).stdout.strip() == (default or "runc"), 10, f"runtime {default}")

    def end(self, is_killed: bool = False) -> None:
        """End the daemon and its containers. Containers of a killed daemon end when it starts again."""
        self._daemon.send_signal(signal.SIGKILL if is_killed else signal.SIGTERM)
        self._daemon.wait(20)

    def close(self) -> None:
        """See Engine."""
        self.end()
        super().close()


class NewerDocker(Docker):
    """A Docker with CDI, switched on."""

    cdi = True
    before = '{\n  "features": {"cdi": true},\n  "debug": false\n}'

    def roots(self) -> list[Path]:
        """See Engine."""
        return [newer_docker(), unpacked()]


ALL = {"podman": Podman, "docker": Docker, "newer-docker": NewerDocker}


# -- bundles -------------------------------------------------------------------------------------------------------


class Bundles(Container):
    """Containers of runc or crun without fgpu's mounts. Tests add the mounts to the configuration."""

    def __init__(self, work: Path, runtime: str, run_dir: Path = RUN_DIR) -> None:
        super().__init__(work, runtime)
        self.spec: dict[str, Any] = {}  # the edits of CDI that an engine would apply to the next container
        self.device = ""
        self.wrapped = False
        self.before: list[Path] = []

    def _bundle(self, bundle: Path, name: str, folder: Path) -> None:
        super()._bundle(bundle, name, folder)
        path = bundle / "config.json"
        config = json.loads(path.read_text())
        ours = {str(SHIM), "/run/fgpu/shim", *LISTS}
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
    """Apply the edits of a device and those of its specification, as the CDI library of an engine does."""
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
