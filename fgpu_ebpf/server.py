"""The control socket and the metrics address.

Owns: who may read (the socket's group) and who may write (root of the agent's own user namespace). Never: blocks the
agent on a slow peer. On failure: a peer that sends no JSON gets one line that says so.
"""

from __future__ import annotations

import contextlib
import grp
import json
import logging
import os
import selectors
import shlex
import socket
import struct
from collections.abc import Callable
from typing import Any
from wsgiref.types import WSGIApplication

from prometheus_client import make_wsgi_app

from fgpu_ebpf import cdi, explain, metrics, page, quantities, shares, snapshot, targets
from fgpu_ebpf.agent import Agent
from fgpu_ebpf.checks import Check
from fgpu_ebpf.control import RequestError
from fgpu_ebpf.enforcer import RoomError
from fgpu_ebpf.offers import Offers
from fgpu_ebpf.peers import Peers
from fgpu_ebpf.policy import Device, Priority
from fgpu_ebpf.quantities import QuantityError
from fgpu_ebpf.sockets import make_way
from fgpu_ebpf.start_checks import AgentError
from fgpu_ebpf.web import Web, by_path, health
from fgpu_ebpf.workloads import TargetError

log = logging.getLogger("fgpu.server")
MOST_WEIGHT = 10_000
_COMPUTE_FIELDS = {"compute": "limit_millionths", "weight": "weight", "priority": "priority"}
READS = {"snapshot", "metrics", "ping", "explain", "events", "offers"}


