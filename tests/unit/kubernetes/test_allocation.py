"""The name under which CDI knows a device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fgpu_ebpf.kubernetes.allocation import AllocationError, Gpus, Way

FIRST, SECOND = (f"GPU-{digit}f1d0a52-6c3b-4b0e-9d57-2f0c5a3b7e11" for digit in "45")


def way(folder: Path, gpus: Gpus, *names: str) -> Way:
    """Return the way of a host that has devices of these names in its specification."""
    devices = [{"name": name, "containerEdits": {}} for name in names]
    (folder / "nvidia.json").write_text(json.dumps({"kind": "nvidia.com/gpu", "devices": devices}))
    return Way(gpus=gpus, folders=(folder,))


@pytest.mark.parametrize("gpus", [Gpus.AUTO, Gpus.CDI])
def test_a_device_has_the_name_of_its_uuid(tmp_path: Path, gpus: Gpus) -> None:
    found, env = way(tmp_path, gpus, "0", "1", FIRST, SECOND).devices([SECOND, FIRST])
    assert found == [f"nvidia.com/gpu={SECOND}", f"nvidia.com/gpu={FIRST}"]
    assert env == {"NVIDIA_VISIBLE_DEVICES": "void"}


def test_a_name_that_is_an_index_is_not_used(tmp_path: Path) -> None:
    """NVIDIA's indexes change when a device vanishes, and the ledger's do not."""
    names = "0", "1", FIRST
    assert way(tmp_path, Gpus.AUTO, *names).devices([SECOND]) == ([], {"NVIDIA_VISIBLE_DEVICES": SECOND})
    with pytest.raises(AllocationError, match=f"no CDI specification has nvidia.com/gpu={SECOND}: run nvidia-ctk cdi"):
        way(tmp_path, Gpus.CDI, *names).devices([SECOND])
