"""Major numbers of the driver's device nodes, and their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgpu_ebpf.driver import device_nodes

PROC_DEVICES = """Character devices:
  1 mem
195 nvidia
234 nvidia-nvswitch
236 nvidia-nvlink
237 nvidia-caps
238 nvidia-caps-imex-channels
506 nvidia-uvm

Block devices:
  7 loop
259 nvidia-no-character-device
"""


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "devices"
    file.write_text(PROC_DEVICES)
    monkeypatch.setattr(device_nodes, "DEVICES", file)
    return file


def test_all_character_devices_of_the_driver_are_found(devices: Path) -> None:
    assert set(device_nodes.majors()) == {195, 234, 236, 237, 238, 506}


def test_the_fixed_number_is_known_before_the_driver_is_loaded(devices: Path) -> None:
    devices.write_text("Character devices:\n  1 mem\n\nBlock devices:\n")
    assert set(device_nodes.majors()) == {195}


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        ((195, 255), "nvidiactl"),
        ((195, 254), "nvidia-modeset"),
        ((195, 3), "nvidia3"),
        ((506, 0), "nvidia-uvm"),
        ((77, 1), "77:1"),
    ],
)
def test_a_node_has_its_usual_name(devices: Path, numbers: tuple[int, int], name: str) -> None:
    assert device_nodes.name(*numbers) == name
