"""Record which opens of files a cgroup's processes make, inside which functions of libraries, and refuse devices.

`/usr/bin/python3 -I open_recorder.py PREFIX[,PREFIX...] LIBRARY...` attaches BPF programs to the entry and the return
of every function that the libraries export, and to the end of every system call. LIBRARY is a path, or a name that the
dynamic linker finds. The program prints one line of JSON, {"libraries": {path: functions}, "skipped": [function]}, and
answers each line of stdin with one line of JSON:

    watch CGROUP_ID         record the opens of this cgroup's processes from now on, and of no others
    take                    stop, and answer {"opens": [...], "lost": count, "unprobed": [path]}
    gate CGROUP_PATH        refuse devices in this cgroup and in all cgroups inside, until the program exits
    refuse [MAJOR:MINOR...] refuse these devices, and no others

An open is an object: `ns` (CLOCK_MONOTONIC at its end), `pid`, `tid`, `process`, `thread` (names), `path`, `flags`,
`result` (a descriptor, or a negative errno), `functions` (the exported functions that the thread was in, outermost
first) and `callers` (return addresses on the stack, innermost first). `callers` are all words of the topmost 8 KiB of
the stack that follow a call instruction, because the driver has no frame pointers, so some may be left from earlier
calls. The list is empty if the process had exited. `unprobed` are other copies of the libraries that processes used.
Needs Linux 6.6 (uprobe_multi) on x86-64.
"""

from __future__ import annotations

import _ctypes
import bisect
import contextlib
import ctypes
import functools
import json
import mmap
import os
import select
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Compile the programs with the stub headers of bpf/include, because the host may have no headers of its kernel.
os.environ["BCC_KERNEL_SOURCE"] = str(Path(__file__).resolve().parents[2] / "bpf")
KPROBE, CGROUP_DEVICE, RAW_TRACEPOINT = 2, 15, 17  # types of BPF programs
CGROUP_DEVICE_ATTACH, UPROBE_MULTI_ATTACH = 6, 48
BPF_SYSCALL, LINK_CREATE = 321, 28
DEEPEST = 16  # calls of exported functions inside each other
MOST_CALLERS = 40
NOP5 = b"\x0f\x1f\x44\x00\x00"
# The path is read at the end of the call: at its begin, the page with the path may not be in memory yet.
TEXT = """
struct call { u64 function, sp; };
struct calls { u64 depth; struct call open[DEEPEST]; };
struct opened {
    u64 ns;
    u32 pid, tid;
    s64 result;
    u64 flags, words;
    char thread[16], path[128];
    struct calls calls;
    u64 stack[1024];
};
struct system_call { u64 registers; s64 result; };
struct device { u32 access_type, major, minor; };

BPF_HASH(watched, u64, u32, 16);
BPF_HASH(refused, u64, u32, 256);
BPF_TABLE("lru_hash", u32, struct calls, threads, 8192);
BPF_ARRAY(empty, struct calls, 1);
BPF_ARRAY(lost, u64, 1);
BPF_RINGBUF_OUTPUT(opens, 4096);
static u64 (*attach_cookie)(void *) = (void *)174;

static inline int is_watched(void)
{
    u64 cgroup = bpf_get_current_cgroup_id();
    return watched.lookup(&cgroup) != 0;
}

static inline void leave(struct calls *calls, u64 sp)
{
    for (int i = 0; i < DEEPEST; i++) {
        u64 last = calls->depth - 1;
        if (last >= DEEPEST || calls->open[last].sp >= sp) break;
        calls->depth = last;
    }
}

int enters(struct pt_regs *context)
{
    if (!is_watched()) return 0;
    u32 tid = bpf_get_current_pid_tgid(), zero = 0;
    struct calls *calls = threads.lookup(&tid);
    if (!calls) {
        struct calls *none = empty.lookup(&zero);
        if (none) threads.update(&tid, none);
        calls = threads.lookup(&tid);
        if (!calls) return 0;
    }
    u64 sp = context->sp;
    leave(calls, sp); // calls that longjmp() left. A call with the same sp is active: it ended with a jump to this one.
    u64 depth = calls->depth;
    if (depth >= DEEPEST) return 0;
    calls->open[depth].function = attach_cookie(context);
    calls->open[depth].sp = sp;
    calls->depth = depth + 1;
    return 0;
}

int returns(struct pt_regs *context)
{
    u32 tid = bpf_get_current_pid_tgid();
    struct calls *calls = threads.lookup(&tid);
    if (calls) leave(calls, context->sp);
    return 0;
}

static inline int is_searched(char *path)
{
    return IS_SEARCHED;
}

int ends(struct system_call *call)
{
    if (!is_watched()) return 0;
    struct pt_regs registers;
    if (bpf_probe_read_kernel(&registers, sizeof registers, (void *)call->registers)) return 0;
    u64 path_at = registers.si, flags = registers.dx, id = bpf_get_current_pid_tgid();
    if (registers.orig_ax == 2) { // open
        path_at = registers.di;
        flags = registers.si;
    } else if (registers.orig_ax == 437) { // openat2
        if (bpf_probe_read_user(&flags, sizeof flags, (void *)registers.dx)) flags = 0;
    } else if (registers.orig_ax != 257) { // openat
        return 0;
    }
    char path[128] = {};
    if (bpf_probe_read_user_str(path, sizeof path, (void *)path_at) < 0 || !is_searched(path)) return 0;
    u32 tid = id, zero = 0;
    struct opened *opened = opens.ringbuf_reserve(sizeof(struct opened));
    if (!opened) {
        lost.atomic_increment(zero);
        return 0;
    }
    opened->ns = bpf_ktime_get_ns();
    opened->pid = id >> 32;
    opened->tid = tid;
    opened->result = call->result;
    opened->flags = flags;
    bpf_get_current_comm(opened->thread, sizeof opened->thread);
    __builtin_memcpy(opened->path, path, sizeof path);
    struct calls *calls = threads.lookup(&tid);
    opened->calls.depth = 0;
    if (calls) {
        leave(calls, registers.sp);
        bpf_probe_read_kernel(&opened->calls, sizeof opened->calls, calls);
    }
    opened->words = 0;
    for (int i = 0; i < 16; i++) {
        if (bpf_probe_read_user(opened->stack + 64 * i, 512, (void *)(registers.sp + 512 * i))) break;
        opened->words += 64;
    }
    opens.ringbuf_submit(opened, 0);
    return 0;
}

int gate(struct device *device)
{
    u64 number = (u64)device->major << 32 | device->minor;
    return refused.lookup(&number) == 0;
}
"""


