"""Tests of profiles: the list in agent.yaml, how many of each a device holds, and which of them kubelet gets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from fgpu_ebpf.agent import host_config, offers
from fgpu_ebpf.kubernetes import slots
from fgpu_ebpf.kubernetes.slots import Book, Slot, SlotError, host_of
from fgpu_ebpf.policy import share_name
from fgpu_ebpf.tenancy import profiles
from fgpu_ebpf.tenancy.profiles import Profile, ProfileError

GIB = 1 << 30
ONE, TWO = (f"GPU-00000000-0000-4000-8000-00000000000{n}" for n in (1, 2))


@dataclass(frozen=True)
class Device:
    index: int = 0
    uuid_text: str = ONE
    name: str = "NVIDIA T4"
    usable_bytes: int = 16 * GIB


def read(tmp_path, text: str) -> Any:
    file = tmp_path / "agent.yaml"
    file.write_text(text)
    return host_config.read(file, root_only=False)


# -- settings ------------------------------------------------------------------------------------------------------


def test_agent_yaml_lists_the_profiles(tmp_path):
    host, errors = read(
        tmp_path, "profiles: [{share: 8gib-50pct, count: 2}, {share: 4gib, devices: ['1', GPU-0000]}]\n"
    )
    assert not errors
    first, second = host.profiles
    assert (first, second.share, second.count) == (Profile("8gib-50pct", 2), "4gib", None)
    assert [second.is_of(Device(index)) for index in (0, 1)] == [True, True], "the device is identified by its UUID"
    assert [second.is_of(Device(index, TWO.replace("0000", "1111", 1))) for index in (0, 1)] == [False, True]
    assert host_config.HostSettings().profiles == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("share: all-50pct", "'all-50pct' is not a profile: write memory"),
        (f"share: '8gib:{ONE}'", "is not a profile: write memory and no device"),
        ("share: 8gb", "'8gb' is not a share"),
        ("share: 1000.125gib-12.5pct", "is longer than 16 characters"),
        ("share: 8gib, count: 0", "count"),
        ("share: 8gib, count: 129", "count"),
        ("share: 8gib, number: 2", "number"),
        ("count: 2", "share"),
        ("share: 8gib}, {share: 8gib", "'8gib' is listed twice: join the two entries"),
    ],
)
def test_invalid_profiles_are_refused(tmp_path, text, said):
    host, errors = read(tmp_path, f"listen: 127.0.0.1:1\nprofiles:\n  [{{{text}}}]\n")
    assert host is None
    assert said in str(errors[0])
    assert "agent.yaml:" in str(errors[0])


# -- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "counted"),
    [
        ([Profile("8gib-50pct")], {"8gib-50pct": 2}),
        ([Profile("1gib-50pct")], {"1gib-50pct": 2}),  # limited by time
        ([Profile("1gib-50pct", 4)], {"1gib-50pct": 4}),  # a ceiling guarantees no time, so agent.yaml may list more
        ([Profile("1gib")], {"1gib": 16}),
        ([Profile("2mib")], {"2mib": profiles.MOST_COUNT}),
        ([Profile("50pct", 1), Profile("3gib")], {"50pct": 1, "3gib": 2}),
        ([Profile("8gib"), Profile("4gib")], {"8gib": 2, "4gib": 4}),  # each counted as the only profile
        ([Profile("8gib", 2), Profile("4gib")], {"8gib": 2}),
        ([Profile("17gib")], {}),
    ],
)
def test_a_device_holds_the_expected_number_of_each_profile(listed, counted):
    assert profiles.counts(listed, Device(), overcommit=False) == counted


def test_counts_that_do_not_fit_together_are_refused():
    listed = [Profile("8gib", 1), Profile("3gib", 3)]
    with pytest.raises(ProfileError, match="1 of 8gib, 3 of 3gib would take 17GiB of 16GiB on device 0"):
        profiles.counts(listed, Device(), overcommit=False)
    assert profiles.counts(listed, Device(), overcommit=True) == {"8gib": 1, "3gib": 3}


def test_containers_can_request_each_profile_on_each_device():
    devices = [Device(), Device(1, TWO)]
    found = profiles.names([Profile("8gib"), Profile("4gib", devices=())], devices)
    assert found == [f"{share}:{uuid}" for share in ("8gib", "4gib") for uuid in (ONE, TWO)]
    share = share_name.parse(found[3])
    assert (share.name, share.device, share.text) == ("4gib", TWO, found[3])


def test_the_numa_node_of_a_device_is_read_and_none_if_unknown(tmp_path):
    for name, text in (("0000:0f:00.0", "1\n"), ("0001:00:00.0", "-1\n"), ("0000:10:00.0", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "numa_node").write_text(text)
    found = [offers.numa(pci, tmp_path) for pci in ("00000000:0F:00.0", "00000001:00:00.0", "0000:10:00.0", "?", "")]
    assert found == [1, None, None, None, None]


# -- slots ---------------------------------------------------------------------------------------------------------


def told(free: int = 16, taken: int = 0, fault: str = "", overcommit: bool = False, **more: Any) -> slots.Host:
    """Return a host with one device and two profiles that overlap."""

    def profile(share: str, size: int, count: int, taken: int) -> dict[str, Any]:
        fits = count if overcommit else free // size
        sizes = {"bytes": size * GIB, "count": count, "taken": taken, "fits": fits}
        return {"share": share, "memory": f"{size}GiB", "compute": "", **sizes}

    both = [profile("8gib", 8, 2, taken), profile("4gib", 4, 4, 0)]
    of = {"uuid": ONE, "index": 0, "numa": None, "fault": fault, "capacity_bytes": 16 * GIB}
    return host_of({"fault": "", "mounts": [], "devices": [{**of, "free_bytes": free * GIB, "profiles": both}], **more})


def numbers(found: set[Slot]) -> list[int]:
    return sorted(slot.number for slot in found)


def test_the_number_of_healthy_ids_is_that_of_taken_and_of_still_fitting_profiles():
    book = Book()
    assert not book.healthy("8gib")
    for free, taken, eights, fours in ((16, 0, 2, 4), (8, 1, 2, 2), (7, 1, 1, 1), (0, 2, 2, 0), (0, 0, 0, 0)):
        book.look(told(free, taken))
        assert (len(book.healthy("8gib")), len(book.healthy("4gib"))) == (eights, fours), (free, taken)
    for unfit in (told(fault="lost"), replace(told(), fault="no agent")):
        book.look(unfit)
        assert not book.healthy("4gib")
    book.look(told(free=0, overcommit=True))
    assert numbers(book.healthy("8gib")) == [0, 1]


def test_a_promise_holds_until_its_use_or_its_expiry():
    book = Book()
    book.look(told(), now=0)
    slot = Slot(ONE, "8gib", 1)
    book.promise([slot], now=0)
    assert numbers(book.healthy("8gib")) == [0, 1]
    assert numbers(book.healthy("4gib")) == [0, 1]
    assert not book.shortage([slot]), "a slot's own promise counts against the slot"
    book.promise([Slot(ONE, "8gib", 0)], now=1)
    assert "4GiB do not fit on" in book.shortage([Slot(ONE, "4gib", 0)])
    book.look(told(free=8, taken=1), now=2)
    assert len(book.healthy("8gib")) == 2
    assert not book.healthy("4gib"), "one slot is taken, and the other is promised"
    book.look(told(free=8, taken=1), now=2 + slots.PROMISE_SECONDS)
    assert numbers(book.healthy("4gib")) == [0, 1]


def test_a_promise_ends_at_its_use_although_another_share_ends_too():
    book, name = Book(), f"8gib:{ONE}"
    book.look(told(free=8, taken=1, started={name: 1}))
    book.promise([Slot(ONE, "8gib", 0)])
    assert "8GiB do not fit on" in book.shortage([Slot(ONE, "8gib", 1)])
    book.look(told(free=8, taken=1, started={name: 2}))
    assert not book.shortage([Slot(ONE, "8gib", 1)])
    assert numbers(book.healthy("4gib")) == [0, 1]
    book.promise([Slot(ONE, "8gib", 1)])
    book.look(told(free=8, taken=1))  # the agent has restarted
    book.look(told(free=0, taken=2, started={name: 1}))
    book.look(told(free=8, taken=1, started={name: 1}))
    assert not book.shortage([Slot(ONE, "8gib", 0)])


def test_a_promise_of_two_containers_in_one_slot_ends_with_the_second():
    """Kubelet gives the slot of an init container to a container of the same pod, which starts afterwards."""
    book, name, slot = Book(), f"8gib:{ONE}", Slot(ONE, "8gib", 0)
    book.look(told())
    book.promise([slot])
    book.promise([slot])
    assert (numbers(book.healthy("8gib")), numbers(book.healthy("4gib"))) == ([0, 1], [0, 1]), "one share is promised"
    book.look(told(free=8, taken=1, started={name: 1}))
    assert not book.shortage([Slot(ONE, "8gib", 1)]), "the two containers never run at the same time"
    assert (numbers(book.healthy("8gib")), numbers(book.healthy("4gib"))) == ([0, 1], [0, 1])
    book.look(told(started={name: 1}))
    assert (numbers(book.healthy("8gib")), numbers(book.healthy("4gib"))) == ([0, 1], [0, 1]), (
        "the second has not begun"
    )
    book.look(told(free=8, taken=1, started={name: 2}))
    assert (numbers(book.healthy("8gib")), numbers(book.healthy("4gib"))) == ([0, 1], [0, 1])
    book.look(told(started={name: 2}))
    assert numbers(book.healthy("4gib")) == [0, 1, 2, 3]


def test_an_init_container_that_ends_at_once_leaves_the_promise_of_the_next_container():
    book, name, slot = Book(), f"8gib:{ONE}", Slot(ONE, "8gib", 0)
    book.look(told())
    for _ in range(2):
        book.promise([slot])
    book.look(told(started={name: 1}))
    assert numbers(book.healthy("4gib")) == [0, 1]
    book.look(told(started={name: 2}))
    assert numbers(book.healthy("4gib")) == [0, 1, 2, 3]


def test_containers_that_start_at_the_same_time_use_promises_of_different_slots():
    book, name = Book(), f"8gib:{ONE}"
    book.look(told())
    for _ in range(2):
        book.promise([Slot(ONE, "8gib", 0), Slot(ONE, "8gib", 1)])
    book.look(told(free=0, taken=2, started={name: 2}))
    book.look(told(free=8, taken=1, started={name: 2}))
    assert not book.healthy("4gib"), "a container of each slot has not begun"
    book.look(told(free=0, taken=2, started={name: 4}))
    book.look(told(free=8, taken=1, started={name: 4}))
    assert numbers(book.healthy("4gib")) == [0, 1], "a promise ends with the last container"


def test_the_promise_of_a_pod_that_never_started_ends_when_another_pod_gets_its_slot():
    book, name, (first, second) = Book(), f"8gib:{ONE}", (Slot(ONE, "8gib", number) for number in (0, 1))
    book.look(told(), now=0)
    book.promise([second], now=0)
    book.look(told(free=8, taken=1, started={name: 1}), now=1)
    book.promise([first], now=2)
    book.promise([first], now=20)
    book.look(told(free=0, taken=2, started={name: 2}), now=25)
    book.look(told(free=8, taken=1, started={name: 2}), now=60)
    assert not book.shortage([second])
    assert numbers(book.healthy("4gib")) == [0, 1]


def test_the_end_of_another_container_is_not_that_of_an_init_container_that_runs():
    """Kubelet requests a slot again only after the slot's container has ended."""
    book, name, (first, second) = Book(), f"8gib:{ONE}", (Slot(ONE, "8gib", number) for number in (0, 1))
    book.look(told())
    book.promise([second])
    book.look(told(free=8, taken=1, started={name: 1}))
    for _ in range(2):
        book.promise([first])
    book.look(told(free=0, taken=2, started={name: 2}))
    book.look(told(free=8, taken=1, started={name: 2}))
    assert not book.shortage([second])
    assert "4GiB do not fit on" in book.shortage([Slot(ONE, "4gib", 0)]), "the init container may have ended"


