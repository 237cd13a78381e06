"""First instructions of drivers' functions: a probe is placed after a known comparison, otherwise at the first byte."""

from __future__ import annotations

import pytest

from fgpu_ebpf.driver import probe_plan

REAL = {
    "470.256.02": ("813d7e93510100ba1c327414ff25e659", 10),
    "535.261.03": ("813d4e7a920100ba1c32740cff257e07", 10),
    "570.133.07": ("813dc6130e0400ba1c32740cff250e0d", 10),
    "580.178.04": ("554889e541544883ec08813d2c688a05", 0),
    "615.71.09": ("813dce527b0600ba1c327434554889e5", 10),
}


@pytest.mark.parametrize("driver", REAL)
def test_functions_of_real_drivers_are_probed_at_the_right_offset(driver):
    code, shift = REAL[driver]
    assert probe_plan.shift(bytes.fromhex(code)) == shift


@pytest.mark.parametrize(
    ("code", "shift"),
    [
        ("833d0102030405 5548", 7),  # a comparison with a byte, then a push
        ("833d0102030405 4155", 0),  # the next instruction is not known to be emulated
        ("813d010203040506 0708", 0),  # the library ends here
        ("823d0102030405 74", 0),
        ("", 0),
    ],
)
def test_a_probe_follows_a_known_comparison_and_is_otherwise_at_the_first_byte(code, shift):
    assert probe_plan.shift(bytes.fromhex(code)) == shift
