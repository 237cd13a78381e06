"""The policy that `fgpu setup ENGINE --memory SIZE` writes: a limit for each container of the engine.

This module runs in the command. The file of the policy is the last file of its folder. An Engine describes this file,
so that `engine_setup` writes and removes the file. A file that an administrator has written or changed is never
replaced.
"""

from __future__ import annotations

import json
from pathlib import Path

from fgpu_ebpf.containers import engine_setup
from fgpu_ebpf.containers.engine_config import Engine, Settings, Wanted, check_is_ours
from fgpu_ebpf.policy.folder import PolicyFolder


def settings(name: str, cgroups: tuple[str, ...], memory: str, folder: Path) -> Engine:
    """Return an Engine that describes the policy file of the engine `name`. `memory`: the limit, as in a policy."""
    text = (
        f"# Written by `fgpu setup {name} --memory {memory}`. `fgpu setup {name} --undo` removes this file, unless it\n"
        "# has changed since. Policies in files with earlier names are tried first.\n"
        "apiVersion: fgpu.dev/v1alpha1\n"
        "kind: GpuPolicy\n"
        f"metadata: {{name: {name}}}\n"
        "spec:\n"
        f"  selector: {{cgroup: {json.dumps(cgroups)}}}\n"
        f"  memory: {{limit: {memory}}}\n"
    )

    def after(of: Settings) -> Wanted:
        check_is_ours(of)
        return Wanted(text)

    # keeps_folder, because an agent without the folder would keep the last policies in force.
    return Engine(folder / f"zz-{name}.yaml", after, lambda now, _: now, keeps_folder=True)


def others(folder: Path, states: Path) -> list[Path]:
    """Return the policy files of a folder that are not exactly as a setup has written them."""
    state = PolicyFolder(folder).state()
    ours = {engine_setup.unchanged(path) for path in states.glob("*.json")}
    return [folder / name for name, _ in state.files if folder / name not in ours] if state else []