def test_a_slot_that_was_used_before_does_not_end_the_promise_of_another_slot():
    book, name, (first, second) = Book(), f"8gib:{ONE}", (Slot(ONE, "8gib", number) for number in (0, 1))
    book.look(told(free=8))  # two containers have 4 GiB each
    book.promise([second])
    book.look(told(free=8, started={name: 1}))
    for _ in range(2):
        book.promise([first])
    book.look(told(free=0, taken=1, started={name: 2}))
    book.look(told(free=8, started={name: 2}))
    assert "8GiB do not fit on" in book.shortage([second]), "the second container of the slot has not begun"


def test_all_ids_are_healthy_if_the_agent_counts_no_container_with_a_share():
    """Policies set the limits of the strategy `mounts`, so `taken` stays 0 while memory is committed."""
    book, slots_ = Book(is_counted=False), [Slot(ONE, "8gib", number) for number in (0, 1)]
    book.look(told())
    book.promise(slots_[:1])
    book.look(told(free=8))
    assert numbers(book.healthy("8gib")) == [0, 1]
    assert not book.shortage(slots_[1:])
    book.look(told(free=4))
    assert numbers(book.healthy("8gib")) == [0, 1]
    assert "8GiB do not fit on" in book.shortage(slots_[1:])
    for unfit in (told(fault="lost"), replace(told(), fault="no agent")):
        book.look(unfit)
        assert not book.healthy("8gib")


def test_allocated_ids_stay_healthy():
    """Kubelet does not report which ids are in use. The id that it requested last is in use, so it stays healthy."""
    book = Book()
    book.look(told())
    book.promise([Slot(ONE, "8gib", 1)])
    book.look(told(free=0, taken=1))
    assert numbers(book.healthy("8gib")) == [1]


@pytest.mark.parametrize(
    "id_", ["", "::", f"{ONE}::8gib::2", f"{ONE}::8gib::01", f"{ONE}::8gib::\u0661", f"{TWO}::8gib::0"]
)
def test_invalid_ids_are_refused(id_):
    book = Book()
    book.look(told())
    with pytest.raises(SlotError, match=r"is not the id of a slot of fgpu\.dev/8gib"):
        book.read("8gib", [id_])


def test_an_answer_of_another_version_s_agent_is_refused():
    for answer in ({}, {"devices": [{}]}, {"fault": "", "devices": [{"uuid": ONE}], "mounts": []}, []):
        with pytest.raises((KeyError, TypeError)):
            host_of(answer)
