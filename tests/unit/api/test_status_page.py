"""Tests of the web page for given Snapshots: its contents, and that every name is shown as plain text."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf.api import status_page
from fgpu_ebpf.api.ranking import BY_WORD, Order
from fgpu_ebpf.api.status_page import Asked
from fgpu_ebpf.snapshot import Fields, ParkingView, PoliciesView, Snapshot
from tests.unit import top_kit as kit

ODD = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    '"><b a="',
    "{{ 7*7 }}",
    "&amp;",
    "</main>",
]
TEXTS = st.one_of(st.sampled_from(ODD), st.text(), st.builds("{}{}".format, st.sampled_from(ODD), st.text()))


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_page.time, "localtime", status_page.time.gmtime)


class Read(HTMLParser):
    """A page's elements with their attributes' names, its text without style and script, and its attributes' values."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, ...]] = []
        self.texts: list[str] = []
        self.values: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, *(name for name, _ in attrs)))
        self.values += [value or "" for _, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] not in ("style", "script"):
            self.texts.append(data)

    @property
    def words(self) -> str:
        """Return all text that the page shows."""
        return " ".join(" ".join(self.texts).split())


def shown(snapshot: Snapshot, query: str = "", host: str = "gpu-3") -> Read:
    return Read(status_page.html(Fields(snapshot), Asked.of(query), host))


def snapshot(*tenants: Any, devices: Any = (), **more: Any) -> Snapshot:
    known = tuple(replace(device, reconcile_age_seconds=0.1) for device in devices or (kit.device(),))
    return Snapshot(1.0, known, tenants, **{"gatekeeper_up": True, **more})


def rows(read: Read) -> list[str]:
    """Return the names of the tenants in the table, in the order of rows."""
    text = read.words
    return re.findall(r"(?:^| )([\w/]+(?: \(group\))?) policy notebooks", text)


# -- contents


def test_the_page_of_a_usual_host_has_all_parts() -> None:
    policies = PoliciesView(True, 1.0, 3, ())
    words = shown(snapshot(*kit.ALL, policies=policies, events={"rate": 2, "full": 1})).words
    assert "enforced agent up gatekeeper up 3 events lost policies valid, 3 in force as of 00:00:01 " in words
    assert "0 NVIDIA H200 used 40GiB/160GiB committed 100GiB unmanaged 0B turn: bob" in words
    assert "4 tenants , by used" in words or "4 tenants, by used" in words
    assert "alice policy notebooks /batch/alice 8GiB 4GiB 4GiB 25.1% 25.0% 12.3s 3 kernel" in words
    assert "carol policy notebooks /batch/carol - 0B 1MiB alone - 0.0s 0 kernel" in words
    assert "fix:" not in words


def test_rows_follow_the_sort_reverse_and_filter_of_the_query() -> None:
    host = snapshot(*kit.ALL)
    assert rows(shown(host)) == ["batch (group)", "bob", "alice", "carol"]
    assert rows(shown(host, "sort=refused")) == ["alice", "batch (group)", "bob", "carol"]
    assert rows(shown(host, "sort=limit&reverse=1")) == ["alice", "batch (group)", "bob", "carol"]
    assert rows(shown(host, "filter=ALI")) == ["alice"]
    assert ", 1 with ALI" in shown(host, "filter=ALI").words.replace(" ,", ",")


def test_the_table_has_a_gpu_column_only_with_several_devices() -> None:
    both = kit.tenant("alice", kit.on(0, 5), kit.on(1, 7 * kit.MIB))
    assert "TENANT GPU LIMIT" in shown(snapshot(both, devices=(kit.device(0), kit.device(1)))).words
    assert "TENANT LIMIT" in shown(snapshot(kit.ALICE)).words


