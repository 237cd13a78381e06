"""Tests of the frame of `fgpu top`: given Snapshots in windows of given sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fgpu_ebpf.api.ranking import BY_WORD, Order
from fgpu_ebpf.cli import top_frame
from fgpu_ebpf.cli.top_frame import ASCII, UNICODE, Window
from fgpu_ebpf.cli.top_input import LatestSnapshot, ViewChoice
from fgpu_ebpf.snapshot import ParkingView
from tests.unit import top_kit as kit


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_frame.time, "localtime", top_frame.time.gmtime)


def lines(latest: LatestSnapshot, width: int, height: int, choice: ViewChoice | None = None) -> list[str]:
    text, _ = top_frame.live(latest, choice or ViewChoice(), Window(width, height))
    return text.plain.split("\n")


def test_the_frame_of_a_usual_window_has_all_columns() -> None:
    assert lines(kit.latest(*kit.ALL), 80, 9) == [
        "fgpu 00:00:01  4 tenants  by used",
        "0 NVIDIA H200 ▕██░░░░   ▏ 40GiB/160GiB ░committed 100GiB ▒unmanaged 0B turn: bob",
        "TENANT          LIMIT    USED    PEAK  SHARE ENTITLED WAITED REFUSED HELD BY",
        "batch (group)   12GiB   10GiB   10GiB      -        -      -       0 observe",
        "bob             16GiB    6GiB    6GiB  74.9%    75.0%   0.0s       0  kernel",
        "alice            8GiB    4GiB    4GiB  25.1%    25.0%  12.3s       3  kernel",
        "carol               -      0B    1MiB  alone        -   0.0s       0  kernel",
        "",
        "q quit  ↑↓ scroll  / filter  sort: a column's first letter  ? keys",
    ]


def test_the_list_of_keys_replaces_the_table() -> None:
    shown = lines(kit.latest(*kit.ALL), 80, 16, choice=ViewChoice(helping=True))
    assert shown[1].startswith("0 NVIDIA H200"), "the devices are not shown"
    assert any(line.startswith("h ?  ") for line in shown)
    assert not any("alice" in line for line in shown)
    assert shown[-1] == "any key: back"
    assert max(map(len, shown)) <= 80


def test_a_narrow_window_keeps_the_main_columns() -> None:
    assert lines(kit.latest(*kit.ALL), 40, 8) == [
        "fgpu 00:00:01  4 tenants  by used",
        "0 ▕███░░░░░     ▏ 40GiB/160GiB turn: bob",
        "TENANT          LIMIT    USED  SHARE",
        "batch (group)   12GiB   10GiB      -",
        "bob             16GiB    6GiB  74.9%",
        "alice            8GiB    4GiB  25.1%",
        "carol               -      0B  alone",
        "q quit  ↑↓ scroll  / filter",
    ]


@pytest.mark.parametrize("width", [1, 2, 5, 12, 20, 40, 79, 80, 99, 100, 132, 400])
@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 24, 100])
def test_the_frame_fits_any_window(width: int, height: int) -> None:
    wide = kit.tenant("日本" * 60, kit.on(0, 1), kit.on(1, 1))
    latest = kit.latest(
        *kit.ALL, wide, devices=(kit.device(0), kit.device(1)), error="no agent", unenforced="no driver"
    )
    text, _ = top_frame.live(latest, ViewChoice(), Window(width, height))
    drawn = text.split("\n", allow_blank=True)
    assert len(drawn) == height
    assert max(line.cell_len for line in drawn) <= width


def test_a_long_name_is_cut_and_moves_no_column() -> None:
    heading, first, second = lines(kit.latest(kit.ALICE, kit.tenant("x" * 99, kit.on(0, 1))), 80, 6)[2:5]
    assert second.startswith("xxxxxxxxxxxx")
    assert len(heading) == len(first) == len(second) <= 80
    assert "x… " in second
    assert second.endswith(" kernel")


def test_scrolling_beyond_the_last_row_shows_the_last_rows() -> None:
    latest = kit.latest(*(kit.tenant(f"t{number:02}", kit.on(0, number)) for number in range(30)))
    choice = ViewChoice(Order(BY_WORD["tenant"]), first=99)
    text, kept = top_frame.live(latest, choice, Window(80, 8))
    drawn = text.plain.split("\n")
    assert [line.split()[0] for line in drawn[3:7]] == ["t26", "t27", "t28", "t29"]
    assert drawn[-1].endswith("  27-30 of 30")
    assert kept.first == 26
    assert top_frame.room(latest, Window(80, 8)) == 4


def test_many_devices_leave_room_for_tenants() -> None:
    devices = tuple(kit.device(index) for index in range(16))
    drawn = lines(kit.latest(kit.tenant("alice", *(kit.on(gpu, 1) for gpu in range(16))), devices=devices), 80, 24)
    assert [line.split()[0] for line in drawn[1:7]] == ["0", "1", "2", "3", "4", "and"]
    assert drawn[6] == "and 11 more devices"
    assert drawn[7].split()[:3] == ["TENANT", "GPU", "LIMIT"]


def test_devices_are_listed_one_below_the_other() -> None:
    devices = (kit.device(0, owner="carol"), kit.device(10, used=kit.GIB // 2, owner=None, unmanaged=kit.GIB // 2))
    assert lines(kit.latest(kit.ALICE, devices=devices), 100, 9)[1:3] == [
        "0  NVIDIA H200 ▕████░░░░░░░      ▏  40GiB/160GiB   ░committed 100GiB  ▒unmanaged 0B      turn: carol",
        "10 NVIDIA H200 ▕░░░░░░░░░░░      ▏  512MiB/160GiB  ░committed 100GiB  ▒unmanaged 512MiB",
    ]


def test_a_filter_shows_how_many_rows_match() -> None:
    drawn = lines(kit.latest(*kit.ALL), 80, 6, ViewChoice(filter="ali", typing=True))
    assert drawn[0] == "fgpu 00:00:01  4 tenants  1 of them with 'ali'  by used"
    assert drawn[3].startswith("alice ")
    assert drawn[4] == ""
    assert drawn[5].startswith("/ali ")


def test_a_missing_answer_and_missing_enforcement_are_shown_in_one_line_each() -> None:
    drawn = lines(kit.latest(kit.ALICE, error="no agent answers", unenforced="no driver"), 80, 9)
    assert drawn[1] == "as of 00:00:01: no agent answers"
    assert drawn[2] == "No limit is enforced: no driver"
    assert drawn[5].startswith("alice ")


@pytest.mark.parametrize(
    ("used", "unmanaged", "bar"),
    [
        (40, 0, "▕██░░░   ▏"),
        (60, 20, "▕██▒░░░  ▏"),
        (160, 40, "▕██████▒▒▏"),
        (0, 0, "▕░░░░░   ▏"),
        (None, None, "▕░░░░░   ▏"),
    ],
)
def test_the_usage_bar_shows_used_unmanaged_and_committed_memory(
    used: int | None, unmanaged: int | None, bar: str
) -> None:
    used_bytes, others = (None if part is None else part * kit.GIB for part in (used, unmanaged))
    device = kit.latest(devices=(kit.device(0, used_bytes, None, others),)).snapshot["devices"][0]
    assert top_frame._bar(device, 8, UNICODE).plain == bar
    ascii_bar = bar.translate(str.maketrans("█▒░▕▏", "#x-[]"))
    assert top_frame._bar(device, 8, ASCII).plain == ascii_bar
    text = next(top_frame._bars([device], 80, UNICODE)).plain
    assert f" {'-' if used is None else f'{used}GiB' if used else '0B'}/160GiB " in text


def test_a_single_print_cuts_names_only_if_a_width_is_given() -> None:
    long = kit.tenant("team/" + "x" * 90 + "/main", kit.on(0, 1))
    text = top_frame.once(kit.latest(long, *kit.ALL), ViewChoice(), None, UNICODE).plain.split("\n")
    assert long.tenant in "\n".join(text)
    assert len(text) == 2 + 5
    assert " ".join(text[1].split()) == "TENANT LIMIT USED PEAK SHARE ENTITLED WAITED REFUSED HELD BY"
    cut = top_frame.once(kit.latest(long), ViewChoice(), 60, UNICODE).plain.split("\n")
    assert max(map(len, cut)) <= 60
    assert "…" in cut[2]


def test_a_tenant_that_does_not_run_has_its_state_behind_its_name() -> None:
    parked = replace(kit.tenant("alice", kit.on(0, 0)), parking=ParkingView("parked", 61.0, "", 1, 0, 1.5, 0.0))
    assert "alice (parked) " in top_frame.once(kit.latest(parked), ViewChoice(), None, UNICODE).plain
