"""A Prometheus that scrapes one address every second, and its answers."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import yaml

from tests.support.host import BUILD, free_port
from tests.support.wait import eventually

BIN = BUILD / "engines/usr/bin"
JOB, CLUSTER = "fgpu", "test"
Labels = frozenset[tuple[str, str]]


class Prometheus:
    """A real Prometheus, on its own port."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **arguments: str) -> Any:
        """Return the answer of its API."""
        query = urllib.parse.urlencode(arguments)
        with urllib.request.urlopen(f"{self._url}{path}?{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    def ask(self, expr: str, **at: str) -> dict[Labels, float]:
        """Return the series of a query with their current values, or those at a `time`."""
        found = self.get("/api/v1/query", query=expr, **at)["result"]
        return {frozenset(series["metric"].items()): float(series["value"][1]) for series in found}

    def label_values(self, selector: str, label: str) -> list[str]:
        """Return what Grafana's label_values(selector, label) shows."""
        return list(self.get(f"/api/v1/label/{label}/values", **{"match[]": selector}))

    def is_scraping(self) -> bool:
        """Return whether it has a first sample."""
        with contextlib.suppress(OSError):
            return self.ask(f'up{{job="{JOB}"}}') != {} and 1.0 in self.ask(f'up{{job="{JOB}"}}').values()
        return False


@contextlib.contextmanager
def exporting(text: str) -> Iterator[str]:
    """Serve a page of metrics; yield its address."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer with the page."""
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Write nothing."""

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def scraping(address: str, work: Path, other: str) -> Iterator[Prometheus]:
    """Run Prometheus, and yield it after it has scraped `address`. `other`: the address of a second job."""
    target = {"targets": [address], "labels": {"cluster": CLUSTER}}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "scrape_configs": [
            {"job_name": JOB, "static_configs": [target]},
            {"job_name": "dcgm-exporter", "static_configs": [{"targets": [other, "127.0.0.1:1"]}]},  # one is down
        ],
    }
    (work / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [BIN / "prometheus", f"--config.file={work}/prometheus.yml", f"--storage.tsdb.path={work}/tsdb"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with open(work / "prometheus.log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            prometheus = Prometheus(port)
            eventually(prometheus.is_scraping, 30, "Prometheus")
            yield prometheus
        finally:
            process.terminate()
            process.wait(20)


def promtool(*arguments: str | Path, cwd: Path) -> str:
    """Return the output of promtool. Raises AssertionError if promtool finds an error."""
    done = subprocess.run(
        [BIN / "promtool", *arguments], capture_output=True, text=True, cwd=cwd, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
