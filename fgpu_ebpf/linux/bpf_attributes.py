"""The arguments of bpf(2) and perf_event_open(2) as ctypes, with the kernel's names of fields.

The classes are members of `union bpf_attr` (bpf/include/uapi/linux/bpf.h) and struct perf_event_attr, up to the last
field that fgpu uses. The kernel treats fields that are not passed as zeros.
"""

from __future__ import annotations

from ctypes import Structure, c_char
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64


class MapCreateAttr(Structure):
    """The arguments of BPF_MAP_CREATE."""

    _fields_ = (
        ("map_type", u32),
        ("key_size", u32),
        ("value_size", u32),
        ("max_entries", u32),
        ("map_flags", u32),
        ("inner_map_fd", u32),
        ("numa_node", u32),
        ("map_name", c_char * 16),
    )


class ProgLoadAttr(Structure):
    """The arguments of BPF_PROG_LOAD."""

    _fields_ = (
        ("prog_type", u32),
        ("insn_cnt", u32),
        ("insns", u64),
        ("license", u64),
        ("log_level", u32),
        ("log_size", u32),
        ("log_buf", u64),
        ("kern_version", u32),
        ("prog_flags", u32),
        ("prog_name", c_char * 16),
        ("prog_ifindex", u32),
        ("expected_attach_type", u32),
    )


class MapElemAttr(Structure):
    """The arguments of BPF_MAP_{LOOKUP,UPDATE,DELETE}_ELEM. BPF_MAP_FREEZE uses only `map_fd`."""

    _fields_ = (("map_fd", u32), ("key", u64), ("value", u64), ("flags", u64))


class BatchAttr(Structure):
    """The arguments of BPF_MAP_{LOOKUP,UPDATE,DELETE}_BATCH."""

    _fields_ = (
        ("in_batch", u64),
        ("out_batch", u64),
        ("keys", u64),
        ("values", u64),
        ("count", u32),
        ("map_fd", u32),
        ("elem_flags", u64),
        ("flags", u64),
    )


class IdAttr(Structure):
    """The arguments of BPF_MAP_GET_FD_BY_ID."""

    _fields_ = (("map_id", u32), ("next_id", u32), ("open_flags", u32))


class ObjAttr(Structure):
    """The arguments of BPF_OBJ_PIN and BPF_OBJ_GET."""

    _fields_ = (("pathname", u64), ("bpf_fd", u32), ("file_flags", u32))


class TestRunAttr(Structure):
    """The arguments of BPF_PROG_TEST_RUN."""

    _fields_ = (
        ("prog_fd", u32),
        ("retval", u32),
        ("data_size_in", u32),
        ("data_size_out", u32),
        ("data_in", u64),
        ("data_out", u64),
        ("repeat", u32),
        ("duration", u32),
        ("ctx_size_in", u32),
        ("ctx_size_out", u32),
        ("ctx_in", u64),
        ("ctx_out", u64),
    )


class RawTracepointAttr(Structure):
    """The arguments of BPF_RAW_TRACEPOINT_OPEN."""

    _fields_ = (("name", u64), ("prog_fd", u32))


class PerfEventLink(Structure):
    """The member `link_create.perf_event` of bpf_attr."""

    _fields_ = (("bpf_cookie", u64),)


class UprobeMultiLink(Structure):
    """The member `link_create.uprobe_multi` of bpf_attr (Linux 6.6)."""

    _fields_ = (
        ("path", u64),
        ("offsets", u64),
        ("ref_ctr_offsets", u64),
        ("cookies", u64),
        ("cnt", u32),
        ("flags", u32),
        ("pid", u32),
    )


class LinkCreateAttr(Structure):
    """The arguments of BPF_LINK_CREATE for every link. PerfEventLink or UprobeMultiLink follows these fields."""

    _fields_ = (("prog_fd", u32), ("target_fd", u32), ("attach_type", u32), ("flags", u32))


class PerfEventLinkAttr(Structure):
    """The arguments of BPF_LINK_CREATE with BPF_PERF_EVENT."""

    _fields_ = (("link_create", LinkCreateAttr), ("perf_event", PerfEventLink))


class UprobeMultiLinkAttr(Structure):
    """The arguments of BPF_LINK_CREATE with BPF_TRACE_UPROBE_MULTI."""

    _fields_ = (("link_create", LinkCreateAttr), ("uprobe_multi", UprobeMultiLink))


class PerfEventAttr(Structure):
    """The argument struct perf_event_attr of perf_event_open(2), up to PERF_ATTR_SIZE_VER7."""

    _fields_ = (
        ("type", u32),
        ("size", u32),
        ("config", u64),
        ("sample_period", u64),
        ("sample_type", u64),
        ("read_format", u64),
        ("bits", u64),
        ("wakeup_events", u32),
        ("bp_type", u32),
        ("uprobe_path", u64),
        ("probe_offset", u64),
        ("unused", u64 * 7),
    )
