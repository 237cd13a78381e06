"""Quantities: what people write, and what they are told when it is wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf.quantities import QuantityError, memory_bytes, memory_text


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("8GiB", 8 << 30),
        ("8Gi", 8 << 30),
        ("8192MiB", 8 << 30),
        ("1.5GiB", 3 << 29),
        ("1TiB", 1 << 40),
        ("4096", 4096),
        ("4096B", 4096),
        (" 2 KiB ", 2048),
    ],
)
def test_quantities(text, bytes_):
    assert memory_bytes(text) == bytes_


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("8GB", "did you mean 8GiB?"),
        ("8G", "did you mean 8GiB?"),
        ("8gb", "did you mean 8GiB?"),
        ("512m", "did you mean 512MiB?"),
        ("8 apples", "unknown unit"),
        ("50%", "no quantity"),
        ("-1GiB", "no quantity"),
        ("", "no quantity"),
        ("NaN", "no quantity"),
        ("1e9", "no quantity"),
        ("0", "between 1 byte and 128 TiB"),
        ("0.3B", "between 1 byte and 128 TiB"),
        ("9999999TiB", "between 1 byte and 128 TiB"),
    ],
)
def test_what_is_wrong_is_said(text, hint):
    with pytest.raises(QuantityError, match=hint):
        memory_bytes(text)


@given(st.text(max_size=40))
def test_any_text_is_a_quantity_or_a_quantity_error(text):
    try:
        good = 0 < memory_bytes(text) <= 2**47
    except QuantityError as error:
        good = bool(str(error))
    assert good


@given(st.integers(1, 2**47))
def test_plain_bytes_are_exact(bytes_):
    assert memory_bytes(str(bytes_)) == bytes_


def test_for_people():
    assert [memory_text(n) for n in (0, 518 << 20, 3 << 29, -(2 << 30))] == ["0B", "518MiB", "1.5GiB", "-2GiB"]
