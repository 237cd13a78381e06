"""The web page: one HTML page that shows a Snapshot. The page's script reloads the page while the page is visible.

This module runs in a thread of the metrics address. The headers isolate the page: a browser loads nothing from another
host, and runs only the page's own script. Names of tenants are escaped. jinja2 is imported at the first request.
Invalid parts of a query are ignored.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, urlencode
from wsgiref.types import StartResponse, WSGIEnvironment

import fgpu_ebpf
from fgpu_ebpf.agent import gatekeeper_process
from fgpu_ebpf.api import bars, health, ranking
from fgpu_ebpf.api.ranking import BY_WORD, COLUMNS, GPU, TENANT, Order, Row
from fgpu_ebpf.check import Check
from fgpu_ebpf.snapshot import Fields, Snapshot
from fgpu_ebpf.tenancy import parking_text
from fgpu_ebpf.tenancy.enforcement import Enforcement, denial, no_limit

if TYPE_CHECKING:
    from jinja2 import Template

MOST_ROWS = 100
MOST_FILTER = 128
_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Asked:
    """The order and the filter that a query requests, in the words of `fgpu top`."""

    order: Order = field(default_factory=Order)
    filter: str = ""

    @classmethod
    def of(cls, query: str) -> Asked:
        """Parse a query such as `sort=refused&reverse=1&filter=team-a`, and ignore invalid parts."""
        try:
            parameters = parse_qs(query, max_num_fields=8)
        except ValueError:
            return cls()
        column = BY_WORD.get(parameters.get("sort", [""])[0], Order().column)
        return cls(Order(column, "reverse" in parameters), parameters.get("filter", [""])[0].strip()[:MOST_FILTER])

    @property
    def query(self) -> str:
        """The query string that requests this order and filter."""
        words = {"sort": self.order.column.word, "reverse": self.order.is_reversed and "1", "filter": self.filter}
        usual = Order().column.word
        return "?" + urlencode({name: word for name, word in words.items() if word and (name, word) != ("sort", usual)})


class Line(NamedTuple):
    """A tenant on a device. `cells`: the text of each column. `mark`: the state of the row.

    `full`: the ratio of the limit that is used, or None without a limit. `about`: policy, path and labels. `notes`:
    texts that are shown with the first line of a tenant.
    """

    cells: Mapping[str, str]
    mark: str
    full: float | None
    about: str
    notes: tuple[str, ...]


# -- from a Snapshot's JSON to the template's values ----------------------------------------------------------------


def failed_checks(snapshot: Mapping[str, Any]) -> list[Check]:
    """Return the failed checks, beginning with a missing gatekeeper.

    The page shows `probes` as `unenforced` instead.
    """
    found = [check for check in health.checks(snapshot) if not check.ok and check.name != "probes"]
    if snapshot["gatekeeper_up"] is False:
        found.insert(0, gatekeeper_process.ABSENT)
    return found


def state(snapshot: Mapping[str, Any]) -> list[str]:
    """Return the state of the host, as short texts."""
    policies, events = snapshot["policies"], snapshot["events"]
    up = {True: "gatekeeper up", False: "gatekeeper down", None: "gatekeeper unknown"}[snapshot["gatekeeper_up"]]
    lost = sum(events.get(reason, 0) for reason in ("rate", "full"))
    stale = "limits may be out of date" if snapshot["incomplete"] else ""
    held = "not enforced" if snapshot["unenforced"] else stale or "enforced"
    words = [held, "agent up", up, f"{lost:,} events lost"]
    if policies:
        words.append(f"policies {'valid' if policies['good'] else 'have errors'}, {policies['count']} in force")
    return words


def lines(shown: Iterable[Row]) -> Iterator[Line]:
    """Yield the lines of the table."""
    seen = set()
    for row in shown:
        tenant = row.tenant
        is_first = tenant["cgroup"] not in seen
        seen.add(tenant["cgroup"])
        cells = {column.name: column.text(row) for column in COLUMNS}
        notes = tuple(_notes(tenant)) if is_first else ()
        yield Line(cells, ranking.mark(row).name.lower(), _full(row), _about(tenant), notes)


def _about(tenant: Mapping[str, Any]) -> str:
    """Return the tenant's policy, path and labels, for the line under the tenant's name."""
    policy = [f"policy {tenant['policy']}"] if tenant["policy"] else []
    labels = [f"{name}={value}" for name, value in sorted(tenant["labels"].items()) if value]
    return " ".join([*policy, tenant["path"], *labels])


def _full(row: Row) -> float | None:
    """Return the ratio of the limit that is used, or None if there is no limit."""
    limit = ranking.limit_bytes(row)
    return None if limit is None else min(1.0, row.device["used_bytes"] / (limit or 1))


def _notes(tenant: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts that describe a tenant's state in addition to its numbers, in the words of `fgpu explain`."""
    if text := denial(tenant):
        yield text
    if parking_text.is_away(tenant["parking"]):
        yield f"parking: {parking_text.sentence(tenant['parking'], tenant['devices'])}"
    bypassing, reasons = (
        ", ".join(f"{count} {word}" for word, count in sorted(tenant[kind].items()))
        for kind in ("bypassing", "shimless")
    )
    if word := Enforcement(tenant["enforcement"]).words:
        yield word
    if bypassing:
        yield f"bypassing: {bypassing}{f' ({reasons})' if reasons else ''}"
    yield from (f"note: {note}" for note in tenant["notes"])


