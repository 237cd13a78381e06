#!/usr/bin/env python3
"""Write the documents of a package below STAGE/usr/share: `documents.py STAGE`.

Pages are copied to doc/fgpu, into the same folders as in the repository, so that links between them work, and their
generated parts are filled in. Manual pages are made from the commands, in man/man1. Examples are in doc/fgpu/examples.
Raises KeyError if a page has the mark of an unknown generated part.
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
LEFT_OUT = ("hooks", "site.css", "make.py", "grafana.py", "__pycache__")  # parts of the site, and generators
MARK = re.compile(r"<!-- generated: (\w+) -->")
SETTINGS = "# Settings of the agent: copy what you change to /etc/fgpu/agent.yaml. These are the defaults.\n"


def pages(folder: Path) -> None:
    """Write all pages below a folder, and the files that they link to."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for name in PAGES:
        shutil.copy(ROOT / name, folder)
    for page in folder.rglob("*.md"):
        page.write_text(MARK.sub(lambda found: references.WRITERS[found[1]](), page.read_text()))


def settings() -> str:
    """Return an agent.yaml that has every setting with its default, as a comment.

    The text is taken from docs/policy.md, which a test compares with the defaults of the code.
    """
    (block,) = re.findall(r"^```yaml\n(listen: .*?)^```", (ROOT / "docs/policy.md").read_text(), re.M | re.S)
    return SETTINGS + "".join(f"#{line}\n" for line in block.splitlines())


# -- manual pages


def roff(text: str) -> str:
    """Return text escaped for roff, so that none of it is a request."""
    plain = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "")
    return re.sub(r"^(?=[.'])", r"\\&", plain, flags=re.MULTILINE)


def paragraphs(text: str) -> Iterator[str]:
    r"""Yield the roff lines of a command's help. A paragraph that begins with \b is not wrapped, as in click."""
    for paragraph in text.split("\n\n"):
        kept = paragraph.startswith("\b\n")
        yield from (".PP", *([".nf"] if kept else []), roff(paragraph.removeprefix("\b\n").strip()))
        yield from [".fi"] if kept else []


def option(found: click.Option, context: click.Context) -> Iterator[str]:
    """Yield the roff lines of an option."""
    value = "" if found.is_flag else rf" \fI{roff(found.make_metavar(context))}\fR"
    names = ", ".join(rf"\fB{roff(name)}\fR" for name in (*found.opts, *found.secondary_opts))
    usual = f" The default is {found.default}." if found.show_default and found.default is not None else ""
    yield from (".TP", names + value, roff((found.help or "") + usual))


def manual(words: str, command: click.Command, inner: dict[str, click.Command]) -> str:
    """Return the manual page of a command.

    Args:
        words: the command as it is typed, such as `fgpu policy check`.
        command: the command.
        inner: its sub-commands, by the words that call them.
    """
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
    exits = (
        "0 done, 1 a finding or a failure, 2 wrong usage, 3 the agent does not answer, 4 no such target, "
        "5 a tenant is still parked."
    )
    if words == "fgpu run":
        exits = "The status of COMMAND, or 125 if fgpu itself fails."
    lines += [".SH EXIT STATUS", roff(exits), ".SH FILES"]
    for path, what in (("/etc/fgpu/policy.d", "policies"), ("/etc/fgpu/agent.yaml", "settings of the agent")):
        lines += [".TP", rf"\fI{roff(path)}\fR", what]
    above = words.rpartition(" ")[0].replace(" ", "-")
    also = [f".BR {roff(above)} (1)," if above else "", roff("/usr/share/doc/fgpu/docs/index.md")]
    return "\n".join([*lines, ".SH SEE ALSO", *filter(None, also)]) + "\n"


def manuals() -> Iterator[tuple[str, str]]:
    """Yield the file name and the text of the manual page of every command."""
    known = dict(references.commands())
    for words, command in known.items():
        inner = {other: one for other, one in known.items() if other.rpartition(" ")[0] == words}
        yield f"{words.replace(' ', '-')}.1", manual(words, command, inner)


def write(stage: Path) -> None:
    """Write all documents below a folder."""
    share = stage / "usr/share"
    pages(share / "doc/fgpu")
    (share / "doc/fgpu/examples/agent.yaml").write_text(settings())
    (share / "doc/fgpu/changelog.gz").write_bytes(gzip.compress((ROOT / "CHANGELOG.md").read_bytes(), mtime=0))
    (share / "man/man1").mkdir(parents=True, exist_ok=True)
    for name, text in manuals():
        (share / "man/man1" / f"{name}.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