class Call(ctypes.Structure):
    _fields_ = (("function", ctypes.c_uint64), ("sp", ctypes.c_uint64))


class Calls(ctypes.Structure):
    _fields_ = (("depth", ctypes.c_uint64), ("open", Call * DEEPEST))


class Opened(ctypes.Structure):
    """`struct opened` of the BPF programs."""

    _fields_ = (
        ("ns", ctypes.c_uint64),
        ("pid", ctypes.c_uint32),
        ("tid", ctypes.c_uint32),
        ("result", ctypes.c_int64),
        ("flags", ctypes.c_uint64),
        ("words", ctypes.c_uint64),
        ("thread", ctypes.c_char * 16),
        ("path", ctypes.c_char * 128),
        ("calls", Calls),
        ("stack", ctypes.c_uint64 * 1024),
    )


class Export(NamedTuple):
    """A function that a library exports. `names` are all names of the same code, joined by `=`."""

    offset: int
    size: int
    names: str


class Mapping(NamedTuple):
    """An executable mapping of a file."""

    begin: int
    end: int
    offset: int
    path: str


def path_of(library: str) -> str:
    """Return the file that the dynamic linker finds as `library` in this environment. Raises OSError."""
    handle = ctypes.CDLL(library)
    try:
        name = os.path.basename(library).split(".so")[0]
        return next(m.path for m in mappings("self") if os.path.basename(m.path).startswith(f"{name}.so"))
    finally:
        _ctypes.dlclose(handle._handle)


def mappings(pid: int | str) -> list[Mapping]:
    """Return the executable mappings of files of a process in the order of their addresses. Raises OSError."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if "x" in fields[1] and len(fields) == 6 and fields[5].startswith("/"):
            begin, end = (int(word, 16) for word in fields[0].split("-"))
            found.append(Mapping(begin, end, int(fields[2], 16), fields[5]))
    return found


@functools.cache
def content(path: str) -> bytes | mmap.mmap:
    """Return the content of a file, or nothing if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except (OSError, ValueError):
        return b""


