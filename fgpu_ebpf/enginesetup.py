"""`fgpu setup docker|podman|containerd`: every container of an engine gets the shim, with no flag at all.

Owns: the few lines of an engine's settings that name `fgpu-oci`, and what was there before. Never: restarts an engine,
or loses a setting of somebody else. On failure: SetupError, and the settings are as they were.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpu_ebpf import inject
from fgpu_ebpf.checks import Check

STATE = inject.BIN.parent / "setup"
NAME = "fgpu"
_TYPE = "io.containerd.runc.v2"
_CRI = {1: "cri", 2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}


class SetupError(Exception):
    """Why nothing was changed, and what would do."""


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine's settings: the file, what becomes of its text, the same without us, how it hears of either."""

    file: Path
    after: Callable[[str, Path], str]
    without: Callable[[str], str]
    reload: str = ""
    reload_undone: str = ""


def set_up(engine: Engine, helper: Path, state: Path) -> bool:
    """Writes the engine's settings; False: they are so already. Raises SetupError, OSError.

    `state`: a file of ours that keeps the text before, so that undo() restores it to the byte.
    """
    now, kept = _text(engine.file), _kept(state)
    before = kept["before"] if now is not None and now == kept["after"] else _without(engine, now)
    after = engine.after(before or "", helper)
    if after == now:
        return False
    _link_runtimes(after, helper)
    _write(state, json.dumps({"file": str(engine.file), "before": before, "after": after}))
    _write(engine.file, after)
    return True


def undo(engine: Engine, state: Path) -> bool:
    """The settings as they were before; what others changed since then stays. False: nothing of ours is there."""
    now, kept = _text(engine.file), _kept(state)
    before = kept["before"] if now is not None and now == kept["after"] else _without(engine, now)
    if before != now:
        _restore(engine.file, before)
    state.unlink(missing_ok=True)
    return before != now


def _without(engine: Engine, text: str | None) -> str | None:
    """None: there is no such file, or nothing in it but what is ours."""
    if text is None or not text:
        return text
    return engine.without(text) or None


def _link_runtimes(text: str, helper: Path) -> None:
    """Names by which settings that take no arguments call the helper."""
    for name in set(re.findall(rf'"{re.escape(str(helper.parent))}/(fgpu-runtime-[^"/]+)"', text)):
        link = helper.with_name(name)
        if not link.is_symlink():
            link.symlink_to(helper.name)


def _kept(state: Path) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = json.loads(state.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {"file": str(state), "before": None, "after": None}
    return kept


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
    """Whole, with the mode and owner that the file had; through a link to where it points."""
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


def checks(state: Path = STATE) -> Iterator[Check]:
    """Every engine that was set up still is."""
    for name, engine in ENGINES.items():
        kept = _kept(state / f"{name}.json")
        if kept["after"] is None:
            continue
        file = Path(kept["file"])
        now = _text(file)
        if now is not None and (now == kept["after"] or engine.without(now) != now):
            yield Check(name, True, f"{file} names fgpu")
        else:
            yield Check(name, False, f"{file} no longer names fgpu", f"fgpu setup {name}, or --undo")


# -- Docker --------------------------------------------------------------------------------------------------------


def docker_after(text: str, helper: Path) -> str:
    """daemon.json with a runtime `fgpu` in front of the default one."""
    settings = _json(text)
    default = settings.get("default-runtime", "runc")
    runtimes = settings.get("runtimes", {})
    if not isinstance(runtimes, dict) or default == NAME:
        raise SetupError(f"daemon.json has a runtime {NAME} of somebody else: take it out")
    real = runtimes.get(default, {"path": "runc"} if default in ("runc", _TYPE) else {})
    if "path" not in real:
        raise SetupError(f"Docker's default runtime {default} has no path: only OCI runtimes can be put behind fgpu")
    words = ["runtime", shutil.which(real["path"]) or real["path"], *real.get("runtimeArgs", [])]
    ours = {NAME: {"path": str(helper), "runtimeArgs": words}}
    return _json_text({**settings, "default-runtime": NAME, "runtimes": {**runtimes, **ours}})


def docker_without(text: str) -> str:
    """The same without us. What the default was stands in our runtime's words."""
    settings = _json(text)
    runtimes = dict(settings.get("runtimes", {}))
    ours = runtimes.pop(NAME, None)
    if ours is None:
        return text
    words = ours.get("runtimeArgs", ["", "runc"])[1:]
    if settings.get("default-runtime") == NAME:
        same = [name for name, r in runtimes.items() if [r.get("path"), *r.get("runtimeArgs", [])] == words]
        default = same[0] if same else ""
        settings = {k: v for k, v in settings.items() if k != "default-runtime"}
        settings |= {"default-runtime": default} if default else {}
    settings = {k: v for k, v in settings.items() if k != "runtimes"} | ({"runtimes": runtimes} if runtimes else {})
    return _json_text(settings)


def _json(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text or "{}")
    except ValueError as error:
        raise SetupError(f"daemon.json is no JSON ({error}): mend it first") from error
    if not isinstance(settings, dict):
        raise SetupError("daemon.json is no object: mend it first")
    return settings


def _json_text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=4, ensure_ascii=False) + "\n"


