"""The DRA driver `gpu.fgpu.dev`, which publishes this node's devices and assigns allocated shares to containers.

The driver runs in a process of its own (`fgpu dra-driver`), in one asyncio loop. Kubernetes' scheduler divides the
devices. The driver reads the allocation of a claim from the API server, and writes a CDI device for the claim. When a
container starts, the hook of that device requests the share from the agent, which refuses a share that does not fit.
Therefore this process enforces nothing, and limits stay in force without this process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fgpu_ebpf import control_client, protobuf
from fgpu_ebpf.containers.cdi import Parts
from fgpu_ebpf.kubernetes import claims, dra_messages, resource_slices
from fgpu_ebpf.kubernetes.allocation import AllocationError, Way
from fgpu_ebpf.kubernetes.api_server import APPLY, ApiError, ApiServer
from fgpu_ebpf.kubernetes.claim_files import ClaimFiles
from fgpu_ebpf.kubernetes.claims import DRIVER, ClaimError, Grant
from fgpu_ebpf.kubernetes.dra_server import DraServer
from fgpu_ebpf.kubernetes.resource_slices import Publisher
from fgpu_ebpf.kubernetes.slots import Host, host_of
from fgpu_ebpf.kubernetes.until_signal import run_until_signal
from fgpu_ebpf.policy.rules import DeviceChoice

log = logging.getLogger("fgpu.kubelet")
FOLDER = Path("/var/lib/kubelet")
LOOK_SECONDS = 2.0
MOST_REQUESTS = 8  # to read claims at once; a waiting request uses the connection of the request before
STATUS_SECONDS = (1.0, 2.0, 10.0)  # pauses before a status is written, and written again; preparations have precedence
AGENT_SECONDS = 2.0  # timeout of a request to the agent
SILENT_SECONDS = 5.0  # after this time without an answer of the agent, no device is published. Upgrades take less time.


class DriverError(Exception):
    """The driver cannot serve. The text has the reason and the fix."""


@dataclass(frozen=True, slots=True)
class Options:
    """The name of this node, and the paths of the agent, kubelet, the API server's token and CDI specifications.

    `devices`: the only devices in the slice; empty: all devices.
    """

    node: str
    run_dir: Path = Path("/run/fgpu")
    folder: Path = FOLDER
    account: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount")
    files: ClaimFiles = field(default_factory=ClaimFiles)
    way: Way = field(default_factory=Way)
    devices: tuple[DeviceChoice, ...] = ()


def serve(options: Options) -> None:
    """Serve until SIGTERM or SIGINT. Raise DriverError if a package is missing, or outside of a pod."""
    try:
        import grpc.aio  # noqa: F401

        messages = dra_messages.classes()
        server = ApiServer.of_pod(options.account)
    except ImportError as error:
        raise DriverError(protobuf.lacks(error)) from error
    except ApiError as error:
        raise DriverError(str(error)) from error
    os.umask(0o077)  # only kubelet, which runs as root, connects to the sockets
    asyncio.run(_Driver(options, server, messages).run())


class _Driver:
    """The answers to kubelet, and the last answer of the agent."""

    def __init__(self, options: Options, api: ApiServer, messages: dict[str, Any]) -> None:
        self._options, self._api, self._messages = options, api, messages
        self._publisher = Publisher(api, options.node)
        self._server = DraServer(options.folder, messages, self._prepare, self._unprepare)
        self._server.on_registration = self._publisher.look  # kubelet may have removed the slice
        self._locks = weakref.WeakValueDictionary[str, asyncio.Lock]()  # by the UID of a claim that is changing
        self._parts: Parts | None = None
        self._answered_at = time.monotonic()  # when the agent last answered
        self._reads = asyncio.Semaphore(MOST_REQUESTS)
        self._writes = asyncio.Semaphore(1)  # kubelet waits for reads, and nothing waits for a status
        self._reports = set[asyncio.Task[None]]()  # references that keep running tasks
        self._asking: asyncio.Task[tuple[Host, Mapping[str, Any], Parts]] | None = None
        self._said = ""

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT."""
        try:
            await run_until_signal(self._look_often(), self._publisher.run(), self._publisher.watch())
        finally:
            await self._server.close()
            log.info("the DRA driver has ended")

    # -- the agent

    async def _look_often(self) -> None:
        """Publish the agent's report, and serve kubelet after the agent's first answer or after a timeout."""
        while True:
            try:
                host, facts, parts = await self._answer()
                choices = self._options.devices
                offered = resource_slices.devices(host, facts, choices)
                self._publisher.want(offered)
                self._renew(parts)
                absent = resource_slices.left_out(host, facts, choices).items()
                text = f"{len(offered)} of {len(host.devices)} devices are offered"
                text += "".join(f"; {uuid}: {why}" for uuid, why in absent)
                self._say(host.fault or text, not offered)
            except ClaimError as error:
                if time.monotonic() - self._answered_at >= SILENT_SECONDS:
                    self._publisher.want([])
                    self._say(str(error), True)
            await self._serve()
            await asyncio.sleep(LOOK_SECONDS)

    async def _serve(self) -> None:
        if self._server.is_open:
            return
        try:
            await self._server.open()
            log.info("serving kubelet at %s", self._server.path)
        except (OSError, RuntimeError) as error:
            self._say(f"cannot serve {self._server.path}: {error}", True)

    def _say(self, text: str, is_bad: bool) -> None:
        words = re.sub(r"[0-9.]+ s\b", "", text)  # the age of NVML's last answer
        if words != self._said:
            self._said = words
            log.log(logging.WARNING if is_bad else logging.INFO, "%s", text)

    def _renew(self, parts: Parts) -> None:
        if parts != self._parts:
            self._parts = parts
            self._options.files.renew(parts)

    async def _answer(self) -> tuple[Host, Mapping[str, Any], Parts]:
        """Return the agent's next answer. Simultaneous callers share one request. Raise ClaimError on failure."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> tuple[Host, Mapping[str, Any], Parts]:
        """Return the agent's devices, facts and files. Raise ClaimError if the answer is missing or incomplete."""
        try:
            answer = await control_client.ask(self._options.run_dir, {"verb": "offers"}, AGENT_SECONDS)
            host, facts = host_of(answer), answer["facts"]
            paths = [Path(path) for path in facts["parts"]]
        except (ConnectionError, control_client.RequestError) as error:
            raise ClaimError(str(error)) from error
        except (KeyError, TypeError, ValueError) as error:
            raise ClaimError("this version of the agent does not support the DRA driver: upgrade the agent") from error
        self._answered_at = time.monotonic()
        if len(paths) != len(Parts._fields):
            raise ClaimError("the agent cannot write what containers get: set cdiFolder to a writable folder")
        return host, facts, Parts(*paths)

    async def _agent(self) -> tuple[Host, Parts]:
        """Return the agent's devices and files, even after a restart of the agent. Raise ClaimError on failure."""
        until = time.monotonic() + SILENT_SECONDS
        while True:
            try:
                host, _, parts = await self._answer()
                break
            except ClaimError:
                if time.monotonic() >= until:
                    raise
            await asyncio.sleep(0.2)
        if host.fault:
            raise ClaimError(host.fault)
        return host, parts

    # -- claims

    def _lock(self, uid: str) -> asyncio.Lock:
        """Return the lock of a claim. A late preparation must not write a file that has just been removed."""
        return self._locks.setdefault(uid, asyncio.Lock())

    async def _prepare(self, claim: Any) -> Any:
        name = f"{claim.namespace}/{claim.name}"
        try:
            path = claims.path(claim.namespace, claim.name, claim.uid)
            async with self._lock(claim.uid):
                granted, found = await self._devices(path, claim.uid)
        except (ClaimError, AllocationError, ApiError, OSError) as error:
            log.warning("%s: not prepared: %s", name, error, extra={"what": name})
            return self._messages["NodePrepareResourceResponse"](error=f"{DRIVER}: {error}")
        log.info("%s: prepared", name, extra={"what": name})
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time()))
        self._report(path, claims.with_status(claim.namespace, claim.name, claim.uid, granted, now))
        return self._messages["NodePrepareResourceResponse"](devices=found)

    async def _devices(self, path: str, uid: str) -> tuple[list[Grant], list[dict[str, Any]]]:
        """Write the CDI specification of a claim. Return its shares, and its devices in the form for kubelet."""
        claim, (host, parts) = await asyncio.gather(self._call(self._reads, "GET", path), self._agent())
        granted = claims.grants(claim, uid, self._options.node, host)
        uuids = list(dict.fromkeys(grant.share.device for grant in granted))
        gpus, env = self._options.way.devices(uuids)
        of_uuid = dict(zip(uuids, gpus, strict=False))  # empty if the devices are passed by other means
        names = self._options.files.prepare(uid, [grant.share for grant in granted], env, parts)
        return granted, [
            {
                "request_names": [grant.request.partition("/")[0]],
                "pool_name": grant.pool,
                "device_name": grant.device,
                "cdi_device_ids": [*([of_uuid[grant.share.device]] if of_uuid else []), name],
            }
            for grant, name in zip(granted, names, strict=True)
        ]

    async def _call(self, free: asyncio.Semaphore, method: str, path: str, *more: Any) -> dict[str, Any]:
        async with free:
            return await self._api.call(method, path, *more)

    def _report(self, path: str, status: Mapping[str, Any]) -> None:
        """Begin to write the status of a claim. kubelet does not wait for the status."""
        report = asyncio.create_task(self._write_status(path, status))
        self._reports.add(report)
        report.add_done_callback(self._reports.discard)

    async def _write_status(self, path: str, status: Mapping[str, Any]) -> None:
        """Write the status of a claim. The claim works without a status, and may have been deleted."""
        text = ""
        for pause in STATUS_SECONDS:
            await asyncio.sleep(pause)
            try:
                await self._call(
                    self._writes, "PATCH", f"{path}/status?fieldManager={DRIVER}&force=true", status, APPLY
                )
                return
            except ApiError as error:
                text = str(error)
                if error.status not in (0, 429) and error.status < 500:
                    break
        log.warning("%s: the status is not written: %s", path, text)

    async def _unprepare(self, claim: Any) -> Any:
        name, error = f"{claim.namespace}/{claim.name}", ""
        if claims.is_uid(claim.uid):
            async with self._lock(claim.uid):
                try:
                    self._options.files.unprepare(claim.uid)
                    log.info("%s: unprepared", name, extra={"what": name})
                except OSError as failure:
                    error = f"{DRIVER}: {failure}"
                    log.error("%s: not unprepared: %s", name, failure, extra={"what": name})
        return self._messages["NodeUnprepareResourceResponse"](error=error)
