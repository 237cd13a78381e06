"""Computation of the settings with which an engine gives every container the shim, and of settings without fgpu.

This module runs in `fgpu setup` and `fgpu doctor`, and writes nothing. With the computed settings, Docker, Podman,
containerd, CRI-O, k3s and RKE2 run `fgpu-oci`. Settings of others are kept. Unknown settings raise SetupError.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fgpu_ebpf.containers import toml_text

NAME = "fgpu"
RUNTIMES = "runtimes"  # folder beside the helper with links to the real runtimes, if the settings give their paths
HOOKS = "hooks.d"  # folder beside the helper with Podman's hooks
_TYPE = "io.containerd.runc.v2"
CRI = {1: "cri", 2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}


class SetupError(Exception):
    """The settings cannot be computed. Nothing was changed. The text has the reason and, if known, the fix."""


class Settings(NamedTuple):
    """The present settings. `text`: the file without fgpu's lines, empty if the file does not exist.

    `helper`: the path of `fgpu-oci`. `version`: the first two numbers of the engine's version; empty if unknown.
    `command`: the command line of the engine's daemon; empty if unknown.
    """

    file: Path
    text: str
    helper: Path
    version: tuple[int, ...] = ()
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """The settings to write. `links`, `files`: targets of links and texts of files to create, by path.

    The settings name these links and files. The paths of the links and files are relative to the helper's folder.
    `note`: a text for the administrator about a part of the settings, or empty.
    """

    text: str
    links: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine's settings.

    `after`: returns the settings with fgpu. `without`: returns the text of settings without fgpu; its second argument
    is the text before the setup, or None if this text is unknown. `reload`, `reload_undone`: the command that makes the
    engine read the settings after the setup, and after --undo. `is_drop_in`: the file has only fgpu's settings, is the
    last of several files, and is computed from the other files. `programs`: the engine is installed if one of these
    programs is installed. `version`: see Settings. `more`: a second file that the engine needs. `cgroups`: patterns of
    the containers' cgroups, as in a policy. `example`: a command that shows the limit of a container. `keeps_folder`: a
    folder that was created for the file is kept after --undo. `read`: parses a text that `fgpu doctor` compares.
    `conflict`: returns a reason and a fix if settings outside of the file prevent the setup, else None. `daemon`: the
    name of the daemon's service and pid file, if the daemon's flags may conflict with the file.
    """

    file: Path
    after: Callable[[Settings], Wanted]
    without: Callable[[str, str | None], str]
    reload: str = ""
    reload_undone: str = ""
    is_drop_in: bool = False
    programs: tuple[str, ...] = ()
    version: tuple[int, ...] = ()
    more: Engine | None = None
    cgroups: tuple[str, ...] = ()
    example: str = ""
    keeps_folder: bool = False
    read: Callable[[str, Path], Mapping[str, Any]] | None = None
    conflict: Callable[[Settings], tuple[str, str] | None] | None = None
    daemon: str = ""


# -- Docker --------------------------------------------------------------------------------------------------------

CDI_ASKS = ((25, 0), (28, 2))  # Docker versions from 25.0 to below 28.2 need a setting to enable CDI
_CDI_NOTE = "to use --device fgpu.dev/share=..., run once: systemctl restart docker"


def docker_after(of: Settings) -> Wanted:
    """Return daemon.json with `fgpu`, which runs the former default runtime, and with CDI for versions in CDI_ASKS."""
    settings = read_json(of.text)
    default = settings.get("default-runtime", "runc")
    runtimes = settings.get("runtimes", {})
    if not isinstance(runtimes, dict) or default == NAME:
        raise SetupError(f"daemon.json has a runtime {NAME} that `fgpu setup` did not write: remove the runtime")
    real = runtimes.get(default, {"path": "runc"} if default in ("runc", _TYPE) else {})
    if "path" not in real:
        raise SetupError(f"Docker's default runtime {default} has no path: fgpu supports only OCI runtimes")
    ours = {NAME: {"path": str(of.helper), "runtimeArgs": ["runtime", real["path"], *real.get("runtimeArgs", [])]}}
    settings |= {"default-runtime": NAME, "runtimes": {**runtimes, **ours}}
    if not docker_lacks_cdi(of):
        return Wanted(_json_text(settings))
    return Wanted(_json_text(settings | {"features": {**_features(settings), "cdi": True}}), note=_CDI_NOTE)


def docker_lacks_cdi(of: Settings) -> bool:
    """Return whether Docker ignores CDI specifications because daemon.json has no setting for CDI.

    Return False if the setting has the value false, which is an administrator's decision.

    Raises:
        SetupError: daemon.json is damaged.
    """
    return CDI_ASKS[0] <= of.version < CDI_ASKS[1] and "cdi" not in _features(read_json(of.text))


