"""Everything that a page of docs/ needs to become a page of the site.

Owns: the generated parts (`<!-- generated: NAME -->`, see `references`), CONTRIBUTING.md as a page, and links out of
docs/: a file that a page links to goes along, as a page that shows it. So one relative link works in a checkout, on a
code host and on the site. Never: asks the network. On failure: a warning, with which `mkdocs build --strict` ends.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import references
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# Pages that lie outside docs/, and what they are called on the site.
OUTSIDE = {"CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<=\]\()\.\./[\w./-]+")
MARK = re.compile(r"<!-- generated: (\w+) -->")
LEXERS = {".yaml": "yaml", ".json": "json", ".py": "python", ".c": "c", ".h": "c", ".hcl": "hcl"}
log = logging.getLogger("mkdocs.plugins.fgpu")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that docs/ itself does not have."""
    linked = set()
    for file in files.documentation_pages():
        linked |= {_outside(file, match[0]) for match in LINK.finditer(file.content_string)}
    for outside, name in OUTSIDE.items():
        files.append(File.generated(config, name, content=(ROOT / outside).read_text()))
    for path in sorted(linked - OUTSIDE.keys() - {""}):
        if (ROOT / path).exists():
            files.append(File.generated(config, f"source/{path}.md", content=_shown(path)))
        else:
            log.warning("a page links to %s, which is not in this tree", path)
    return files


def _outside(file: File, target: str) -> str:
    """The path below the root that a page's relative link leads to; empty: it stays within docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(file.src_uri), target))
    return "" if path.startswith("docs/") else path


def _shown(path: str) -> str:
    """A file as a page, or a folder as a list; a tilde fence, since sources have backticks."""
    here, lexer = ROOT / path, LEXERS.get(Path(path).suffix, "text")
    inside = sorted(str(found.relative_to(here)) for found in here.rglob("*") if found.is_file())
    text = "\n".join(inside) if here.is_dir() else here.read_text()
    return f"# {path}\n\n~~~~~~{lexer}\n{text}\n~~~~~~\n"


def on_page_markdown(markdown: str, *, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Links and generated parts of a page."""
    if page.file.src_uri.startswith("source/"):
        return markdown

    def led(match: re.Match[str]) -> str:
        path = _outside(page.file, match[0])
        return page.file.src_uri.count("/") * "../" + OUTSIDE.get(path, f"source/{path}.md") if path else match[0]

    markdown = LINK.sub(led, markdown)
    return MARK.sub(lambda match: references.WRITERS[match[1]](), markdown)
