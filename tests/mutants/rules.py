"""Rules of the kernel's ledger, each with the replacement that breaks it: one text in one of bpf/*.bpf.*.

The tests in tests/bpf together must detect each broken rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.mutants.judge import Outcome

TESTS = ("tests/bpf", "--ignore=tests/bpf/test_arm64.py")  # it compares compiled code, and takes half of the time
RELEASES_ALL = """\
    u32 tgid = id >> 32;
    struct fgpu_process *p = processes.lookup(&tgid);
    for (u32 d = 0; p && d < FGPU_DEVICES; d++) release(p, d, on(p, d)->bytes);
"""
RULES = {
    "limit-off-by-one": ("if (UNLIKELY(now > limit) && !(page", "if (UNLIKELY(now > limit + 1) && !(page"),
    "limit-not-looked-at": ("return used + bytes <= limit;", "return 1;"),
    "overflow": ("bytes = FGPU_MOST_BYTES; /* fits in no level, and no sum overflows */", "(void)0;"),
    "ticket-charged-anew": ("if (a->ticket == ticket && a->verdict != FGPU_AGAIN) return a->verdict;", ""),
    "unsettled-admission-released": (
        "    if (UNLIKELY(a->bytes)) leave_unsettled(p, a);\n",
        "    if (UNLIKELY(a->bytes)) release(p, a->device, a->bytes);\n    a->bytes = 0;\n",
    ),
    "unsettled-admission-is-no-overhead": (
        "    if (a->bytes && is_of_era(p, a->device, a->kind)) add_overhead(p, a->device, a->bytes);\n",
        "",
    ),
    "levels-not-asked-before-one-is-charged": (
        "    if (refused_by_a_level(h, device, bytes, kind, patient)) return FGPU_REFUSED;\n",
        "",
    ),
    "refused-question-is-a-change": (
        "    u64 verdict = ask(p, h, t, device, bytes, kind, ticket);\n",
        "    busy(p, t);\n    u64 verdict = ask(p, h, t, device, bytes, kind, ticket);\n",
    ),
    "room-for-any-level": ("else if (h.page[0]->flags & FGPU_WAITS)", "else"),
    "room-decided-for-good": ("    if (until_ns > most) until_ns = most;\n", ""),
    "unseen-context-not-charged": (
        "&& shows_context(p, f)) more = count_unseen(p, f->device);",
        "&& shows_context(p, f)) count_unseen(p, f->device);",
    ),
    "handle-shows-a-context": (
        "f->function >= FGPU_FUNCTION_ALLOC && f->function < FGPU_FUNCTION_CREATE &&",
        "f->function >= FGPU_FUNCTION_ALLOC && f->function <= FGPU_FUNCTION_CREATE &&",
    ),
    "overhead-charged-again-with-an-unseen-context": ("    more -= overhead & ~(overhead >> 63);\n", ""),
    "unseen-context-ends-without-a-record": ("    if (!withdraw_note(p, unseen_on(device))) return 0;\n", ""),
    "unseen-context-ends-for-an-unknown-library": (
        "        if (!trusted) return 0;\n        return f->references ? end_context(",
        "        return f->references ? end_context(",
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
    "hopeless-call-charged": ("    } else if (has || !full) {", "    } else if (1) {"),
    "handed-out-not-charged": ("    default:\n        return f->uncovered;", "    default:\n        return 0;"),
    "failed-call-kept": ("retained);\n    release(p, f->device, f->bytes);\n", "retained);\n"),
    "longjmp-ignored": (
        "&& a->arguments[0] == b->arguments[0] && a->arguments[1] == b->arguments[1] &&\n"
        "           (!is_mapping || a->arguments[2] == b->arguments[2]);",
        ";",
    ),
    "bytes-in-flight-outlive-the-last-context": (
        "    return !era || era == era_of(p, device);",
        "    return 1;",
    ),
    "more-is-released-than-the-process-has": (
        "        bytes = was;\n    }\n    u64 some = draw",
        "    }\n    u64 some = draw",
    ),
    "unfit-call-without-return-is-free": ("    charge_anew(p, f, missing);\n    switch", "    switch"),
    "given-back-by-two-versions": ("if (t->call.arguments[0] == ticket) return 1;", ""),
    "second-probe-counts": ("if (!settles && same_call(&t->call, &now)) return;", ""),
    "mapping-holds-nothing": (
        "        __sync_fetch_and_add(&a->references, 1);\n        value.device",
        "        value.device",
    ),
    "retained-handle-holds-nothing": ("        if (a) __sync_fetch_and_add(&a->references, 1);\n", ""),
    "context-never-ends": ("    if (!left) return end_last_context(p, device, out);\n", ""),
    "second-reference-is-a-context": ("->primary, 0, 1)) return f->bytes;", "->primary, 0, 1) & 0) return f->bytes;"),
    "failed-retain-counts": (
        "    if (retains(f->function)) one_less(&on(p, f->device)->retained);\n",
        "",
    ),
    "crowd-admitted": ("    if (crowded(h->page[0], device, bytes, kind)) return FGPU_REFUSED;\n", ""),
    "entries-never-counted-back": (
        "    if (!allocations.delete(key)) give_place",
        "    if (allocations.delete(key)) give_place",
    ),
    "stale-parts-kept": ("    lower_parts(p, old->device, old->exported ? old->bytes : 0, 0, 0, old->exported);\n", ""),
    "stale-export-released": (
        "        orphan_part(p, tgid, old->device, old->bytes);\n",
        "        release(p, old->device, old->bytes);\n",
    ),
    "every-call-settles": ("&& takes(now.function)", "&& !frees(now.function)"),
    "crowd-of-threads-admitted": ("&p->counted, FGPU_THREADS, 0)", "&p->counted, FGPU_THREADS, 1)"),
    "crowd-of-processes-admitted": ("levels, n, 0, &found", "levels, n, 1, &found"),
    "adopted-process-not-counted": (
        "placed = take_place(&leaf, FGPU_PROCESSES, force);",
        "placed = force || take_place(&leaf, FGPU_PROCESSES, force);",
    ),
    "adoption-refused-beyond-the-part": ("adopt(tgid, ctx, 1)", "adopt(tgid, ctx, 0)"),
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
    "vmm-dies-with-the-context": ("kept = has->vmm + pool_of(has)", "kept = pool_of(has)"),
    "pool-dies-with-the-context": ("kept = has->vmm + pool_of(has)", "kept = has->vmm"),
    "era-forgotten": ("    has->era++;\n", ""),
    "stale-name-frees-the-larger": (
        "return new->bytes < old->bytes ? new->bytes : old->bytes;",
        "return new->bytes < old->bytes ? old->bytes : new->bytes;",
    ),
    "stale-name-of-two-devices-frees": ("old->exported || old->device != new->device", "old->exported"),
    "call-without-an-end-is-no-overhead": (
        "    add_overhead(p, f->device, f->bytes);\n    end_opening(p, f);\n",
        "    end_opening(p, f);\n",
    ),
    "bypass-not-charged": ("    charge(p, &h, f->device, bytes - f->bytes, 1);\n", ""),
    "pool-without-bottom": ("u64 less = subtract_most((s64 *)&on(p, device)->pool, bytes);", "u64 less = bytes;"),
    "overhead-in-a-race": (
        "p->begun != ctx->args[5] || p->changes != ctx->args[5] ? -11 : 0",
        "0",
    ),
    "move-leaves-the-charge": ("    alter_levels(left, device, -bytes);\n", ""),
    "late-charge-stays-behind": ("        shift(p, turn + 1, &left, &entered, d, 0);\n", ""),
    "late-release-never-made-good": ("__sync_lock_test_and_set(&on(p, d)->owed, 0)", "0"),
    "common-level-counted-twice": ("own[i].cgroup & -apart", "own[i].cgroup"),
    "late-charge-has-no-orphan": ("    if (turn) orphan_side(p, tgid, turn - 1);\n", ""),
    "late-charge-outlives-its-entry": (" && !has_stragglers(moved_ns, now))", ")"),
    "finished-move-is-a-move": ("    if (ctx->args[0] == FGPU_FINISH_MOVE) return 1;\n", ""),
    "move-does-not-wait": ("    if (has_stragglers(p->moved_ns, bpf_ktime_get_ns())) return -11;\n", ""),
    "place-believed": ("return page && page->cgroup == level->cgroup ? page : 0;", "return page;"),
    "page-not-withdrawn": ("    *(volatile u64 *)&page->cgroup = 0;\n", ""),
    "places-never-looked-for-again": ("    EACH_LEVEL enter_level(&own[i], own[i].cgroup);\n", ""),
    "quiet-in-a-call": ("if (t->admission.bytes || t->call.function || t->open", "if (t->admission.bytes || t->open"),
    "quiet-after-an-admission": ("if (t->admission.bytes || t->call", "if (t->call"),
    "never-quiet-again": ("| IDLE;\n    end(p);\n", "| IDLE;\n"),
    "new-process-not-counted": ("    count_entry(HOST_PROCESSES);\n    return p;", "    return p;"),
    "new-orphan-not-counted": ("        count_orphan();\n", ""),
    "every-process-told": ("if (!page || page->process_second == now) return;", "if (!page) return;"),
    "reap-of-another-generation": ("    if (p->generation != ctx->args[2]) return -3;\n", ""),
    "device-unchecked": (
        "    if (UNLIKELY(device >= FGPU_DEVICES)) {\n        anomaly",
        "    if (0) {\n        anomaly",
    ),
    "hello-ends-the-admission": (
        "    if (kind == FGPU_HELLO) {\n",
        "    if (t && kind == FGPU_HELLO) t->admission.bytes = 0;\n    if (kind == FGPU_HELLO) {\n",
    ),
    "memory-released-at-exit": (
        "    note_end(id >> 32);\n",
        "    note_end(id >> 32);\n" + RELEASES_ALL,
    ),
    "memory-released-at-exec": (
        "became the leader */\n    end_process(id >> 32);\n",
        "became the leader */\n" + RELEASES_ALL + "    end_process(tgid);\n",
    ),
    "exported-memory-released": ("trusted && !exported && ", "trusted && "),
    "export-forgotten-at-release": ("    *orphaned = f->bytes;\n    return 0;", "    return f->bytes;"),
    "orphan-untold": ("    tell_of_orphans(page_at(&levels[0]), device, some);\n", ""),
    "orphan-of-an-ended-process-untold": ("    tell_of_orphans(page_at(&levels[0]), last, bytes_on_last);\n", ""),
    "released-from-no-level": (
        "        if (page) subtract(&page->devices[slot(device)].used, some);\n",
        "        (void)page;\n",
    ),
    "orphan-counted-by-no-level": ("    __sync_fetch_and_add(&page->orphaned[slot(device)], bytes);\n", ""),
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
    "export-forgotten-at-unmap": ("differs(a->exported | may_be_open(p, f), 0)", "differs(may_be_open(p, f), 0)"),
    "export-forgotten-with-the-context": ("    out->orphaned = open;\n    return bytes - open;", "    return bytes;"),
    "pointer-without-entry-is-not-exported": ("    if (!a) {\n        note(p, FGPU_SEEN_EXPORT);\n", "    if (!a) {\n"),
    "unknown-library-s-free-believed": ("if (trusted && !exported", "if (!exported"),
    "unknown-library-frees-managed-memory": ("return trusted || (function", "return 1 || (function"),
    "unknown-library-resets-the-context": (
        "/* references to the primary context stay */\n        if (!trusted) return 0;\n",
        "/* references to the primary context stay */\n",
    ),
    "unknown-library-drops-references": ("    if (!is_trusted(cookie)) distrust(p, f.function);\n", ""),
    "bypass-told-from-the-budget-of-refusals": (
        "spend(&page->urgent_second, &page->urgent_count,",
        "spend(&page->event_second, &page->event_count,",
    ),
    "unsent-bypass-counts-as-told": (
        "    if (p->flags & FGPU_TOLD_BYPASS) return;\n",
        "    if (p->flags & FGPU_TOLD_BYPASS) return;\n    note(p, FGPU_TOLD_BYPASS);\n",
    ),
    "process-without-an-entry-admitted": (
        "if (verdict == FGPU_AGAIN) return 0; /* the shim",
        "if (verdict == FGPU_AGAIN) verdict = FGPU_ADMITTED; /* the shim",
    ),
    "crowd-without-an-entry-admitted": (
        "    refuse_entry(leaf, device, bytes, kind);\n    return FGPU_REFUSED;",
        "    refuse_entry(leaf, device, bytes, kind);\n    return FGPU_ADMITTED;",
    ),
    "counter-without-room-uncounted": (
        "        __sync_fetch_and_add(n, 1);\n    else\n        anomaly(FGPU_ANOMALY_FULL);\n",
        "        __sync_fetch_and_add(n, 1);\n",
    ),
    "tag-of-the-question-believed": ("(u64)p->tag << FGPU_TAG_SHIFT", "(ticket >> 32) << FGPU_TAG_SHIFT"),
    "more-let-go-than-orphaned": ("was.bytes < bytes ? 0 : was.bytes - bytes;", "was.bytes - bytes;"),
    "orphan-without-room-not-counted": (
        "        record_orphan(p, tgid, turn, d, left.of[d], 1);\n",
        "        record_orphan(p, tgid, turn, d, left.of[d], 1);\n"
        "        struct fgpu_orphan_key key = {tgid, d, p->generation, turn};\n"
        "        if (!orphans.lookup(&key)) continue;\n",
    ),
    "unmap-of-two-levels-leaves-entries": (" | apart(&mapping->level, &of_mappings)) break;", ") break;"),
    "unmap-of-handles-of-two-levels-leaves-entries": ("        if (a && apart(&a->level, &of_handles)) break;\n", ""),
    "unmap-leaves-the-entries-of-mappings": ("    give_places(&of_mappings, FGPU_ALLOCATIONS, mappings);\n", ""),
    "unmap-leaves-the-entries-of-handles": ("    give_places(&of_handles, FGPU_ALLOCATIONS, handles);\n", ""),
    "mapping-of-unknown-memory-has-a-handle": (
        "        value.device = a->device;\n        value.owner = f->arguments[2];\n    }\n",
        "        value.device = a->device;\n    }\n    value.owner = f->arguments[2];\n",
    ),
    "end-of-an-older-mapping-ends-its-successor": ("    value.owner = 0;\n", ""),
    "patience-is-counted": (
        "    if (patient && reason == FGPU_REASON_LIMIT && fits_without_orphans(full, device, bytes)) return 1;\n",
        "",
    ),
    "patience-without-orphans": (
        "reason == FGPU_REASON_LIMIT && fits_without_orphans(full, device, bytes)",
        "reason == FGPU_REASON_LIMIT",
    ),
    "shared-address-space-unseen": ("    if (other) return other;\n", ""),
    "registered-child-is-a-process": ("u32 *owner = p && p->space ? 0", "u32 *owner = p ? 0"),
    "no-room-for-a-borrower-is-no-refusal": ("    if (*full) return 0;\n", "    *full = 0;\n"),
    "borrower-not-forgotten": ("    borrowers.delete(&tgid);\n", ""),
    "address-space-outlives-its-process": ("    if (owner && *owner == tgid) spaces.delete(&space);\n", ""),
    "managed-memory-of-the-ended-not-counted": ("__sync_lock_test_and_set(&on(p, d)->managed, 0)", "0"),
    "exported-pool-released": ("(FGPU_SEEN_POOL_EXPORT | FGPU_SEEN_EXPORT)", "FGPU_SEEN_EXPORT"),
    "context-without-an-end-is-none": (
        "->contexts, 1);\n        break;\n    case FGPU_FUNCTION_RETAIN_HANDLE:",
        "->contexts, 0);\n        break;\n    case FGPU_FUNCTION_RETAIN_HANDLE:",
    ),
    "first-reference-without-an-end-is-none": ("        make_primary(p, f->device);\n", ""),
    "mapping-without-an-end-holds-nothing": ("        hold_handle(p, tgid, f->arguments[2]);\n", ""),
    "green-context-is-no-reference": (
        "function == FGPU_FUNCTION_RETAIN || function == FGPU_FUNCTION_GREEN; }",
        "function == FGPU_FUNCTION_RETAIN; }",
    ),
    "green-context-never-ends": ("            if (!green_ended(f, key)) return 0;\n", "            return 0;\n"),
    "further-reference-on-another-device": ("referred_device(p, tgid, now.device)", "now.device"),
    "retain-without-an-end-is-none": (
        "    case FGPU_FUNCTION_RETAIN_HANDLE:\n    case FGPU_FUNCTION_EXPORT:",
        "    case FGPU_FUNCTION_EXPORT:",
    ),
    "free-beside-an-opening-released": (" | (f->exported >> 32 ^ openings(p, OPENINGS_BEGUN));", ";"),
    "opening-is-never-over": ("    end_opening(p, &f);\n    quiet", "    quiet"),
    "opening-without-an-end-is-never-over": ("    end_opening(p, f);\n", ""),
    "unknown-memory-released-with-the-context": ("    if (unknown > 0) open += unknown;\n", ""),
    "pool-released-without-a-context": (" || !on(p, device)->contexts)", ")"),
    "surplus-process-takes-memory-unnamed": ("name_unrecorded(tgid, cookie & FGPU_FUNCTION_MASK);", "(void)tgid;"),
    "export-without-an-end-is-none": ("        note(p, FGPU_SEEN_EXPORT);\n        break;\n", "        break;\n"),
    "failed-free-brings-an-ended-context-s-memory-back": (
        "if (f->function != FGPU_FUNCTION_DESTROY) f->references = 0;",
        "",
    ),
    "orphan-of-a-living-process-has-an-end": (
        "    if (ended) known->ended_ns = now;\n",
        "    known->ended_ns = now;\n",
    ),
    "orphans-of-one-level-fill-the-map": ("< PART(MOST_ORPHANS)", "< MOST_ORPHANS"),
    "claims-of-owners-never-given-back": ("        __sync_fetch_and_add(all, needed - claimed);\n", "        ;\n"),
    "entries-of-owners-never-given-back": ("    if (owner) lower(&owner->entries[shared], n);\n", ""),
    "empty-orphan-of-a-living-process-deleted": ("    if (was.bytes) return 0;\n", "    if (left) return 0;\n"),
    "orphan-is-older-than-its-bytes": (
        "    if (!*(volatile u64 *)&known->bytes) known->since_ns = now;\n",
        "",
    ),
    "rest-of-a-long-unmap-stays": (
        "        if (UNLIKELY(f.function == FGPU_FUNCTION_UNMAP && f.arguments[1])) go_on(ctx, t, &f);\n",
        "        (void)go_on;\n",
    ),
    "cgroups-outside-told": ("    if (is_outside) return 0;\n", ""),
    "new-cgroups-not-told": ("    *is_outside = has_root;\n", "    *is_outside = 1;\n"),
    "disown-anything": ("    if (bytes > *(volatile u64 *)orphaned) return -22;\n", ""),
    "failed-call-names": (
        "        if (UNLIKELY(f.uncovered)) name_bypass(p, &f);\n    } else {\n",
        "    } else {\n        if (UNLIKELY(f.uncovered)) name_bypass(p, &f);\n",
    ),
    "exceeding-call-not-killed": ("    bpf_send_signal(SIGKILL);\n", ""),
    "fitting-call-killed": ("!kills(full) && !fits(page, device, bytes)", "!kills(full)"),
    "kill-under-observe": ("page->flags & FGPU_KILL && !(page->flags & FGPU_OBSERVE)", "page->flags & FGPU_KILL"),
    "every-failure-is-the-device-s": ("== OUT_OF_MEMORY && f.bytes)", "&& f.bytes)"),
    "device-full-of-a-pool-forgotten": ("    if (kind & FGPU_FULL) device_full(p, device, FGPU_POOL, bytes);\n", ""),
    "flood": ("    return __sync_fetch_and_add(n, 1) < most;\n", "    return 1;\n"),
    "workload-tells-all": (
        "    if (budget && !first_ones(&budget->second, &budget->count, WORKLOAD_A_SECOND)) return 0;\n",
        "",
    ),
    "lost-of-a-workload-is-lost-of-all": (
        "    if (!budget) budget = event_budgets.lookup(&others);\n",
        "    budget = event_budgets.lookup(&others);\n",
    ),
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
    "parked-bytes-stay-charged-around-their-level": ("    leave_groups(p, side, device, bytes);\n", ""),
    "parked-bytes-outlive-their-process": ("        subtract(&own->devices[d].used, bytes);\n", ""),
    "owed-bytes-of-a-parked-process-are-forgotten": ("keeps = p->flags & FGPU_PARKED ? ~0ULL : 0;", "keeps = 0;"),
    "entry-with-parked-bytes-is-deleted": ("    if (left) return -16;\n", ""),
    "a-parked-process-changes-its-levels": ("UNLIKELY(p->flags & FGPU_PARKED) && !stays(p, ctx) ? -16 : move", "move"),
    "wake-up-is-never-refused": (
        "if (take_levels(&h, device, bytes, force) == FGPU_AGAIN)",
        "if (!take_levels(&h, device, bytes, 1))",
    ),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of RULES."""

    name: str

    row = None
    tests = TESTS
    compiled = False
    kills = frozenset({Outcome.ASSERTED, Outcome.HUNG, Outcome.RAISED})
    removes = "a rule of the ledger"

    def place(self, root: Path) -> Path:
        """Return the only file that contains its text. Raise SystemExit if there is no such file, or more than one."""
        texts = {path: path.read_text(encoding="utf-8") for path in (root / "bpf").glob("*.bpf.[ch]")}
        found = [path for path, text in texts.items() for _ in range(text.count(RULES[self.name][0]))]
        if len(found) != 1:
            raise SystemExit(f"{self.name}: its text occurs {len(found)} times in bpf/")
        return found[0]

    def apply(self, root: Path) -> None:
        """Break the rule in the tree at `root`."""
        file = self.place(root)
        file.write_text(file.read_text(encoding="utf-8").replace(*RULES[self.name]), encoding="utf-8")