def docker_without(text: str, before: str | None = None) -> str:
    """Return daemon.json without fgpu. The arguments of fgpu's runtime contain the earlier default runtime."""
    settings = read_json(text)
    runtimes = dict(settings.get("runtimes", {}))
    ours = runtimes.pop(NAME, None)
    if ours is None:
        return text
    words = ours.get("runtimeArgs", ["", "runc"])[1:]
    if settings.get("default-runtime") == NAME:
        # Resolved paths are compared, because an earlier version of fgpu wrote the path at which it found the program.
        of = {name: _found(r.get("path", ""), *r.get("runtimeArgs", [])) for name, r in runtimes.items()}
        same = [name for name, found in of.items() if found == _found(*words)]
        del settings["default-runtime"]
        settings |= {"default-runtime": same[0]} if same else {}
    settings = {k: v for k, v in settings.items() if k != "runtimes"} | ({"runtimes": runtimes} if runtimes else {})
    if before is not None and "cdi" not in _features(read_json(before)):
        features = {k: v for k, v in _features(settings).items() if k != "cdi"}
        settings = {k: v for k, v in settings.items() if k != "features"} | ({"features": features} if features else {})
    return _json_text(settings)


def _found(path: str = "", *args: str) -> list[str]:
    return [shutil.which(path) or path, *args]


def _features(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    features = settings.get("features", {})
    if not isinstance(features, dict):
        raise SetupError('"features" in daemon.json is not an object: fix the file first')
    return features


def read_json(text: str, _: Path | None = None) -> dict[str, Any]:
    """Return the contents of daemon.json. Raise SetupError on failure."""
    try:
        settings = json.loads(text or "{}")
    except ValueError as error:
        raise SetupError(f"daemon.json is not JSON ({error}): fix the file first") from error
    if not isinstance(settings, dict):
        raise SetupError("daemon.json is not a JSON object: fix the file first")
    return settings


def _json_text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=4, ensure_ascii=False) + "\n"


# -- containerd ----------------------------------------------------------------------------------------------------


def containerd_after(of: Settings) -> Wanted:
    """Return config.toml with another BinaryName for Kubernetes' default runtime. Everything else is unchanged."""
    text = of.text
    before = read_toml(text, of.file)
    plugin = CRI.get(before.get("version", 1))
    if not text:
        plugin, text = CRI[2], "version = 2\n"
    if plugin is None or plugin == "cri":
        raise SetupError("config.toml has an unknown version: versions 2 and 3 are supported")
    cri = before.get("plugins", {}).get(plugin, {}).get("containerd", {})
    name = cri.get("default_runtime_name", "runc")
    runtime = cri.get("runtimes", {}).get(name, {})
    if runtime.get("runtime_type", _TYPE) != _TYPE:
        raise SetupError(f"containerd's default runtime {name} is not of type {_TYPE}: only OCI runtimes are supported")
    real = runtime.get("options", {}).get("BinaryName", "runc") or "runc"
    link, links = _in_front_of(real, "containerd", of.helper)
    table = ("plugins", plugin, "containerd", "runtimes", name)
    after = _with_binary(text, table, runtime, f'BinaryName = "{link}"')
    wanted = {**runtime.get("options", {}), "BinaryName": str(link)}
    try:
        found = toml_text.loads(after)["plugins"][plugin]["containerd"]["runtimes"][name]["options"]
        is_right = found == wanted and toml_text.loads(containerd_without(after)) == toml_text.loads(text)
    except (ValueError, KeyError):  # the options are written in another form, for example in one line
        is_right = False
    if not is_right:
        where = f"[{_name(table)}.options]"
        raise SetupError(f"config.toml has an unsupported form: write BinaryName on a line of its own below {where}")
    return Wanted(after, links)


def _with_binary(text: str, table: tuple[str, ...], runtime: Mapping[str, Any], line: str) -> str:
    """Return the text with fgpu's lines, each with the mark `# fgpu`. A replaced line follows the mark, unchanged."""
    header = _header(text, (*table, "options"))
    if header is None:
        kind = "" if runtime else f'[{_name(table)}] {_MARK}\nruntime_type = "{_TYPE}" {_MARK}\n'
        gap = "" if text.endswith("\n") or not text else "\n"
        return f"{text}{gap}{kind}[{_name(table)}.options] {_MARK}\n{line} {_MARK}\n"
    rest = text[header.end() :]
    section = re.match(r"(?:(?!\s*\[)[^\n]*\n?)*", rest)
    body = section[0] if section else ""
    old = re.search(r"^[ \t]*BinaryName[ \t]*=[^\n]*$", body, re.M)
    start, end = old.span() if old else (0, 0)
    ours = f"{line} {_MARK} {old[0]}" if old else f"{line} {_MARK}\n"
    body = body[:start] + ours + body[end:]
    return text[: header.end()] + body + rest[section.end() if section else 0 :]


