"""The control socket and the metrics address: the commands and the pages that the agent serves.

This module runs in the agent's main loop. A request to the metrics address is answered in its own thread. Members of
the socket's group may send requests that only read. Root of the agent's user namespace may send all requests. A slow
peer never blocks the agent. A peer that sends no JSON gets one line with the error.
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
from collections import Counter
from collections.abc import Callable
from typing import Any
from wsgiref.types import WSGIApplication

from prometheus_client import make_wsgi_app

from fgpu_ebpf import control_client, snapshot
from fgpu_ebpf.agent.agent import Agent
from fgpu_ebpf.agent.offers import Offers
from fgpu_ebpf.api import metrics, status_page
from fgpu_ebpf.api.http_server import HttpServer, by_path, health
from fgpu_ebpf.api.line_server import LineServer
from fgpu_ebpf.check import Check
from fgpu_ebpf.containers import cdi
from fgpu_ebpf.control_client import RequestError
from fgpu_ebpf.driver.start_checks import AgentError
from fgpu_ebpf.linux.clear_path import make_way
from fgpu_ebpf.linux.peer_credentials import pid_and_uid, pid_of
from fgpu_ebpf.policy import share_name, units
from fgpu_ebpf.policy.rules import Classes, Device, Priority
from fgpu_ebpf.policy.units import QuantityError
from fgpu_ebpf.tenancy import explain, targets
from fgpu_ebpf.tenancy.enforcer import RoomError
from fgpu_ebpf.workloads.cgroups import TargetError

log = logging.getLogger("fgpu.server")
MOST_WEIGHT = 10_000
_COMPUTE_FIELDS = {
    "compute": "limit_millionths", "weight": "weight", "priority": "priority", "priority class": "priority_class"
}  # fmt: skip
READS = {"snapshot", "metrics", "ping", "explain", "events", "offers", "errand"}


class ControlServer:
    """The server of the control socket.

    The answer to a line, a JSON object, is {"ok": …} or {"error": …, "code": …}.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._own_namespace = os.stat("/proc/self/ns/user").st_ino
        self._listener: socket.socket | None = None
        self._peers = LineServer(agent.selector, self._line)
        self._started = Counter[str]()  # the containers that have got a share of a profile, by the text of the share
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
            "release": lambda request: agent.devices.release(units.duration_ns(_text(request, "for")) / 1e9),
            "take": lambda _: agent.devices.take(),
            "park": self._park,
            "wake": self._wake,
            "errand": self._errand,
            "detach": self._detach,
        }

    def open(self) -> None:
        """Listen at <run>/control.sock, mode 0660, owned by root:fgpu if the group fgpu exists."""
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
        """Stop listening and remove the socket, because clients treat an existing socket as a running agent."""
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
        except Exception as error:  # a defect of fgpu; the peer gets an error, and the main loop continues
            self._agent.failures += 1
            log.exception("a request failed")
            return {"error": f"internal error ({type(error).__name__}): see the agent's log", "code": 1}

    def _handle(self, peer: socket.socket, request: dict[str, Any]) -> Any:
        verb = request.get("verb")
        if not isinstance(verb, str) or verb not in self._verbs:
            raise RequestError(f"this version of the agent has no request {verb!r}", 2)
        if verb not in READS and not self._may_write(peer):
            self._agent.writes_refused += 1
            self._agent.history.add(
                "write refused", text=f"{verb} on the control socket: the sender is not root on the host"
            )
            raise RequestError("this change needs root on the host: use sudo")
        return self._verbs[verb](request | {"peer": pid_of(peer)})

    def _ping(self, _: dict[str, Any]) -> dict[str, Any]:
        settings, released = self._agent.settings, self._agent.devices.is_released
        says = {"driver_root": str(settings.driver_root), "loader": shlex.join(settings.loader), "released": released}
        return {"pid": os.getpid(), **says}

    def _offers(self) -> dict[str, Any]:
        """Return this host's profiles and devices, for a device plugin or the DRA driver."""
        agent, parts = self._agent, self._agent.parts
        offers = Offers(
            agent.settings.profiles, parts.driver.nvml.devices, parts.enforcer, parts.reconciler.truth,
            parts.driver.discovery.unenforced(),
        )  # fmt: skip
        facts = offers.facts(parts.driver.nvml.driver_version, agent.given)
        view = offers.view(parts.manager.overrides, cdi.mounts(agent.given) if agent.given else ())
        return view | {"facts": facts, "started": self._started}

    def _may_write(self, peer: socket.socket) -> bool:
        pid, uid = pid_and_uid(peer)
        with contextlib.suppress(OSError):
            return uid == 0 and os.stat(f"/proc/{pid}/ns/user").st_ino == self._own_namespace
        return False

    def _reload(self) -> dict[str, Any]:
        if errors := self._agent.reload():
            said = "the policies in force do not change, because of these errors:"
            raise RequestError("\n".join([said, *map(str, errors)]), 1)
        return {"policies": len(self._agent.parts.manager.policies.policies)}

    def _put(self, request: dict[str, Any]) -> dict[str, Any]:
        path = self._find(request)
        asked = _limits(request, self._agent.parts.manager.classes) | self._devices(request)
        tenant = self._agent.parts.manager.set(path, asked)
        said = [f"memory {request['memory']}"] if asked.get("memory_millionths") else []
        said += [f"{name} {asked[field]}" for name, field in _COMPUTE_FIELDS.items() if asked.get(field)]
        bytes_ = asked.get("memory_bytes") or 0
        self._agent.history.add("set", tenant=tenant.name, bytes=bytes_, text=", ".join(said))
        return {"tenant": tenant.name, "path": tenant.path, **asked, "level": self._level(path)}

    def _level(self, path: str) -> dict[str, Any] | None:
        return explain.level_at(path, self._agent.parts.manager, self._agent.parts.ledger)

    def _find(self, request: dict[str, Any]) -> str:
        target, manager = _text(request, "target"), self._agent.parts.manager
        if any(tenant.name == target for tenant in manager.gone):
            raise TargetError(f"the cgroup of {target} was removed; `fgpu ps` shows the processes that keep its memory")
        return targets.find(target, self._agent.parts.enforcer, manager.workloads)

    def _explain(self, request: dict[str, Any]) -> dict[str, Any]:
        parts, path = self._agent.parts, self._find(request)
        found = parts.driver.discovery
        tenants = self._agent.fresh().tenants
        orphans = [snapshot.plain(orphan) for tenant in tenants if tenant.path == path for orphan in tenant.orphans]
        enforced = {tenant.cgroup: tenant.enforcement for tenant in tenants}
        reasons, shortfalls = parts.driver.reasons, parts.chores.shortfalls.found
        around = found.reasons(), found.standalone(), orphans, reasons, enforced, shortfalls
        parking = next(
            (parts.chores.idle_parking.explain(tenant) for tenant in parts.enforcer if tenant.path == path), ""
        )
        return explain.explain(path, parts.manager, parts.ledger, found.unenforced(), *around, parking)

    def _drop(self, request: dict[str, Any]) -> dict[str, Any]:
        path = self._find(request)
        name = self._agent.parts.enforcer.name_at(path)
        if not self._agent.parts.manager.unset(path):
            raise TargetError(f"no limit was set by hand on {path}")
        self._agent.history.add("unset", tenant=name, text=path)
        return {"tenant": name, "path": path, "level": self._level(path)}

    def _clear(self, request: dict[str, Any]) -> dict[str, Any]:
        """Offer shares of a device again after a repair. Earlier XIDs of the device no longer count."""
        agent, device = self._agent, self._device(_text(request, "device"))
        agent.parts.reconciler.repaired(device.index)
        agent.history.add("device cleared", gpu=device.index, text=device.uuid_text)
        return {"device": device.index}

    def _device(self, name: str) -> Device:
        device = next((d for d in self._agent.parts.driver.nvml.devices if name in (str(d.index), d.uuid_text)), None)
        if device is None:
            raise TargetError(f"no device {name}: `fgpu status --json` lists each index and uuid")
        return device

    def _devices(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the UUIDs of the devices that a tenant may use, as a field of an Override.

        No UUID means all devices.
        """
        named = request.get("devices") or []
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise RequestError("devices is not a list of indexes or UUIDs", 2)
        uuids = tuple(dict.fromkeys(self._device(name).uuid_text for name in named))
        return {"devices": uuids} if uuids else {}

    def _share(self, request: dict[str, Any]) -> dict[str, Any]:
        """Set the share of a container. A hook of the container's engine requests the share before the program runs."""
        share = share_name.parse(_text(request, "share"))
        path = targets.starting(request.get("pid"), request["peer"], self._agent.parts.manager.workloads)
        tenant = self._agent.parts.manager.share(path, share)
        if any(profile.share == share.name for profile in self._agent.settings.profiles):  # claims have any names
            self._started[share.text] += 1
        self._agent.history.add("share", tenant=tenant.name, text=share.text)
        return {"tenant": tenant.name, "path": tenant.path}

    def _detach(self, _: dict[str, Any]) -> dict[str, int]:
        if names := self._agent.parts.chores.parking.names():
            text = f"tenants are parked ({', '.join(names)}): wake these tenants first (`fgpu wake --all`)"
            raise RequestError(text, control_client.PARKED)
        return self._agent.detach()

    def _park(self, request: dict[str, Any]) -> dict[str, Any]:
        tenant = targets.tenant(self._find(request), self._agent.parts.enforcer)
        return self._agent.parts.chores.parking.park(tenant).view()

    def _wake(self, request: dict[str, Any]) -> dict[str, Any]:
        tenant = targets.tenant(self._find(request), self._agent.parts.enforcer)
        return self._agent.parts.chores.parking.wake(tenant.cgroup, tenant.name).view()

    def _errand(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the progress of a request to park or to wake."""
        errand = self._agent.parts.chores.parking.errands.get(_number(request, "errand"))
        if errand is None:
            raise RequestError("the agent no longer has this request: see `fgpu status`")
        return errand.view()

    def _run(self, request: dict[str, Any]) -> dict[str, Any]:
        tenant = self._agent.parts.manager.run(
            _limits(request, self._agent.parts.manager.classes) | self._devices(request), str(request.get("name") or "")
        )
        return {
            "tenant": tenant.name,
            "folder": self._agent.parts.manager.workloads.folder(tenant.path),
            "preload": str(self._agent.settings.run_dir / "ld.so.preload"),
            "shim": str(self._agent.parts.driver.shim),
        }


def _limits(request: dict[str, Any], classes: Classes) -> dict[str, Any]:
    """Return the limits that a request names, as fields of an Override.

    For a priority class that is not in `classes`, the priority of the policy is in force.
    """
    asked: dict[str, Any] = {}
    if request.get("memory") is not None:
        memory = units.amount(_text(request, "memory"))
        asked |= {"memory_bytes": memory.bytes or None, "memory_millionths": memory.millionths or None}
    if request.get("compute") is not None:
        asked["limit_millionths"] = units.millionths(_text(request, "compute"))
    weight, priority = request.get("weight"), request.get("priority")
    if weight is not None:
        if not isinstance(weight, int) or isinstance(weight, bool) or not 1 <= weight <= MOST_WEIGHT:
            raise RequestError(f"weight must be between 1 and {MOST_WEIGHT}", 2)
        asked["weight"] = weight
    if priority is not None:
        if priority not in list(Priority):
            raise RequestError(f"priority must be one of {', '.join(Priority)}", 2)
        asked |= {"priority": priority, "priority_class": ""}
    if request.get("priority_class") is not None:
        name = _text(request, "priority_class")
        if priority is not None:
            raise RequestError("priority and priority class are both given: give only one option", 2)
        asked |= {"priority": classes.get(name, ""), "priority_class": name if name in classes else ""}
    if not any(asked.values()):
        raise RequestError("no limit is given: set memory, compute, weight or priority", 2)
    return asked


def _text(request: dict[str, Any], name: str) -> str:
    value = request.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{name} is missing", 2)
    return value


def _number(request: dict[str, Any], name: str) -> int:
    value = request.get(name) or 0
    if not isinstance(value, int) or value < 0:
        raise RequestError(f"{name} must be a number, 0 or more", 2)
    return value


def _request(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError) as error:
        raise RequestError("expected one JSON object per line", 2) from error
    if not isinstance(request, dict):
        raise RequestError("expected one JSON object per line", 2)
    return request


class MetricsAddress:
    """The web page (/), /metrics, /healthz and /readyz at settings.listen, each request in a thread.

    /healthz: 200 if the agent answers. /readyz: 200 if the agent enforces all requested limits, else 503 with the
    reason. Enforcement does not depend on the address. If the address is in use, `fgpu doctor` reports the failure, and
    the agent tries again in each round.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._web: HttpServer | None = None
        agent.chores.append(self._keep)
        self._open()

    def close(self) -> None:
        """Stop listening."""
        if self._web:
            self._web.server_close()

    def _open(self) -> None:
        agent, listen = self._agent, self._agent.settings.listen
        host, _, port = listen.rpartition(":")
        web = None
        try:
            web = HttpServer(host.strip("[]"), int(port), by_path(_paths(agent)), agent.settings.listen_names)
            agent.selector.register(web, selectors.EVENT_READ, self._take_in)
        except (OSError, ValueError, OverflowError) as error:
            if "metrics" not in agent.failed_checks:
                log.error("cannot listen at %s: %s; limits are enforced without metrics", listen, error)
            fix = "stop the program at this address, or set another address: listen in agent.yaml, as 127.0.0.1:9423"
            agent.failed_checks["metrics"] = Check("metrics", False, f"cannot listen at {listen}: {error}", fix)
            if web:  # the kernel has refused its entry in epoll
                web.discard()
            return
        self._web = web
        if agent.failed_checks.pop("metrics", None):
            log.info("web page and /metrics at http://%s/", listen)

    def _keep(self) -> None:
        if self._web:
            self._web.expire()
        else:
            self._open()

    def _take_in(self) -> None:
        """Accept connections, and take a Snapshot if a whole request has arrived."""
        assert self._web
        if self._web.receive():
            try:
                self._agent.fresh()
            finally:
                self._web.answer()


def _paths(agent: Agent) -> dict[str, WSGIApplication]:
    return {
        "/": status_page.app(lambda: agent.snapshot),
        "/metrics": make_wsgi_app(metrics.registry(lambda: agent.snapshot)),
        "/healthz": health(lambda: ""),
        "/readyz": health(lambda: agent.snapshot.unenforced or agent.snapshot.incomplete),
    }
