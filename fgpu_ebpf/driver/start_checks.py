"""Checks of the package and the kernel before anything is enforced.

Runs in the agent's main thread at its start, in `fgpu load` and in `fgpu setup`. The text of an AgentError has the
reason and the fix.
"""

from __future__ import annotations

from pathlib import Path

from fgpu_ebpf.driver import programs, uretprobe_check


class AgentError(Exception):
    """Enforcement is not possible. The text has the reason and, if there is one, the fix."""


def package_file(*names: str) -> Path:
    """Return the path of a file of the package, or of a build in a checkout. Raises AgentError: it is not installed."""
    package = Path(__file__).parents[1]
    for base in (package, package.parent, package.parent / "build"):
        path = base.joinpath(*names)
        if path.exists():
            return path
    raise AgentError(f"{'/'.join(names)} is not installed: reinstall fgpu, or run ./dev build in a checkout")


def check_kernel(loading: programs.Loading, shim: Path) -> None:
    """Check the kernel before the first use of the BPF programs. Raises AgentError: probes would kill processes."""
    if loading.begun and (why := uretprobe_check.unfit(str(shim))):
        raise AgentError(why)