def _header(text: str, table: tuple[str, ...]) -> re.Match[str] | None:
    """Return the line that begins the table. The table's keys may be quoted: containerd writes both forms."""
    lines = re.finditer(r"^[ \t]*\[[^][\n]+\][^\n]*\n", text, re.M)
    return next((line for line in lines if _keys(line[0]) == table), None)


def _keys(header: str) -> tuple[str, ...]:
    try:
        inner = toml_text.loads(header)
    except ValueError:
        return ()
    keys = []
    while inner:
        ((key, inner),) = inner.items()
        keys.append(key)
    return tuple(keys)


def _name(table: tuple[str, ...]) -> str:
    return ".".join(key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key) for key in table)


_MARK = "# fgpu"
# The mark alone may begin an administrator's comment. The last part is the begin of a line that fgpu has replaced.
_OURS = re.compile(
    r'(?m)^[ \t]*(?:\[.*\]|(?:runtime_type|BinaryName) = "[^"\n]*"|SystemdCgroup = \{.*\}|\{\{.*\}\})'
    rf" {_MARK}(?:[ \t]*(?:\n|\Z)| (?=[ \t]*BinaryName[ \t]*=))"
)


def containerd_without(text: str, _: str | None = None) -> str:
    """Return config.toml, or a template of config.toml, without the lines that fgpu has written."""
    return _OURS.sub("", text)


# -- k3s and RKE2: a template of containerd's settings, and the name of the default runtime --------------------------

OLDEST = (1, 29)  # of k3s and RKE2: earlier versions exit because the setting `default-runtime` is unknown to them
_BASE = re.compile(r"\{\{-?\s*template\s+\"base\"\s")


def template_after(of: Settings) -> Wanted:
    """Return a template with a runtime `fgpu` in front of NVIDIA's runtime, or of runc without NVIDIA's runtime.

    A template cannot change tables of its base template. Therefore the runtime has a table of its own.
    """
    if of.version < OLDEST:
        raise SetupError("k3s or RKE2 1.29 or later is needed, for default-runtime: the version is older or unknown")
    made = of.file.with_name("config.toml")
    if not made.is_file():
        raise SetupError(f"{made} does not exist: start the service once, which writes this file")
    text = of.text or f'{{{{ template "base" . }}}} {_MARK}\n'
    if not _BASE.search(text):
        raise SetupError(f'{of.file} has no {{{{ template "base" . }}}}: add that line, and run fgpu setup again')
    settings = read_toml(made.read_text(encoding="utf-8"), made)
    plugin = CRI.get(settings.get("version", 1), "")
    runtimes = settings.get("plugins", {}).get(plugin, {}).get("containerd", {}).get("runtimes", {})
    real = runtimes.get("nvidia", {}).get("options", {}).get("BinaryName") or "runc"
    link, links = _in_front_of(real, "k3s", of.helper)
    table = _name(("plugins", plugin, "containerd", "runtimes", NAME))
    lines = (
        f"[{table}]", f'runtime_type = "{_TYPE}"',
        f"[{table}.options]", f'BinaryName = "{link}"', "SystemdCgroup = {{ .SystemdCgroup }}",
    )  # fmt: skip
    gap = "" if text.endswith("\n") else "\n"
    return Wanted(text + gap + "".join(f"{line} {_MARK}\n" for line in lines), links)


def default_after(of: Settings) -> Wanted:
    """Return a file of k3s or RKE2 that names the default runtime."""
    if of.text:
        raise SetupError(f"{of.file} has settings that are not fgpu's: remove the file")
    return Wanted(f"{HEAD}default-runtime: {NAME}\n")


# -- drop-in files of fgpu alone: Podman and CRI-O ------------------------------------------------------------------

HEAD = "# `fgpu setup` wrote this file; `fgpu setup ENGINE --undo` removes the file.\n"
_HEADS = (HEAD, "# Written by `fgpu setup`; --undo takes it away.\n")  # with the one of earlier versions
_HOOK_FOLDER = "/usr/share/containers/oci/hooks.d"  # Podman's default


def check_is_ours(of: Settings) -> None:
    """Raise SetupError if a file that has only fgpu's text has another text."""
    if of.text:
        raise SetupError(f"{of.file} was not written by `fgpu setup`, or has changed since: edit it by hand")


