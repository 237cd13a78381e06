"""Tests of the pages' statements about the code: named tests exist, and every check of `fgpu doctor` is explained."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from docs.hooks import references
from tests.support.host import ROOT

DOCS = ROOT / "docs"
PACKAGE = ROOT / "fgpu_ebpf"
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES = [*OUTSIDE, *sorted(DOCS.rglob("*.md"))]
TEST = re.compile(r"^def (test_\w+)", re.MULTILINE)
SELECTS = re.compile(r'\./dev test (\w+)(?: -s)? -k ("[^"]+"|\w+)')
# A command on its own line, indented or after a prompt, or in a text.
TYPED = re.compile(r"(?:`|^ {4}(?:\$ )?|^\$ )(?:sudo )?fgpu ([a-z][^`|#&\n]*)", re.MULTILINE)
OPTIONS = {words: {name for p in command.params for name in p.opts} for words, command in references.commands()}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_tests_that_a_page_names_exist(page) -> None:
    named = re.findall(r"`(?:tests/)?([\w/]+\.py)::(\w+)`", page.read_text())
    for file, test in named:
        found = ast.parse((ROOT / "tests" / file).read_text()).body
        assert test in {node.name for node in found if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


def test_every_promise_of_the_security_page_names_two_tests() -> None:
    stated = (DOCS / "security.md").read_text().split("## How the promises are kept")[0]
    promises = re.split(r"^\*\*(P\d)\.", stated, flags=re.M)
    assert promises[1::2] == [f"P{n}" for n in range(1, 9)]
    assert all(text.count(".py::") >= 2 for text in promises[2::2])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_selections_of_tests_in_a_page_match(page) -> None:
    """Each word of `./dev test SUITE -k WORDS` is in the name of a test or of its file."""
    for suite, words in SELECTS.findall(page.read_text()):
        folder = ROOT / "tests" / ("" if suite == "full" else suite)
        files = {path: path.read_text() for path in folder.rglob("test_*.py")}
        named = [f"{path.stem} {name}" for path, text in files.items() for name in TEST.findall(text)]
        for word in set(re.findall(r"\w+", words)) - {"and", "or", "not"}:
            assert any(word in name for name in named), f"-k {words}: {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_metrics_that_a_page_names_exist(page) -> None:
    named = set(re.findall(r"`(fgpu_[a-z_]*[a-z])[`{]", page.read_text())) - {"fgpu_ebpf", "fgpu_admit"}
    assert named - {references.exposed(family) for family in references.families()} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_and_options_that_a_page_contains_exist(page) -> None:
    for said in TYPED.findall(page.read_text()):
        words = ["fgpu", *said.split(" -- ")[0].split()]
        command = next((known for n in (3, 2) if (known := " ".join(words[:n])) in OPTIONS), "")
        assert command, f"no command: fgpu {said}"
        for option in [word.partition("=")[0] for word in words if word.startswith("--")]:
            assert option in OPTIONS[command], f"{command} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_has_one_title(page) -> None:
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(), flags=re.M | re.S)
    assert len(re.findall(r"^# ", text, re.M)) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_benchmarks_and_paths_that_a_page_names_exist(page) -> None:
    """A page names a benchmark as `./dev bench NAME`."""
    text = page.read_text()
    for name in re.findall(r"`\./dev bench (\w+)", text):
        assert (ROOT / f"bench/{name}.py").exists(), name
    for path in re.findall(r"`((?:bench|tests|deploy|dashboards|examples)/[\w./-]+)`", text):
        assert any(ROOT.glob(path.replace("NAME", "*"))), path


@pytest.mark.parametrize("page", [*OUTSIDE, *sorted(ROOT.glob(".github/**/*.md"))], ids=lambda path: path.stem)
def test_links_of_pages_outside_the_site_have_targets(page) -> None:
    """mkdocs checks the links in docs/."""
    for path, anchor in re.findall(r"\]\((?!https?:)([\w./-]+)(?:#([\w-]+))?\)", page.read_text()):
        target = page.parent / path
        assert target.exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, anchor


@pytest.mark.parametrize(
    ("page", "label"),
    [("runbooks", ("fgpu_bypassing_processes", "how")), ("containers", ("fgpu_shimless_processes", "reason"))],
)
def test_every_value_of_a_label_is_explained(page, label) -> None:
    rows = [line.split("|")[1] for line in (DOCS / f"{page}.md").read_text().splitlines() if line.startswith("| `")]
    assert {f"`{value}`" for value in references.VALUES[label]} - set(re.findall(r"`\w+`", " ".join(rows))) == set()


def test_statements_on_other_products_have_sources() -> None:
    text = (DOCS / "comparison.md").read_text()
    rows = re.findall(r"^\| (?!\*\*fgpu)(\w.*?) \|(.*)\|$", text, re.MULTILINE)
    assert len(rows) == 24
    for name, cells in rows:
        for cell in map(str.strip, cells.split("|")):
            assert cell in ("", "not found") or "[^" in cell, f"{name}: {cell!r} has no source"
    named = set(re.findall(r"\[\^([\w-]+)\](?!:)", text))
    assert named == set(re.findall(r"^\[\^([\w-]+)\]: .*https://", text, re.MULTILINE))


# -- troubleshooting -----------------------------------------------------------------------------------------------


def texts(node: ast.expr, around: ast.AST) -> Iterator[str]:
    """Yield the texts of an expression: constants, and those that a name has in the same function or module."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value
        elif isinstance(part, ast.Name):
            for given in ast.walk(around):
                if isinstance(given, ast.Assign) and any(getattr(to, "id", "") == part.id for to in given.targets):
                    yield from (c.value for c in ast.walk(given.value) if isinstance(getattr(c, "value", None), str))


def failures() -> Iterator[tuple[str, str]]:
    """Yield the name of every check that may fail, with the words of its fix."""
    for module in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(module.read_text())
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Check" and len(call.args) > 3:
                    name, fix = call.args[0], call.args[3]
                    known = name.value if isinstance(name, ast.Constant) else "docker"
                    said = [*texts(fix, function)] or [*texts(fix, tree)]
                    yield known, "\0".join(said)


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("`", "").replace("\\|", "|")).lower()


def test_every_check_of_doctor_is_explained() -> None:
    rows = {}
    for line in (DOCS / "troubleshooting.md").read_text().splitlines():
        names = re.match(r"\| (`[\w ]+`(?:, `\w+`)*) \|", line)
        for name in re.findall(r"`([\w ]+)`", names[1] if names else ""):
            rows[name] = plain(line)
    found = list(failures())
    assert len({name for name, _ in found}) > 20
    for name, fix in found:
        assert name in rows, f"no row explains doctor's line {name!r}"
        for words in re.split(r"[\0;]", fix):
            told = [part for part in re.split(r"'.*?'|[:(,]", plain(words).strip(" :;,()")) if len(part.strip()) > 8]
            for part in told:
                assert part.strip() in rows[name], f"{name}: {part.strip()!r} is not in its row"
