#!/usr/bin/env python3
"""Writes what a package has to read, below STAGE/usr/share: `documents.py STAGE`.

Pages go to doc/fgpu in the folders that they have in the repository, so that links between them hold, with their
generated parts filled in. Manual pages go to man/man1, made from the commands, and examples to doc/fgpu/examples.
Raises KeyError for a generated part that nothing writes.
"""

from __future__ import annotations

import gzip
import inspect
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs/hooks"))
import references  # noqa: E402

import fgpu_ebpf  # noqa: E402

FOLDERS = ("docs", "dashboards", "examples/policy.d", "deploy/systemd")
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE")
LEFT_OUT = ("hooks", "site.css", "make.py", "grafana.py", "__pycache__")  # parts of the site, and what makes the files
MARK = re.compile(r"<!-- generated: (\w+) -->")
SETTINGS = "# Settings of the agent: copy what you change to /etc/fgpu/agent.yaml. These are the defaults.\n"


def pages(folder: Path) -> None:
    """Write all pages, and the files that they link to."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for name in PAGES:
        shutil.copy(ROOT / name, folder)
    for page in folder.rglob("*.md"):
        page.write_text(MARK.sub(lambda found: references.WRITERS[found[1]](), page.read_text()))


def settings() -> str:
    """Return agent.yaml with every default, as comments. The page on policies has it, and a test compares it."""
    (block,) = re.findall(r"^```yaml\n(listen: .*?)^```", (ROOT / "docs/policy.md").read_text(), re.M | re.S)
    return SETTINGS + "".join(f"#{line}\n" for line in block.splitlines())


# -- manual pages


def roff(text: str) -> str:
    """Return text in which nothing is a request of roff."""
    plain = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "")
    return re.sub(r"^(?=[.'])", r"\\&", plain, flags=re.MULTILINE)


def paragraphs(text: str) -> Iterator[str]:
    """Yield the lines of a command's help; what click is told not to wrap is not wrapped here."""
    for paragraph in text.split("\n\n"):
        kept = paragraph.startswith("\b\n")
        yield from (".PP", *([".nf"] if kept else []), roff(paragraph.removeprefix("\b\n").strip()))
        yield from [".fi"] if kept else []


def option(found: click.Option, context: click.Context) -> Iterator[str]:
    """Yield the lines of an option."""
    value = "" if found.is_flag else rf" \fI{roff(found.make_metavar(context))}\fR"
    names = ", ".join(rf"\fB{roff(name)}\fR" for name in (*found.opts, *found.secondary_opts))
    usual = f" The default is {found.default}." if found.show_default and found.default is not None else ""
    yield from (".TP", names + value, roff((found.help or "") + usual))


def manual(words: str, command: click.Command, inner: dict[str, click.Command]) -> str:
    """Return the manual page of a command. `inner`: its own commands, by the words that call them."""
    context, name = click.Context(command, info_name=words), words.replace(" ", "-")
    text = inspect.cleandoc(command.help or "")
    lines = [
        f'.TH {name.upper()} 1 "" "fgpu {fgpu_ebpf.__version__}" "fgpu"',
        ".SH NAME", f"{roff(name)} \\- {roff(text.split(chr(10))[0].rstrip('.'))}",
        ".SH SYNOPSIS", rf"\fB{roff(words)}\fR {roff(' '.join(command.collect_usage_pieces(context)))}",
        ".SH DESCRIPTION", *paragraphs(text),
    ]  # fmt: skip
    if found := references.options(command):
        lines += [".SH OPTIONS", *(line for one in found for line in option(one, context))]
    if inner:
        lines.append(".SH COMMANDS")
        for called, one in inner.items():
            lines += [".TP", rf"\fB{roff(called)}\fR", roff((one.help or "").split("\n")[0])]
    exits = "0 done, 1 a finding or a failure, 2 wrong usage, 3 the agent does not answer, 4 no such target."
    if words == "fgpu run":
        exits = "That of COMMAND, or 125 if fgpu itself fails."
    lines += [".SH EXIT STATUS", roff(exits), ".SH FILES"]
    for path, what in (("/etc/fgpu/policy.d", "policies"), ("/etc/fgpu/agent.yaml", "settings of the agent")):
        lines += [".TP", rf"\fI{roff(path)}\fR", what]
    above = words.rpartition(" ")[0].replace(" ", "-")
    also = [f".BR {roff(above)} (1)," if above else "", roff("/usr/share/doc/fgpu/docs/index.md")]
    return "\n".join([*lines, ".SH SEE ALSO", *filter(None, also)]) + "\n"


def manuals() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each manual page: one for every command."""
    known = dict(references.commands())
    for words, command in known.items():
        inner = {other: one for other, one in known.items() if other.rpartition(" ")[0] == words}
        yield f"{words.replace(' ', '-')}.1", manual(words, command, inner)


def write(stage: Path) -> None:
    """Write everything below a folder."""
    share = stage / "usr/share"
    pages(share / "doc/fgpu")
    (share / "doc/fgpu/examples/agent.yaml").write_text(settings())
    (share / "doc/fgpu/changelog.gz").write_bytes(gzip.compress((ROOT / "CHANGELOG.md").read_bytes(), mtime=0))
    (share / "man/man1").mkdir(parents=True, exist_ok=True)
    for name, text in manuals():
        (share / "man/man1" / f"{name}.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
