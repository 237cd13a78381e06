"""The command `fgpu setup ENGINE`, which gives every container of an engine the shim.

This module runs in the command; `checks` and `check_cdi` run in `fgpu doctor`. The command writes the engine's
settings, and the links and files beside `fgpu-oci` that the settings name. The previous text is stored for --undo.
`engine_config` computes the settings. No engine is restarted. After SetupError the settings are unchanged; after
OSError each file has the whole old or the whole new text.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fgpu_ebpf.check import Check
from fgpu_ebpf.containers import injection
from fgpu_ebpf.containers.engine_config import Engine, Settings, SetupError, Wanted, docker_lacks_cdi
from fgpu_ebpf.containers.engines import ENGINES
from fgpu_ebpf.linux import atomic_file, procfs

STATE = injection.BIN.parent / "setup"
_FOLDERS = ("/usr/local/bin", "/usr/sbin", "/usr/bin", "/opt/rke2/bin")  # after PATH, which may lack these folders
_RUN = Path("/run")  # has the pid files of daemons
_VERSION = re.compile(r"version v?(\d+)\.(\d+)")
_ARGUMENTS = re.compile(r"argv\[\]=(.*?) ; ")  # of a command that `systemctl show` prints


def program(engine: Engine) -> str:
    """Return the path of the engine's program, or an empty text if the engine is not installed on this host."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *_FOLDERS])
    return next((found for name in engine.programs if (found := shutil.which(name, path=path))), "")


def parts(name: str, engine: Engine, states: Path) -> list[tuple[Engine, Path]]:
    """Return each settings file of an engine with the file of its state. `states`: the folder of the states."""
    return [(engine, states / f"{name}.json"), *([(engine.more, states / f"{name}-more.json")] if engine.more else ())]