# -- the answer ------------------------------------------------------------------------------------------------------


class _Files(NamedTuple):
    """The template with its style and script, and the content security policy under which a browser runs the script."""

    template: Template
    style: str
    script: str
    policy: str


@functools.cache
def _files() -> _Files:
    """Read the files at the first request."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text, style, script = (_FOLDER.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; connect-src 'self'; "
        "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    return _Files(environment.from_string(text), style, script, policy)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def html(snapshot: Mapping[str, Any], asked: Asked, host: str) -> str:
    """Return the web page that shows a Snapshot.

    Args:
        snapshot: the Snapshot as JSON.
        asked: the order and the filter of the table of tenants.
        host: the name of this host, as the page shows it.
    """
    files = _files()
    found = ranking.ranked(ranking.rows(snapshot, asked.filter), asked.order)
    return files.template.render(
        style=files.style,
        script=files.script,
        version=f"{fgpu_ebpf.__version__} {_digest(files.script + files.style)}",
        host=host,
        when=time.strftime("%T %Z", time.localtime(snapshot["time_seconds"])),
        unenforced=no_limit(snapshot),
        state=state(snapshot),
        errors=failed_checks(snapshot),
        devices=[(device, bars.ends(device), bars.figures(device)) for device in snapshot["devices"]],
        columns=[column for column in COLUMNS if column is not GPU or len(snapshot["devices"]) > 1],
        tenant=TENANT,
        lines=list(lines(found[:MOST_ROWS])),
        more=max(0, len(found) - MOST_ROWS),
        count=len(snapshot["tenants"]),
        fitting=len({row.tenant["cgroup"] for row in found}),
        asked=asked,
        all=replace(asked, filter="").query,
        sorted_by=lambda column: replace(asked, order=asked.order.by(column)).query,
    )


def app(latest: Callable[[], Snapshot]) -> Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]:
    """Return an application that answers GET and HEAD with the page of the latest Snapshot."""
    host = socket.gethostname()

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            start("405 Method Not Allowed", [("Allow", "GET, HEAD"), ("Content-Length", "0")])
            return []
        text = html(Fields(latest()), Asked.of(environ.get("QUERY_STRING", "")), host)
        body = text.encode("utf-8", "replace")  # a cgroup's path may be invalid UTF-8
        headers = _headers()
        if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
            body = gzip.compress(body, 1)
            headers.append(("Content-Encoding", "gzip"))
        start("200 OK", [*headers, ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return answer


def _headers() -> list[tuple[str, str]]:
    return [
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Security-Policy", _files().policy),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Frame-Options", "DENY"),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        ("Cache-Control", "no-store"),
        ("Vary", "Accept-Encoding"),
    ]
