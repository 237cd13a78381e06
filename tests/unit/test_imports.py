"""Packages import in one direction, and heavy libraries are imported only where they are needed."""

from __future__ import annotations

import ast
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fgpu_ebpf"
LINTER = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES}
MOST_IMPORTS = 20


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def linted(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of pyproject.toml for the package in this folder."""
    command = [sys.executable, "-c", LINTER]
    environment = {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_the_import_contracts_of_pyproject_are_kept() -> None:
    done = linted(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("linux/procfs.py", "from fgpu_ebpf.agent import agent", "Packages import in one direction"),
        ("linux/elf.py", "from fgpu_ebpf.tenancy.manager import Manager", "Packages import in one direction"),
        ("new_module.py", "", "Packages import in one direction"),
        ("policy/units.py", "from fgpu_ebpf.policy import rules", "The modules of a package have no import cycle"),
        ("gatekeeper/listener.py", "from fgpu_ebpf.policy import rules", "The gatekeeper knows nothing of policies"),
        ("scheduling/rivals.py", "from fgpu_ebpf.linux import procfs", "The scheduler needs nothing but the layouts"),
    ],
)
def test_the_linter_reports_a_module_that_breaks_an_import_contract(
    module: str, line: str, contract: str, tmp_path: Path
) -> None:
    shutil.copytree(PACKAGE, tmp_path / "fgpu_ebpf", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "fgpu_ebpf" / module
    before = path.read_text() if path.exists() else ""
    path.write_text(f"{before}\n\ndef lazy() -> None:\n    {line or 'pass'}\n")
    done = linted(tmp_path)
    assert done.returncode != 0
    assert re.search(rf"^{contract}.* BROKEN$", done.stdout, re.MULTILINE), done.stdout


def imported(source: str) -> set[str]:
    """Return the modules of the package that this source imports at any place."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            assert not node.level, "a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in NAMES else node.module for name in inner}
    return found & NAMES


def test_no_module_imports_more_than_20_modules_of_the_package() -> None:
    counts = {name_of(path): len(imported(path.read_text())) for path in MODULES}
    assert {name: count for name, count in counts.items() if count > MOST_IMPORTS} == {}


def test_the_check_counts_each_module_once() -> None:
    source = """
import fgpu_ebpf, os
from fgpu_ebpf import abi, __version__
from fgpu_ebpf.linux import bpf, procfs
from fgpu_ebpf.linux.procfs import ended

def lazy():
    import fgpu_ebpf.cli.main
    from fgpu_ebpf.linux import bpf, elf
"""
    named = {"abi", "linux.bpf", "linux.procfs", "linux.elf", "cli.main"}
    assert imported(source) == {"fgpu_ebpf", *(f"fgpu_ebpf.{name}" for name in named)}


def test_every_folder_with_modules_is_a_package() -> None:
    assert [path.parent.name for path in PACKAGE.rglob("*.py") if not (path.parent / "__init__.py").exists()] == []


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_the_import_of_a_package_imports_no_module(path: Path) -> None:
    """Otherwise a process that needs one module of a package would import others of the package too."""
    (docstring,) = ast.parse(path.read_text()).body
    assert isinstance(docstring, ast.Expr)


def test_the_compiler_imports_nothing_of_fgpu() -> None:
    assert "fgpu_ebpf" not in (PACKAGE / "driver/compiler.py").read_text()


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("gatekeeper.main", {"bcc", "pynvml", "prometheus_client", "click", "rich", "psutil", "elftools", "asyncio"}),
        ("daemon", {"bcc", "rich", "psutil", "click", "grpc", "google.protobuf", "jinja2", "asyncio"}),
        ("policy.watch", {"pydantic", "asyncio", "watchfiles"}),  # until there is a file to read
        ("agent.host_config", {"pydantic"}),
        ("cli.policy", {"pydantic", "yaml", "watchfiles"}),
        ("cli.main", {"bcc", "pynvml", "prometheus_client", "rich", "psutil"}),
        ("cli.tables", {"rich"}),  # until a table is printed
    ],
)
def test_a_process_does_not_import_large_modules_that_it_does_not_need(module: str, heavy: set[str]) -> None:
    code = f"import sys, fgpu_ebpf.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert heavy & set(done.stdout.split()) == set()


@pytest.mark.parametrize("module", ["cli", "gatekeeper"])
def test_packages_that_are_programs_run_by_module_name(module: str) -> None:
    """An agent that runs while the package is upgraded starts the gatekeeper by this name."""
    command = [sys.executable, "-P", "-m", f"fgpu_ebpf.{module}", "--help"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.lower().startswith("usage: ")


@pytest.mark.parametrize(
    "words", [["set", "x", "--memory", "1GiB"], ["unset", "x"], ["reload"], ["detach"]], ids=" ".join
)
def test_commands_that_change_limits_do_not_import_large_or_agent_modules(words: list[str], tmp_path: Path) -> None:
    """A command reaches the agent in a tenth of a second; the import of the agent's own modules takes half a second."""
    code = (
        "import sys\n"
        "from fgpu_ebpf.cli import main\n"
        "try: main.main(['--run-dir', *sys.argv[1:]])\n"
        "except SystemExit as end: print(end.code, *sys.modules)"
    )
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(tmp_path / "control.sock"))
        agent.listen()
        command = [sys.executable, "-c", code, str(tmp_path), *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as asked:
            peer, _ = agent.accept()
            with peer:
                peer.recv(1 << 16)
                peer.sendall(b'{"error": "no", "code": 1}\n')
            code_said, *modules = asked.communicate(timeout=20)[0].split()
    assert code_said == "1"
    unwanted = {"prometheus_client", "pynvml", "psutil", "fgpu_ebpf.agent.agent", "fgpu_ebpf.daemon"}
    assert unwanted & set(modules) == set()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_functions_stay_small_and_have_docstrings(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert text.count("\n") <= 400
    assert [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= 60] == []
    assert ast.get_docstring(tree)
    public = [f for f in functions if not f.name.startswith("_")]
    nested = {n.name for f in functions for n in ast.walk(f) if isinstance(n, ast.FunctionDef) and n is not f}
    assert [f.name for f in public if not ast.get_docstring(f) and f.name not in nested] == []
