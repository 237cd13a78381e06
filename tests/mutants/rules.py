"""Rules of the kernel's ledger, each with the replacement that breaks it: one text in one of bpf/*.bpf.*.

The whole of tests/bpf is what must notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from judge import Outcome

TESTS = ("tests/bpf", "--ignore=tests/bpf/test_arm64.py")  # which compares compilers, and takes half of the time
RULES = {
    "limit-off-by-one": ("int over = now > limit;", "int over = now > limit + 1;"),
    "limit-not-looked-at": ("return used + bytes <= limit;", "return 1;"),
    "overflow": ("if (bytes > FGPU_MOST_BYTES) bytes = FGPU_MOST_BYTES;", ""),
    "ticket-charged-anew": ("if (a->ticket == ticket && a->verdict != FGPU_AGAIN) return a->verdict;", ""),
    "old-admission-kept": ("        release(p, a->device, a->bytes); /* an older one that nothing settled */\n", ""),
    "leaf-kept-when-the-group-refuses": (
        " || refused_by_a_level(h, device, bytes, kind)",
        "",
    ),
    "leader-is-the-process": ("if (!is_last(ctx)) return 0;", "if (id >> 32 != (u32)id) return 0;"),
    "exec-forgotten": (
        "became the leader */\n    end_process(id >> 32);\n",
        "became the leader */\n",
    ),
    "thread-number-after-exec": ("(u32)ctx->args[1]); /* the thread", "(u32)id); /* the thread"),
    "free-looked-up-at-return": (
        "    delete_allocation(&key, a);\n}\n\nstatic u32 operation_of",
        "}\n\nstatic u32 operation_of",
    ),
    "failed-free-not-put-back": ("    if (!f->references) return;\n", "    return;\n"),
    "hopeless-call-charged": ("    else if (has || !who) {", "    else if (1) {"),
    "handed-out-not-charged": ("    default:\n        return f->uncovered;", "    default:\n        return 0;"),
    "failed-call-kept": ("        release(p, f->device, f->bytes);\n        return;", "        return;"),
    "longjmp-ignored": ("&& a->arguments[0] == b->arguments[0] && a->arguments[1] == b->arguments[1];", ";"),
    "given-back-by-two-versions": ("if (t->call.arguments[0] == ticket) return 1;", ""),
    "second-probe-counts": ("if (!settles && same_call(&t->call, &now)) return;", ""),
    "mapping-holds-nothing": (
        "    __sync_fetch_and_add(&a->references, 1);\n    struct fgpu_allocation value",
        "    struct fgpu_allocation value",
    ),
    "retained-handle-holds-nothing": ("        if (a) __sync_fetch_and_add(&a->references, 1);\n", ""),
    "context-never-ends": ("    if (left) {", "    if (1) {"),
    "second-reference-is-a-context": ("->primary, 0, 1)) return f->bytes;", "->primary, 0, 1) & 0) return f->bytes;"),
    "failed-retain-counts": ("one_less(&on(p, f->device)->retained);\n        release", "{}\n        release"),
    "crowd-admitted": ("crowded(h->page[0], device, bytes, kind) || ", ""),
    "entries-never-counted-back": (
        "    if (!allocations.delete(key)) give_place",
        "    if (allocations.delete(key)) give_place",
    ),
    "stale-parts-kept": ("    lower_parts(p, old->device, old->bytes, handle, old->owner, old->exported);\n", ""),
    "stale-export-released": (
        "let_go(p, old->device, old->bytes - back, !!old->exported);",
        "release(p, old->device, old->bytes - back);",
    ),
    "every-call-settles": ("t->admission.ticket && takes(now.function)", "t->admission.ticket && !frees(now.function)"),
    "crowd-of-threads-admitted": ("PART(MOST_THREADS))) return 1;", "~0ULL)) return 1;"),
    "crowd-of-processes-admitted": ("PART(MOST_PROCESSES));\n    if (placed)", "~0ULL);\n    if (placed)"),
    "agent-s-word-not-counted": ("    take_place(&leaf, FGPU_PROCESSES, ~0ULL);\n", ""),
    "crowd-refused-under-observe": ("    if (observed) return FGPU_ADMITTED;\n", ""),
    "crowd-that-observes-is-free": ("observed &= h->page[i]->flags;", "observed |= h->page[i]->flags;"),
    "crowd-refused-unnamed": ("    refuse_entry(leaf, device, bytes, kind);\n", ""),
    "threads-never-counted-back": (
        "        uncount_thread(p);\n    }\n    threads.delete",
        "    }\n    threads.delete",
    ),
    "threads-outlive-their-process": ("    if (n > 0) give_places(&level, FGPU_THREADS, n);\n", ""),
    "processes-never-counted-back": (
        "if (!processes.delete(&tgid)) give_place",
        "if (processes.delete(&tgid)) give_place",
    ),
    "thread-of-an-earlier-life": ("!t || (t->open && !belongs(p, t))", "!t"),
    "thread-of-an-earlier-life-counts": ("if (p && belongs(p, t)) {", "if (p) {"),
    "call-of-an-earlier-life": (" || t->open != p->generation) return 0;", ") return 0;"),
    "reset-leaves-the-context": ("->primary, 1, 0)) return 0;", "->primary, 1, 1)) return 0;"),
    "vmm-dies-with-the-context": ("bytes = bytes > vmm ? bytes - vmm : 0;", ""),
    "era-forgotten": ("on(p, device)->era++;", ""),
    "stale-released-twice": ("0 : take_cut(p, old->device, old->bytes);", "0 : 0;"),
    "cut-never-put-back": ("    if (more > 0) take_cut(p, device, more);\n", ""),
    "bypass-not-charged": ("    charge(p, &h, f->device, bytes - f->bytes, 1);\n", ""),
    "pool-without-bottom": ("less = bytes < was ? bytes : was;", "less = bytes;"),
    "overhead-in-a-race": (
        "p->begun != ctx->args[5] || p->changes != ctx->args[5] ? -11 : 0",
        "0",
    ),
    "move-leaves-the-charge": ("    alter_levels(p, from, device, -bytes, 0);\n", ""),
    "late-charge-stays-behind": ("        shift(p, turn + 1, d, 0);\n", ""),
    "late-release-never-made-good": ("__sync_lock_test_and_set(&on(p, d)->owed, 0)", "0"),
    "common-level-counted-twice": ("own[i].cgroup & -(apart | all)", "own[i].cgroup"),
    "late-charge-outlives-its-process": ("    release_side(p, p->turn + 1, 0);\n", ""),
    "move-waits-for-nobody": ("    if (bpf_ktime_get_ns() - p->moved_ns < STRAGGLER_NS) return -11;\n", ""),
    "place-believed": ("return page && page->cgroup == level->cgroup ? page : 0;", "return page;"),
    "page-not-withdrawn": ("    *(volatile u64 *)&page->cgroup = 0;\n", ""),
    "places-never-looked-for-again": ("    EACH_LEVEL enter_level(&own[i], own[i].cgroup);\n", ""),
    "quiet-in-a-call": ("if (t->admission.bytes || t->call.function || t->open", "if (t->admission.bytes || t->open"),
    "quiet-after-an-admission": ("if (t->admission.bytes || t->call", "if (t->call"),
    "never-quiet-again": ("| IDLE;\n    end(p);\n", "| IDLE;\n"),
    "who-comes-uncounted": ("    count_processes();\n    tell_of", "    tell_of"),
    "every-process-told": ("if (!page || page->process_second == now) return;", "if (!page) return;"),
    "reap-anybody": ("    if (p->generation != ctx->args[2]) return -3;\n", ""),
    "device-unchecked": (
        "    if (UNLIKELY(device >= FGPU_DEVICES)) {\n        anomaly",
        "    if (0) {\n        anomaly",
    ),
    "hello-ends-the-admission": (
        "    if (kind == FGPU_HELLO) {\n",
        "    if (t && kind == FGPU_HELLO) t->admission.bytes = 0;\n    if (kind == FGPU_HELLO) {\n",
    ),
    "export-forgotten-at-exit": ("        if (left > bytes) left = bytes;\n", "        left = 0;\n"),
    "export-forgotten-at-release": ("    *orphaned = f->bytes;\n    return 0;", "    return f->bytes;"),
    "orphan-untold": ("    if (orphaned && some) tell(", "    if (0) tell("),
    "released-from-no-level": ("            subtract(&page->devices[slot(device)].used, some);\n", "            {}\n"),
    "orphan-kept-by-no-level": ("__sync_fetch_and_add(&page->orphaned[slot(device)], some);", "{}"),
    "no-room-uncounted": (
        "    anomaly(FGPU_ANOMALY_FULL);\n    return 0;\n}\n\nstatic void delete_allocation",
        "    return 0;\n}\n\nstatic void delete_allocation",
    ),
    "charged-what-no-driver-has": (" || bytes > FGPU_MOST_BYTES) return;", ") return;"),
    "rows-wrap-around": (
        "return pitch < FGPU_MOST_BYTES && height < MOST_HEIGHT ? pitch * height : pitch;",
        "return pitch * height;",
    ),
    "extents-wrap-around": ("return n > MOST_EXTENT ? MOST_EXTENT : n;", "return n;"),
    "no-extent-is-none": ("return n | none >> 63;", "return n;"),
    "export-forgotten-at-unmap": (
        "    let_go(p, device, bytes, !!exported);",
        "    let_go(p, device, bytes, 0);",
    ),
    "export-forgotten-with-the-context": (
        "    *orphaned = open;\n    return bytes - open;",
        "    return bytes;",
    ),
    "pointer-without-entry-is-not-exported": ("        p->flags |= FGPU_SEEN_EXPORT;\n", ""),
    "disown-anything": ("    if (bytes > *(volatile u64 *)orphaned) return -22;\n", ""),
    "failed-call-names": (
        "        if (UNLIKELY(f.uncovered)) name_bypass(p, &f);\n    } else {\n",
        "    } else {\n        if (UNLIKELY(f.uncovered)) name_bypass(p, &f);\n",
    ),
    "kill-nobody": ("    bpf_send_signal(SIGKILL);\n", ""),
    "kill-who-fits": ("!kills(who) && !fits(page, device, bytes)", "!kills(who)"),
    "kill-under-observe": ("page->flags & FGPU_KILL && !(page->flags & FGPU_OBSERVE)", "page->flags & FGPU_KILL"),
    "every-failure-is-the-device-s": ("== OUT_OF_MEMORY && f.bytes)", "&& f.bytes)"),
    "device-full-of-a-pool-forgotten": ("    if (kind & FGPU_FULL) device_full(p, device, FGPU_POOL, bytes);\n", ""),
    "flood": ("    return __sync_fetch_and_add(n, 1) < most;\n", "    return 1;\n"),
    "program-untold": ("    if (find_levels(levels)) tell_of_program(page_of(levels[0]));\n", ""),
    "every-program-told": ("first_ones(&page->exec_second, &page->exec_count, PROGRAMS_A_SECOND)", "1"),
    "bell-never-rung": ("return bell.ringbuf_output(&nothing, sizeof(nothing), WAKE_UP) ? -11 : 0;", "return 0;"),
    "lost-uncounted": (
        "? FGPU_FATE_FULL : FGPU_FATE_SENT);\n    return 0;",
        "? FGPU_FATE_SENT : FGPU_FATE_SENT);\n    return 0;",
    ),
    "managed-forgotten-at-free": (
        "    if (handle || managed) subtract",
        "    if (handle) subtract",
    ),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of the table."""

    name: str

    row = None
    tests = TESTS
    compiled = False
    kills = frozenset({Outcome.ASSERTED, Outcome.HUNG, Outcome.RAISED})
    removes = "a rule of the ledger"

    def place(self, root: Path) -> Path:
        """The file in which its text stands; SystemExit unless it does so once."""
        texts = {path: path.read_text(encoding="utf-8") for path in (root / "bpf").glob("*.bpf.[ch]")}
        found = [path for path, text in texts.items() for _ in range(text.count(RULES[self.name][0]))]
        if len(found) != 1:
            raise SystemExit(f"{self.name}: its text stands {len(found)} times in bpf/")
        return found[0]

    def apply(self, root: Path) -> None:
        """Breaks the rule in the tree at `root`."""
        file = self.place(root)
        file.write_text(file.read_text(encoding="utf-8").replace(*RULES[self.name]), encoding="utf-8")
