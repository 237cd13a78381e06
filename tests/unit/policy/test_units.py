"""Tests of quantities: their notations, and the message for each error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf.policy.units import MOST_BYTES, Amount, QuantityError, amount, memory_text


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("8GiB", 8 << 30),
        ("8Gi", 8 << 30),
        ("8192MiB", 8 << 30),
        ("1.5GiB", 3 << 29),
        ("1TiB", 1 << 40),
        ("4194304B", 4 << 20),
        (" 2048 KiB ", 2 << 20),
    ],
)
def test_valid_quantities_are_parsed(text, bytes_):
    assert amount(text) == Amount(bytes_)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("8GB", "did you mean 8GiB?"),
        ("8G", "did you mean 8GiB?"),
        ("8gb", "did you mean 8GiB?"),
        ("512m", "did you mean 512MiB?"),
        ("8 apples", "unknown unit"),
        ("6", "'6' has no unit: did you mean 6GiB?"),
        ("0.5", "did you mean 0.5GiB?"),
        ("8192", "did you mean 8192MiB?"),
        ("8589934592", "did you mean 8GiB?"),
        ("8592031744", "did you mean 8194MiB?"),
        ("8589934593", "did you mean 8589934593B?"),
        ("6B", "is less than the driver's unit of allocation: write at least 2MiB"),
        ("150%", "must be above 0% and at most 100%"),
        ("-1GiB", "not a memory size"),
        ("", "not a memory size"),
        ("NaN", "not a memory size"),
        ("1e9", "not a memory size"),
        ("0", "between 1 byte and 128 TiB"),
        ("0.3B", "between 1 byte and 128 TiB"),
        ("1.7GiB", "'1.7GiB' is not a whole number of bytes: did you mean 1740MiB?"),
        ("9999999TiB", "between 1 byte and 128 TiB"),
    ],
)
def test_invalid_quantities_are_refused_with_a_hint(text, hint):
    with pytest.raises(QuantityError, match=hint):
        amount(text)


@given(st.text(max_size=40))
def test_any_text_is_a_quantity_or_a_quantity_error(text):
    try:
        good = amount(text).of(MOST_BYTES) > 0
    except QuantityError as error:
        good = bool(str(error))
    assert good


@given(st.integers(2 << 20, 2**47))
def test_bytes_are_exact(bytes_):
    assert amount(f"{bytes_}B") == Amount(bytes_)


@given(st.decimals(0, MOST_BYTES, places=3).map(str) | st.integers(0, MOST_BYTES).map(str))
def test_a_number_without_a_unit_is_refused_with_a_suggestion_that_can_be_typed(number):
    with pytest.raises(QuantityError) as refused:
        amount(number)
    if float(number):
        suggestion = str(refused.value).removesuffix("?").split("did you mean ")[1]
        assert suggestion.startswith(number) or amount(suggestion) == Amount(int(number))


def test_quantities_are_printed_with_the_largest_unit():
    assert [memory_text(n) for n in (0, 518 << 20, 3 << 29, -(2 << 30))] == ["0B", "518MiB", "1.5GiB", "-2GiB"]
