"""Names of tenants are unique after any history, kept over restarts, and given in the order of cgroups' creation."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgpu_ebpf.tenancy.tenant import Source, Tenant
from fgpu_ebpf.tenancy.tenant_names import FILE, TenantNames
from fgpu_ebpf.workloads.workload import NAME_CHARACTERS, Workload


def tenant(cgroup: int, name: str) -> Tenant:
    return Tenant(Workload(cgroup, f"/{cgroup}", name), name, Source.POLICY, "", {})


def put(names: TenantNames, *tenants: Tenant) -> dict[int, str]:
    named = names.named(tenants)
    names.enter(named)
    return {one.cgroup: one.name for one in named}


def anywhere(path: str) -> int:
    """Return the id of the cgroup at a path, as if the cgroups of all tenants existed."""
    return int(path[1:])


# Few names, so that they collide. Some equal another tenant's name with that tenant's id behind it.
words = st.sampled_from(["job", "job-2", "job-3", "job-2-2", "job-3.2", "x" * NAME_CHARACTERS])
batches = st.lists(
    st.tuples(
        st.dictionaries(st.integers(1, 6), words, max_size=6),  # put
        st.sets(st.integers(1, 6), max_size=3),  # then forgotten
        st.sets(st.integers(1, 6), max_size=2),  # then removed, with memory left behind
        st.booleans(),  # then a restart
    ),
    max_size=6,
)


@settings(deadline=None)  # the test writes files
@given(batches, st.randoms())
def test_names_are_unique_after_any_history(tmp_path_factory, history, chance: random.Random):
    file = tmp_path_factory.mktemp("run") / FILE
    names, have, ended = TenantNames(), dict[int, str](), set[int]()
    names.keep_in(file, anywhere)
    for batch, forgotten, gone, restart in history:
        tenants = [tenant(cgroup, word) for cgroup, word in batch.items() if cgroup not in ended]
        chance.shuffle(tenants)
        have |= put(names, *tenants)
        names.forget(forgotten)
        have = {cgroup: name for cgroup, name in have.items() if cgroup not in forgotten}
        for cgroup in gone & have.keys() - ended:
            have[cgroup] = names.outlive(tenant(cgroup, have[cgroup])).name
        ended |= gone
        if restart:
            have = {cgroup: name for cgroup, name in have.items() if cgroup not in ended}
            names = TenantNames()
            names.keep_in(file, {f"/{cgroup}": cgroup for cgroup in range(1, 7) if cgroup not in ended}.get)
        assert len(set(have.values())) == len(have)
        assert {name: names.owner(name) for name in have.values()} == {name: c for c, name in have.items()}
        assert all(len(name) <= NAME_CHARACTERS for name in have.values())


def test_the_oldest_cgroup_of_a_batch_has_the_name_without_a_suffix():
    for order in ((2, 3, 5), (5, 3, 2), (3, 5, 2)):
        assert put(TenantNames(), *(tenant(c, "job") for c in order)) == {2: "job", 3: "job-3", 5: "job-5"}


def test_a_restart_keeps_each_name(tmp_path):
    names = TenantNames()
    names.keep_in(tmp_path / FILE, anywhere)
    for cgroup in (3, 2, 5):
        put(names, tenant(cgroup, "job"))
    put(names, tenant(7, "job"))
    names.forget([5])
    again = TenantNames()
    again.keep_in(tmp_path / FILE, anywhere)
    assert put(again, *(tenant(c, "job") for c in (2, 7, 3, 9))) == {3: "job", 2: "job-2", 7: "job-7", 9: "job-9"}


def test_a_removed_cgroup_keeps_no_name(tmp_path):
    names = TenantNames()
    names.keep_in(tmp_path / FILE, anywhere)
    put(names, tenant(2, "job"))
    again = TenantNames()
    again.keep_in(tmp_path / FILE, lambda _: 11)  # another cgroup has this path now
    assert put(again, tenant(3, "job")) == {3: "job"}


def test_a_name_follows_the_tenant_s_label():
    names = TenantNames()
    put(names, tenant(2, "job"), tenant(3, "job"))
    assert put(names, tenant(3, "team/pod")) == {3: "team/pod"}
    assert put(names, tenant(5, "job-3")) == {5: "job-3"}


def test_the_end_of_one_tenant_changes_no_other_name():
    names = TenantNames()
    put(names, tenant(2, "job"), tenant(3, "job"))
    names.forget([3])
    assert names.owner("job") == 2
    names.forget([2])
    assert put(names, tenant(5, "job")) == {5: "job"}


@pytest.mark.parametrize("text", ["", "{", "[1]", "[[1]]", '[["x", 1, 2]]', "null", "[" * 1000, "5"])
def test_an_unreadable_file_has_no_names(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    names = TenantNames()
    names.keep_in(tmp_path / FILE, anywhere)
    assert put(names, tenant(2, "job")) == {2: "job"}


def test_a_file_that_cannot_be_written_causes_a_warning_and_no_error(tmp_path, caplog):
    names = TenantNames()
    names.keep_in(tmp_path / "nowhere" / FILE, anywhere)
    assert put(names, tenant(2, "job"), tenant(3, "job")) == {2: "job", 3: "job-3"}
    assert "names of tenants cannot be stored" in caplog.text
