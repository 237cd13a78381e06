"""Tests of the two forms of a device's UUID: the text of NVML and the bytes of a page."""

from __future__ import annotations

import pytest

from fgpu_ebpf.driver.nvml import uuid_bytes, uuid_text


def test_uuids_are_converted_to_bytes_and_text_and_invalid_uuids_are_refused() -> None:
    text = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert uuid_bytes(text) == bytes(range(16))
    assert uuid_text(bytes(range(16))) == text
    for wrong in ("", "GPU-", "GPU-00", text + "00", "GPU-zz010203-0405-0607-0809-0a0b0c0d0e0f"):
        with pytest.raises(ValueError, match=r"UUID|hex"):
            uuid_bytes(wrong)
    with pytest.raises(ValueError, match="16 bytes"):
        uuid_text(b"short")