def drop_in_without(text: str, _: str | None = None) -> str:
    """Return an empty text if the file is fgpu's, else the file's text."""
    return "" if text.startswith(_HEADS) else text


def podman_after(of: Settings) -> Wanted:
    """Return settings with a folder of hooks that Podman alone reads, after Podman's other folders of hooks.

    Buildah and CRI-O reject fgpu's hooks, so the hooks cannot be in a folder that these engines read too.
    """
    hook = {"path": str(of.helper), "args": [of.helper.name, "precreate"]}
    stages = {"version": "1.0.0", "hook": hook, "when": {"always": True}, "stages": ["precreate"]}
    folders = [_HOOK_FOLDER]
    for settings in _others(of, Path("/usr/share/containers/containers.conf"), "containers.conf", "*.conf"):
        hooks = settings.get("engine", {}).get("hooks_dir", folders)
        kept = folders if {"append": True} in hooks else []
        folders = [*kept, *(folder for folder in hooks if isinstance(folder, str) and folder not in kept)]
    ours = {"hooks_dir": [*folders, str(of.helper.with_name(HOOKS))]}
    return Wanted(_drop_in("engine", ours), files={f"{HOOKS}/{NAME}.json": _json_text(stages)})


def crio_after(of: Settings) -> Wanted:
    """Return a copy of the default runtime's table with another path and the same name, which pods may request."""
    name = ""
    tables: dict[str, Any] = {}
    for settings in _others(of, "crio.conf", "*"):
        runtime = settings.get("crio", {}).get("runtime", {})
        name = runtime.get("default_runtime", name)
        tables |= runtime.get("runtimes", {})
    table = tables.get(name)
    if table is None:
        what = f"no [crio.runtime.runtimes.{name}]" if name else "no default_runtime"
        fix = "add this setting, because fgpu-oci runs the default runtime"
        raise SetupError(f"CRI-O's settings beside {of.file} have {what}: {fix}")
    if table.get("runtime_type", "") not in ("", "oci", "pod"):
        raise SetupError(f"CRI-O's default runtime {name} is not an OCI runtime: only OCI runtimes are supported")
    link, links = _in_front_of(table.get("runtime_path") or name, "crio", of.helper)
    text = _drop_in(_name(("crio", "runtime", "runtimes", name)), {**table, "runtime_path": str(link)})
    return Wanted(text, links)


def _in_front_of(real: str, engine: str, helper: Path) -> tuple[Path, dict[str, str]]:
    """Return the link that settings without runtime arguments name, and all links to create, by path.

    Args:
        real: the name or the path of the runtime that the helper runs.
        engine: the name of the engine, for names of links.
        helper: the path of `fgpu-oci`. A `real` in the helper's folder would run itself, and raises SetupError.
    """
    if Path(real).parent == helper.parent:
        where = f"the settings name fgpu's {real} outside of fgpu's own lines"
        raise SetupError(f"{where}: replace {real} with the real runtime's path")
    name = f"{engine}-{Path(real).name}" if "/" in real else real  # the helper finds a name on the engine's PATH
    link = helper.with_name(f"fgpu-runtime-{name}")
    return link, {link.name: helper.name} | ({f"{RUNTIMES}/{name}": real} if "/" in real else {})


def _others(of: Settings, *places: Path | str) -> Iterator[dict[str, Any]]:
    """Yield the engine's other settings, in the order in which the engine reads them.

    `places`: absolute paths or names of files beside the folder of fgpu's file, then a pattern of files in that folder.
    """
    if of.text:
        raise SetupError(f"{of.file} has settings that are not fgpu's: name another file with --file")
    *files, pattern = places
    base, folder = of.file.parent.parent, of.file.parent
    drop_ins: Iterable[Path] = sorted(folder.glob(str(pattern))) if folder.is_dir() else ()
    for path in [*(base / file for file in files), *drop_ins]:
        if path.is_file() and path != of.file:
            yield read_toml(path.read_text(encoding="utf-8"), path)


def _drop_in(table: str, values: Mapping[str, Any]) -> str:
    text = HEAD + f"[{table}]\n" + "".join(f"{key} = {toml_text.dumps(value)}\n" for key, value in values.items())
    if list(toml_text.loads(text)) != [table.split(".")[0]]:
        raise SetupError(f"the table [{table}] cannot be written as TOML: write the table by hand")
    return text


def read_toml(text: str, file: Path) -> dict[str, Any]:
    """Return the contents of a TOML file. Raise SetupError on failure."""
    try:
        return toml_text.loads(text)
    except ValueError as error:
        raise SetupError(f"{file} is not TOML ({error}): fix the file first") from error
