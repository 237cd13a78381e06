"""Tests of the ledger's indexes of devices: a device that has an index in the kernel keeps it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf.abi import DEVICES
from fgpu_ebpf.driver.device_indexes import index_of

UUIDS = st.lists(st.binary(min_size=16, max_size=16), unique=True, max_size=2 * DEVICES)


def test_a_known_device_keeps_its_index_and_no_other_device_gets_it() -> None:
    first, second, other = (bytes([n]) * 16 for n in (1, 2, 3))
    known = {first: 0, second: 1}
    assert index_of(second, 0, known, ()) == 1, "the device's index has changed after the other device was lost"
    assert index_of(other, 0, known, ()) == 2
    assert index_of(other, 5, known, ()) == 5
    assert index_of(other, 0, {}, ()) == 0


@given(UUIDS, st.lists(st.integers(0, DEVICES - 1), unique=True))
def test_no_two_devices_have_the_same_index(uuids: list[bytes], pinned: list[int]) -> None:
    known = dict(zip(uuids[::2], pinned, strict=False))
    used: dict[int, bytes] = {}
    for number, uuid in enumerate(uuids):
        index = index_of(uuid, number, known, used)
        if index is not None:
            assert index not in used
            assert 0 <= index < DEVICES
            assert known.get(uuid, index) == index
            used[index] = uuid
    assert len(used) >= min(len(uuids), DEVICES) - len(known)
