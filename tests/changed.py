"""Find what a change since main can break: `python -m tests.changed` prints files and suites for `./dev test changed`.

A changed Python module selects the tests that import it, directly or through other modules. The suites that test whole
processes import nothing of the product. Therefore OF_PART names the suites for each part of the tree.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = ("tests/unit/test_language.py", "tests/unit/test_mutants.py", "tests/unit/test_static.py")
EVERYTHING = ("dev", "pyproject.toml", "tests/conftest.py", "tests/world.py")
OF_PART = {  # suites by the beginning of a path; the first match counts
    "bpf/": ("bpf", "e2e", "gatekeeper", "shim"),
    "bench/": ("soak",),
    "dashboards/": ("dashboards", "docs"),
    "deploy/debian/": ("docs", "packages"),
    "deploy/release/": ("packages",),
    "deploy/rpm/": ("packages",),
    "deploy/slurm/": ("docs", "slurm"),
    "deploy/": ("docs", "kubernetes", "packages"),
    "docs/recipes.md": ("docs", "slurm"),
    "docs/slurm.md": ("docs", "slurm"),
    "docs/system-containers.md": ("docs", "engines"),
    "docs/": ("docs",),
    "examples/": ("docs", "e2e"),
    "fgpu_ebpf/api/": ("dashboards", "docs", "e2e", "page"),
    "fgpu_ebpf/cli/": ("docs", "e2e", "unit/cli"),  # the command imports their modules by name
    "fgpu_ebpf/containers/": ("docs", "e2e", "engines", "standalone"),
    "fgpu_ebpf/gatekeeper/": ("e2e", "gatekeeper", "shim"),
    "fgpu_ebpf/kubernetes/": ("e2e", "kubelet", "kubernetes"),
    "fgpu_ebpf/ledger/": ("bpf", "e2e", "gatekeeper"),
    "fgpu_ebpf/linux/": ("bpf", "e2e", "engines", "gatekeeper"),
    "fgpu_ebpf/parker/": ("docs", "e2e", "parker"),
    "fgpu_ebpf/policy/": ("docs", "e2e", "kubernetes"),
    "fgpu_ebpf/scheduling/": ("e2e", "gatekeeper", "shim"),
    "fgpu_ebpf/workloads/": ("e2e", "engines", "kubelet"),
    "fgpu_ebpf/": ("docs", "e2e"),
    "oci/": ("engines", "standalone"),
    "shim/": ("e2e", "fuzz", "gatekeeper", "shim", "standalone"),
    "sim/": ("bpf", "e2e", "fuzz", "parker", "shim", "sim"),
    "tests/programs/": ("e2e", "shim"),
    "": ("docs",),
}


def changed() -> list[str]:
    """Return the paths of new files, and of files that differ from the commit at which this branch left main."""
    base = _git("merge-base", "HEAD", "main")[0]
    return sorted({*_git("diff", "--name-only", base), *_git("ls-files", "--others", "--exclude-standard")})


def _git(*words: str) -> list[str]:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def broken_by(paths: list[str]) -> list[str]:
    """Return the test files and suites that a change of these paths can break."""
    if any(path in EVERYTHING for path in paths):
        return ["tests"]
    graph = grimp.build_graph("fgpu_ebpf", "tests", cache_dir=None)
    found = set(ALWAYS)
    for path in paths:
        parts = path.split("/")
        module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        if module in graph.modules:
            for user in (module, *graph.find_downstream_modules(module)):
                found |= _tests_of(user)
        if parts[0] != "tests" or path.startswith("tests/programs/"):
            suites = next(suites for part, suites in OF_PART.items() if path.startswith(part))
            found |= {f"tests/{suite}" for suite in suites}
        elif (len(parts) > 2 and module not in graph.modules) or path.endswith(("conftest.py", "_kit.py")):
            found.add("/".join(parts[:2]))  # the suite's tests read or import this file
    return sorted(name for name in found if _is_there(name) and not _is_inside(name, found))


def _tests_of(module: str) -> set[str]:
    path = module.replace(".", "/") + ".py"
    return {path} if path.rpartition("/")[2].startswith("test_") else set()


def _is_there(name: str) -> bool:
    return (ROOT / name).exists() and name not in ("tests/support", "tests/programs", "tests/mutants", "tests/kernels")


def _is_inside(name: str, others: set[str]) -> bool:
    return any(name != other and name.startswith(f"{other}/") for other in others)


if __name__ == "__main__":
    FOUND = broken_by(changed())
    print(f"changed since main: {', '.join(FOUND)}", file=sys.stderr)
    print(*FOUND)
