"""Files that containers get from this host: the preload list, `fgpu-oci` and the CDI specifications.

This module runs in the agent's main thread, and in commands. The files are RUN/containers (read by `fgpu-oci`),
RUN/container.preload, lists in RUN/preload.d, the published helper, and the CDI specifications. This module does not
change settings of engines (`engine_setup` changes these settings on request). After an OSError, containers that start
get the previous files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fgpu_ebpf.check import Check
from fgpu_ebpf.containers import cdi
from fgpu_ebpf.containers.cdi import Parts
from fgpu_ebpf.driver import shim_store
from fgpu_ebpf.linux import atomic_file
from fgpu_ebpf.linux.clear_path import make_way

HELPER = "fgpu-oci"
BIN = shim_store.STORE.parent / "bin"
_WRITTEN = "cdi.files"  # in the run folder: paths of the specifications, one per line
PUBLISHED = "published"  # in the run folder: path of the shim, if shim and helper are published copies
UNUSED_SECONDS = 600.0  # an engine mounts a list within seconds after `fgpu-oci` has named the list
_UNSAFE = frozenset('"\\\n')


def parts(run_dir: Path, shim: Path, helper: Path) -> Parts:
    """Return the paths of the parts. Raise ValueError if a path has a character that settings cannot contain."""
    for path in (run_dir, shim, helper):
        if _UNSAFE & set(str(path)):
            raise ValueError(f"{path}: paths must not contain quotes, backslashes or line breaks")
    return Parts(shim, run_dir / "shim", run_dir / "container.preload", helper, run_dir)


def publish_helper(built: Path) -> Path:
    """Copy the helper to a path that upgrades do not change, because settings and hooks name the path.

    Helpers that are running are not changed. The link `fgpu-info` beside the copy is the helper's other name. If no
    copy can be written, the existing copy is kept. After a loss of power, the path has the whole old or new helper,
    because engines that were set up start no container without the helper.

    Returns:
        The path of the copy.

    Raises:
        OSError: no copy can be written, and no copy exists.
    """
    BIN.mkdir(mode=0o755, parents=True, exist_ok=True)
    place, link = BIN / HELPER, BIN / Path(cdi.INFO).name
    aside = BIN / f".{HELPER}.{os.getpid()}"
    try:
        aside.unlink(missing_ok=True)
        content = built.read_bytes()
        is_same = place.is_file() and os.access(place, os.X_OK) and place.read_bytes() == content
        if not is_same:
            shim_store.write_durably(aside, content)
            make_way(str(place))
            os.replace(aside, place)
        if not is_same or not link.is_symlink() or os.readlink(link) != HELPER:
            aside.symlink_to(HELPER)
            os.replace(aside, link)
            atomic_file.sync_folder(BIN)
    except OSError:
        aside.unlink(missing_ok=True)
        if not place.is_file():
            raise
    return place


def set_up(of: Parts, folder: Path, names: Sequence[str]) -> None:
    """Write the files with which containers can request the shim and these shares.

    Raise OSError or QuantityError on failure. RUN/containers does not depend on the specifications, so that containers
    of engines that were set up get the shim although no specification can be written.

    Args:
        of: the files of the host that containers get.
        folder: the folder of the CDI specifications.
        names: the names of the shares.
    """
    atomic_file.write(of.preload, f"{of.shim}\n")
    if of.helper.parent == BIN:
        atomic_file.write(of.run_dir / PUBLISHED, f"{of.shim}\n")
    atomic_file.write(of.run_dir / "containers", _setup(of))
    specs = [cdi.shim_spec(of), *([cdi.share_spec(of, names)] if names else [])]
    paths = [folder / cdi.file_name(spec) for spec in specs]
    _forget(of.run_dir, keep=paths)
    atomic_file.write(of.run_dir / _WRITTEN, "".join(f"{path}\n" for path in paths))
    for path, spec in zip(paths, specs, strict=True):
        cdi.write(path, spec)


def _setup(of: Parts) -> str:
    """Return the text of RUN/containers."""
    return f"shim {of.shim}\nsocket {of.socket}\npreload {of.preload}\ninfo {of.helper}\n"


class Lists:
    """Preload lists of images, which `fgpu-oci precreate` stores in the run folder, because Podman passes no bundle.

    A list that no container starts with is removed after UNUSED_SECONDS of the monotonic clock.
    """

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "preload.d"
        self._asked: dict[str, tuple[int, float]] = {}  # by path: the time stamp, and the time of its last change

    def sweep(self) -> None:
        """Remove lists that no start has used for UNUSED_SECONDS. Running containers keep their mounts."""
        now, asked = time.monotonic(), dict[str, tuple[int, float]]()
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as lists:
            for entry in lists:
                stamp = entry.stat().st_mtime_ns
                known, since = self._asked.get(entry.path, (stamp, now))
                asked[entry.path] = stamp, since if known == stamp else now
                if now - asked[entry.path][1] > UNUSED_SECONDS:
                    os.unlink(entry.path)
                    del asked[entry.path]
        self._asked = asked


def take_away(run_dir: Path) -> None:
    """Remove RUN/containers, the lists and the specifications, so that containers that start from now on get nothing.

    Running containers keep their mounts.
    """
    (run_dir / "containers").unlink(missing_ok=True)
    _forget(run_dir, keep=())
    (run_dir / _WRITTEN).unlink(missing_ok=True)
    (run_dir / "container.preload").unlink(missing_ok=True)
    shutil.rmtree(run_dir / "preload.d", ignore_errors=True)


def published(run_dir: Path) -> Path | None:
    """Return the path of the shim that this host's agents have published, or None if no shim was published."""
    try:
        shim = (run_dir / PUBLISHED).read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return None
    return Path(shim) if shim.startswith("/") else None


def written(run_dir: Path) -> list[dict[str, Any]]:
    """Return fgpu's specifications that still exist."""
    found = []
    for path in _listed(run_dir):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def mounted(run_dir: Path) -> dict[str, Path]:
    """Return the files that containers get (`shim`, `preload`, `info`); empty if nothing is set up."""
    try:
        lines = (run_dir / "containers").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return {}
    paths = dict(line.split(" ", 1) for line in lines if " " in line)
    return {name: Path(paths[name]) for name in ("shim", "preload", "info") if name in paths}


def check(run_dir: Path) -> Check:
    """Check that CDI specifications of fgpu exist, with devices that a container may request."""
    devices = [f"{spec['kind']}={device['name']}" for spec in written(run_dir) for device in spec["devices"]]
    if devices:
        return Check("containers", True, f"{len(devices)} CDI devices (`fgpu cdi list`)")
    fix = "the agent's log has the reason; set cdiFolder in agent.yaml to a writable folder"
    return Check("containers", False, "there is no CDI specification", fix)


def _forget(run_dir: Path, keep: Sequence[Path]) -> None:
    """Remove specifications that an earlier start wrote, and their folder if it is empty."""
    for path in _listed(run_dir):
        if path not in keep:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def _listed(run_dir: Path) -> list[Path]:
    """Return the paths in the list of specifications; no paths if the list, renewed at each start, is unreadable."""
    try:
        lines = (run_dir / _WRITTEN).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    return [Path(line) for line in lines if line.startswith("/") and line.endswith(".json") and "\0" not in line]
