"""Imports run one way, and the heavy ones stay where they belong."""

from __future__ import annotations

import ast
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "fgpu_ebpf"
# Each module may import those of earlier rows alone.
ORDER = (
    {"mappings", "sockets"},
    {"locks", "wholefile"},
    {"pages", "bpf", "elf", "bounds", "checks", "snapshot", "procfs", "loader", "quantities", "globs", "yamlfile"}
    | {"bell", "folderbell", "control", "prologue", "enginesettings", "urgency", "privileges", "innerpath"}
    | {"cgroupnames", "messages", "visitors", "heap", "workers", "log_lines"},
    {
        "bound_owner",
        "identity",
        "journal",
        "keepers",
        "orphan_text",
        "process_rows",
        "notify",
        "published",
        "processes",
        "orphans",
        "scheduler",
        "futex",
        "peers",
        "web",
        "shares",
        "xids",
    }
    | {"crimessages", "kubeletmessages", "slots", "graces", "breakpoints", "file_budget"}
    | {"owner_table", "resolutions"}
    | {"library_class", "library_files", "trust", "observed", "shim_mounts"},
    {"probe_plan"} | {"events", "launch"},
    {"nested_shares"},
    {"policy", "configfile", "faults", "shimless", "timebook", "places", "answers", "elders", "namesfile", "cdi"}
    | {"allocation", "unwitnessed", "enforcement"},
    {
        "audit",
        "device_balance",
        "policyvalues",
        "profiles",
        "endpoint",
        "clocks",
        "units",
        "claims",
        "asker",
        "dockerapi",
        "criapi",
        "inject",
    },
    {"policymodel", "hostmodel", "kubelet", "turns", "engines", "enginesetup", "selinux"},
    {"policyfile"},
    {"policyfolder"},
    {"policywatch", "hostfile", "last_good"},
    {"programs", "door", "usage", "shelf", "sealed", "overrides", "history", "keeper", "links"},
    {"ledger", "tenants", "workloads", "overruns"},
    {"tenant_names", "tenant_tree", "level_places", "stale_mounts"},
    {"answered", "level_refusals", "commitments"},
    {"probes", "device_indexes", "clients", "enforcer", "gone_tenants", "roots", "library_search"},
    {"library_worker"},
    {"libraries"},
    {"host_scan"},
    {"devices", "trial", "glance", "discovery", "manager", "targets", "desks", "gatekeeper_start"},
    {"device_sample", "context_sizes", "start_checks"},
    {"corrections", "orphan_release"},
    {"settings", "reconcile", "news", "detach", "explain", "callers", "slicer", "pinned_levels"},
    {"policies", "questions"},
    {"map_views"},
    {"view", "readers", "adoption", "health", "offers", "xidnews", "orphan_reports", "bypass_killer"}
    | {"late_devices", "xid_record"},
    {"agent", "metrics", "tables", "gatekeeper", "keyboard", "ranking", "bars"},
    {"choice", "feed", "page"},
    {"frame"},
    {"top"},
    {"server"},
    {"service"},
    {"cli_policy", "cli_containers", "cli_kubernetes", "cli_completion"},
    {"cli"},
)
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")


def imports(module: str) -> set[str]:
    tree, found = ast.parse((PACKAGE / f"{module}.py").read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "fgpu_ebpf":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fgpu_ebpf."):
            found.add(node.module.split(".")[1])  # type: ignore[union-attr]
    return found & set(MODULES)


def rank(module: str) -> int:
    return next(i for i, row in enumerate(ORDER) if module in row)


def test_every_module_has_its_place():
    assert set(MODULES) == set().union(*ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    assert {name for name in imports(module) if rank(name) >= rank(module)} == set()


def test_the_loader_imports_nothing_of_ours():
    assert imports("loader") == set()
    assert "fgpu_ebpf" not in (PACKAGE / "loader.py").read_text()


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("gatekeeper", {"bcc", "pynvml", "prometheus_client", "click", "rich", "psutil", "elftools", "asyncio"}),
        ("service", {"bcc", "rich", "psutil", "click", "grpc", "google.protobuf", "jinja2", "asyncio"}),
        ("policywatch", {"pydantic", "asyncio", "watchfiles"}),  # until there is a file to read
        ("hostfile", {"pydantic"}),
        ("cli_policy", {"pydantic", "yaml", "watchfiles"}),
        ("cli", {"bcc", "pynvml", "prometheus_client", "rich", "psutil"}),
    ],
)
def test_heavy_modules_stay_out(module, heavy):
    code = f"import sys, fgpu_ebpf.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert heavy & set(done.stdout.split()) == set()


@pytest.mark.parametrize(
    "words", [["set", "x", "--memory", "1GiB"], ["unset", "x"], ["reload"], ["detach"]], ids=" ".join
)
def test_what_changes_limits_waits_for_no_imports(words, tmp_path):
    """A command is there in a tenth of a second; the agent's own modules take half of one."""
    code = (
        "import sys, fgpu_ebpf.cli as cli\n"
        "try: cli.main(['--run-dir', *sys.argv[1:]])\n"
        "except SystemExit as end: print(end.code, *sys.modules)"
    )
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(tmp_path / "control.sock"))
        agent.listen()
        command = [sys.executable, "-c", code, str(tmp_path), *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PACKAGE.parent) as asked:
            peer, _ = agent.accept()
            with peer:
                peer.recv(1 << 16)
                peer.sendall(b'{"error": "no", "code": 4}\n')
            code_said, *modules = asked.communicate(timeout=20)[0].split()
    assert code_said == "4"
    assert {"prometheus_client", "pynvml", "psutil", "fgpu_ebpf.agent", "fgpu_ebpf.service"} & set(modules) == set()


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.stem)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    tree = ast.parse(text)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert text.count("\n") <= 400
    assert [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= 60] == []
    assert ast.get_docstring(tree)
    public = [f for f in functions if not f.name.startswith("_")]
    nested = {n.name for f in functions for n in ast.walk(f) if isinstance(n, ast.FunctionDef) and n is not f}
    assert [f.name for f in public if not ast.get_docstring(f) and f.name not in nested] == []
