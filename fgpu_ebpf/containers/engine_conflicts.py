"""Settings outside of fgpu's file that make the settings of `fgpu setup` ineffective, or stop the engine's start.

This module runs in `fgpu setup` and `fgpu doctor`, and writes nothing. Each function returns a reason and a fix, or
None if there is no conflict.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fgpu_ebpf.containers import toml_text
from fgpu_ebpf.containers.engine_config import CRI, Settings, read_toml


def docker_conflict(of: Settings) -> tuple[str, str] | None:
    """Find flags of dockerd that conflict with daemon.json. dockerd refuses a setting that is also a flag."""
    runtime, file = _flag(of.command, "--default-runtime"), _flag(of.command, "--config-file")
    if runtime is not None:
        found = f"dockerd has the flag --default-runtime, and does not start if {of.file} names a default runtime too"
        setting = f'"default-runtime": "{runtime}"'
        return found, f"replace the flag by {setting} in the file, restart Docker, and run fgpu setup docker"
    if file is not None and os.path.realpath(file) != os.path.realpath(of.file):
        return f"dockerd reads {file} (flag --config-file), not {of.file}", f"run fgpu setup docker --file {file}"
    return None


def _flag(command: Sequence[str], name: str) -> str | None:
    """Return the value of a flag, or None without the flag. The last flag takes precedence."""
    value = None
    for word, following in zip(command, [*command[1:], ""], strict=False):
        if word == name:
            value = following
        elif word.startswith(f"{name}="):
            value = word.removeprefix(f"{name}=")
    return value


def containerd_conflict(of: Settings) -> tuple[str, str] | None:
    """Find an imported file with runtimes of the CRI plugin.

    containerd 1 replaces all settings of a plugin by the settings of the imported file. containerd 2 merges the
    settings, and the imported file takes precedence.
    """
    found = [
        (file, version, settings.get("version"), table)
        for file, settings in _imported(of)
        for version, plugin in CRI.items()
        if (table := _table(settings, "plugins", plugin, "containerd")).keys() & {"runtimes", "default_runtime_name"}
    ]
    if not found:
        return None
    file, version, written, table = found[0]
    reason = f"{of.file} imports {file}, which has runtimes of containerd and takes precedence"
    has_default = str(table.get("default_runtime_name")) in _table(table, "runtimes")
    if len(found) == 1 and version == written != 1 and has_default:
        return reason, f"run fgpu setup containerd --file {file}"
    return reason, f"move the settings of {CRI[version]} from {file} to {of.file}, and run fgpu setup containerd"


def _imported(of: Settings) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield the files that config.toml imports, directly or through other files. Unreadable files are left out."""
    known, waiting = {os.path.realpath(of.file)}, [(of.file, read_toml(of.text, of.file))]
    for file, settings in waiting:  # the loop appends to the list
        for path in _paths(file.parent, settings.get("imports")):
            if (real := os.path.realpath(path)) in known:
                continue
            known.add(real)
            with contextlib.suppress(OSError, ValueError):
                waiting.append((path, toml_text.loads(path.read_text(encoding="utf-8"))))
    yield from waiting[1:]


def _paths(folder: Path, patterns: Any) -> Iterator[Path]:
    """Yield the paths that the patterns match, as containerd finds them: relative to the folder, also hidden files."""
    for pattern in patterns if isinstance(patterns, list) else ():
        place = str(folder / str(pattern))
        yield from map(Path, sorted(glob.glob(place, include_hidden=True)) if "*" in place else [place])


def _table(settings: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    for key in keys:
        settings = settings.get(key, {})
        if not isinstance(settings, dict):
            return {}
    return settings