@functools.cache
def exports(path: str) -> list[Export]:
    """Return the functions of the dynamic symbol table of an ELF file for x86-64, by their offsets in the file."""
    data = content(path)
    segments_at, sections_at = struct.unpack_from("<QQ", data, 32)
    segment_bytes, segment_count, section_bytes, section_count = struct.unpack_from("<HHHH", data, 54)
    loaded = []
    for at in range(segments_at, segments_at + segment_bytes * segment_count, segment_bytes):
        kind, _, offset, address, _, size = struct.unpack_from("<IIQQQQ", data, at)
        loaded += [(address, address + size, offset)] if kind == 1 else []
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, sections_at + section_bytes * n) for n in range(section_count)]
    found: dict[int, tuple[int, list[str]]] = {}
    for _, kind, _, _, symbols_at, size, strings, _, _, _ in sections:
        if kind != 11:  # SHT_DYNSYM
            continue
        for at in range(symbols_at, symbols_at + size, 24):
            name_at, info, _, section, address, length = struct.unpack_from("<IBBHQQ", data, at)
            if info & 15 != 2 or not section:  # neither a function nor defined here
                continue
            name_at += sections[strings][4]
            name = data[name_at : data.find(b"\0", name_at)].decode()
            for begin, end, offset in loaded:
                if begin <= address < end:
                    found.setdefault(address - begin + offset, (length, []))[1].append(name)
    return [Export(at, length, "=".join(sorted(names))) for at, (length, names) in sorted(found.items())]


def called(path: str, offset: int) -> bool:
    """Return whether a call instruction ends at this offset of a file."""
    before = content(path)[max(0, offset - 7) : offset]
    if len(before) < 7:
        return False
    # call rel32, or `ff /2` with an operand of 1 to 6 bytes
    return before[-5] == 0xE8 or any(before[-n] == 0xFF and before[1 - n] & 0x38 == 0x10 for n in (2, 3, 4, 6, 7))


def named(path: str, offset: int, probed: list[str]) -> str:
    """Return the name of the code at an offset: a function's of libc and of probed libraries, else FILE+OFFSET."""
    name = os.path.basename(path)
    if path in probed or name.startswith("libc.so"):
        known = exports(path)
        at = bisect.bisect_right(known, offset, key=lambda export: export.offset) - 1
        if at >= 0 and offset <= known[at].offset + known[at].size:
            return f"{name}:{known[at].names}"
    return f"{name}+{offset:#x}"


def begins(prefix: str) -> str:
    """Return a condition in C: `path` begins with the prefix. It has no string, which would need a data section."""
    return "(" + " && ".join(f"path[{at}] == {byte}" for at, byte in enumerate(prefix.encode())) + ")"


