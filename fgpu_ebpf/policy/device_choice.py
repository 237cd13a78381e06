"""The parser of an item of `devices:`, in policies and profiles and for the DRA driver. The function has no state."""

from __future__ import annotations

import re
from typing import Any

from fgpu_ebpf import abi
from fgpu_ebpf.policy.globs import name_globs
from fgpu_ebpf.policy.rules import DeviceChoice
from fgpu_ebpf.policy.units import shown

_UUID = re.compile(r"gpu-[0-9a-f-]{1,36}")


def device_choice(value: Any) -> DeviceChoice:
    """Return the devices of an index, a UUID or its beginning, or a model with wildcards.

    Raise ValueError for any other value.
    """
    text = str(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError("is not a device: write an index, a UUID or a model, as in [0, GPU-1f3a, '*H200*']")
    if re.fullmatch("-?[0-9]+", text):
        if len(text) > 2 or not 0 <= int(text) < abi.DEVICES:
            raise ValueError(f"{shown(text)} is not an index of a device: write 0 to {abi.DEVICES - 1}")
        return DeviceChoice(text, index=int(text))
    if text.upper().startswith(("GPU-", "MIG-")):
        if not _UUID.fullmatch(text.lower()):
            raise ValueError(
                f"{shown(text)} is not the UUID of a whole device: write a UUID (GPU-1f3a…) or its beginning"
            )
        return DeviceChoice(text, uuid=text.lower())
    return DeviceChoice(text, model=name_globs([text]))
