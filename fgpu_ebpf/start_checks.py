"""What a start needs of the package and of the kernel before anything is enforced.

Used by the agent and by `fgpu doctor`. On failure: AgentError, which says what is missing and what fixes it.
"""

from __future__ import annotations

from pathlib import Path

from fgpu_ebpf import programs, trial


class AgentError(Exception):
    """Why there is no enforcement, and what fixes it."""


def package_file(*names: str) -> Path:
    """A file that the package carries, or that a checkout has built."""
    package = Path(__file__).parent
    for base in (package, package.parent, package.parent / "build"):
        path = base.joinpath(*names)
        if path.exists():
            return path
    raise AgentError(f"{'/'.join(names)} is not installed: reinstall fgpu, or run ./dev build in a checkout")


def check_kernel(loading: programs.Loading, shim: Path) -> None:
    """Before programs are used for the first time. AgentError: this kernel is not fit for them."""
    if loading.begun and (why := trial.unfit(str(shim))):
        raise AgentError(why)
