"""The command `fgpu` in this process, and an agent whose answers the test defines."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from fgpu_ebpf.cli.main import main

Answer = dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]


@contextmanager
def agent(run_dir: Path, **answers: Answer) -> Iterator[list[dict[str, Any]]]:
    """Answer requests at a control socket by verb, and yield the list of the received requests."""
    asked: list[dict[str, Any]] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(run_dir / "control.sock"))
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    request = json.loads(peer.makefile("rb").readline())
                    asked.append(request)
                    found = answers.get(request["verb"], {"error": "no", "code": 1})
                    answer = found(request) if callable(found) else found
                    peer.sendall(json.dumps(answer if "error" in answer else {"ok": answer}).encode() + b"\n")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield asked
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
    (run_dir / "control.sock").unlink()


def fgpu(run_dir: Path, *words: str, **more: Any) -> Result:
    """Run the command. The result has its exit code, stdout and stderr."""
    done = CliRunner().invoke(main, ["--run-dir", str(run_dir), *words], **more)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done
