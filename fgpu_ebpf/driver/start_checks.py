"""Checks of the package and the kernel before anything is enforced.

The agent, at its start, and `fgpu doctor` use this module. AgentError names what is missing, and the fix.
"""

from __future__ import annotations

from pathlib import Path

from fgpu_ebpf.driver import programs, uretprobe_check


class AgentError(Exception):
    """There is no enforcement; the text says why, and names the fix."""


def package_file(*names: str) -> Path:
    """Return a file of the package, or one that a checkout has built. Raises AgentError: it is not installed."""
    package = Path(__file__).parents[1]
    for base in (package, package.parent, package.parent / "build"):
        path = base.joinpath(*names)
        if path.exists():
            return path
    raise AgentError(f"{'/'.join(names)} is not installed: reinstall fgpu, or run ./dev build in a checkout")


def check_kernel(loading: programs.Loading, shim: Path) -> None:
    """Check the kernel before programs are used for the first time. Raises AgentError: it would kill processes."""
    if loading.begun and (why := uretprobe_check.unfit(str(shim))):
        raise AgentError(why)
