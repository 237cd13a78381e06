"""Simulated engines for the tests: real sockets, with the messages of Docker, Podman and CRI engines."""

from __future__ import annotations

import contextlib
import json
import os
import socketserver
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fgpu_ebpf.workloads import cri_messages
from fgpu_ebpf.workloads.cgroup_names import Engine
from fgpu_ebpf.workloads.engine_labels import Engines
from fgpu_ebpf.workloads.workload import Subject, Workload
from tests.support.wait import eventually

ID = "4f1d" * 16
OTHER = "beef" * 16
UID = "0f8a2c1e-1111-2222-3333-444455556666"
PATH = f"/system.slice/docker-{ID}.scope"
IMAGE = "sha256:" + "a1" * 32


def container(id_: str = ID, **more: Any) -> dict[str, Any]:
    """Return a container as `docker ps` shows it."""
    usual = {"Id": id_, "Names": ["/web"], "Image": "registry.example/app:1", "ImageID": IMAGE, "State": "created"}
    return {**usual, "Labels": {"tier": "notebook"}, "HostConfig": {"NetworkMode": "none"}, **more}


def subject(id_: str = ID, engine: Engine = Engine.DOCKER, is_pod: bool = False) -> Subject:
    return Subject(id_, engine, is_pod)


def workload(about: Subject | None = None, path: str = PATH, **more: Any) -> Workload:
    about = about or subject()
    return Workload(7, path, "w", container=None if about.is_pod else about.id, subject=about, **more)


def asked(engines: Engines, about: Workload, seconds: float = 5.0) -> Workload:
    """Return the workload with its names, once they are known."""
    engines.named(about)
    eventually(lambda: about.path in engines.take(), seconds)
    return engines.named(about)


# -- Docker, Podman ------------------------------------------------------------------------------------------------


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


class Docker:
    """A Docker engine for the requests that fgpu makes. `raw` replaces its responses by arbitrary bytes.

    `given` has the names by which the images of containers were given at the creation of the containers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.containers: list[Any] = []
        self.images: dict[str, Any] = {}
        self.given: dict[str, Any] = {}
        self.raw: Callable[[Any], None] | None = None
        self.status = 200
        self.targets: list[str] = []
        docker = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                docker.targets.append(self.path)
                if docker.raw:
                    with contextlib.suppress(OSError):
                        docker.raw(self.wfile)
                    self.close_connection = True
                    return
                found = docker.answer(self.path)
                body = json.dumps({"message": "no such image"} if found is None else found).encode()
                self.send_response(404 if found is None else docker.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            def address_string(self) -> str:
                return "unix"

            def log_message(self, *_: Any) -> None:
                pass

        self._server = _Server(str(path), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, target: str) -> Any:
        parts = urlsplit(target)
        if parts.path.startswith("/images/"):
            labels = self.images.get(parts.path.split("/")[2])
            return None if labels is None else {"Id": IMAGE, "Config": {"Labels": labels}}
        if parts.path != "/containers/json":
            return self.given.get(parts.path.split("/")[2])
        (filters,) = parse_qs(parts.query)["filters"]
        (wanted,) = json.loads(filters)["id"]
        return [c for c in self.containers if not isinstance(c, dict) or str(c.get("Id")).startswith(wanted)]

    def stop(self) -> None:
        """Remove the socket, as an engine does when it restarts."""
        self._server.shutdown()
        self._server.server_close()
        self.path.unlink(missing_ok=True)


# -- CRI -----------------------------------------------------------------------------------------------------------


class Cri:
    """A containerd or CRI-O engine with the interface for kubelet."""

    def __init__(self, path: Path) -> None:
        import grpc

        self.path = path
        self.messages = cri_messages.classes()
        self.containers: dict[str, Any] = {}
        self.pods: list[Any] = []
        self.images: dict[str, dict[str, str]] = {}
        self.raw: Callable[[], bytes] | None = None
        self.calls: list[str] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.max_send_message_length", -1)])
        self._server.add_generic_rpc_handlers((self._handlers("Runtime"), self._handlers("Image")))
        self._server.add_insecure_port(f"unix:{path}")
        self._server.start()

    def _handlers(self, service: str) -> Any:
        import grpc

        methods = {"Runtime": ("ContainerStatus", "ListPodSandbox"), "Image": ("ImageStatus",)}[service]

        def handler(method: str) -> Any:
            def behave(request: bytes, context: Any) -> bytes:
                self.calls.append(method)
                if self.raw:
                    return self.raw()
                answer = getattr(self, f"_{method}")(self.messages[f"{method}Request"].FromString(request))
                if answer is None:
                    context.abort(grpc.StatusCode.NOT_FOUND, "an error occurred when try to find container: not found")
                return answer.SerializeToString()

            return grpc.unary_unary_rpc_method_handler(behave)

        return grpc.method_handlers_generic_handler(f"runtime.v1.{service}Service", {m: handler(m) for m in methods})

    def _ContainerStatus(self, request: Any) -> Any:
        found = self.containers.get(request.container_id)
        return found and self.messages["ContainerStatusResponse"](status=found)

    def _ListPodSandbox(self, request: Any) -> Any:
        wanted = request.filter
        fits = [
            pod
            for pod in self.pods
            if wanted.id in ("", pod.id) and dict(wanted.label_selector).items() <= dict(pod.labels).items()
        ]
        return self.messages["ListPodSandboxResponse"](items=fits)

    def _ImageStatus(self, request: Any) -> Any:
        labels = self.images.get(request.image.image)
        info = {} if labels is None else {"info": json.dumps({"imageSpec": {"config": {"Labels": labels}}})}
        return self.messages["ImageStatusResponse"](info=info)

    def add_pod(self, id_: str = OTHER, labels: Any = None, annotations: Any = None, **more: Any) -> Any:
        meta = self.messages["PodSandboxMetadata"](name="jupyter-0", uid=UID, namespace="dev")
        labels = {"io.kubernetes.pod.uid": UID, "io.kubernetes.pod.name": "jupyter-0", **(labels or {})}
        pod = self.messages["PodSandbox"](
            id=id_, metadata=meta, labels=labels, annotations=annotations or {}, created_at=1, **more
        )
        self.pods.append(pod)
        return pod

    def add_container(self, id_: str = ID, **more: Any) -> Any:
        m = self.messages
        status = m["ContainerStatus"](
            id=id_,
            metadata=m["ContainerMetadata"](name="main"),
            image=m["ImageSpec"](image="registry.example/app:1"),
            image_ref=IMAGE,
            labels={"io.kubernetes.pod.uid": UID, "io.kubernetes.container.name": "main"},
            **more,
        )
        self.containers[id_] = status
        return status

    def stop(self) -> None:
        self._server.stop(0).wait()
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def running(*apis: Any, file: Path | None = None) -> Iterator[Engines]:
    """Run a client of these engines, and stop all of its threads afterwards."""
    before = set(threading.enumerate())
    engines = Engines(apis, file)
    try:
        yield engines
    finally:
        engines.stop()
        for thread in set(threading.enumerate()) - before:
            if thread.name.startswith("engine "):
                thread.join(30)
                assert not thread.is_alive()
        os.close(engines.fileno())
