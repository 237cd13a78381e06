"""The Python layouts equal bpf/fgpu.h as the C compiler reads it: sizes, offsets, names, numbers."""

from __future__ import annotations

import ctypes
import enum
import inspect
import re
import subprocess
from pathlib import Path

import pytest

from fgpu_ebpf import abi

HEADER = Path(__file__).parents[2] / "bpf" / "fgpu.h"
OTHER_NAMES = {"FileKey": "fgpu_file"}
NOT_NUMBERS = {"H", "SOCKET_DIR", "SOCKET"}
FLAGS = {
    **{flag.name: flag for kind in (abi.LimitFlag, abi.ControlFlag) for flag in kind},
    **{f"SEEN_{flag.name}": flag for flag in abi.Seen},
    "GATE_OPEN": abi.Gate.OPEN,
    "GATED": abi.Gate.GATED,
}


def c_name(python: str) -> str:
    return OTHER_NAMES.get(python, "fgpu" + re.sub(r"([A-Z])", lambda m: "_" + m[1].lower(), python))


STRUCTS = {
    c_name(name): kind
    for name, kind in inspect.getmembers(abi, inspect.isclass)
    if issubclass(kind, ctypes.Structure) and kind is not ctypes.Structure
}
ENUMS = {
    c_name(name): kind
    for name, kind in inspect.getmembers(abi, inspect.isclass)
    if issubclass(kind, enum.IntEnum) and kind is not enum.IntEnum
}


def header_text() -> str:
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)


def header_enums() -> dict[str, list[str]]:
    found = re.findall(r"enum (\w+) \{(.*?)\}", header_text(), flags=re.S)
    return {name: re.findall(r"\w+", body) for name, body in found}


def header_fields() -> dict[str, list[str]]:
    found = re.findall(r"struct (\w+) \{(.*?)\n\}", header_text(), flags=re.S)
    return {name: re.findall(r"(\w+)(?:\[\w+\])?;", body) for name, body in found}


def header_numbers() -> list[str]:
    return [name for name in re.findall(r"#define FGPU_(\w+)", header_text()) if name not in NOT_NUMBERS]


def is_signed(form: type) -> bool:
    return form is ctypes.c_int64 or getattr(form, "_type_", None) is ctypes.c_int64


def python_facts() -> dict[str, int]:
    facts: dict[str, int] = {}
    for name, kind in STRUCTS.items():
        facts[f"sizeof(struct {name})"] = ctypes.sizeof(kind)
        for field in kind._fields_:
            place = getattr(kind, field[0])
            facts[f"offsetof(struct {name}, {field[0]})"] = place.offset
            facts[f"sizeof(((struct {name} *)0)->{field[0]})"] = place.size
    for name, members in ENUMS.items():
        for constant, member in zip(header_enums()[name], members, strict=True):
            facts[f"{constant} + 0"] = member.value
    for constant in header_numbers():
        facts[f"FGPU_{constant} + 0"] = FLAGS[constant] if constant in FLAGS else getattr(abi, constant)
    return facts


def c_facts(expressions: list[str], folder: Path) -> dict[str, int]:
    lines = "".join(f'    printf("%llu\\n", (unsigned long long)({text}));\n' for text in expressions)
    source = folder / "facts.c"
    source.write_text(f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\nint main(void)\n{{\n{lines}}}\n')
    subprocess.run(["cc", "-Wall", "-Werror", "-o", folder / "facts", source], check=True)
    said = subprocess.run([folder / "facts"], check=True, capture_output=True, text=True).stdout
    return dict(zip(expressions, map(int, said.split()), strict=True))


def test_sizes_offsets_and_numbers_equal_those_of_the_compiler(tmp_path: Path) -> None:
    facts = python_facts()
    assert len(facts) > 200
    assert facts == c_facts(list(facts), tmp_path)


def test_every_struct_and_field_of_the_header_has_a_python_layout() -> None:
    assert {name: [field[0] for field in kind._fields_] for name, kind in STRUCTS.items()} == header_fields()


def test_every_enum_and_constant_of_the_header_exists_in_python() -> None:
    tails = {name: [constant.removeprefix("FGPU_") for constant in body] for name, body in header_enums().items()}
    assert set(tails) == set(ENUMS)
    for name, constants in tails.items():
        prefix = name.removeprefix("fgpu_").upper() + "_"
        assert [constant.removeprefix(prefix) for constant in constants] == [member.name for member in ENUMS[name]]
    assert set(FLAGS) < set(header_numbers())


def test_signed_fields_equal_those_of_the_header() -> None:
    signed = re.findall(r"__s64 (\w+)", header_text())
    ours = [name for kind in STRUCTS.values() for name, form, *_ in kind._fields_ if is_signed(form)]
    assert sorted(ours) == sorted(signed)


def test_the_socket_s_folder_equals_that_of_the_header() -> None:
    assert f'#define FGPU_SOCKET_DIR "{abi.SOCKET_DIR}"' in HEADER.read_text()
    assert abi.SOCKET.startswith(abi.SOCKET_DIR + "/")


@pytest.mark.parametrize("page", [abi.UsagePage, abi.ControlPage, abi.StatusPage])
def test_page_layouts_fit_into_a_page(page: type[ctypes.Structure]) -> None:
    assert ctypes.sizeof(page) <= abi.PAGE_BYTES


def test_fields_that_agents_of_other_layouts_read_keep_their_offsets() -> None:
    """An agent of another layout, older or newer, reads these fields: see `other_layouts`.

    Never change these numbers.
    """
    page, usage = abi.UsagePage, abi.Usage
    assert (page.version.offset, page.cgroup.offset, page.place.offset, page.devices.offset) == (0, 8, 24, 64)
    assert (ctypes.sizeof(usage), usage.limit.offset, usage.used.offset, abi.DEVICES) == (32, 0, 8, 16)
    assert (abi.LevelDevice.cgroup.offset, abi.LevelDevice.device.offset) == (0, 8)
    assert (abi.Limit.bytes.offset, abi.Limit.flags.offset, abi.Device.uuid.offset) == (0, 8, 0)
    assert (abi.LimitFlag.OBSERVE, abi.UNCOMMITTED_SHIFT) == (1, 16)


def test_the_comparison_finds_a_wrong_layout(tmp_path: Path) -> None:
    """A single offset that is wrong by 4 bytes is found."""
    facts = python_facts()
    facts["offsetof(struct fgpu_control_page, epoch)"] += 4
    assert facts != c_facts(list(facts), tmp_path)
