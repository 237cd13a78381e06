"""The policy that `fgpu setup slurm` writes, and the lines of slurm.conf with which Slurm limits jobs by their shards.

This module runs in the commands. slurm.conf is the same file on all nodes of a cluster, so no command changes this
file. The setup prints the lines that slurm.conf lacks.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from fgpu_ebpf.containers.engine_config import HEAD, Settings, SetupError, Wanted, check_is_ours, drop_in_without

POLICY = Path("/etc/fgpu/policy.d/30-slurm.yaml")  # the setup uses the folder that agent.yaml names
_TEXT = f"""{HEAD}# Cgroups of Slurm that its prolog has not limited, such as cgroups of jobs without GPUs, get nothing.
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: jobs}}
spec:
  selector:
    cgroup: ["system.slice/*slurmstepd.scope/*"]
  memory: {{limit: 0}}
  onBypass: kill
"""
_TO_DO = "add to slurm.conf, and restart slurmctld and slurmd:"
UNDONE = "removing fgpu's Prolog, Epilog and TaskProlog from slurm.conf, and a restart of slurmctld and slurmd"
_SCRIPTS = {"Prolog": "prolog.py", "Epilog": "epilog.sh", "TaskProlog": "task.sh"}


def after(of: Settings) -> Wanted:
    """Return the policy, with a note of the lines that slurm.conf lacks. Raise SetupError if the file is not fgpu's."""
    check_is_ours(of)
    conf = _conf()
    missing = [line for line in lines() if not _has(conf, line)]
    return Wanted(_TEXT, note="\n".join([_TO_DO, *missing]) if missing else "")


def without(text: str, before: str | None) -> str:
    """Return the text without fgpu's policy. A policy that an administrator has changed since the setup is kept."""
    return drop_in_without(text) if before is None else text


def lines() -> list[str]:
    """Return the lines of slurm.conf. Raise SetupError if the scripts are not installed."""
    from fgpu_ebpf.driver.start_checks import AgentError, package_file  # `fgpu doctor` does not wait for this import

    try:
        paths = {key: package_file("deploy", "slurm", file) for key, file in _SCRIPTS.items()}
    except AgentError as error:
        raise SetupError(str(error)) from error
    return ["PrologFlags=Contain", *(f"{key}={path}" for key, path in paths.items())]


def _conf() -> str:
    """Return the text of slurm.conf, or an empty text if slurm.conf is missing or unreadable."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(os.environ.get("SLURM_CONF", "/etc/slurm/slurm.conf")).read_text(encoding="utf-8")
    return ""


def _has(text: str, line: str) -> bool:
    """Return whether a setting has the value of the line, alone or in a list."""
    key, _, value = line.partition("=")
    found = re.findall(rf"^[ \t]*{key}[ \t]*=[ \t]*([^#\n]*)", text, re.MULTILINE | re.IGNORECASE)
    return any(value.lower() in (word.strip().lower() for word in one.split(",")) for one in found)