def as_installed(engine: Engine) -> Engine:
    """Return the engine with its version, or an empty version if unknown, and with the file that the engine reads."""
    file, said = engine.file, ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = [program(engine), "--version"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    if file.name == "config.toml.tmpl":  # of k3s and RKE2: containerd 2 reads another template
        made = _text(file.with_name("config.toml")) or ""
        file = file.with_name("config-v3.toml.tmpl") if re.search(r"^version = 3$", made, re.M) else file
    match = _VERSION.search(said)
    return replace(engine, file=file, version=tuple(map(int, match.groups())) if match else ())


def set_up(engine: Engine, helper: Path, state: Path, is_dry: bool = False) -> Wanted | None:
    """Write the engine's settings. Return the written settings, or None if nothing has to be written.

    Raise SetupError or OSError on failure.

    Args:
        engine: the engine, as as_installed() returns it.
        helper: the path of `fgpu-oci`.
        state: the file in which the previous text is stored, so that undo() restores that text byte for byte.
        is_dry: write nothing.
    """
    if conflict := _conflict(engine, _text(engine.file) or "", helper):
        raise SetupError(": ".join(conflict))
    there = where_it_is(engine, state)
    if there.file != engine.file and not is_dry:
        undo(there, state)
    now, kept = _text(engine.file), _kept(state)
    before = _before(engine, now, kept)
    wanted = engine.after(Settings(engine.file, before or "", helper, engine.version))
    if is_dry:
        return None if wanted.text == now else wanted
    _put_beside(helper, wanted)
    if state.exists():
        state.chmod(0o600)  # an earlier version of fgpu has made the state readable for all users
    if wanted.text == now and kept["after"] is not None:
        return None
    missing = () if engine.keeps_folder else _missing_folders(engine.file)
    made = sorted({*kept["made"], *missing}, key=len, reverse=True)
    notes = json.dumps({"file": str(engine.file), "before": before, "had": now, "after": wanted.text, "made": made})
    _write(state, notes)  # also if the state alone was lost, because a removal of fgpu undoes what has a state
    if wanted.text == now:
        return None
    _write(engine.file, wanted.text, like=engine.file)
    return wanted


def _conflict(engine: Engine, text: str, helper: Path) -> tuple[str, str] | None:
    """Return a reason and a fix if settings outside of the engine's file prevent the setup, else None."""
    of = Settings(engine.file, text, helper, engine.version, _command(engine))
    return engine.conflict(of) if engine.conflict else None


def _command(engine: Engine) -> tuple[str, ...]:
    """Return the command line of the running daemon, or of the service if no daemon runs; empty if unknown."""
    if not engine.daemon:
        return ()
    with contextlib.suppress(OSError, ValueError):
        pid = int((_RUN / f"{engine.daemon}.pid").read_text(encoding="ascii"))
        words = os.fsdecode(procfs.read(f"/proc/{pid}/cmdline")).split("\0")
        if Path(words[0]).name in engine.programs:  # else another process has the pid of a daemon that was killed
            return tuple(words[:-1])
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["systemctl", "show", "-p", "ExecStart", f"{engine.daemon}.service"]
        said = os.fsdecode(subprocess.run(asked, capture_output=True, timeout=5, check=True).stdout)
        if match := _ARGUMENTS.search(said):
            return tuple(match[1].split())
    return ()


def undo(engine: Engine, state: Path) -> bool:
    """Restore the settings, and keep later changes that are not fgpu's. Return False if nothing has to be restored."""
    now, kept = _text(engine.file), _kept(state)
    before = _before(engine, now, kept)
    if before != now:
        _restore(engine.file, before)
    with contextlib.suppress(OSError):  # another program has put a file into the folder, or removed the folder
        for folder in kept["made"]:
            Path(folder).rmdir()
    state.unlink(missing_ok=True)
    return before != now


def unread_mark(run_dir: Path) -> Path:
    """Return the file that exists, until the next boot, if an engine may still use settings that were undone.

    `fgpu detach` and the removal of the package keep the helper, which the engine runs for each container.
    """
    return run_dir.with_name(f"{run_dir.name}-undone")


def where_it_is(engine: Engine, state: Path) -> Engine:
    """Return the engine with the file that was set up, which may differ from the default file."""
    kept = _kept(state)
    return engine if kept["after"] is None else replace(engine, file=Path(kept["file"]))


def unchanged(state: Path) -> Path | None:
    """Return the file of this state if set_up() was its last writer, or None if the file has changed or is missing."""
    kept = _kept(state)
    file = Path(kept["file"])
    with contextlib.suppress(SetupError):  # a file that is not UTF-8 has changed
        return file if kept["after"] is not None and _text(file) == kept["after"] else None
    return None


def _before(engine: Engine, now: str | None, kept: dict[str, Any]) -> str | None:
    """Return the present text without fgpu, or None if the file does not exist or has nothing else.

    Raises:
        SetupError: the file has only fgpu's settings, and has changed since the setup.
    """
    before: str | None = kept["before"]
    if now in (kept["after"], kept.get("had", kept["after"])):  # the setup was interrupted before it wrote the file
        return before
    if not now:
        return now
    text = engine.without(now, None if kept["after"] is None else before or "")
    if engine.is_drop_in and not text and kept["file"] == str(engine.file):
        fix = "move the other lines to another file, or remove the file"
        raise SetupError(f"{engine.file} has changed since `fgpu setup`: {fix}")
    return text or None


def _missing_folders(file: Path) -> list[str]:
    return [str(folder) for folder in file.resolve().parents if not folder.exists()]


def _put_beside(helper: Path, wanted: Wanted) -> None:
    """Create the links and files that the settings name. Each file and link is replaced as a whole."""
    for name, target in wanted.links.items():
        place = helper.parent / name
        place.parent.mkdir(mode=0o755, exist_ok=True)
        aside = place.with_name(f".{place.name}.{os.getpid()}")
        aside.symlink_to(target)
        os.replace(aside, place)
    for name, text in wanted.files.items():
        (helper.parent / name).parent.mkdir(mode=0o755, exist_ok=True)
        atomic_file.write(helper.parent / name, text, durable=True)


def _kept(state: Path) -> dict[str, Any]:
    """Return the stored state.

    `before`: the text of the file without fgpu. `had`: the text when set_up() began; states of earlier versions have
    no `had`. `after`: the text that set_up() writes. `made`: the folders that set_up() has created, innermost first.
    """
    nothing: dict[str, Any] = {"file": str(state), "before": None, "after": None, "made": []}
    try:
        return {**nothing, **json.loads(state.read_text(encoding="utf-8"))}
    except (FileNotFoundError, ValueError):
        return nothing


def _text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()  # read_text() would change the line ends
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise SetupError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): fix the file first") from error


