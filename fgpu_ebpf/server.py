"""The control socket and the metrics address.

Owns: who may read (the socket's group) and who may write (root of the agent's own user namespace). Never: blocks the
agent on a slow peer: each has a second. On failure: a peer that sends no JSON gets one line that says so.
"""

from __future__ import annotations

import contextlib
import grp
import json
import logging
import os
import selectors
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server

from fgpu_ebpf import metrics, policy
from fgpu_ebpf.agent import Agent, AgentError
from fgpu_ebpf.policy import QuantityError
from fgpu_ebpf.workloads import TargetError

log = logging.getLogger("fgpu.server")
PEER_SECONDS = 1.0
MOST_REQUEST_BYTES = 1 << 16
READS = {"snapshot", "metrics", "ping"}


class RequestError(Exception):
    """What is wrong with a request; `code` is the client's exit code."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


class ControlServer:
    """One JSON object a line, one line an answer: {"ok": …} or {"error": …, "code": …}."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._own_namespace = os.stat("/proc/self/ns/user").st_ino
        self._listener: socket.socket | None = None
        self._verbs: dict[str, Callable[[dict[str, Any]], Any]] = {
            "ping": lambda _: {"pid": os.getpid()},
            "snapshot": lambda _: agent.look().as_json(),
            "metrics": lambda _: metrics.text(agent.look()),
            "put": self._put,
            "drop": self._drop,
            "run": self._run,
            "detach": lambda _: agent.detach(),
        }

    def open(self) -> None:
        """Listens at <run>/control.sock, 0660 root:fgpu where that group is."""
        path = self._agent.settings.run_dir / "control.sock"
        aside = path.with_name(".control.sock")
        aside.unlink(missing_ok=True)
        listener = self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(str(aside))
        aside.chmod(0o660)
        with contextlib.suppress(KeyError):
            os.chown(aside, 0, grp.getgrnam("fgpu").gr_gid)
        listener.listen(64)
        aside.rename(path)
        self._agent.selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))

    def close(self) -> None:
        """Stops listening; nobody may think that an agent is here."""
        if self._listener is None:
            return
        self._listener.close()
        (self._agent.settings.run_dir / "control.sock").unlink(missing_ok=True)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(PEER_SECONDS)
                peer.sendall(json.dumps(self._answer(peer)).encode() + b"\n")

    def _answer(self, peer: socket.socket) -> dict[str, Any]:
        try:
            return {"ok": self._handle(peer, _request(peer))}
        except RequestError as error:
            return {"error": str(error), "code": error.code}
        except TargetError as error:
            return {"error": str(error), "code": 4}
        except QuantityError as error:
            return {"error": str(error), "code": 2}
        except (AgentError, OSError) as error:
            log.warning("request failed: %s", error)
            return {"error": str(error), "code": 1}

    def _handle(self, peer: socket.socket, request: dict[str, Any]) -> Any:
        verb = request.get("verb")
        if not isinstance(verb, str) or verb not in self._verbs:
            raise RequestError(f"unknown verb {verb!r}", 2)
        if verb not in READS and not self._may_write(peer):
            log.warning("refused %s: not root in this user namespace", verb)
            raise RequestError(f"{verb} needs root on the host")
        return self._verbs[verb](request)

    def _may_write(self, peer: socket.socket) -> bool:
        pid, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        with contextlib.suppress(OSError):
            return uid == 0 and os.stat(f"/proc/{pid}/ns/user").st_ino == self._own_namespace
        return False

    def _put(self, request: dict[str, Any]) -> dict[str, Any]:
        path = self._agent.workloads.find(_text(request, "target"))
        workload = self._agent.put(path, policy.memory_bytes(_text(request, "memory")))
        return {"tenant": workload.name, "path": workload.path, "memory_bytes": workload.memory_bytes}

    def _drop(self, request: dict[str, Any]) -> dict[str, Any]:
        path = self._agent.workloads.find(_text(request, "target"))
        if not self._agent.drop(path):
            raise TargetError(f"{path} has no limit")
        return {"path": path}

    def _run(self, request: dict[str, Any]) -> dict[str, Any]:
        memory = policy.memory_bytes(_text(request, "memory"))
        workload = self._agent.run_cgroup(memory, str(request.get("name") or ""))
        return {
            "tenant": workload.name,
            "folder": str(self._agent.workloads.folder(workload.path)),
            "preload": str(self._agent.settings.run_dir / "ld.so.preload"),
            "shim": str(self._agent.settings.shim),
        }


def _text(request: dict[str, Any], name: str) -> str:
    value = request.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{name} is missing", 2)
    return value


def _request(peer: socket.socket) -> dict[str, Any]:
    data = b""
    while not data.endswith(b"\n"):
        more = peer.recv(65536)
        data += more
        if not more or len(data) > MOST_REQUEST_BYTES:
            raise RequestError("one JSON object a line, please", 2)
    try:
        request = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError("one JSON object a line, please", 2) from error
    if not isinstance(request, dict):
        raise RequestError("one JSON object a line, please", 2)
    return request


def serve_metrics(agent: Agent) -> WSGIServer:
    """Serves /metrics at settings.listen, from the latest Snapshot. AgentError: the address is taken."""
    host, _, port = agent.settings.listen.rpartition(":")
    try:
        server, _ = start_http_server(
            int(port), addr=host.strip("[]"), registry=metrics.registry(lambda: agent.snapshot)
        )
    except (OSError, ValueError) as error:
        raise AgentError(f"cannot listen at {agent.settings.listen} ({error}): choose another with --listen") from error
    return server


def call(run_dir: Path, request: dict[str, Any]) -> Any:
    """Asks the agent; raises ConnectionError when there is none, RequestError when it says no."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(30.0)
        try:
            sock.connect(str(run_dir / "control.sock"))
            sock.sendall(json.dumps(request).encode() + b"\n")
            data = b"".join(iter(lambda: sock.recv(1 << 20), b""))
        except OSError as error:
            raise ConnectionError(f"no agent answers at {run_dir}/control.sock ({error.strerror or error})") from error
    if not data:
        raise ConnectionError("the agent hung up")
    answer = json.loads(data)
    if "error" in answer:
        raise RequestError(answer["error"], answer["code"])
    return answer["ok"]
