"""The gRPC server of the DRA driver: registration with kubelet, and kubelet's calls to prepare and unprepare claims.

This module runs in the asyncio loop of the DRA driver. kubelet finds the registration socket in its folder
`plugins_registry`, again after each restart of kubelet. kubelet then requests the path of the driver's own socket, and
calls the driver at this socket. Requests are not trusted. The failure of a claim is a sentence in the answer for that
claim. kubelet shows this sentence in an event of the pod.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fgpu_ebpf.kubernetes.claims import DRIVER
from fgpu_ebpf.kubernetes.device_plugin_server import is_at, stamp
from fgpu_ebpf.kubernetes.dra_messages import DRA_SERVICE, HEALTH_SERVICE, REGISTRATION_SERVICE, TYPE, VERSION

log = logging.getLogger("fgpu.kubelet")
_OPTIONS = (("grpc.max_receive_message_length", 1 << 20), ("grpc.so_reuseport", 0))
_CLOSE_SECONDS = 0.2  # watches end within this time; calls that have not ended are then cancelled
_AT_ONCE = 16  # claims of one request; kubelet requests all claims of a pod, as many as fit in a message

Answer = Callable[[Any], Awaitable[Any]]  # a claim of a request -> the answer for it


class DraServer:
    """One server at two sockets, which may be closed and opened again."""

    def __init__(self, folder: Path, messages: dict[str, Any], prepare: Answer, unprepare: Answer) -> None:
        """Make a server that is not open yet.

        Args:
            folder: kubelet's folder, with `plugins_registry` and `plugins`.
            messages: the classes of messages by name.
            prepare: returns a NodePrepareResourceResponse.
            unprepare: returns a NodeUnprepareResourceResponse.
        """
        self.registration = folder / f"plugins_registry/{DRIVER}-reg.sock"
        self.path = folder / f"plugins/{DRIVER}/dra.sock"
        self.on_registration: Callable[[], None] = lambda: None
        self._messages, self._prepare, self._unprepare = messages, prepare, unprepare
        self._server: Any = None
        self._closing = asyncio.Event()  # event of the present server
        self._stamps: list[tuple[int, int] | None] = []

    @property
    def _paths(self) -> list[Path]:
        return [self.path, self.registration]  # in this order: kubelet uses both as soon as it finds the second

    @property
    def is_open(self) -> bool:
        """True if both sockets exist and belong to this server."""
        return self._server is not None and all(map(is_at, self._paths, self._stamps))

    async def open(self) -> None:
        """Close an open server, and start a server at new sockets.

        Raise OSError or RuntimeError on failure.
        """
        import grpc.aio

        await self.close()
        self._server, self._closing = grpc.aio.server(options=_OPTIONS), asyncio.Event()
        self._stamps = [None] * len(self._paths)
        self._server.add_generic_rpc_handlers(self._handlers())
        for path in self._paths:
            path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self._server.add_insecure_port(f"unix:{path}")
        await self._server.start()
        self._stamps = [stamp(path) for path in self._paths]

    async def close(self) -> None:
        """End every call, and remove the sockets unless another server owns the sockets."""
        if self._server is None:
            return
        server, self._server = self._server, None
        ours = [path for path, own in zip(self._paths, self._stamps, strict=True) if is_at(path, own)]
        for path in reversed(ours):  # first the socket by which kubelet detects the end
            path.unlink(missing_ok=True)
        self._closing.set()
        await server.stop(_CLOSE_SECONDS)

    def _handlers(self) -> tuple[Any, ...]:
        import grpc

        unary = grpc.unary_unary_rpc_method_handler  # bytes in, bytes out, so that invalid messages are answered here
        services: dict[str, dict[str, Any]] = {
            REGISTRATION_SERVICE: {"GetInfo": self._info, "NotifyRegistrationStatus": self._registered},
            DRA_SERVICE: {"NodePrepareResources": self._prepare_all, "NodeUnprepareResources": self._unprepare_all},
        }
        found = [
            grpc.method_handlers_generic_handler(service, {name: unary(method) for name, method in methods.items()})
            for service, methods in services.items()
        ]
        watch = {"NodeWatchResources": grpc.unary_stream_rpc_method_handler(self._watch)}
        return *found, grpc.method_handlers_generic_handler(HEALTH_SERVICE, watch)

    def _message(self, name: str, /, **fields: Any) -> bytes:
        return bytes(self._messages[name](**fields).SerializeToString())

    # -- calls of kubelet

    async def _info(self, _: bytes, __: Any) -> bytes:
        about = {"type": TYPE, "name": DRIVER, "endpoint": str(self.path), "supported_versions": [VERSION]}
        return self._message("PluginInfo", **about)

    async def _registered(self, request: bytes, context: Any) -> bytes:
        status = await self._read("RegistrationStatus", request, context)
        if status.plugin_registered:
            log.info("%s: registered with kubelet", DRIVER)
            self.on_registration()
        else:
            log.warning("%s: registration with kubelet failed: %s", DRIVER, status.error)
        return self._message("RegistrationStatusResponse")

    async def _prepare_all(self, request: bytes, context: Any) -> bytes:
        return await self._answer("NodePrepareResources", request, context, self._prepare)

    async def _unprepare_all(self, request: bytes, context: Any) -> bytes:
        return await self._answer("NodeUnprepareResources", request, context, self._unprepare)

    async def _watch(self, _: bytes, __: Any) -> None:
        """Report no health until the server is closed. Without a stream, kubelet 1.36 logs an error every 5 seconds."""
        await self._closing.wait()

    async def _answer(self, name: str, request: bytes, context: Any, answer: Answer) -> bytes:
        asked = await self._read(f"{name}Request", request, context)
        free = asyncio.Semaphore(_AT_ONCE)

        async def one(claim: Any) -> Any:
            async with free:
                return await answer(claim)

        answers = await asyncio.gather(*map(one, asked.claims))
        found = {claim.uid: each for claim, each in zip(asked.claims, answers, strict=True)}
        return self._message(f"{name}Response", claims=[{"key": uid, "value": each} for uid, each in found.items()])

    async def _read(self, name: str, request: bytes, context: Any) -> Any:
        try:
            return self._messages[name].FromString(request)
        except Exception:  # protobuf's DecodeError is in a different module in every version
            await self._refuse(context, f"not a valid {name}")

    async def _refuse(self, context: Any, text: str) -> None:
        import grpc

        log.warning("%s: request of kubelet refused: %s", DRIVER, text)
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)  # raises
