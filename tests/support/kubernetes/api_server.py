"""A stand-in for Kubernetes' API server: nodes, ResourceSlices and ResourceClaims in memory, over TLS.

Writes follow the rules that a driver has to follow: a new object must not exist, a replacement needs the present
resourceVersion, and a watch reports each change. Imports nothing of fgpu.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "a-token"
NODE = "gpu-1"
SLICES = "/apis/resource.k8s.io/v1/resourceslices"


class ApiServer:
    """The server, and a service account's folder. It may be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir()
        (folder / "token").write_text(f"{TOKEN}\n")
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=api",
             "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key", "-out", folder / "ca.crt"],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        self.objects: dict[str, dict[str, Any]] = {
            f"/api/v1/nodes/{NODE}": {"kind": "Node", "metadata": {"name": NODE, "uid": str(uuid.uuid4())}}
        }
        self.writes: list[tuple[str, str, dict[str, Any]]] = []
        self.refusing: tuple[int, str] | None = None  # the answer to each request
        self.refused: set[str] = set()  # methods of the requests that got this answer
        self.kept_fields: set[str] | None = None  # of devices; None: all
        self.may_write_status = True
        self.port = 0
        self._version = 0
        self._changed = threading.Condition()
        self._server: _Server | None = None

    def start(self) -> None:
        """Listen, at the same port as before."""
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.api = self  # type: ignore[attr-defined]
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trust.load_cert_chain(self.folder / "ca.crt", self.folder / "key")
        self._server.socket = trust.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening, and end all connections."""
        if self._server:
            server, self._server = self._server, None
            server.shutdown()
            server.server_close()
            server.end_connections()
            with self._changed:
                self._changed.notify_all()

    # -- objects

    def claim(self, name: str, *results: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """Add a ResourceClaim with the results of the scheduler's allocation, and return it."""
        metadata = {"name": name, "namespace": "default", "uid": str(uuid.uuid4())}
        status = {"allocation": {"devices": {"results": list(results)}}} if results else {}
        found = {"kind": "ResourceClaim", "metadata": metadata, "status": status, **fields}
        self.objects[f"/apis/resource.k8s.io/v1/namespaces/default/resourceclaims/{name}"] = found
        return found

    def slice(self) -> dict[str, Any] | None:
        """Return the only ResourceSlice, or None."""
        found = [one for path, one in list(self.objects.items()) if path.startswith(f"{SLICES}/")]
        assert len(found) <= 1
        return found[0] if found else None

    def devices(self) -> list[dict[str, Any]]:
        """Return the devices of the ResourceSlice."""
        found = self.slice()
        return list(found["spec"]["devices"]) if found else []

    def change(self, path: str, new: dict[str, Any] | None) -> dict[str, Any]:
        """Write or remove (None) an object, and report that to watches."""
        with self._changed:
            self._version += 1
            before = self.objects.pop(path, {})
            if new is not None:
                own = {"resourceVersion": str(self._version), "uid": before.get("metadata", {}).get("uid", "new")}
                new = json.loads(json.dumps(new))
                new["metadata"] |= own
                for device in new.get("spec", {}).get("devices", ()) if self.kept_fields is not None else ():
                    for field in set(device) - (self.kept_fields or set()):
                        del device[field]
                self.objects[path] = new
            self._changed.notify_all()
            return new or {"kind": "Status", "status": "Success"}

    def wait(self, version: int, seconds: float) -> int:
        """Wait for a change after a version. Return the present version, or -1 if the server has stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._version > version or self._server is None, seconds)
            return -1 if self._server is None else self._version


def _key(device: dict[str, Any]) -> tuple[Any, ...]:
    """Return what identifies a device of a claim."""
    return tuple(device.get(name) for name in ("driver", "pool", "device", "shareID"))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self._accepted: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection."""
        sock, address = super().get_request()
        self._accepted.append(sock)
        return sock, address

    def end_connections(self) -> None:
        """End the connections that are open."""
        for sock in self._accepted:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have gone away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer has two writes
    timeout = 20

    @property
    def api(self) -> ApiServer:
        found = self.server.api  # type: ignore[attr-defined]
        assert isinstance(found, ApiServer)
        return found

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, text: str) -> None:
        self._answer(status, {"kind": "Status", "status": "Failure", "code": status, "message": text})

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        place, asked = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        if self.api.refusing:
            self.api.refused.add(self.command)
            self._refuse(*self.api.refusing)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "Unauthorized")
        elif "watch" in asked:
            self._watch()
        elif self.command == "GET":
            found = self.api.objects.get(place)
            self._answer(200, found) if found else self._refuse(404, f'"{place.rpartition("/")[2]}" not found')
        elif self.command == "PATCH":
            self._apply_status(place, asked, body)
        else:
            self._write(place, body)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _write(self, place: str, body: Any) -> None:
        api = self.api
        path = f"{place}/{body['metadata']['name']}" if self.command == "POST" else place
        now = api.objects.get(path)
        if self.command == "POST" and now:
            self._refuse(409, "already exists")
        elif self.command != "POST" and not now:
            self._refuse(404, "not found")
        elif (
            self.command == "PUT"
            and now
            and body["metadata"].get("resourceVersion") != now["metadata"]["resourceVersion"]
        ):
            self._refuse(409, "the object has been modified")
        else:
            api.writes.append((self.command, path, body))
            self._answer(200, api.change(path, None if self.command == "DELETE" else body))

    def _apply_status(self, place: str, asked: dict[str, list[str]], body: Any) -> None:
        """Replace the devices of one driver in a claim's status, as a server-side apply does."""
        path, _, part = place.rpartition("/")
        now = self.api.objects.get(path)
        assert (part, self.headers["Content-Type"], asked["force"]) == (
            "status", "application/apply-patch+yaml", ["true"],
        )  # fmt: skip
        assert set(body) == {"apiVersion", "kind", "metadata", "status"}
        if now is None or now["metadata"]["uid"] != body["metadata"]["uid"]:
            self._refuse(409, "the uid is that of another object")
        elif not self.api.may_write_status:
            self._refuse(403, "resourceclaims/status is forbidden")
        elif not {_key(one) for one in body["status"]["devices"]} <= {
            _key(one) for one in now["status"]["allocation"]["devices"]["results"]
        }:
            self._refuse(422, "status.devices: must be an allocated device in the claim")
        else:
            (driver,) = asked["fieldManager"]
            others = [one for one in now["status"].get("devices", ()) if one["driver"] != driver]
            now["status"]["devices"] = others + body["status"]["devices"]
            self._answer(200, now)

    def _watch(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        version = self.api.wait(-1, 0)
        while version >= 0:
            data = b'{"type":"MODIFIED","object":{}}\n'
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            before = version
            while version == before:
                version = self.api.wait(before, 1)