def _restore(path: Path, text: str | None) -> None:
    if text is None:
        path.resolve().unlink()  # a symbolic link stays, as in _write()
    else:
        _write(path, text, like=path)


def _write(path: Path, text: str, like: Path | None = None) -> None:
    """Replace a file as a whole, also if the power fails; a symbolic link is followed.

    Args:
        like: the new file gets the owner, group and mode of this file. If that file does not exist, all users may read
            the new file. Without `like` only root may access the new file. A state must be private to root, because a
            state has a copy of settings with passwords, and names the file to which undo() writes that copy.
    """
    path = path.resolve()
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.unlink(missing_ok=True)
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)  # the folder may be a user's
        with open(fd, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            if like and like.exists():
                status = like.stat()
                os.fchown(fd, status.st_uid, status.st_gid)
                os.fchmod(fd, stat.S_IMODE(status.st_mode))
            elif like:
                os.fchmod(fd, 0o644)
            file.flush()
            os.fsync(fd)
        os.replace(aside, path)
        atomic_file.sync_folder(path.parent)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def checks(state: Path = STATE, helper: Path = injection.BIN / injection.HELPER) -> Iterator[Check]:
    """Check each engine that was set up: settings with fgpu, and no later change of other settings."""
    for name, usual in ENGINES.items():
        files = parts(name, usual, state)
        try:
            is_set_up = any(_kept(place)["after"] is not None for _, place in files)
            found = [_check(name, part, place, helper) for part, place in files] if is_set_up else []
        except PermissionError as error:
            found = [Check(name, False, f"{error.filename} cannot be read by this user", "sudo fgpu doctor")]
        except (SetupError, OSError) as error:
            fix = f"then run fgpu setup {name}, or fgpu setup {name} --undo"
            found = [Check(name, False, str(error), fix)]
        yield from sorted(found, key=lambda check: check.ok)[:1]


def check_cdi(run_dir: Path, state: Path = STATE) -> Check | None:
    """Check that Docker does not ignore fgpu's CDI specifications. Return None without Docker or specifications.

    Args:
        run_dir: the run folder of the agent, which has the list of the specifications.
        state: the folder with the states of set_up().
    """
    try:
        docker = as_installed(where_it_is(ENGINES["docker"], state / "docker.json"))
        if not program(docker) or not injection.written(run_dir):
            return None
        lacks = docker_lacks_cdi(Settings(docker.file, _text(docker.file) or "", Path(), docker.version))
    except PermissionError as error:
        return Check("docker cdi", False, f"{error.filename} cannot be read by this user", "sudo fgpu doctor")
    except (SetupError, OSError) as error:
        return Check("docker cdi", False, str(error), "then run fgpu setup docker")
    if lacks:
        found = f"Docker {'.'.join(map(str, docker.version))} ignores CDI: features.cdi is not set in {docker.file}"
        return Check("docker cdi", False, found, "sudo fgpu setup docker, then systemctl restart docker")
    return Check("docker cdi", True, "features.cdi is set, or this version of Docker does not need this setting")


def _check(name: str, usual: Engine, state: Path, helper: Path) -> Check:
    """Check a file of an engine that was set up. Raise SetupError or OSError if a file cannot be read."""
    kept, engine = _kept(state), where_it_is(usual, state)
    file, now, fix = engine.file, _text(engine.file), f"fgpu setup {name}, or fgpu setup {name} --undo"
    if now is None or (rest := engine.without(now, None)) == now:
        return Check(name, False, f"{file} no longer has fgpu's settings", fix)
    if conflict := _conflict(engine, now, helper):
        return Check(name, False, *conflict)
    if engine.read and (engine.is_drop_in or now != kept["after"]):
        wanted = engine.after(Settings(file, rest, helper)).text
        if engine.read(wanted, file) != engine.read(now, file):
            return Check(name, False, f"{file} or the engine's other settings have changed since the setup", fix)
    return Check(name, True, f"{file} has fgpu's settings")
