"""`fgpu setup`: give every container of an engine the shim and, with --memory, a first limit.

This module runs in the process of the command, and restarts no engine. The exit codes are 0 (done), 1 (an error or a
failed check of the host) and 2 (wrong usage).
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fgpu_ebpf.cli.help_texts import examples
from fgpu_ebpf.cli.request import fail, run_dir

if TYPE_CHECKING:  # these imports would delay other commands
    from fgpu_ebpf.containers.engine_config import Engine

    Parts = list[tuple[Engine, Path]]

NAMES = ("docker", "podman", "containerd", "crio", "k3s", "rke2", "slurm")


def _size(_: click.Context, __: click.Parameter, value: str | None) -> str:
    """Return a memory limit as text for a policy, or an empty text. Raise BadParameter if the limit is invalid."""
    from fgpu_ebpf.policy import units

    try:
        return value.strip() if value is not None and units.amount(value) else ""
    except units.QuantityError as error:
        raise click.BadParameter(str(error)) from error


@examples("fgpu setup docker --memory 8GiB", "fgpu setup docker --undo")
@click.command()
@click.argument("engine", type=click.Choice(NAMES))
@click.option(
    "--memory", metavar="SIZE", callback=_size,
    help="Also write a first policy (SIZE, as 8GiB or 50%, for each container), start the service, and check the"
    " host.",
)  # fmt: skip
@click.option("--undo", "is_undo", is_flag=True, help="Restore the settings and remove the files that the setup wrote.")
@click.option("--dry-run", "is_dry", is_flag=True, help="Only print which files would be written.")
@click.option("--file", type=click.Path(path_type=Path, dir_okay=False), help="The engine's settings file.")
def setup(engine: str, memory: str, is_undo: bool, is_dry: bool, file: Path | None) -> None:
    """Give every container of ENGINE the shim, without a flag or a label on the container.

    Policies set the limits; --memory writes the first policy if the host has no policy. No engine is restarted: the
    command prints what to run. A second run changes nothing.
    """
    from fgpu_ebpf.containers.engine_config import SetupError
    from fgpu_ebpf.containers.engines import ENGINES
    from fgpu_ebpf.driver.start_checks import AgentError

    os.umask(0o022)  # engines and rootless programs read the files and folders
    if is_undo and (memory or is_dry):
        raise click.UsageError("--undo cannot be combined with --memory or --dry-run")
    if engine == "slurm" and memory:
        raise click.UsageError("--memory is not for slurm: the shards of a job are its limit")
    # The state has the file's path, and is read by commands in other folders.
    found = replace(ENGINES[engine], file=file.absolute()) if file else ENGINES[engine]
    to_do = []
    try:
        if is_undo:
            _undo(engine, found, bool(file))
        else:
            to_do = _set_up(_parts(engine, found, memory, bool(file)), is_dry)
    except (SetupError, AgentError) as error:
        fail(f"{error}; {'no further file' if is_undo else 'nothing'} was changed", 1)
    except OSError as error:
        fail(f"{error.filename or found.file}: {error.strerror}; no further file was changed", 1)
    is_well = is_undo or is_dry or _go_on(bool(memory))
    for line in [*to_do, *([f"then try: {found.example}"] if memory and not is_dry else [])]:
        click.echo(line)
    sys.exit(0 if is_well else 1)


def _parts(name: str, engine: Engine, memory: str, is_named: bool) -> Parts:
    """Return the files to write and the files of their states. Raise SetupError if the engine is not installed."""
    from fgpu_ebpf.containers import engine_setup
    from fgpu_ebpf.containers.engine_config import SetupError

    if not is_named and not engine_setup.program(engine):
        program = engine.programs[0]
        raise SetupError(f"{name} is not installed here ({program} was not found): name its settings with --file")
    found = engine_setup.as_installed(engine)
    if name == "slurm" and not is_named:
        found = replace(found, file=_policy_folder() / found.file.name)
    return [*engine_setup.parts(name, found, engine_setup.STATE), *(_policy(name, found, memory) if memory else ())]


def _policy(name: str, engine: Engine, memory: str) -> Parts:
    """Return the first policy of this host, or an empty list if the host has policies that no setup has written."""
    from fgpu_ebpf.containers import first_policy
    from fgpu_ebpf.containers.engine_setup import STATE

    folder = _policy_folder()
    if others := first_policy.others(folder, STATE):
        names = ", ".join(path.name for path in others[:3]) + (", ..." if len(others) > 3 else "")
        click.echo(f"{folder}: kept, because the folder has policies ({names}): add a policy for {memory} by hand")
        return []
    return [(first_policy.settings(name, engine.cgroups, memory, folder), STATE / f"{name}-policy.json")]


def _policy_folder() -> Path:
    """Return the folder of policies that agent.yaml names. Exit with 1 if agent.yaml has an error."""
    from fgpu_ebpf.agent import host_config

    host, errors = host_config.read()
    if host is None:
        fail("\n".join(map(str, errors)), 1)
    return host.policy_folder


def _set_up(parts: Parts, is_dry: bool) -> list[str]:
    """Write all files, or no file if the contents of a file cannot be determined.

    Returns:
        The lines for the administrator, with the remaining steps.

    Raises:
        SetupError: an engine's settings do not permit the change.
        AgentError: the helper is not installed.
        OSError: a file cannot be read or written.
    """
    from fgpu_ebpf.containers import engine_setup, injection
    from fgpu_ebpf.driver.start_checks import package_file

    helper = injection.BIN / injection.HELPER
    for part, state in parts:
        wanted = engine_setup.set_up(part, helper, state, is_dry=True)
        if is_dry:
            click.echo(f"{part.file}: {'would be written' if wanted else 'nothing to do'}")
    if is_dry:
        return []
    helper = injection.publish_helper(package_file("oci", injection.HELPER))
    to_do = []
    for part, state in parts:
        wanted = engine_setup.set_up(part, helper, state)
        click.echo(f"{part.file}: {'written' if wanted else 'nothing to do'}")
        to_do += [f"takes effect after: {part.reload}"] if wanted and part.reload else []
        to_do += [wanted.note] if wanted and wanted.note else []
    return to_do


def _go_on(is_first: bool) -> bool:
    """Start the service and check the host if a first policy was requested. If not, print what SELinux refuses.

    Returns:
        False if the service does not start or a check of the host fails.
    """
    from fgpu_ebpf.cli import host_service
    from fgpu_ebpf.containers import selinux
    from fgpu_ebpf.containers.engine_setup import STATE

    if is_first:
        is_started = host_service.start(run_dir(), STATE)
        host_service.read_policies(run_dir())
        return host_service.check(run_dir()) and is_started
    for check in selinux.checks(run_dir()):
        if not check.ok:
            click.echo(f"SELinux: {check.found}: {check.fix}")
    return True


def _undo(name: str, engine: Engine, is_named: bool) -> None:
    """Undo the setup of an engine, and print which files are restored or kept.

    Raise SetupError or OSError on failure.
    """
    from fgpu_ebpf.cli import host_service
    from fgpu_ebpf.containers import engine_setup, first_policy
    from fgpu_ebpf.containers.engine_config import SetupError
    from fgpu_ebpf.containers.engine_setup import STATE
    from fgpu_ebpf.policy.folder import FOLDER

    there = engine_setup.where_it_is(engine, STATE / f"{name}.json").file
    if is_named and there.resolve() != engine.file.resolve():  # the undo would remove the state of that file
        raise SetupError(f"`fgpu setup {name}` has changed {there}, not {engine.file}: run --undo without --file")
    policy = first_policy.settings(name, (), "", FOLDER), STATE / f"{name}-policy.json"
    if engine.reload and (STATE / f"{name}.json").exists():  # Podman has no old settings in use, and Slurm no helper
        engine_setup.unread_mark(run_dir()).touch()
    has_changed = False
    for part, state in reversed([*engine_setup.parts(name, engine, STATE), policy]):
        if part is engine or state.exists():
            # The engine's own file is the last file.
            has_changed = _take_back(engine_setup.where_it_is(part, state), state)
    if has_changed and engine.reload_undone:
        click.echo(f"takes effect after: {engine.reload_undone}")
    if has_changed and name == "docker":
        click.echo("containers created since the setup use the removed runtime fgpu: create them again")
    host_service.stop(run_dir(), STATE)


def _take_back(part: Engine, state: Path) -> bool:
    """Undo the setup of one file, and return whether the file was changed. Raise SetupError or OSError on failure."""
    from fgpu_ebpf.containers import engine_setup

    is_known, is_unchanged = state.exists(), engine_setup.unchanged(state) is not None
    did = engine_setup.undo(part, state)
    if not did:
        said = "kept: the file has changed since the setup" if is_known and part.file.exists() else "nothing to do"
    elif not part.file.exists():
        said = "removed"
    else:
        said = "restored" if is_unchanged else "restored; changes since the setup are kept"
    click.echo(f"{part.file}: {said}")
    return did
