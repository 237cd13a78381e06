"""A gatekeeper and a kernel side that tests of the shim control by commands.

The system's interpreter runs this program, because it has bcc. The program creates a mount namespace with an empty
/run, attaches a few lines of BPF to the shim's own probe symbols, and answers hellos. Each line on stdin is a command,
a JSON object, and gets one answer.
"""

import array
import contextlib
import ctypes
import json
import mmap
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time

SHIM, STUBS = sys.argv[1:3]
os.environ["BCC_KERNEL_SOURCE"] = STUBS
from bcc import BPF  # noqa: E402

LEVEL_SIZE, NO_LIMIT, MAGIC = 4096, 2**64 - 1, 0x75706766
# Offsets in a usage page. TAIL is behind all fields that the shim reads.
ORPHANED, ORPHANED_NS, LOOKED_NS, FREED_NS, ROOM_NS, TAIL = 1856, 2048, 3224, 3624, 3808, 3936
TAG = 44  # offset in a control page
MANAGED, SETTLE = 1, 2
GATES, BUDGETS, FUTEX = 64 + 16 * 32, 0x290 + 16 * 128, 202 if os.uname().machine == "x86_64" else 98
STATUS = "waiting", "drained", "launches", "in_flight", "busy_until", "wanted", "idle", "bell", "begun", "ended"
with open(os.path.join(STUBS, "fgpu.h"), encoding="utf-8") as header:
    LAYOUT = int(re.search(r"#define FGPU_LAYOUT (\d+)", header.read())[1])
