"""Prepare the pages of docs/ for the site.

The module fills in the generated parts (`<!-- generated: NAME -->`, see `references`), adds CONTRIBUTING.md as a page,
and changes links to files outside docs/. For each linked file, a page that shows the file is added, so that the same
relative link works in a checkout, on a code host and on the site. The module does not use the network. A link to a
missing file causes a warning, which fails `mkdocs build --strict`.
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
# Pages outside docs/ -> their names on the site.
OUTSIDE = {"CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<=\]\()\.\./[\w./-]+")
MARK = re.compile(r"<!-- generated: (\w+) -->")
LEXERS = {".yaml": "yaml", ".json": "json", ".py": "python", ".c": "c", ".h": "c", ".hcl": "hcl"}
log = logging.getLogger("mkdocs.plugins.fgpu")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that docs/ itself does not have."""
    linked = set()
    for file in files.documentation_pages():
        linked |= {_outside(file, match[0]) for match in LINK.finditer(file.content_string)}
    for outside, name in OUTSIDE.items():
        files.append(File.generated(config, name, content=(ROOT / outside).read_text()))
    for path in sorted(linked - OUTSIDE.keys() - {""}):
        if (ROOT / path).exists():
            files.append(File.generated(config, f"source/{path}.md", content=_shown(path)))
        else:
            log.warning("a page links to %s, which does not exist", path)
    return files


def _outside(file: File, target: str) -> str:
    """Return the path of a relative link's target below the root, or an empty text for a target inside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(file.src_uri), target))
    return "" if path.startswith("docs/") else path


def _shown(path: str) -> str:
    """Return a page that shows a file or lists a folder. The fence has tildes, because sources contain backticks."""
    here, lexer = ROOT / path, LEXERS.get(Path(path).suffix, "text")
    inside = sorted(str(found.relative_to(here)) for found in here.rglob("*") if found.is_file())
    text = "\n".join(inside) if here.is_dir() else here.read_text()
    return f"# {path}\n\n~~~~~~{lexer}\n{text}\n~~~~~~\n"


def on_page_markdown(markdown: str, *, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Change the links of a page, and fill in its generated parts."""
    if page.file.src_uri.startswith("source/"):
        return markdown

    def led(match: re.Match[str]) -> str:
        path = _outside(page.file, match[0])
        return page.file.src_uri.count("/") * "../" + OUTSIDE.get(path, f"source/{path}.md") if path else match[0]

    markdown = LINK.sub(led, markdown)
    return MARK.sub(lambda match: references.WRITERS[match[1]](), markdown)