def test_rows_beyond_the_maximum_are_counted() -> None:
    many = [kit.tenant(f"t{number}", kit.on(0, number)) for number in range(1234)]
    read = shown(snapshot(*many))
    assert len(rows(read)) == status_page.MOST_ROWS
    assert "and 1,134 more" in read.words
    assert "1,234 tenants" in read.words


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"unenforced": "a probe has gone"}, "No limit is enforced: a probe has gone not enforced agent up"),
        ({"incomplete": "a typo"}, "Some limits may be out of date: a typo limits may be out of date agent up"),
        ({"gatekeeper_up": False}, "gatekeeper not running: new programs are refused memory fix: wait for the agent"),
        ({"gatekeeper_up": None}, "gatekeeper unknown"),
        (
            {"policies": PoliciesView(False, 1.0, 2, ("a.yaml:3: memory: '8G'",))},
            "policies a.yaml:3: memory: '8G' fix: fgpu policy check && fgpu reload",
        ),
        (
            {"reconcile_failure": "no driver"},
            "reconcile the last comparison with NVML failed: no driver fix: nvidia-smi",
        ),
        ({"failures": 3}, "internal errors 3 fix: report"),
    ],
)
def test_errors_of_the_host_are_shown_with_a_fix_if_there_is_one(more: dict[str, Any], said: str) -> None:
    assert said in shown(snapshot(kit.ALICE, **more)).words


def test_errors_of_a_tenant_are_shown() -> None:
    around = replace(kit.ALICE, bypassing={"no_shim": 3}, shimless={"musl": 2, "static": 1}, notes=("no device B",))
    denied = replace(kit.tenant("bob", kit.on(0, 0, limit=0)), denied="8GiB are wanted, 1GiB is left")
    words = shown(snapshot(around, denied)).words
    assert "kernel bypassing: 3 no_shim (2 musl, 1 static) note: no device B" in words
    assert "kernel no memory is admitted: 8GiB are wanted, 1GiB is left" in words
    assert "shim alice (musl, static) fix: static: static programs have no loader" in words


def test_a_parked_tenant_is_shown_with_its_reason() -> None:
    on = replace(kit.on(0, 0), parked_bytes=64 << 20)
    waits = replace(kit.tenant("bob", on), parking=ParkingView("waiting", 61.0, "group g is full", 1, 0, 1.5, 0.0))
    words = shown(snapshot(waits)).words
    assert "bob (waiting)" in words
    assert "parking: parked, and waits to be woken, for 61 s, 64MiB in host memory: group g is full" in words
    runs = replace(waits, parking=ParkingView("running", None, "", 1, 1, 1.5, 1.5))
    assert "parking:" not in shown(snapshot(runs)).words


def test_a_denial_is_shown_once_for_a_tenant_on_two_devices() -> None:
    both = replace(kit.tenant("alice", kit.on(0, 5), kit.on(1, 7, limit=0)), denied="no room")
    words = shown(snapshot(both, devices=(kit.device(0), kit.device(1)))).words
    assert words.count("no memory is admitted") == words.count("no memory is admitted on some devices: no room") == 1


def test_a_limit_that_is_not_in_force_is_shown_without_a_statement_about_memory() -> None:
    deep = replace(kit.tenant("alice", kit.on(0, 5)), denied="the cgroup is too deep")
    words = shown(snapshot(deep)).words
    assert "the limit is not in force: the cgroup is too deep" in words
    assert "no memory is admitted" not in words


def test_an_unmeasured_value_is_a_dash() -> None:
    words = shown(snapshot(kit.BATCH, devices=(kit.device(used=None, unmanaged=None, owner=None),))).words
    assert "used -/160GiB committed 100GiB unmanaged -" in words
    assert "turn:" not in words


@pytest.mark.parametrize("none", [snapshot(), Snapshot(0.0), Snapshot(1.0, (kit.device(),), (kit.tenant("a"),))])
def test_the_page_without_rows_of_tenants_shows_the_state_of_enforcement(none: Snapshot) -> None:
    assert "enforced" in shown(none).words


# -- every name is plain text