UUIDS = [bytes([0x10 + i] * 16) for i in range(2)]
SOURCE = r"""
#include "fgpu.h"
struct call { u64 kind; u64 flags; u64 device; u64 bytes; u64 ticket; u64 tgid; u64 result; };
struct knobs { u64 mute; u64 again; u64 fixed; u64 outer; u64 old; u64 crowded; };
BPF_F_TABLE("array", u32, struct fgpu_usage_page, leaf, 1, 1U << 10);
BPF_F_TABLE("array", u32, struct fgpu_usage_page, group, 1, 1U << 10);
BPF_TABLE("array", u32, struct knobs, knob, 1);
BPF_TABLE("array", u32, struct call, calls, 4096);
BPF_TABLE("array", u32, u64, seen, 2);
BPF_TABLE("hash", u32, u32, tags, 1024);

static void log_call(u64 kind, u64 device, u64 bytes, u64 ticket, u64 result) {
    u32 zero = 0;
    u64 *n = seen.lookup(&zero);
    if (!n) return;
    u32 at = __sync_fetch_and_add(n, 1) & 4095;
    struct call *c = calls.lookup(&at);
    if (!c) return;
    c->kind = kind & FGPU_KIND_MASK; c->flags = kind & ~(u64)FGPU_KIND_MASK;
    c->device = device; c->bytes = bytes; c->ticket = ticket; c->result = result;
    c->tgid = bpf_get_current_pid_tgid() >> 32;
}
static int uncommitted(struct fgpu_usage_page *p, u32 device) {
    return p->flags >> FGPU_UNCOMMITTED_SHIFT >> device & 1;
}
static int room(struct fgpu_usage_page *p, u32 device, u64 bytes) {
    return !uncommitted(p, device) && p->devices[device].used + bytes <= p->devices[device].limit;
}
/* The check and the charge are one step, because threads make requests at the same time. */
static int charge(struct fgpu_usage_page *p, u32 device, u64 bytes) {
    u64 *used = &p->devices[device].used;
    #pragma unroll
    for (int i = 0; i < 16; i++) {
        u64 had = *(volatile u64 *)used;
        if (uncommitted(p, device) || had + bytes > p->devices[device].limit) return 0;
        if (__sync_val_compare_and_swap(used, had, had + bytes) == had) return 1;
    }
    return 0;
}
static void answer(struct fgpu_usage_page *p, u64 kind, u64 ticket, u64 verdict) {
    u32 tgid = bpf_get_current_pid_tgid() >> 32, *tag = tags.lookup(&tgid);
    if (!(kind & FGPU_TAGGED))
        *(volatile u64 *)&p->verdicts[ticket & 127] = ticket << 2 | verdict;
    else if (tag)
        *(volatile u64 *)&p->answers[ticket & 127] =
            (u64)*tag << FGPU_TAG_SHIFT | (ticket & FGPU_TICKET_BITS) << 2 | verdict;
}
int admit(struct pt_regs *ctx) {
    u32 zero = 0, device = PT_REGS_PARM1(ctx) & 15;
    u64 bytes = PT_REGS_PARM2(ctx), kind = PT_REGS_PARM3(ctx), ticket = PT_REGS_PARM4(ctx), verdict = 0;
    struct fgpu_usage_page *p = leaf.lookup(&zero), *outer = group.lookup(&zero);
    struct knobs *k = knob.lookup(&zero);
    if (!p || !outer || !k) return 0;
    if (kind & FGPU_ANNOUNCE) { seen.increment(1); return 0; }
    if (kind & FGPU_CALLED) { p->called_ns = bpf_ktime_get_ns(); return 0; }
    if (kind & FGPU_FREED) { p->freed_ns = bpf_ktime_get_ns(); return 0; }
    log_call(kind, PT_REGS_PARM1(ctx), bytes, ticket, 0);
    if (kind & FGPU_LACKS) return 0;
    if (k->old) kind = kind < FGPU_KINDS ? kind : FGPU_MEMORY;
    if (uncommitted(p, device) || (k->outer && uncommitted(outer, device))) p->undecided[device]++;
    if (k->mute == 1 || k->mute == bpf_get_current_pid_tgid() >> 32) return 0;
    if (k->again) { k->again--; verdict = 2; }
    else if (k->fixed) verdict = k->fixed - 1;
    else if (k->crowded) p->crowded++;
    else if ((kind & FGPU_KIND_MASK) == FGPU_HELLO) verdict = 1;
    else if ((!k->outer || room(outer, device, bytes)) && charge(p, device, bytes)) {
        verdict = 1;
    } else if (!(kind & FGPU_PATIENT)) {
        __sync_fetch_and_add(&p->devices[device].refused, 1);
    }
    answer(p, kind, ticket, verdict);
    return 0;
}
int give_back(struct pt_regs *ctx) {
    u32 zero = 0, device = PT_REGS_PARM1(ctx) & 15;
    u64 bytes = PT_REGS_PARM2(ctx);
    struct fgpu_usage_page *p = leaf.lookup(&zero);
    log_call(101, PT_REGS_PARM1(ctx), bytes, PT_REGS_PARM4(ctx), PT_REGS_PARM3(ctx));
    if (p && (PT_REGS_PARM3(ctx) & ~0x100) == 1) __sync_fetch_and_add(&p->devices[device].used, -bytes);
    return 0;
}
"""
libc = ctypes.CDLL(None, use_errno=True)


def private_run():
    """Mount an empty /run, which hides the host's files and discards those of the test."""
    assert libc.unshare(0x00020000) == 0
    for what in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "none", "/run"]):
        subprocess.check_call(what)
    os.makedirs("/run/fgpu/shim")


