"""What containers get from this host: the shim's list, `fgpu-oci` and the CDI specifications.

Owns: RUN/containers (what `fgpu-oci` reads), RUN/container.preload, how long a list of RUN/preload.d stays, the
published helper, and which CDI files are ours. Never: touches an engine's own settings (`enginesetup` does, when told
to). On failure: OSError; a container that starts meanwhile has what was there before.
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

from fgpu_ebpf import cdi, published, wholefile
from fgpu_ebpf.cdi import Parts
from fgpu_ebpf.checks import Check

HELPER = "fgpu-oci"
BIN = published.STORE.parent / "bin"
_WRITTEN = "cdi.files"  # below the run directory: paths of the specifications, a line each
_PUBLISHED = "published"  # the same: where the shim is, if it and the helper are copies of ours
UNUSED_SECONDS = 600.0  # an engine binds a list within seconds of its being named
_UNSAFE = frozenset('"\\\n')


def parts(run_dir: Path, shim: Path, helper: Path) -> Parts:
    """Where containers find things. ValueError: a path that no configuration could carry."""
    for path in (run_dir, shim, helper):
        if _UNSAFE & set(str(path)):
            raise ValueError(f"{path}: no quotes, backslashes or line breaks in paths, please")
    return Parts(shim, run_dir / "shim", run_dir / "container.preload", helper, run_dir)


def publish_helper(built: Path) -> Path:
    """A copy at a path that stays over upgrades: engines' settings and hooks name it. What runs keeps its own."""
    BIN.mkdir(mode=0o755, parents=True, exist_ok=True)
    place = BIN / HELPER
    aside = BIN / f".{HELPER}.{os.getpid()}"
    shutil.copyfile(built, aside)
    aside.chmod(0o755)
    os.replace(aside, place)
    return place


def set_up(of: Parts, folder: Path, names: Sequence[str]) -> None:
    """From now on containers can ask for the shim and for these shares. Raises OSError, QuantityError."""
    specs = [cdi.shim_spec(of), *([cdi.share_spec(of, names)] if names else [])]
    paths = [folder / cdi.file_name(spec) for spec in specs]
    wholefile.write(of.preload, f"{of.shim}\n")
    if of.helper.parent == BIN:
        wholefile.write(of.run_dir / _PUBLISHED, f"{of.shim}\n")
    _forget(of.run_dir, keep=paths)
    wholefile.write(of.run_dir / _WRITTEN, "".join(f"{path}\n" for path in paths))
    for path, spec in zip(paths, specs, strict=True):
        cdi.write(path, spec)
    wholefile.write(of.run_dir / "containers", f"shim {of.shim}\nsocket {of.socket}\npreload {of.preload}\n")


class Lists:
    """Lists of images' own preloads that `fgpu-oci precreate` keeps, which knows no bundle that they could be in; as
    long as containers start with them, by no clock that can be set.
    """

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "preload.d"
        self._asked: dict[str, tuple[int, float]] = {}  # time stamp, and since when it is that one

    def sweep(self) -> None:
        """Removes those that nobody has asked for of late: who runs keeps what it has mounted."""
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


def take_away(run_dir: Path) -> Path | None:
    """No container that starts from now on gets anything; those that run keep what they have mounted.

    Answers where the published shim is; None: none was, or somebody else published it.
    """
    (run_dir / "containers").unlink(missing_ok=True)
    _forget(run_dir, keep=())
    (run_dir / _WRITTEN).unlink(missing_ok=True)
    (run_dir / "container.preload").unlink(missing_ok=True)
    shutil.rmtree(run_dir / "preload.d", ignore_errors=True)
    try:
        shim = (run_dir / _PUBLISHED).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    (run_dir / _PUBLISHED).unlink()
    return Path(shim)


def written(run_dir: Path) -> list[dict[str, Any]]:
    """The specifications that are ours and still there."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run_dir / _WRITTEN).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads(Path(line).read_text(encoding="utf-8")))
    return found


def mounted(run_dir: Path) -> list[Path]:
    """The files that containers get, where something is set up."""
    try:
        lines = (run_dir / "containers").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    told = dict(line.split(" ", 1) for line in lines if " " in line)
    return [Path(told[name]) for name in ("shim", "preload") if name in told]


def check(run_dir: Path) -> Check:
    """Engines find what a container may ask for."""
    devices = [f"{spec['kind']}={device['name']}" for spec in written(run_dir) for device in spec["devices"]]
    if devices:
        return Check("containers", True, f"{len(devices)} CDI devices (fgpu cdi list)")
    mend = "the agent's log says why; cdiFolder in agent.yaml names a folder that it may write"
    return Check("containers", False, "no CDI specification is there", mend)


def _forget(run_dir: Path, keep: Sequence[Path]) -> None:
    """Removes specifications that an earlier start wrote, and their folder if nothing else is in it."""
    with contextlib.suppress(FileNotFoundError):
        for line in (run_dir / _WRITTEN).read_text(encoding="utf-8").splitlines():
            if Path(line) not in keep:
                Path(line).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    Path(line).parent.rmdir()
