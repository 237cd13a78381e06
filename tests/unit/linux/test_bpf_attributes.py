"""The Python layouts of the arguments of bpf(2) and perf_event_open(2) equal those of the kernel's headers."""

from __future__ import annotations

import ctypes
import errno
import subprocess
from pathlib import Path

import pytest

from fgpu_ebpf.linux import bpf
from fgpu_ebpf.linux import bpf_attributes as attributes

MEMBERS = {  # class -> where its fields are in union bpf_attr
    attributes.MapCreateAttr: "",
    attributes.ProgLoadAttr: "",
    attributes.MapElemAttr: "",
    attributes.BatchAttr: "batch.",
    attributes.IdAttr: "",
    attributes.ObjAttr: "",
    attributes.TestRunAttr: "test.",
    attributes.RawTracepointAttr: "raw_tracepoint.",
    attributes.LinkCreateAttr: "link_create.",
}
LINKS = {
    attributes.PerfEventLinkAttr.perf_event: (attributes.PerfEventLink, "link_create.perf_event."),
    attributes.UprobeMultiLinkAttr.uprobe_multi: (attributes.UprobeMultiLink, "link_create.uprobe_multi."),
}
NOT_NAMED = {"bits", "unused"}  # of struct perf_event_attr: a bit field, and the fields that fgpu does not set


def python_facts() -> dict[str, tuple[int, int]]:
    """Return offset and size of each field, by the C expression that names it."""
    facts = {}
    for kind, prefix in MEMBERS.items():
        for name, *_ in kind._fields_:
            field = getattr(kind, name)
            facts[f"union bpf_attr, {prefix}{name}"] = (field.offset, field.size)
    for member, (kind, prefix) in LINKS.items():
        for name, *_ in kind._fields_:
            field = getattr(kind, name)
            facts[f"union bpf_attr, {prefix}{name}"] = (member.offset + field.offset, field.size)
    for name, *_ in attributes.PerfEventAttr._fields_:
        if name not in NOT_NAMED:
            field = getattr(attributes.PerfEventAttr, name)
            facts[f"struct perf_event_attr, {name}"] = (field.offset, field.size)
    return facts


def c_facts(expressions: list[str], folder: Path) -> dict[str, tuple[int, int]]:
    lines = []
    for text in expressions:
        kind, field = text.split(", ")
        lines.append(f'printf("%zu %zu\\n", offsetof({kind}, {field}), sizeof((({kind} *)0)->{field}));')
    source = folder / "facts.c"
    body = "\n".join(lines)
    headers = "#include <stddef.h>\n#include <stdio.h>\n#include <linux/bpf.h>\n#include <linux/perf_event.h>\n"
    source.write_text(f"{headers}int main(void)\n{{\n{body}\n}}\n")
    subprocess.run(["cc", "-Wall", "-Werror", "-o", folder / "facts", source], check=True)
    out = subprocess.run([folder / "facts"], check=True, capture_output=True, text=True).stdout
    return {text: tuple(map(int, line.split())) for text, line in zip(expressions, out.splitlines(), strict=True)}


def has_uprobe_multi() -> bool:
    """Return whether the headers have the fields that Linux 6.6 added."""
    return "uprobe_multi" in Path("/usr/include/linux/bpf.h").read_text()


def test_offsets_and_sizes_of_arguments_equal_those_of_the_kernel_headers(tmp_path: Path) -> None:
    facts = python_facts()
    if not has_uprobe_multi():
        facts = {text: fact for text, fact in facts.items() if "uprobe_multi" not in text}
    assert len(facts) > 50
    assert facts == c_facts(list(facts), tmp_path)
    assert ctypes.sizeof(attributes.PerfEventAttr) == 128, "the size is not PERF_ATTR_SIZE_VER7"


def test_fields_of_uprobe_multi_have_the_offsets_of_linux_6_6() -> None:
    member, kind = attributes.UprobeMultiLinkAttr.uprobe_multi, attributes.UprobeMultiLink
    offsets = [member.offset + getattr(kind, name).offset for name, *_ in kind._fields_]
    assert offsets == [16, 24, 32, 40, 48, 52, 56]


@pytest.mark.parametrize("interrupted", [0, 1, 4, 5])
def test_a_load_that_signals_interrupt_is_repeated_at_most_four_times(
    monkeypatch: pytest.MonkeyPatch, interrupted: int
) -> None:
    left = [errno.EAGAIN] * interrupted

    def load(*_: object) -> int:
        if left:
            raise OSError(left.pop(), "interrupted")
        return 7

    monkeypatch.setattr(bpf, "_bpf", load)
    if interrupted < 5:
        assert bpf.load_program("some", b"", True) == 7
    else:
        with pytest.raises(BlockingIOError):
            bpf.load_program("some", b"", True)
    assert not left


def test_a_program_that_the_verifier_refuses_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(*words: object) -> int:
        calls.append(words)
        raise OSError(errno.EACCES, "refused")

    monkeypatch.setattr(bpf, "_bpf", load)
    with pytest.raises(PermissionError):
        bpf.load_program("some", b"", True)
    assert len(calls) == 1
