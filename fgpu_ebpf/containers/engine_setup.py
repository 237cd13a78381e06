"""`fgpu setup docker|podman|containerd|crio`: gives every container of an engine the shim.

This module runs in the command; `checks` runs in `fgpu doctor`. It writes the engine's settings and what they name
beside `fgpu-oci`, and keeps the text before; `engine_config` decides what is written. No engine is restarted.
SetupError or OSError: the settings are as they were.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fgpu_ebpf.check import Check
from fgpu_ebpf.containers import injection
from fgpu_ebpf.containers.engine_config import ENGINES, Engine, Settings, SetupError, Wanted
from fgpu_ebpf.linux import atomic_file

STATE = injection.BIN.parent / "setup"


def set_up(engine: Engine, helper: Path, state: Path) -> bool:
    """Write the engine's settings. Returns False if they are so already. Raises SetupError, OSError.

    Args:
        state: a file in which the text before is kept, so that undo() restores it to the byte.
    """
    there = where_it_is(engine, state)
    if there.file != engine.file:
        undo(there, state)
    now, kept = _text(engine.file), _kept(state)
    before = kept["before"] if now is not None and now == kept["after"] else _without(engine, now)
    wanted = engine.after(Settings(engine.file, before or "", helper))
    _put_beside(helper, wanted)
    if wanted.text == now:
        return False
    made = sorted({*kept["made"], *_missing_folders(engine.file)}, key=len, reverse=True)
    _write(state, json.dumps({"file": str(engine.file), "before": before, "after": wanted.text, "made": made}))
    _write(engine.file, wanted.text)
    return True


def undo(engine: Engine, state: Path) -> bool:
    """Restore the settings; changes that others made since are kept. Returns False if there is nothing of fgpu's."""
    now, kept = _text(engine.file), _kept(state)
    before = kept["before"] if now is not None and now == kept["after"] else _without(engine, now)
    if before != now:
        _restore(engine.file, before)
    with contextlib.suppress(OSError):  # another program has put something there, or removed it
        for folder in kept["made"]:
            Path(folder).rmdir()
    state.unlink(missing_ok=True)
    return before != now


def where_it_is(engine: Engine, state: Path) -> Engine:
    """Return the engine with the file that was set up, which may differ from the default one."""
    kept = _kept(state)
    return engine if kept["after"] is None else replace(engine, file=Path(kept["file"]))


def _without(engine: Engine, text: str | None) -> str | None:
    """Return the text without fgpu; None: there is no such file, or it has nothing else."""
    if text is None or not text:
        return text
    return engine.without(text) or None


def _missing_folders(file: Path) -> list[str]:
    return [str(folder) for folder in file.resolve().parents if not folder.exists()]


def _put_beside(helper: Path, wanted: Wanted) -> None:
    """Create the links and files that the settings name. Each is replaced as a whole."""
    for name, target in wanted.links.items():
        place = helper.parent / name
        place.parent.mkdir(mode=0o755, exist_ok=True)
        aside = place.with_name(f".{place.name}.{os.getpid()}")
        aside.symlink_to(target)
        os.replace(aside, place)
    for name, text in wanted.files.items():
        (helper.parent / name).parent.mkdir(mode=0o755, exist_ok=True)
        atomic_file.write(helper.parent / name, text)


def _kept(state: Path) -> dict[str, Any]:
    """Return the kept state. `made`: folders that set_up() has made, innermost first."""
    nothing: dict[str, Any] = {"file": str(state), "before": None, "after": None, "made": []}
    try:
        return {**nothing, **json.loads(state.read_text(encoding="utf-8"))}
    except (FileNotFoundError, ValueError):
        return nothing


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _restore(path: Path, text: str | None) -> None:
    if text is None:
        path.unlink()
    else:
        _write(path, text)


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole, with its mode and owner; a symbolic link is followed."""
    path = path.resolve()
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.chmod(0o644)
        if path.exists():
            shutil.copymode(path, aside)
            os.chown(aside, path.stat().st_uid, path.stat().st_gid)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def checks(state: Path = STATE, helper: Path = injection.BIN / injection.HELPER) -> Iterator[Check]:
    """Check every engine that was set up: its settings still name fgpu, and still follow from its other settings."""
    for name, usual in ENGINES.items():
        kept, engine = _kept(state / f"{name}.json"), where_it_is(usual, state / f"{name}.json")
        if kept["after"] is None:
            continue
        file, now = engine.file, _text(engine.file)
        if now is None or (now != kept["after"] and engine.without(now) == now):
            yield Check(name, False, f"{file} no longer names fgpu", f"fgpu setup {name}, or --undo")
        elif engine.is_drop_in and (why := _outdated(engine, now, helper)):
            yield Check(name, False, why, f"fgpu setup {name}, or --undo")
        else:
            yield Check(name, True, f"{file} names fgpu")


def _outdated(engine: Engine, now: str, helper: Path) -> str:
    """Return why the settings would be written differently now; empty: they would not."""
    try:
        wanted = engine.after(Settings(engine.file, "", helper))
    except SetupError as error:
        return str(error)
    return "" if wanted.text == now else f"the engine's other settings have changed since {engine.file}"