def host_of(text: str) -> Snapshot:
    """Return a host on which every name that a user can choose, and every message, is this text."""
    one = replace(
        kit.ALICE, tenant=text, path=text, policy=text, denied=text, notes=(text,), labels={"team": text, text: "x"}
    )
    policies = PoliciesView(False, 1.0, 1, (text,))
    return snapshot(
        one, devices=(replace(kit.device(owner=text), name=text),), policies=policies, reconcile_failure=text
    )


@given(TEXTS)
def test_every_name_is_shown_as_text(text: str) -> None:
    text += "x"  # an empty text is left out, as intended
    read = Read(status_page.html(Fields(host_of(text)), Asked(filter=text), text))
    plain = Read(status_page.html(Fields(host_of("x")), Asked(filter="x"), "x"))
    assert read.elements == plain.elements
    assert read.texts.count(text) == plain.texts.count("x")
    assert read.values.count(text) == plain.values.count("x")


def test_the_policy_has_the_hashes_of_script_and_style_and_the_page_has_no_other_code() -> None:
    """The hashes in the page's policy are those of its script and style."""
    text = status_page.html(Fields(snapshot()), Asked(), "x")
    (style,), (script,) = (
        re.findall("<style>(.*?)</style>", text, re.S),
        re.findall("<script>(.*?)</script>", text, re.S),
    )
    policy = status_page._files().policy
    assert {status_page._digest(style), status_page._digest(script)} == set(re.findall(r"'sha256-[^']+'", policy))
    assert "unsafe" not in policy
    assert not re.search(r"""\s(?:on\w+|style)=|javascript:|https?://(?!www\.w3\.org/2000/svg)""", text)


# -- queries and responses


@pytest.mark.parametrize(
    ("query", "asked"),
    [
        ("", Asked()),
        ("sort=limit", Asked(Order(BY_WORD["limit"]))),
        ("sort=limit&reverse=1&filter=%3Cb%3E+a", Asked(Order(BY_WORD["limit"], True), "<b> a")),
        ("sort=nothing&x=y", Asked()),
        ("&".join(["filter=a"] * 99), Asked()),
        ("filter=" + "a" * 999, Asked(filter="a" * status_page.MOST_FILTER)),
        ("filter=%ff%00", Asked(filter="\ufffd\0")),
        ("\xff;;&&==", Asked()),
    ],
)
def test_the_query_string_is_parsed_and_written_back(query: str, asked: Asked) -> None:
    assert Asked.of(query) == asked
    assert Asked.of(asked.query[1:]) == asked


def call(
    method: str = "GET", latest: Callable[[], Snapshot] = snapshot, **more: str
) -> tuple[str, dict[str, str], bytes]:
    said: list[Any] = []
    environ: dict[str, Any] = {"REQUEST_METHOD": method, **more}
    setup_testing_defaults(environ)
    body = b"".join(status_page.app(latest)(environ, lambda status, headers: said.extend((status, dict(headers)))))  # type: ignore[arg-type]
    return said[0], said[1], body


def test_the_response_has_security_headers_a_gzip_form_and_no_body_for_head() -> None:
    status, headers, body = call()
    assert (status, headers["Content-Length"]) == ("200 OK", str(len(body)))
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
    assert headers["Cache-Control"] == "no-store"
    zipped, packed = call(HTTP_ACCEPT_ENCODING="br, gzip")[1:]
    assert zipped["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed) == body
    assert call("HEAD")[1:] == (headers, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "nonsense"])
def test_a_request_method_other_than_get_and_head_is_refused(method: str) -> None:
    status, headers, body = call(method)
    assert (status, headers["Allow"], body) == ("405 Method Not Allowed", "GET, HEAD", b"")


def test_a_path_that_is_not_utf_8_is_shown() -> None:
    """A folder's name may be any bytes."""
    body = call(latest=lambda: snapshot(replace(kit.ALICE, path="/\udcff<b>")))[2]
    assert b"/?&lt;b&gt;" in body