# -- Podman --------------------------------------------------------------------------------------------------------


def podman_after(_: str, helper: Path) -> str:
    """A hook of its own, in a folder where every package puts its own."""
    hook = {"path": str(helper), "args": [helper.name, "precreate"]}
    return _json_text({"version": "1.0.0", "hook": hook, "when": {"always": True}, "stages": ["precreate"]})


# -- containerd ----------------------------------------------------------------------------------------------------


def containerd_after(text: str, helper: Path) -> str:
    """config.toml, whose default runtime for Kubernetes has another BinaryName; all else is untouched."""
    before = _toml(text)
    plugin = _CRI.get(before.get("version", 1))
    if not text:
        plugin, text = _CRI[2], "version = 2\n"
    if plugin is None or plugin == "cri":
        raise SetupError("config.toml is of a version that is not known here: 2 and 3 are")
    cri = before.get("plugins", {}).get(plugin, {}).get("containerd", {})
    name = cri.get("default_runtime_name", "runc")
    runtime = cri.get("runtimes", {}).get(name, {})
    if runtime.get("runtime_type", _TYPE) != _TYPE:
        raise SetupError(f"containerd's default runtime {name} is no {_TYPE}: only OCI runtimes can be put behind fgpu")
    real = runtime.get("options", {}).get("BinaryName", "runc") or "runc"
    link = helper.with_name(f"fgpu-runtime-{Path(real).name}")
    if "/" in real and shutil.which(Path(real).name) is None:
        raise SetupError(f"{real} is on no PATH: link it from /usr/local/bin")
    table = f'plugins."{plugin}".containerd.runtimes.{name}'
    after = _with_binary(text, table, runtime, f'BinaryName = "{link}"')
    wanted = {**runtime.get("options", {}), "BinaryName": str(link)}
    found = _toml(after).get("plugins", {}).get(plugin, {})["containerd"]["runtimes"][name]["options"]
    if found != wanted or _toml(containerd_without(after)) != _toml(text):
        raise SetupError(f"config.toml is written in a way that is not understood here: set {table}.options by hand")
    return after


def _with_binary(text: str, table: str, runtime: Mapping[str, Any], line: str) -> str:
    """Our lines end with `# fgpu`; one that we replace stands behind that, as it was."""
    header = re.search(rf"^[ \t]*\[{re.escape(table)}\.options\][^\n]*\n", text, re.M)
    if header is None:
        kind = "" if runtime else f'[{table}] {_MARK}\nruntime_type = "{_TYPE}" {_MARK}\n'
        gap = "" if text.endswith("\n") or not text else "\n"
        return f"{text}{gap}{kind}[{table}.options] {_MARK}\n{line} {_MARK}\n"
    rest = text[header.end() :]
    section = re.match(r"(?:(?!\s*\[)[^\n]*\n?)*", rest)
    body = section[0] if section else ""
    old = re.search(r"^[ \t]*BinaryName[ \t]*=[^\n]*$", body, re.M)
    start, end = old.span() if old else (0, 0)
    ours = f"{line} {_MARK} {old[0]}" if old else f"{line} {_MARK}\n"
    body = body[:start] + ours + body[end:]
    return text[: header.end()] + body + rest[section.end() if section else 0 :]


_MARK = "# fgpu"


def containerd_without(text: str) -> str:
    """The same without the lines that are marked as ours."""
    lines = []
    for line in text.splitlines(keepends=True):
        _, mark, old = line.partition(f" {_MARK}")
        if not mark:
            lines.append(line)
        elif old.strip():
            lines.append(old[1:])
    return "".join(lines)


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SetupError(f"config.toml is no TOML ({error}): mend it first") from error


# Docker takes over another default runtime, but not that there is none any more, until it is restarted.
_DOCKER = ("systemctl reload docker", "systemctl restart docker")
_CONTAINERD = ("systemctl restart containerd",) * 2
ENGINES = {
    "docker": Engine(Path("/etc/docker/daemon.json"), docker_after, docker_without, *_DOCKER),
    "podman": Engine(Path("/usr/share/containers/oci/hooks.d/fgpu.json"), podman_after, lambda _: ""),
    "containerd": Engine(Path("/etc/containerd/config.toml"), containerd_after, containerd_without, *_CONTAINERD),
}
