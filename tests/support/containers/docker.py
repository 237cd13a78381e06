"""A real Docker that one test starts: containers with labels, and a socket that the test can stall."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from tests.support.host import BUILD, ENVIRONMENT, ROOT, SHIM
from tests.support.place import HUB, PRIVATE_MOUNTS, Place
from tests.support.tenant import Tenant
from tests.support.wait import eventually

ENGINES = BUILD / "engines"  # unpacked by ./dev test, never installed
FOLDERS = ("usr/sbin", "usr/bin")
PATH = ":".join([*(str(ENGINES / folder) for folder in FOLDERS), "/usr/sbin", "/usr/bin", "/sbin", "/bin"])
DOCKERD = next((str(ENGINES / f / "dockerd") for f in FOLDERS if (ENGINES / f / "dockerd").exists()), None)


class Docker(Place):
    """dockerd with the cgroupfs driver, on a private socket. `socket` is the one that the agent uses."""

    group = "/docker"

    def __init__(self, work: Path, where: Path, *more: str) -> None:
        """Start dockerd, with `more` as additional options."""
        super().__init__(work)
        assert DOCKERD, "no dockerd: ./dev test unpacks it"
        self._own, self._where = work / "d.sock", where
        (work / "ld.so.preload").write_text(f"{SHIM}\n")
        self._numbers_of_ids = itertools.count(1)
        self._log = work / "dockerd.log"
        self._state = Path(tempfile.mkdtemp(prefix="dockerd-"))  # short: a socket's path has at most 107 bytes
        options = ["--data-root", work / "data", "--exec-root", self._state, "--pidfile", work / "pid"]
        options += ["--host", f"unix://{self._own}", "--storage-driver=vfs", "--iptables=false", "--bridge=none"]
        options += ["--exec-opt", "native.cgroupdriver=cgroupfs", *more]
        # A dockerd that starts removes containers with --rm, even running ones.
        self._removed = [] if "--live-restore" in more else ["--rm"]
        self._mounts = -1  # descriptor of the mount namespace of a killed daemon
        self._enter = ["unshare", "-m", "sh", "-c", PRIVATE_MOUNTS, "sh"]
        self._words = [DOCKERD, *map(str, options)]
        self.start_daemon()
        self.open()

    def start_daemon(self) -> None:
        """Start dockerd. Returns when it answers."""
        with open(self._log, "ab") as log:
            keep = () if self._mounts < 0 else (self._mounts,)
            environment = {**os.environ, "PATH": PATH}
            self._daemon = subprocess.Popen(
                [*self._enter, *self._words], stdout=log, stderr=log, env=environment, pass_fds=keep
            )
        try:
            eventually(lambda: self._call("version", check=False) == 0, 30, "dockerd")
        except BaseException:
            self._stop()
            raise

    def kill_daemon(self) -> None:
        """Kill dockerd with SIGKILL, and so its containerd. Containers continue."""
        self._mounts = os.open(f"/proc/{self._daemon.pid}/ns/mnt", os.O_RDONLY)
        self._enter = ["nsenter", f"--mount=/proc/self/fd/{self._mounts}"]
        self._daemon.kill()
        self._daemon.wait(10)
        # If pid 1 does not reap children, the next dockerd would treat the zombie as a running containerd.
        (self._state / "containerd/containerd.pid").unlink(missing_ok=True)

    def open(self) -> None:
        """Make the engine reachable for the agent (again)."""
        self.socket = Front(self._where, self._own)

    def _docker(self, *words: str | Path) -> list[str]:
        return [str(ENGINES / "usr/bin/docker"), "--host", f"unix://{self._own}", *map(str, words)]

    def _call(self, *words: str | Path, check: bool = True, given: bytes = b"") -> int:
        done = subprocess.run(self._docker(*words), capture_output=True, input=given, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{words}: {done.stdout!r}{done.stderr!r}"
        return done.returncode

    def image(self, labels: Mapping[str, str]) -> str:
        """Make an image with labels and without files of its own. Return its name."""
        name = f"fgpu-e2e:{next(self._numbers_of_ids)}"
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as made:
            for link in ("bin", "sbin", "lib", "lib64"):
                if Path("/", link).is_symlink():
                    entry = tarfile.TarInfo(link)
                    entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(Path("/", link))
                    made.addfile(entry)
            entry = tarfile.TarInfo("usr")
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            made.addfile(entry)
        changes = [word for key, value in labels.items() for word in ("--change", f'LABEL "{key}"="{value}"')]
        self._call("import", *changes, "-", name, given=tar.getvalue())
        return name

    def container(self, labels: Mapping[str, str], image: Mapping[str, str] | None = None) -> Tenant:
        """Start a container with these labels, from an image with those labels. No limit is set by hand."""
        self._labels, self._image = labels, self.image(image or {})
        return self.tenant(None)

    def named(self, name: str) -> Tenant:
        """Start a container with that name, with the labels and the image of the last container."""
        folder = self.work / name
        folder.mkdir()
        self.tenants.append(self._make(name, folder, None))
        return self.tenants[-1]

    def _make(self, name: str, folder: Path, memory: int | None) -> Tenant:
        assert memory is None
        read_only = [SHIM, BUILD, ROOT / ".venv", "/run/fgpu-sim", "/run/fgpu/shim", "/usr", "/etc/ld.so.cache"]
        binds = [f"{path}:{path}:ro" for path in read_only]
        binds += [f"{self.work}/ld.so.preload:/etc/ld.so.preload:ro", f"{folder}:{folder}"]
        words = ["run", *self._removed, "--interactive", "--name", name, "--network", "none", "--workdir", str(folder)]
        words += [word for bind in binds for word in ("--volume", bind)]
        words += [word for key, value in ENVIRONMENT.items() for word in ("--env", f"{key}={value}")]
        words += [word for key, value in self._labels.items() for word in ("--label", f"{key}={value}")]
        words += ["--cidfile", str(folder / "id"), self._image, "sh", "-c", HUB]
        with open(self.work / f"{name}.log", "wb") as log:
            hub = subprocess.Popen(self._docker(*words), stdin=subprocess.PIPE, stdout=log, stderr=log)
        id_ = eventually(lambda: (folder / "id").exists() and (folder / "id").read_text(), 20, "the container's id")
        tenant = Tenant(self, name, f"{self.group}/{id_}", folder, hub)
        eventually(tenant.pids, 20, f"the start of {name}: {(self.work / f'{name}.log').read_text()}")
        return tenant

    def end(self, tenant: Tenant) -> None:
        """Remove the container."""
        self._call("rm", "--force", tenant.name, check=False)
        tenant.hub.wait(20)
        eventually(lambda: not tenant.pids(), 5, f"the end of {tenant.name}")

    def end_all(self) -> None:
        """Remove every container. A stalled socket answers requests again."""
        self.socket.go_on()
        super().close()

    def close(self) -> None:
        """Remove every container, and stop the engine."""
        self.end_all()
        self.socket.close()
        self._stop()

    def _stop(self) -> None:
        self._daemon.terminate()
        self._daemon.wait(30)
        if self._mounts >= 0:
            os.close(self._mounts)
        for folder in (self.work / "data", self._state):
            shutil.rmtree(folder, ignore_errors=True)


class Front:
    """A socket in front of the engine's own.

    `stall`: requests are accepted and not answered. `close`: the socket does not exist.
    """

    def __init__(self, path: Path, engine: Path) -> None:
        self.path, self._engine = path, engine
        self._go = threading.Event()
        self._go.set()
        self.asked = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def stall(self) -> None:
        """Stop answering requests."""
        self._go.clear()

    def go_on(self) -> None:
        """Answer requests again."""
        self._go.set()

    def close(self) -> None:
        """Remove the socket."""
        self.go_on()
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                self.asked += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._go.wait()
        with client, socket.socket(socket.AF_UNIX) as engine, contextlib.suppress(OSError):
            engine.connect(str(self._engine))
            engine.sendall(client.recv(1 << 16))
            while said := engine.recv(1 << 16):
                client.sendall(said)
