"""Requests to a running agent: the command `fgpu`, the control socket, events and metrics."""

from __future__ import annotations

import functools
import json
import re
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from tests.support import host
from tests.support.host import FGPU, METRICS, RUN_DIR


def fgpu(
    *arguments: str | Path, check: bool = True, seconds: float = 30, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run the command `fgpu`, in the environment of a user of the simulated driver."""
    more.setdefault("env", host.ENVIRONMENT)
    done = subprocess.run([*FGPU, *arguments], capture_output=True, text=True, timeout=seconds, check=False, **more)
    assert not check or done.returncode == 0, f"fgpu {arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def ask(**request: Any) -> Any:
    """Send one request to the control socket, and return the answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(30)
        sock.connect(str(RUN_DIR / "control.sock"))
        sock.sendall(json.dumps(request).encode() + b"\n")
        answer = json.loads(b"".join(iter(lambda: sock.recv(1 << 16), b"")))
    assert "ok" in answer, answer
    return answer["ok"]


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@functools.cache
def output_schema(command: str) -> Any:
    """Return a validator of the schema of `fgpu schema COMMAND`.

    It allows no property that the schema does not have.
    """
    import jsonschema  # benchmarks use this module where it is not installed

    schema = json.loads(fgpu("schema", command).stdout)
    for definition in schema["$defs"].values():
        definition["additionalProperties"] = False
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def output(command: str) -> Any:
    """Return the JSON output of `fgpu status`, `ps` or `events`, as a list for events. It must follow its schema."""
    said = fgpu(command, "--json").stdout
    found = [json.loads(line) for line in said.splitlines()]
    for document in found:
        output_schema(command).validate(document)
    return found if command == "events" else found[0]


def events(what: str) -> list[dict[str, Any]]:
    """Return the events of one kind in `fgpu events`, the oldest first."""
    return [one for one in output("events") if one["what"] == what]


def metrics(page: str | None = None) -> Samples:
    """Return the current metrics, or those of a page: (name, labels) -> value."""
    found = {}
    text = ask(verb="metrics") if page is None else page
    for name, labels, value in re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE):
        found[name, frozenset(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels))] = float(value)
    return found


def metrics_page() -> str:
    """Return the page that Prometheus gets. The agent renews it once a second."""
    with urllib.request.urlopen(METRICS, timeout=20) as page:
        return str(page.read().decode())


def orphans() -> list[dict[str, Any]]:
    """Return all memory that is charged for processes that have exited, or that have exported and freed it."""
    return [orphan for tenant in ask(verb="snapshot")["tenants"] for orphan in tenant["orphans"]]
