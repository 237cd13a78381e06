"""Tests of the built site: it is complete, and it needs nothing from other hosts."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.host import ROOT

# Addresses that a browser fetches by itself when it shows a page.
FETCHED = {
    "script": "src", "img": "src", "iframe": "src", "source": "src", "embed": "src", "object": "data", "use": "href",
    "image": "href", "link": "href",
}  # fmt: skip
NOT_FETCHED = ("canonical", "next", "prev")  # kinds of <link>
STYLE = re.compile(r"(?:url\(|@import\s+)[\"']?([^\"')\s]+)")


class Page(HTMLParser):
    """The addresses that a page fetches and links to, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.classes: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect a tag, as the parser calls it."""
        found = {name: value or "" for name, value in attrs}
        self.ids.add(found.get("id", ""))
        self.classes |= set(found.get("class", "").split())
        self.fetched += STYLE.findall(found.get("style", ""))
        if tag in FETCHED and FETCHED[tag] in found and found.get("rel") not in NOT_FETCHED:
            self.fetched.append(found[FETCHED[tag]])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """Return every page, by its file."""
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_document_is_a_page_of_the_site(site: Path) -> None:
    for path in (ROOT / "docs").rglob("*.md"):
        assert (site / path.relative_to(ROOT / "docs").with_suffix(".html")).exists(), path
    assert (site / "contributing.html").exists()
    assert not (site / "hooks").exists()


def test_no_page_fetches_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    asked = {(path.name, target) for path, page in pages.items() for target in page.fetched}
    for style in site.rglob("*.css"):
        asked |= {(style.name, target) for target in STYLE.findall(style.read_text())}
    assert len(asked) > 50
    elsewhere = {(name, to) for name, to in asked if urlsplit(to).scheme not in ("", "data") or to.startswith("//")}
    assert elsewhere == set()


def test_no_page_has_elements_for_which_the_theme_fetches_code(pages: dict[Path, Page]) -> None:
    """The theme's script has addresses of other hosts for diagrams and repositories. No page needs them."""
    for path, page in pages.items():
        assert not page.classes & {"mermaid", "md-source"}, path


def test_links_within_the_site_have_targets(site: Path, pages: dict[Path, Page]) -> None:
    """Anchors of the links exist too. mkdocs does not check text that hooks and the theme have generated."""
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: {link}"


def test_pictures_are_small_and_have_text_elements_a_title_and_a_dark_form(site: Path) -> None:
    found = list((site / "pictures").glob("*.svg"))
    assert len(found) == 3
    for picture in found:
        text = picture.read_text()
        assert len(text) < 10_000, picture
        assert text.count("<text") > 10
        assert "prefers-color-scheme: dark" in text
        assert "<title" in text


def test_the_search_index_contains_words_of_pages_and_of_generated_parts(site: Path) -> None:
    """The words are a metric, a policy key, an option and a command."""
    index = (site / "search/search_index.json").read_text()
    for word in ("fgpu_memory_refused_total", "matchExpressions", "--pidns", "fgpu doctor"):
        assert word in index, word