class Agent:
    def __init__(self):
        self.bpf = BPF(text=SOURCE, cflags=[f"-I{STUBS}"])
        self.bpf.attach_uprobe(name=SHIM, sym="fgpu_admit", fn_name="admit")
        self.bpf.attach_uprobe(name=SHIM, sym="fgpu_release", fn_name="give_back")
        self.pages = [self.bpf[n].map_fd for n in ("leaf", "group")]
        self.maps = [mmap.mmap(fd, LEVEL_SIZE) for fd in self.pages]
        self.listener = None
        self.given_tags = 0x3FFFFF00  # the first tags have all of their bits in use
        self.hellos = []
        self.controls, self.statuses, self.gates, self.budgets = [], [], {}, {}
        self.reset({})
        threading.Thread(target=self.beat, daemon=True).start()

    # -- commands of the tests

    def reset(self, _):
        self.stop({})
        while libc.umount2(b"/run/fgpu/shim", 0) == 0:
            pass
        self.answer, self.flags, self.levels, self.epoch = "managed", 0, 1, 7
        self.boot, self.beats, self.delay, self.rows = b"B" * 16, True, 0, []
        self.uuids, self.versions, self.tagged = list(UUIDS), {}, False
        self.heard_from = 0  # number of the hello before which the kernel answers no request; 0: it answers all
        self.bpf["tags"].clear()
        self.hellos.clear()
        self.gates, self.budgets = {}, {}
        self.controls.clear()
        self.statuses.clear()
        for m in self.maps:
            m[:] = bytes(LEVEL_SIZE)
            struct.pack_into("<Q", m, 0, LAYOUT)
        self.limit({"limit": 1 << 30})
        self.knobs({})
        for i in range(2):
            self.bpf["seen"][ctypes.c_int(i)] = ctypes.c_uint64(0)
        os.makedirs("/run/fgpu/shim", exist_ok=True)
        os.chmod("/run/fgpu/shim", 0o755)

    def start(self, _):
        os.chmod("/run/fgpu/shim", 0o755)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind("/run/fgpu/shim/shim.sock")
        self.listener.listen(64)
        threading.Thread(target=self.serve, args=(self.listener,), daemon=True).start()

    def die(self, _):
        """Stop listening as a killed gatekeeper does: the socket's file stays."""
        if self.listener:
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
            self.listener = None

    def stop(self, _):
        self.die({})
        if os.path.exists("/run/fgpu/shim/shim.sock"):
            os.unlink("/run/fgpu/shim/shim.sock")

    def remove(self, _):
        self.stop({})
        os.rmdir("/run/fgpu/shim")

    def orphan(self, _):
        """Mount a removed folder over the shim's folder, as in a container after the host has removed that folder."""
        self.stop({})
        os.mkdir("/run/host")
        subprocess.check_call(["mount", "--bind", "/run/host", "/run/fgpu/shim"])
        os.rmdir("/run/host")

    def detach(self, _):
        """Stop, and leave the shim's folder as `fgpu detach` leaves a folder that a container has mounted."""
        self.stop({})
        os.chmod("/run/fgpu/shim", 0o1755)

    def set(self, what):
        for name, value in what.items():
            value = bytes.fromhex(value) if name == "boot" else value
            setattr(self, name, [bytes.fromhex(u) for u in value] if name == "uuids" else value)

    def limit(self, what):
        """Set the fields of a usage page.

        The fields are {limit, used, level, device, flags, orphaned, age_ms: of orphaned bytes, looked_ms: of the last
        comparison, freed_ms: of the last free that no probe reported}.
        """
        device = what.get("device", 3)
        m, at = self.maps[what.get("level", 0)], 64 + 32 * device
        struct.pack_into("<QQ", m, at, what.get("limit", NO_LIMIT), what.get("used", 0))
        struct.pack_into("<Q", m, 16, what.get("flags", 0))
        struct.pack_into("<Q", m, ORPHANED + 8 * device, what.get("orphaned", 0))
        orphaned_ns = time.monotonic_ns() - 1_000_000 * what["age_ms"] if "age_ms" in what else 0
        struct.pack_into("<Q", m, ORPHANED_NS + 8 * device, orphaned_ns)
        looked_ns = time.monotonic_ns() - 1_000_000 * what["looked_ms"] if "looked_ms" in what else orphaned_ns
        struct.pack_into("<Q", m, LOOKED_NS + 8 * device, looked_ns)
        freed_ns = time.monotonic_ns() - 1_000_000 * what["freed_ms"] if "freed_ms" in what else 0
        struct.pack_into("<Q", m, FREED_NS, freed_ns)

    def room(self, what):
        """Set the decision about requests that lack room on device 3: {ms: from now; or 0, none: no room}."""
        at = time.monotonic_ns() + 1_000_000 * what["ms"]
        ctypes.c_uint64.from_buffer(self.maps[0], ROOM_NS + 8 * 3).value = at | 1 if what.get("none") else at & ~1

    def grow(self, _):
        """Add fields to pages behind all fields that the shim reads."""
        for m in self.maps:
            m[TAIL:] = b"\xff" * (LEVEL_SIZE - TAIL)

    def version(self, what):
        struct.pack_into("<Q", self.maps[what["level"]], 0, what["version"])

    def knobs(self, what):
        k = self.bpf["knob"]
        names = ("mute", "again", "fixed", "outer", "old", "crowded")
        k[ctypes.c_int(0)] = k.Leaf(*(what.get(name, 0) for name in names))

    def tag(self, what):
        """Set {pid, tag}: the tag in the kernel's answers to that process.

        With {page}, write the tag to its page too.
        """
        self.bpf["tags"][ctypes.c_uint32(what["pid"])] = ctypes.c_uint32(what["tag"])
        if "page" in what:
            ctypes.c_uint32.from_buffer(self.controls[what["page"]], TAG).value = what["tag"]

    def bump(self, what):
        """Write to the control pages in use."""
        for c in self.controls:
            if "epoch" in what:
                struct.pack_into("<Q", c, 32, what["epoch"])
            if "boot" in what:
                c[8:24] = bytes.fromhex(what["boot"])
            if "sequence" in what:
                struct.pack_into("<I", c, 0x280, what["sequence"])

    def gate(self, what):
        """Set {word, device, budget, passes} in the pages in use and in later ones; with {page}, in that page only."""
        device, word = what.get("device", 3), what["word"]
        if "page" not in what:
            self.gates[device], self.budgets[device] = word, what.get("budget", 0)
        for c in self.controls if "page" not in what else [self.controls[what["page"]]]:
            self.write_gates(c)
            ctypes.c_uint64.from_buffer(c, BUDGETS + 8 * (16 + device)).value = what.get("passes", 0)
            ctypes.c_uint32.from_buffer(c, GATES + 4 * device).value = word
            at = ctypes.addressof(ctypes.c_char.from_buffer(c)) + GATES + 4 * device
            libc.syscall(FUTEX, ctypes.c_void_p(at), 1, 1 << 30, None, None, 0)

    def write_gates(self, control):
        for device, budget in self.budgets.items():
            ctypes.c_uint64.from_buffer(control, BUDGETS + 8 * device).value = budget
        for device, word in self.gates.items():
            ctypes.c_uint32.from_buffer(control, GATES + 4 * device).value = word

    def status(self, what):
        """Return the time, and each process's fields on its status page for a device, in the order of hellos."""
        device = what.get("device", 3)
        answer = []
        for m in self.statuses:
            values = struct.unpack_from("<IIQ", m, 64 + 16 * device)
            values += struct.unpack_from("<QQQQ", m, 64 + 16 * 16 + 32 * device) + struct.unpack_from("<I", m, 4)
            values += struct.unpack_from("<QQ", m, 64 + (16 + 32) * 16 + 16 * device)
            answer.append(dict(zip(STATUS, values, strict=True)))
        return {"pages": answer, "now": time.monotonic_ns()}

    def look(self, _):
        n = self.bpf["seen"][ctypes.c_int(0)].value
        calls = self.bpf["calls"]
        rows = [calls[ctypes.c_int(i)] for i in range(min(n, 4096))]
        names = ("kind", "flags", "device", "bytes", "ticket", "tgid", "result")
        used, _, refused = struct.unpack_from("<QQQ", self.maps[0], 64 + 32 * 3 + 8)
        return {
            "calls": [{k: getattr(r, k) for k in names} for r in rows],
            "hellos": len(self.hellos),
            "announced": self.bpf["seen"][ctypes.c_int(1)].value,
            "boots": [h[8:24].hex() for h in self.hellos],
            "used": used,
            "refused": refused,
            "sizes": [len(h) for h in self.hellos],
        }

    # -- the gatekeeper's part

    def beat(self):
        while True:
            for c in list(self.controls) if self.beats else []:
                ctypes.c_uint64.from_buffer(c, 24).value = time.monotonic_ns()  # at once: pack_into shows zeros
            time.sleep(0.1)

    def control(self, pid):
        fd = os.memfd_create("control", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 4096)
        m = mmap.mmap(fd, 4096)
        flags = self.flags | (0 if self.answer == "unmanaged" else MANAGED)
        version = self.versions.get("control", 99 if self.answer == "control_version" else LAYOUT)
        struct.pack_into("<II16sQQI", m, 0, version, flags, self.boot, time.monotonic_ns(), self.epoch, len(self.uuids))
        for i, uuid in enumerate(self.uuids):
            struct.pack_into("<16sI", m, 0x40 + 32 * i, uuid, 3 + i)
        struct.pack_into("<II", m, 0x280, 2, len(self.rows))
        for i, (pid, device, size) in enumerate(self.rows):
            struct.pack_into("<IIQ", m, 0x290 + 16 * i, pid, device, size)
        if self.tagged:
            self.given_tags += 1
            struct.pack_into("<I", m, TAG, self.given_tags)
            self.bpf["tags"][ctypes.c_uint32(pid)] = ctypes.c_uint32(self.given_tags)
        self.write_gates(m)
        self.controls.append(m)
        if len(self.controls) > 64:
            self.controls.pop(0)
        return fd

    def serve(self, listener):
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer, contextlib.suppress(OSError):
                self.greet(peer)

    def greet(self, peer):
        hello = peer.recv(256)
        self.hellos.append(hello)
        del self.hellos[:-20000]
        how = self.answer
        if self.heard_from:
            self.knobs({"mute": len(self.hellos) < self.heard_from})
        time.sleep(self.delay)
        if how == "eof":
            return
        if how == "silent":
            peer.settimeout(5)
            peer.recv(1)
            return
        pid = struct.unpack("i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4])[0]
        control, status = self.control(pid), os.memfd_create("status", os.MFD_CLOEXEC)
        os.ftruncate(status, 4096)
        self.statuses = [*self.statuses[-63:], mmap.mmap(status, 4096)]
        code = {"unmanaged": 2, "refused": 0, "unknown_code": 9}.get(how, 1)
        levels = {"levels_0": 0, "levels_9": 9}.get(how, self.levels)
        size = {"wrong_size": 64, "longer": 160}.get(how, 128)
        data = struct.pack(
            "<IHHIIIIQ",
            1 if how == "magic" else MAGIC,
            self.versions.get("answer", 99 if how == "version" else LAYOUT),
            size,
            code,
            levels,
            len(self.uuids),
            0,
            self.epoch,
        ).ljust(160 if how == "longer" else 128, b"\0")
        fds = [control, status, *self.pages[: self.levels]]
        if how == "unmanaged":
            fds = fds[:1]
        if how == "short_control":
            os.ftruncate(control, 100)
        if how == "short_status":
            os.ftruncate(status, 0)
        if how == "pipe_for_usage":
            fds[2] = 0
        fds = {"few": fds[:-1], "many": fds + fds[:2], "none": [], "twenty": (fds * 20)[:20]}.get(how, fds)
        data = {"empty": b"", "short": data[:40], "huge": data * 4}.get(how, data)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        peer.sendmsg([data], ancillary)
        os.close(control)
        os.close(status)


def main():
    private_run()
    agent = Agent()
    out = os.dup(1)
    os.dup2(2, 1)  # bcc and mount may print
    os.write(out, b'{"ready": true}\n')
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(agent, request.pop("do"))(request)
        os.write(out, json.dumps(answer or {}).encode() + b"\n")
    os._exit(0)  # the kernel detaches what this process attached; bcc would need tracefs for that


main()
