"""Tests of the documentation in the Debian package: pages without dead links, manual pages, examples."""

from __future__ import annotations

import gzip
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from docs.hooks import references
from fgpu_ebpf.agent import host_config
from tests.support.commands import fgpu
from tests.support.host import ROOT

LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([\w-]+))?\)")
TITLE = re.compile(r"^#+ (.*?)(?: \{ ?#([\w-]+) ?\})?$", re.MULTILINE)
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return /usr/share as in the package."""
    stage = tmp_path_factory.mktemp("stage")
    runpy.run_path(str(ROOT / "deploy/debian/documents.py"))["write"](stage)
    return stage / "usr/share"


@pytest.fixture(scope="module")
def pages(share: Path) -> dict[Path, str]:
    """Return the installed pages, without blocks of code."""
    return {page: FENCE.sub("", page.read_text()) for page in (share / "doc/fgpu").rglob("*.md")}


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's titles, as code hosts and the site create them."""
    named = [(own, re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")) for title, own in TITLE.findall(text)]
    return {own or made for own, made in named} | set(re.findall(r'<\w+ id="([\w-]+)"', text))


def test_no_link_of_a_page_is_dead(pages: dict[Path, str]) -> None:
    links = [(page, *found) for page, text in pages.items() for found in LINK.findall(text)]
    assert len(links) > 200
    dead = []
    for page, path, anchor in links:
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target in pages and anchor not in anchors(pages[target])):
            dead.append(f"{page.name}: {path}#{anchor}")
    assert dead == []


def test_every_page_is_installed_with_its_generated_parts(share: Path, pages: dict[Path, str]) -> None:
    installed = {str(page.relative_to(share / "doc/fgpu")) for page in pages}
    assert {str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")} <= installed
    assert not [page for page, text in pages.items() if "<!-- generated" in text]
    for name, part in (("metrics", "fgpu_memory_used_bytes"), ("cli", "## fgpu status"), ("json", "### TenantView")):
        assert part in pages[share / f"doc/fgpu/docs/reference/{name}.md"]


def test_pages_that_messages_and_units_name_are_installed(share: Path) -> None:
    """A user of the package has no checkout."""
    sources = [*(ROOT / "fgpu_ebpf").rglob("*.py"), *(ROOT / "shim").rglob("*.[ch]"), *(ROOT / "oci").glob("*.c")]
    named = {f"doc/fgpu/{page}" for path in sources for page in re.findall(r"\bdocs/\w+\.md", path.read_text())}
    units = "".join(unit.read_text() for unit in (ROOT / "deploy/systemd").glob("*.service"))
    found = re.findall(r"file:///usr/share/(\S+)", units)
    assert named
    assert found
    assert [path for path in {*named, *found} if not (share / path).exists()] == []
    assert [
        name for name in re.findall(r"man:(\S+)\(1\)", units) if not (share / f"man/man1/{name}.1.gz").exists()
    ] == []


def manual(share: Path, name: str) -> str:
    return gzip.decompress((share / f"man/man1/{name}.1.gz").read_bytes()).decode()


def test_manual_pages_have_the_exit_codes_of_the_reference(share: Path) -> None:
    reference = " ".join((ROOT / "docs/reference/cli.md").read_text().split())
    (codes,) = re.findall(r"Exit codes: (0 done, .*?\.) ", reference)
    assert f"\n{codes}\n" in manual(share, "fgpu-detach").replace("\\", "")


def test_each_command_has_a_manual_page_with_its_options(share: Path) -> None:
    commands = dict(references.commands())
    names = {words.replace(" ", "-"): command for words, command in commands.items()}
    assert {page.name.removesuffix(".1.gz") for page in (share / "man/man1").iterdir()} == names.keys()
    for name, command in names.items():
        plain = manual(share, name).replace("\\", "")
        for option in references.options(command):
            assert all(f"fB{known}fR" in plain for known in option.opts), (name, option.name)
    assert all(f"fB{words}fR" in manual(share, "fgpu").replace("\\", "") for words in commands if words.count(" ") == 1)


@pytest.mark.skipif(not shutil.which("groff"), reason="no groff")
def test_manual_pages_are_shown_without_a_warning(share: Path) -> None:
    text = "".join(manual(share, page.name.removesuffix(".1.gz")) for page in sorted((share / "man/man1").iterdir()))
    command = ["groff", "-k", "-man", "-Tutf8", "-ww", "-rHY=0"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=30)
    assert done.stderr == ""
    shown = re.sub(r"\x1b\[\d+m|.\x08", "", done.stdout)
    assert "t g l u p s e w r b     sort by the column" in shown, "the table of keys in the help of top"
    assert "--priority [high|normal|low]" in shown


def test_the_example_of_settings_has_the_defaults(share: Path, tmp_path: Path) -> None:
    lines = (share / "doc/fgpu/examples/agent.yaml").read_text().splitlines()
    assert all(line.startswith("#") for line in lines)
    file = tmp_path / "agent.yaml"
    file.write_text("".join(f"{line[1:]}\n" for line in lines[1:]))
    assert set(yaml.safe_load(file.read_text())) > {"listen", "shares", "bounds"}
    assert host_config.read(file, root_only=False) == (host_config.HostSettings(), ())


def test_examples_of_policies_are_valid(share: Path) -> None:
    done = fgpu("policy", "check", share / "doc/fgpu/examples/policy.d")
    assert done.stdout == "ok: 3 policies in 2 files\n"
