"""The web page in a browser, as an operator uses it: with a real agent, under a known load."""

from __future__ import annotations

import http.client
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.page.page_kit import HOST, Looker
from tests.support.commands import ask, fgpu
from tests.support.host import CONTEXT, LISTEN, MIB, REFUSED, cgroup_root
from tests.support.place import Place
from tests.support.service import Service
from tests.support.tenant import Tenant
from tests.support.wait import eventually

Look = Callable[..., Looker]
MARKUP = "<img src=x onerror=hit=1>"
SCRIPT = "<script>hit=1</script>"
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: odd}
spec:
  selector: {cgroup: "fgpu-page/*"}
  memory: {limit: 1GiB}
  metricLabels: [team]
"""


@pytest.fixture
def holder(place: Place) -> Tenant:
    """Return a tenant that holds 50 MiB on the first device, and was refused once."""
    tenant = place.tenant(CONTEXT + 60 * MIB)
    client = tenant.client()
    client.ok(f"alloc {50 * MIB}")
    assert client.do(f"alloc {90 * MIB}") == REFUSED
    assert tenant.memory()["refused"] == 1  # a page that is opened later shows that too
    return tenant


@pytest.fixture
def other(place: Place) -> Tenant:
    """Return a tenant with a higher limit that holds nothing. A page that is loaded later shows it."""
    tenant = place.tenant(CONTEXT + 90 * MIB)
    tenant.assert_enforced()
    return tenant


def policies(service: Service, text: str) -> None:
    """Set exactly these policies."""
    (service.policies / "50.yaml").write_text(text)
    fgpu("reload")


def test_figures_change_without_a_reload(look: Look, place: Place) -> None:
    there = look()
    there.mark()
    expect(there.page).to_have_title(f"fgpu {HOST}")
    expect(there.page.locator(".state")).to_contain_text("enforced")
    expect(there.page.locator(".device")).to_have_count(2)
    tenant = place.tenant(CONTEXT + 60 * MIB)
    expect(there.cell(tenant.name, "LIMIT")).to_have_text("578MiB")
    expect(there.cell(tenant.name, "USED")).to_have_text("0B")
    client = tenant.client()
    client.ok(f"alloc {50 * MIB}")
    expect(there.cell(tenant.name, "USED")).to_have_text("568MiB")
    expect(there.cell(tenant.name, "REFUSED")).to_have_text("0")
    assert client.do(f"alloc {90 * MIB}") == REFUSED
    expect(there.cell(tenant.name, "REFUSED")).to_have_text("1")
    expect(there.cell(tenant.name, "HELD BY")).to_have_text("kernel")
    assert there.marked()


def test_the_page_shows_the_same_table_as_top(look: Look, holder: Tenant, other: Tenant) -> None:
    """Names, words, units and order are compared."""
    for query, words in (("", []), ("?sort=limit&reverse=1", ["--sort", "limit", "--reverse"])):
        lines = [line.split() for line in fgpu("top", *words).stdout.splitlines()]
        rows = [line for line in lines if line[0] in (holder.name, other.name)]
        there = look(query)
        texts = "rows => rows.map(row => [...row.children].map(cell => cell.innerText.split('\\n')[0]))"
        assert there.page.locator("tbody tr:not(.notes)").evaluate_all(texts) == rows
        heads = [name.strip() for name in there.page.locator("thead th").all_inner_texts()]
        assert " ".join(heads).split() == next(line for line in lines if line[0] == "TENANT")


def test_the_page_can_be_sorted_and_filtered(look: Look, holder: Tenant, other: Tenant) -> None:
    there = look()
    assert set(there.names()) == {holder.name, other.name}
    there.page.get_by_role("link", name="LIMIT").click()
    expect(there.page.locator("[aria-sort]")).to_have_text("LIMIT")
    assert there.names()[0] == other.name
    there.page.get_by_role("searchbox").fill(holder.name)
    there.page.get_by_role("searchbox").press("Enter")
    expect(there.row(other.name)).to_have_count(0)
    assert set(there.names()) == {holder.name}
    expect(there.page.locator("[aria-sort]")).to_have_text("LIMIT")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_on_a_phone(look: Look, holder: Tenant, place: Place, service: Service, scheme: str) -> None:
    (service.policies / "50.yaml").write_text("kind: " + "x" * 300)
    fgpu("reload", check=False)
    try:
        there = look(width=390, color_scheme=scheme)
        expect(there.page.locator(".errors")).to_contain_text("fix: fgpu policy check")
        assert there.evaluate("document.documentElement.scrollWidth") <= 390
        boxes = [cell.bounding_box() for cell in there.row(holder.name).locator("td").all()]
        assert all(box and box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
        shade = re.findall(r"\d+", there.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (sum(map(int, shade[:3])) > 3 * 128) is (scheme == "light")
    finally:
        policies(service, "")


@pytest.fixture
def odd(service: Service) -> Iterator[Path]:
    """Make a cgroup whose name is an element and whose label is a script."""
    folder = cgroup_root() / "fgpu-page" / MARKUP
    folder.mkdir(parents=True)
    os.setxattr(folder, "user.fgpu.team", SCRIPT.encode())
    policies(service, POLICY)
    eventually(lambda: any(t["labels"].get("team") for t in ask(verb="snapshot")["tenants"]), 20, "the label")
    yield folder
    policies(service, "")
    folder.rmdir()
    folder.parent.rmdir()


def test_names_of_tenants_are_shown_as_plain_text(look: Look, odd: Path) -> None:
    there = look()
    about = there.page.locator("tbody small").first
    expect(about).to_have_text(f"policy odd /fgpu-page/{MARKUP} team={SCRIPT}")
    asked = len(there.requests)
    eventually(lambda: (there.page.wait_for_timeout(50), len(there.requests) > asked)[1], 30, "another request")
    assert there.evaluate("[typeof hit, document.images.length, document.scripts.length]") == ["undefined", 0, 1]
    there = look(f"?filter={SCRIPT}%22%3E{MARKUP}")
    expect(there.page.locator(".count")).to_contain_text(f'0 with {SCRIPT}">{MARKUP}')
    assert there.evaluate("[typeof hit, document.images.length, document.scripts.length]") == ["undefined", 0, 1]


def test_an_injected_script_does_not_run(look: Look) -> None:
    """This is the second protection: the browser refuses the script even if it is in the page."""
    there = look()
    there.evaluate(f"document.querySelector('main').innerHTML = '{MARKUP}<p style=color:red onclick=hit=1>x</p>'")
    there.page.get_by_text("x", exact=True).click()
    assert there.evaluate("typeof hit") == "undefined"
    assert any("Content Security Policy" in line for line in there.said)
    there.said.clear()


@pytest.mark.parametrize("how", ["ended", "hanging"])
def test_the_page_reports_an_agent_that_does_not_answer(look: Look, service: Service, holder: Tenant, how: str) -> None:
    there = look()
    there.mark()
    there.page.clock.install()
    expect(there.cell(holder.name, "USED")).to_have_text("568MiB")
    silence = there.page.locator("#silence")
    expect(silence).to_be_hidden()
    assert service.agent is not None
    if how == "ended":
        service.kill_agent()
    else:
        service.agent.send_signal(signal.SIGSTOP)
        there.page.clock.fast_forward(10_000)
    try:
        text = r"^no answer from the agent since \d\d:\d\d:\d\d \w+: the figures below are from that time$"
        expect(silence).to_have_text(re.compile(text))
        expect(silence).to_be_visible()
        expect(there.page.locator(".state")).to_be_hidden()
        expect(there.page).to_have_title(f"no answer: fgpu {HOST}")
        assert float(there.evaluate("getComputedStyle(document.querySelector('main')).opacity")) < 1
    finally:
        if how == "ended":
            service.start_agent()
        else:
            service.agent.send_signal(signal.SIGCONT)
    expect(silence).to_be_hidden()
    expect(there.page.locator(".state")).to_contain_text("enforced")
    assert there.marked()
    assert all("Failed to load resource" in line for line in there.said)  # the browser's own message
    there.said.clear()


def test_a_hidden_page_sends_no_request_until_the_page_is_shown(look: Look) -> None:
    hide = "window.away = true; Object.defineProperty(document, 'hidden', {get: () => window.away});"
    there = look(before=hide)
    there.page.clock.install()
    there.page.reload()
    asked = len(there.requests)
    there.page.clock.run_for(120_000)
    assert len(there.requests) == asked
    expect(there.page.locator("#silence")).to_be_visible()
    there.evaluate("away = false; document.dispatchEvent(new Event('visibilitychange'))")
    expect(there.page.locator("#silence")).to_be_hidden()
    assert len(there.requests) == asked + 1


def test_the_page_works_without_scripts(look: Look, holder: Tenant) -> None:
    there = look(java_script_enabled=False)
    expect(there.cell(holder.name, "USED")).to_have_text("568MiB")
    expect(there.page.locator("noscript meta[http-equiv=refresh]")).to_have_count(1)


def answer(method: str, path: str, host: str = LISTEN) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(LISTEN, timeout=10)
    connection.request(method, path, headers={"Host": host})
    found = connection.getresponse()
    body = found.read()
    connection.close()
    return found.status, {name.lower(): value for name, value in found.getheaders()}, body


@pytest.mark.parametrize("path", ["/", "/metrics"])
def test_a_request_with_an_unlisted_host_name_is_refused(service: Service, path: str) -> None:
    status, _, body = answer("GET", path, host="rebound.example")
    assert (status, body.count(b"\n")) == (421, 1)
    assert answer("GET", path, host="page.example")[0] == 200, "a name of listenNames was refused"


def test_the_server_answers_only_valid_requests(service: Service) -> None:
    status, headers, body = answer("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"</html>" in body
    assert {"content-security-policy", "x-content-type-options", "referrer-policy", "cache-control"} <= headers.keys()
    status, _, body = answer("HEAD", "/")
    assert (status, body) == (200, b"")
    assert [answer(method, "/")[0] for method in ("POST", "PUT", "DELETE")] == [405, 405, 405]
    assert answer("GET", "/nothing")[0] == 404
    assert b"fgpu_build_info" in answer("GET", "/metrics")[2]
