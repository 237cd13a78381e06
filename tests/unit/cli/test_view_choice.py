"""Tests of the keys of `fgpu top`: how each key changes the view."""

from __future__ import annotations

from fgpu_ebpf.cli.top_input import ViewChoice

PAGE = 10


def after(*keys: str, count: int = 100, choice: ViewChoice | None = None) -> ViewChoice:
    found = choice or ViewChoice()
    for key in keys:
        pressed = found.pressed(key, PAGE)
        assert pressed is not None
        found = pressed.within(count, PAGE)
    return found


def test_scrolling_stays_within_the_rows() -> None:
    assert after("down", "j", "down", "k").first == 2
    assert after("up").first == 0
    assert after("page down", " ", "page up").first == 10
    assert after("end").first == 90
    assert after("end", "down").first == 90
    assert after("end", "home").first == 0
    assert after("down", count=3).first == 0


def test_the_key_of_an_order_scrolls_to_the_top_and_a_second_press_reverses_the_order() -> None:
    found = after("end", "r")
    assert (found.first, found.order.column.word, found.order.is_reversed) == (0, "refused", False)
    assert after("r", "r").order.is_reversed
    assert after("r", "m").order.column.word == "used"


def test_a_filter_is_typed_kept_and_cleared() -> None:
    typed = after("/", "q", "j", "x", "backspace", "up")
    assert (typed.filter, typed.typing, typed.first) == ("qj", True, 0)
    kept = after("enter", choice=typed)
    assert (kept.filter, kept.typing) == ("qj", False)
    assert after("escape", choice=typed) == after("escape", choice=kept) == ViewChoice()


def test_q_ends_top_and_keys_without_a_meaning_change_nothing() -> None:
    assert ViewChoice().pressed("q", PAGE) is None
    assert after("x", "enter", "\x1b[99~", "é") == ViewChoice()


def test_the_list_of_keys_is_shown_until_the_next_key() -> None:
    for key in ("h", "?"):
        helping = after("end", key)
        assert (helping.helping, helping.first) == (True, 90)
        for back in ("q", "r", key):
            assert after(back, choice=helping) == after("end")
    assert after("/", "h", "?").filter == "h?"