class Recorder:
    """The BPF programs, and the opens since `watch`."""

    def __init__(self, prefixes: list[str], libraries: list[str]) -> None:
        from bcc import BPF  # type: ignore[import-untyped,unused-ignore]

        self._links: list[int] = []
        self._opens: list[tuple[dict[str, Any], list[tuple[str, int]]]] = []
        self._mapped: set[str] = set()
        self.probed = [path_of(library) for library in libraries]
        self.functions: list[str] = []
        self.skipped: list[str] = []
        text = TEXT.replace("IS_SEARCHED", " || ".join(map(begins, prefixes)))
        self.bpf = BPF(text=text, cflags=["-Wno-everything", f"-DDEEPEST={DEEPEST}"])
        programs = [self.bpf.load_func(name, KPROBE, None, UPROBE_MULTI_ATTACH).fd for name in ("enters", "returns")]
        for path in self.probed:
            # Return probes are attached first, so that every call that is recorded at its entry is removed.
            self._probe(path, programs[1], programs[0])
        self._traced = self.bpf.load_func("ends", RAW_TRACEPOINT)
        self.bpf.attach_raw_tracepoint("sys_exit", "ends")
        self.bpf["opens"].open_ring_buffer(self._opened)

    def _probe(self, path: str, returns: int, enters: int) -> None:
        places = []
        for export in exports(path):
            # A probe on a five-byte nop kills forked children on Linux 6.18.
            if export.names in ("_init", "_fini") or content(path)[export.offset : export.offset + 5] == NOP5:
                self.skipped.append(export.names)
                continue
            places.append((export.offset, len(self.functions)))
            self.functions.append(export.names)
        if not places:
            raise OSError(f"no functions in {path}")
        count = len(places)
        offsets, cookies = ((ctypes.c_uint64 * count)(*column) for column in zip(*places, strict=True))
        name = ctypes.c_char_p(path.encode())
        for program, at_return in ((returns, 1), (enters, 0)):
            kept = [ctypes.cast(value, ctypes.c_void_p).value or 0 for value in (name, offsets, cookies)]
            attr = struct.pack(
                "<IIIIQQQQIII", program, 0, UPROBE_MULTI_ATTACH, 0, *kept[:2], 0, kept[2], count, at_return, 0
            )
            self._link(attr, f"uprobes of {path}")

    def _link(self, attr: bytes, what: str) -> None:
        buffer = ctypes.create_string_buffer(attr, len(attr))
        libc = ctypes.CDLL(None, use_errno=True)
        link = libc.syscall(BPF_SYSCALL, LINK_CREATE, buffer, len(attr))
        if link < 0:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
        self._links.append(link)  # the kernel detaches the program when the descriptor is closed

    def _opened(self, _: object, data: int, __: int) -> None:
        """Keep an open. The mappings are read at once, because the process may exit soon."""
        opened = ctypes.cast(data, ctypes.POINTER(Opened)).contents
        maps, process = [], opened.thread.decode(errors="replace")
        with contextlib.suppress(OSError):
            process = Path(f"/proc/{opened.pid}/comm").read_text().strip()
            maps = mappings(opened.pid)
        addresses = []
        for word in opened.stack[: opened.words]:
            at = bisect.bisect_right(maps, word, key=lambda m: m.begin) - 1
            if at >= 0 and word < maps[at].end:
                addresses.append((maps[at].path, word - maps[at].begin + maps[at].offset))
        self._mapped.update(m.path for m in maps)
        row = {name: getattr(opened, name) for name in ("ns", "pid", "tid", "flags", "result")}
        row |= {"process": process, "thread": opened.thread.decode(errors="replace")}
        row["path"] = opened.path.decode(errors="replace")
        row["functions"] = [self.functions[opened.calls.open[n].function] for n in range(opened.calls.depth)]
        self._opens.append((row, addresses))

    def _unprobed(self) -> list[str]:
        """Return mapped files that are copies of the probed libraries, for example of another version."""
        names = {os.path.basename(path).split(".so")[0] for path in self.probed}
        return sorted(p for p in self._mapped - set(self.probed) if os.path.basename(p).split(".so")[0] in names)

    def watch(self, cgroup: str) -> dict[str, Any]:
        """Record the opens of one cgroup from now on."""
        self.bpf["threads"].clear()
        self.bpf["watched"].clear()
        self.bpf["watched"][ctypes.c_uint64(int(cgroup))] = ctypes.c_uint32(1)
        return {}

    def take(self) -> dict[str, Any]:
        """Stop, and return all opens since watch()."""
        self.bpf["watched"].clear()
        self.bpf.ring_buffer_consume()
        for row, addresses in self._opens:
            found = (named(*address, self.probed) for address in addresses if called(*address))
            row["callers"] = [name for name, _ in zip(found, range(MOST_CALLERS), strict=False)]
        lost = self.bpf["lost"]
        answer = {"opens": [row for row, _ in self._opens], "lost": lost[0].value, "unprobed": self._unprobed()}
        lost.clear()
        self._opens, self._mapped = [], set()
        return answer

    def gate(self, cgroup: str) -> dict[str, Any]:
        """Attach the program that refuses devices to a cgroup."""
        program = self.bpf.load_func("gate", CGROUP_DEVICE).fd
        folder = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
        self._link(struct.pack("<IIIIQQ", program, folder, CGROUP_DEVICE_ATTACH, 0, 0, 0), f"gate of {cgroup}")
        os.close(folder)
        return {}

    def refuse(self, *devices: str) -> dict[str, Any]:
        """Refuse exactly these devices."""
        self.bpf["refused"].clear()
        for device in devices:
            major, minor = map(int, device.split(":"))
            self.bpf["refused"][ctypes.c_uint64(major << 32 | minor)] = ctypes.c_uint32(1)
        return {}


def commands(recorder: Recorder) -> Iterator[list[str]]:
    """Yield the words of each line of stdin, and receive opens in the meantime."""
    while True:
        recorder.bpf.ring_buffer_poll(20)
        if select.select([sys.stdin], [], [], 0)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            yield line.split()


def main() -> None:
    """Attach the programs, and answer lines until stdin ends."""
    recorder = Recorder(sys.argv[1].split(","), sys.argv[2:])
    counts = {path: len(exports(path)) for path in recorder.probed}
    print(json.dumps({"libraries": counts, "skipped": recorder.skipped}), flush=True)
    verbs: dict[str, Callable[..., dict[str, Any]]] = {
        "watch": recorder.watch,
        "take": recorder.take,
        "gate": recorder.gate,
        "refuse": recorder.refuse,
    }
    for verb, *words in commands(recorder):
        print(json.dumps(verbs[verb](*words)), flush=True)
    os._exit(0)  # the kernel then detaches the programs; BCC's own cleanup needs tracefs


if __name__ == "__main__":
    main()