class ControlServer:
    """One JSON object a line, one line an answer: {"ok": …} or {"error": …, "code": …}."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._own_namespace = os.stat("/proc/self/ns/user").st_ino
        self._listener: socket.socket | None = None
        self._peers = Peers(agent.selector, self._line)
        self._verbs: dict[str, Callable[[dict[str, Any]], Any]] = {
            "ping": self._ping,
            "snapshot": lambda _: agent.look(),
            "metrics": lambda _: metrics.text(agent.look()),
            "explain": self._explain,
            "events": lambda request: agent.history.since(_number(request, "since")),
            "offers": lambda _: self._offers(),
            "reload": lambda _: self._reload(),
            "put": self._put,
            "drop": self._drop,
            "run": self._run,
            "share": self._share,
            "clear": self._clear,
            "detach": lambda _: agent.detach(),
        }

    def open(self) -> None:
        """Listens at <run>/control.sock, 0660 root:fgpu where that group is."""
        path = self._agent.settings.run_dir / "control.sock"
        aside = path.with_name(".control.sock")
        make_way(str(path))
        aside.unlink(missing_ok=True)
        listener = self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(str(aside))
        aside.chmod(0o660)
        with contextlib.suppress(KeyError):
            os.chown(aside, 0, grp.getgrnam("fgpu").gr_gid)
        listener.listen(64)
        aside.rename(path)
        self._agent.selector.register(listener, selectors.EVENT_READ, lambda: self._peers.accept(listener))
        self._agent.chores.append(self._peers.expire)

    def close(self) -> None:
        """Stops listening; nobody may think that an agent is here."""
        if self._listener is None:
            return
        self._peers.close()
        self._listener.close()
        (self._agent.settings.run_dir / "control.sock").unlink(missing_ok=True)

    def _line(self, peer: socket.socket, line: bytes) -> bytes:
        return json.dumps(self._answer(peer, line), default=snapshot.plain).encode() + b"\n"

    def _answer(self, peer: socket.socket, line: bytes) -> dict[str, Any]:
        try:
            return {"ok": self._handle(peer, _request(line))}
        except RequestError as error:
            return {"error": str(error), "code": error.code}
        except TargetError as error:
            return {"error": str(error), "code": 4}
        except QuantityError as error:
            return {"error": str(error), "code": 2}
        except (AgentError, RoomError, OSError) as error:
            log.warning("request failed: %s", error)
            return {"error": str(error), "code": 1}
        except Exception as error:  # a mistake of ours: whoever asked is told so, and the loop goes on
            self._agent.failures += 1
            log.exception("a request failed")
            return {"error": f"a mistake in fgpu, see the agent's log: {type(error).__name__}", "code": 1}

    def _handle(self, peer: socket.socket, request: dict[str, Any]) -> Any:
        verb = request.get("verb")
        if not isinstance(verb, str) or verb not in self._verbs:
            raise RequestError(f"unknown verb {verb!r}", 2)
        if verb not in READS and not self._may_write(peer):
            self._agent.writes_refused += 1
            self._agent.history.add("write refused", text=f"{verb} on the control socket: not root on the host")
            raise RequestError(f"{verb} needs root on the host")
        return self._verbs[verb](request | {"peer": _pid(peer)})

    def _ping(self, _: dict[str, Any]) -> dict[str, Any]:
        settings = self._agent.settings
        return {"pid": os.getpid(), "driver_root": str(settings.driver_root), "loader": shlex.join(settings.loader)}

    def _offers(self) -> dict[str, Any]:
        """For a device plugin."""
        agent = self._agent
        assert agent.reconciler
        offers = Offers(
            agent.settings.profiles, agent.nvml.devices, agent.enforcer, agent.reconciler.truth,
            agent.discovery.unenforced(),
        )  # fmt: skip
        return offers.view(agent.manager.overrides, cdi.mounts(agent.parts) if agent.parts else ())

    def _may_write(self, peer: socket.socket) -> bool:
        pid, uid = _pid(peer), struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        with contextlib.suppress(OSError):
            return uid == 0 and os.stat(f"/proc/{pid}/ns/user").st_ino == self._own_namespace
        return False

    def _reload(self) -> None:
        if faults := self._agent.reload():
            raise RequestError("\n".join(["the policies in force stay:", *map(str, faults)]), 1)

    def _put(self, request: dict[str, Any]) -> dict[str, Any]:
        path = self._find(request)
        asked = _asked(request) | self._devices(request)
        tenant = self._agent.manager.set(path, asked)
        said = [f"memory {request['memory']}"] if asked.get("memory_millionths") else []
        said += [f"{name} {asked[field]}" for name, field in _COMPUTE_FIELDS.items() if field in asked]
        bytes_ = asked.get("memory_bytes") or 0
        self._agent.history.add("set", tenant=tenant.name, bytes=bytes_, text=", ".join(said))
        return {"tenant": tenant.name, "path": tenant.path, **asked}

    def _find(self, request: dict[str, Any]) -> str:
        return targets.find(_text(request, "target"), self._agent.enforcer, self._agent.manager.workloads)

    def _explain(self, request: dict[str, Any]) -> dict[str, Any]:
        agent = self._agent
        found, path = agent.discovery, self._find(request)
        tenants = agent.fresh().tenants
        orphans = [snapshot.plain(orphan) for tenant in tenants if tenant.path == path for orphan in tenant.orphans]
        enforced = {tenant.cgroup: tenant.enforcement for tenant in tenants}
        around = found.reasons(), found.standalone(), orphans, found.is_shim, enforced
        return explain.explain(path, agent.manager, agent.ledger, found.unenforced(), *around)

    def _drop(self, request: dict[str, Any]) -> dict[str, Any]:
        path = self._find(request)
        if not self._agent.manager.unset(path):
            raise TargetError(f"no limit was set by hand on {path}")
        self._agent.history.add("unset", text=path)
        return {"path": path}

    def _clear(self, request: dict[str, Any]) -> dict[str, Any]:
        """A device has been repaired, whatever it has reported."""
        agent, device = self._agent, self._device(_text(request, "device"))
        if agent.reconciler:
            agent.reconciler.repaired(device.index)
        agent.history.add("device cleared", gpu=device.index, text=device.uuid_text)
        return {"device": device.index}

    def _device(self, said: str) -> Device:
        device = next((d for d in self._agent.nvml.devices if said in (str(d.index), d.uuid_text)), None)
        if device is None:
            raise TargetError(f"no device {said}: fgpu status --json names them by index and uuid")
        return device

    def _devices(self, request: dict[str, Any]) -> dict[str, Any]:
        """The only devices that a tenant is to have, by UUID, as a field of an Override."""
        said = request.get("devices") or []
        if not isinstance(said, list) or not all(isinstance(one, str) for one in said):
            raise RequestError("devices is no list of indexes or UUIDs", 2)
        uuids = tuple(dict.fromkeys(self._device(one).uuid_text for one in said))
        return {"devices": uuids} if uuids else {}

    def _share(self, request: dict[str, Any]) -> dict[str, Any]:
        """A hook of a container that an engine is about to start, of which only `pid` is there yet."""
        share = shares.parse(_text(request, "share"))
        path = targets.starting(request.get("pid"), request["peer"], self._agent.manager.workloads)
        tenant = self._agent.manager.share(path, share)
        self._agent.history.add("share", tenant=tenant.name, text=share.text)
        return {"tenant": tenant.name, "path": tenant.path}

    def _run(self, request: dict[str, Any]) -> dict[str, Any]:
        tenant = self._agent.manager.run(_asked(request) | self._devices(request), str(request.get("name") or ""))
        return {
            "tenant": tenant.name,
            "folder": self._agent.manager.workloads.folder(tenant.path),
            "preload": str(self._agent.settings.run_dir / "ld.so.preload"),
            "shim": str(self._agent.shim),
        }


def _pid(peer: socket.socket) -> int:
    return int(struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def _asked(request: dict[str, Any]) -> dict[str, Any]:
    """The limits that a request names, as fields of an Override."""
    asked: dict[str, Any] = {}
    if request.get("memory") is not None:
        memory = quantities.amount(_text(request, "memory"))
        asked |= {"memory_bytes": memory.bytes or None, "memory_millionths": memory.millionths or None}
    if request.get("compute") is not None:
        asked["limit_millionths"] = quantities.millionths(_text(request, "compute"))
    weight, priority = request.get("weight"), request.get("priority")
    if weight is not None:
        if not isinstance(weight, int) or isinstance(weight, bool) or not 1 <= weight <= MOST_WEIGHT:
            raise RequestError(f"weight is not between 1 and {MOST_WEIGHT}", 2)
        asked["weight"] = weight
    if priority is not None:
        if priority not in list(Priority):
            raise RequestError(f"priority is one of {', '.join(Priority)}", 2)
        asked["priority"] = priority
    if not asked:
        raise RequestError("memory is missing: say memory, compute, weight or priority", 2)
    return asked


def _text(request: dict[str, Any], name: str) -> str:
    value = request.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{name} is missing", 2)
    return value


def _number(request: dict[str, Any], name: str) -> int:
    value = request.get(name) or 0
    if not isinstance(value, int) or value < 0:
        raise RequestError(f"{name} is a number", 2)
    return value


def _request(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError) as error:
        raise RequestError("one JSON object a line, please", 2) from error
    if not isinstance(request, dict):
        raise RequestError("one JSON object a line, please", 2)
    return request


class MetricsAddress:
    """The status page (/), /metrics, /healthz and /readyz at settings.listen, each request in a thread.

    /healthz: the agent answers; /readyz: it enforces what was asked for, else 503 and why not. Enforcement does not
    depend on the address: where it is taken, `fgpu doctor` says so, and it is tried again each round.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._web: Web | None = None
        agent.chores.append(self._keep)
        self._open()

    def close(self) -> None:
        """Stop listening."""
        if self._web:
            self._web.server_close()

    def _open(self) -> None:
        agent, listen = self._agent, self._agent.settings.listen
        host, _, port = listen.rpartition(":")
        try:
            self._web = Web(host.strip("[]"), int(port), by_path(_paths(agent)), agent.settings.listen_names)
        except (OSError, ValueError, OverflowError) as error:
            if "metrics" not in agent.lacks:
                log.error("cannot listen at %s: %s; limits are enforced without metrics", listen, error)
            fix = "end what listens there, or name another address: listen in agent.yaml"
            agent.lacks["metrics"] = Check("metrics", False, f"cannot listen at {listen}: {error}", fix)
            return
        if agent.lacks.pop("metrics", None):
            log.info("metrics at http://%s/", listen)
        agent.selector.register(self._web, selectors.EVENT_READ, self._take_in)

    def _keep(self) -> None:
        if self._web:
            self._web.expire()
        else:
            self._open()

    def _take_in(self) -> None:
        """Take connections in, and a Snapshot when a whole request is there."""
        assert self._web
        if self._web.hear():
            try:
                self._agent.fresh()
            finally:
                self._web.answer()


def _paths(agent: Agent) -> dict[str, WSGIApplication]:
    return {
        "/": page.app(lambda: agent.snapshot),
        "/metrics": make_wsgi_app(metrics.registry(lambda: agent.snapshot)),
        "/healthz": health(lambda: ""),
        "/readyz": health(lambda: agent.snapshot.unenforced or agent.snapshot.incomplete),
    }
