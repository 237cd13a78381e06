/*
 * fgpu.h: every struct that two sides share. BPF programs, the shim and fgpu_ebpf/abi.py read this one file;
 * tests/unit/test_layout.py compares the Python layouts with it, offset by offset.
 *
 * Layouts grow at the end only; spare room is zero. FGPU_LAYOUT changes when that promise cannot be kept. It names the
 * folder of the pinned maps, so that two layouts never meet. An agent reads some of another layout (other_layouts.py),
 * so every layout has: the folder vLAYOUT/maps with `pages` (cgroup -> usage page), `shelf` (place -> the same),
 * `limits` and `devices`; of the usage page `version`, `cgroup`, `place` and the first FGPU_DEVICES `devices`, at their
 * offsets; of FGPU_DEVICES and limit flags the values; of `struct fgpu_limit` and `struct fgpu_device` the beginning,
 * with their keys. Sizes are bytes, times are CLOCK_MONOTONIC ns; on the pages of a process, as that process reads the
 * clock.
 */
#ifndef FGPU_H
#define FGPU_H

#include <linux/types.h>

#define FGPU_LAYOUT 3
#define FGPU_PAGE_BYTES 4096
#define FGPU_DEVICES 16
#define FGPU_LEVELS 4
#define FGPU_BOTH_LEVELS 8 /* of both sides of a process */
#define FGPU_VERDICTS 128  /* a power of two: the verifier takes a mask, not a remainder */
#define FGPU_ROWS 128
#define FGPU_SHARED 3
#define FGPU_PATH 192
#define FGPU_ENDS 65536       /* a power of two */
#define FGPU_NO_LIMIT (~0ULL) /* 0, what a fresh page holds, means deny */
#define FGPU_MOST_BYTES (1ULL << 48)
#define FGPU_LEASE_NS 2000000000ULL
#define FGPU_BUDGET_NS 4000000ULL /* of work in flight, where the control page says nothing */
#define FGPU_MAGIC 0x75706766u    /* "fgpu" */
#define FGPU_SOCKET_DIR "/run/fgpu/shim"
#define FGPU_SOCKET FGPU_SOCKET_DIR "/shim.sock"

/* A verdict word is `ticket << 2 | verdict`, stored at once in slot `ticket & (FGPU_VERDICTS - 1)`. */
enum fgpu_verdict { FGPU_REFUSED, FGPU_ADMITTED, FGPU_AGAIN, FGPU_UNLIMITED };
enum fgpu_kind { FGPU_MEMORY, FGPU_POOL, FGPU_CONTEXT, FGPU_HELLO, FGPU_VMM, FGPU_KINDS, FGPU_EVENTS };
/* Flags beside a kind. FULL, when bytes are given back: the driver had no room for them. TAGGED, for a question: the
 * answer goes to `answers`, with the tag of the process that asks. PATIENT, for a question: a refusal for orphaned
 * bytes alone is not counted. */
#define FGPU_KIND_MASK 0xff
#define FGPU_FULL 0x100
#define FGPU_TAGGED 0x200
#define FGPU_PATIENT 0x400
/* An answer word is `tag << 34 | (ticket & FGPU_TICKET_BITS) << 2 | verdict`, in slot `ticket & (FGPU_VERDICTS - 1)`.
 * The kernel program chooses the tag, so no process can write the answer that another one waits for. */
#define FGPU_TICKET_BITS 0xffffffffULL
#define FGPU_TAG_SHIFT 34
#define FGPU_TAG_BITS 0x3fffffffU
enum fgpu_reason {
    FGPU_REASON_LIMIT,
    FGPU_REASON_DEVICE_FULL,
    FGPU_REASON_OBSERVED,
    FGPU_REASON_ENTRIES /* too many allocations, threads or processes, of whatever size */
};
enum fgpu_anomaly {
    FGPU_ANOMALY_RELEASE, /* more given back than held */
    FGPU_ANOMALY_FULL,    /* a map had no room: charged until the process ends */
    FGPU_ANOMALY_DEVICE,  /* a device index that is not the tenant's */
    FGPU_ANOMALY_LOST,    /* a witness that met a process entry half made */
    FGPU_ANOMALY_BYPASS,  /* an allocation without an admission, or with a smaller one */
    FGPU_ANOMALY_STALE,   /* a handle seen anew while its old charge stood */
};

/* -- usage page: one per level, a BPF array of one element, frozen: written by BPF programs alone ---------------- */
struct fgpu_usage {
    __u64 limit;
    __u64 used;
    __u64 peak;
    __u64 refused;
};
struct fgpu_tally { /* bytes, ever growing: what was asked for and granted, what the driver was seen to give */
    __u64 admitted;
    __u64 witnessed;
};
/* Maps that all tenants share: a level may have a part of each. What is beyond is refused to that level, not to its
 * neighbours. */
enum fgpu_shared { FGPU_ALLOCATIONS, FGPU_THREADS, FGPU_PROCESSES };
struct fgpu_usage_page {
    __u64 version;
    __u64 cgroup;
    __u64 flags; /* FGPU_OBSERVE, FGPU_KILL, 1 << FGPU_UNCOMMITTED_SHIFT << device: uncommitted there */
    __u64 place; /* in `shelf` */
    __u64 spare[4];
    struct fgpu_usage devices[FGPU_DEVICES];
    __u64 verdicts[FGPU_VERDICTS];
    struct fgpu_tally tallies[FGPU_DEVICES];
    __u64 orphaned[FGPU_DEVICES]; /* within `used`: of processes that ended or exported it, and may still be held */
    __u64 event_second;           /* of the events that this level has caused, so that no level floods the ring */
    __u64 event_count;
    __u64 process_second;       /* of the last that told of a process */
    __u64 entries[FGPU_SHARED]; /* that its processes have in the maps that all tenants share */
    __u64 exec_second;          /* of the programs that began here and were reported */
    __u64 exec_count;
    __u64 orphaned_ns[FGPU_DEVICES]; /* when bytes of this level were orphaned last; 0: never */
    __u64 answers[FGPU_VERDICTS];    /* answer words, see FGPU_TAGGED */
    __u64 orphans;                   /* entries of this level in the map `orphans` */
    __u64 urgent_second;             /* of events that must not be lost behind refusals */
    __u64 urgent_count;
    __u64 looked_ns[FGPU_DEVICES]; /* when the agent last saw that the device keeps all of `orphaned`; 0: never */
    __u64 owner;                   /* slot in `owners` of the owner of this level's bounds; 0: it has none */
    __u64 undecided[FGPU_DEVICES]; /* requests of this level's programs that met an uncommitted level, ever growing */
    __u64 crowded; /* requests of this level's programs that were refused for too many entries, ever growing */
    __u64 tail[75];
};
#define FGPU_OBSERVE 1
#define FGPU_KILL 2
/* Uncommitted: the limit on a device does not count against the device yet. A request for its memory is refused,
 * uncounted, and the event FGPU_NEWS_FIRST_USE tells the agent, which grants the limit or sets it to 0; then the
 * request is made again. `undecided` of the program's own level counts such requests: the uncommitted level may be a
 * group whose page the program does not have yet. */
#define FGPU_UNCOMMITTED_SHIFT 16 /* the first device's bit */

/* -- control page: one per process, a sealed memfd, written by the gatekeeper alone ------------------------------ */
struct fgpu_device {
    __u8 uuid[16];
    __u32 index; /* the ledger's, not CUDA's ordinal */
    __u32 spare[3];
};
struct fgpu_row { /* one process of the tenant on one device */
    __u32 pid;    /* as the reader's pid namespace knows it */
    __u32 device;
    __u64 bytes;
};
struct fgpu_control_page {
    __u32 version;
    __u32 flags;   /* FGPU_MANAGED, FGPU_SETTLE */
    __u8 boot[16]; /* the gatekeeper that wrote this page */
    __u64 heartbeat_ns;
    __u64 epoch; /* a change means: say hello again */
    __u32 device_count;
    __u32 tag; /* of this process's answers, see FGPU_TAGGED; 0: it asks without one */
    __u32 spare[4];
    struct fgpu_device devices[FGPU_DEVICES];
    __u32 gates[FGPU_DEVICES]; /* turn << FGPU_GATE_SHIFT | FGPU_GATED | FGPU_GATE_OPEN; a futex each */
    __u32 sequence;            /* odd while the rows change */
    __u32 row_count;
    __u64 spare2;
    struct fgpu_row rows[FGPU_ROWS];
    __u64 budget_ns[FGPU_DEVICES]; /* most work in flight while gated: how long a drain may take; 0: FGPU_BUDGET_NS */
    __u64 passes[FGPU_DEVICES];    /* a closed gate lets launches through until so many have been made: others wait for
                                      those */
};
/* A gate. Without GATED, whatever its other bits say, no gatekeeper schedules this process there, and the shim counts
 * nothing. A turn keeps its number from its opening to the end of its drain; the next turn has another, so every change
 * of a gate changes the word. A closed gate is open if its page's heartbeat is older than the lease. */
#define FGPU_GATE_OPEN 1
#define FGPU_GATED 2
#define FGPU_GATE_SHIFT 2
#define FGPU_MANAGED 1
#define FGPU_SETTLE 2 /* no return probes on this kernel: call fgpu_settle after the driver */

/* -- status page: one per process, a memfd sealed against resizing, written by the tenant: hints, never trusted -- */
struct fgpu_status {
    __u32 waiting; /* threads at the closed gate */
    __u32 drained; /* the last turn (gate >> FGPU_GATE_SHIFT) that was seen closed with nothing in flight */
    __u64 launches;
};
struct fgpu_flight { /* work given to a gated device */
    __u64 in_flight; /* launches not known to be done; counted before the gate is read: 0 after it closed is drained */
    __u64 busy_until_ns; /* when they should be done, as measured; the past, and no bell: no thread has looked */
    __u64 wanted_ns;     /* when a thread last wanted to launch */
    __u64 idle_ns;       /* between an end that was seen (of a span) and the launch after it, ever growing */
};
struct fgpu_span {  /* of the last turn */
    __u64 begun_ns; /* when a thread last came through a gate that had been closed */
    __u64 ended_ns; /* when the last of what was in flight was seen to be done, while a thread waited for that */
};
struct fgpu_status_page {
    __u32 version;
    __u32 bell; /* a futex: another value and a wake when a thread comes to wait, and when a turn has drained */
    __u32 spare[14];
    struct fgpu_status devices[FGPU_DEVICES];
    struct fgpu_flight flights[FGPU_DEVICES];
    struct fgpu_span spans[FGPU_DEVICES];
};
/* The end of a drain is reported by the thread that comes to the closed gate, after it has waited for what is in
 * flight, or by the thread whose synchronise or query ends. A program that does neither reports nothing, nor does a
 * stopped one: then busy_until_ns is the best guess, and the scheduler waits until its deadline. The shim has no thread
 * of its own. */

/* -- hello: SOCK_SEQPACKET; descriptors in the answer: control, status, usage pages leaf first ------------------- */
struct fgpu_hello {
    __u32 magic;
    __u16 version;
    __u16 size;
    __u8 boot[16]; /* of the control page in use, or zero */
    __u32 flags;
    __u32 spare[9];
};
struct fgpu_answer {
    __u32 magic;
    __u16 version;
    __u16 size;
    __u32 code;
    __u32 levels; /* usage pages that follow */
    __u32 devices;
    __u32 flags;
    __u64 epoch;
    __u64 spare[12];
};
enum fgpu_code { FGPU_CODE_REFUSED, FGPU_CODE_MANAGED, FGPU_CODE_UNMANAGED };

/* -- maps ------------------------------------------------------------------------------------------------------- */
struct fgpu_level_device { /* key of limits */
    __u64 cgroup;
    __u64 device;
};
struct fgpu_limit {
    __u64 bytes;
    __u64 flags; /* as on the usage page; of the uncommitted bits only this device's */
};
struct fgpu_share { /* shares: {level, device} -> what the level is to get of the device's time; none: not gated */
    __u64 limit_millionths;
    __u64 weight;
    __u64 rank; /* 0 comes first */
    __u64 quantum_ns;
};
struct fgpu_turn { /* turns: {level, device} -> what came of it; numbers only grow unless it says otherwise */
    __u64 owned_ns;
    __u64 waits;
    __u64 wait_ns;
    __u64 overruns;            /* turns that passed with work in flight */
    __u64 switches;            /* turns that began */
    __u64 throttled;           /* times that its limit held it back */
    __u64 owner;               /* 1: the device is its own now */
    __u64 had_millionths;      /* of the time since these numbers were last written */
    __u64 entitled_millionths; /* of that time, by weights and limits of the tenants that wanted any */
    __u64 free;     /* 1: no other tenant shares the device, and there is no ceiling: it is not gated, nor measured */
    __u64 since_ns; /* the start of its wait; 0: it does not wait */
};
/* owners: slot -> how many entries of the shared maps an owner of bounds (a workload with all levels inside it) has,
 * and may have. The entries of the last slot are all that owners have claimed: an owner claims some at a time. Slot 0
 * is for levels without an owner. */
#define FGPU_OWNERS 4096
#define FGPU_OWNED 4         /* the maps of enum fgpu_shared, and then: */
#define FGPU_OWNED_ORPHANS 3 /* `orphans` */
struct fgpu_owner {
    __u64 cgroup; /* 0: the slot is free */
    __u64 entries[FGPU_OWNED];
    __u64 claimed[FGPU_OWNED];
    __u64 most[FGPU_OWNED];
    __u64 spare[3];
};
struct fgpu_file { /* key of files, as /proc/PID/maps names a file */
    __u64 dev;
    __u64 ino;
};
struct fgpu_level { /* of a process */
    __u64 cgroup;   /* 0: none */
    __u64 place;    /* of its usage page in `shelf`, as of when the process came to it; its owner's slot in the upper
                       half */
};
struct fgpu_holding { /* of a process on one device; what every allocation touches comes first */
    __u64 bytes;      /* all that is charged, what follows included */
    __s64 charged[2]; /* of `bytes`, at the levels of either side */
    __u32 era;        /* one more when the last context ends: older allocations are gone */
    __u32 spare0;
    __u64 vmm;     /* outlives contexts */
    __u64 managed; /* NVML never shows it */
    __u64 pool;
    __s64 overhead; /* contexts, modules, rounding: what NVML alone knows; may be negative */
    __u64 contexts; /* 64 bits, as all that several threads add to at once and decide on */
    __u64 retained; /* references to the primary context, counted before the driver does */
    __u64 primary;  /* 1: the primary context is there; a reset ends it and leaves its references */
    __u64 exported; /* pointers that another process may have open */
    __u64 exported_vmm;
    __u64 owed;  /* of `charged`: released, and not found there in the middle of a move */
    __u64 ended; /* contexts that ended while others went on: NVML alone knows how much was in them */
    __u64 peak;  /* the most that `bytes` has been since the agent last looked (FGPU_MARK) */
};
/* processes: tgid -> ; a multiple of 64 bytes, so that the kernel lays each field on the same part of a cache line */
struct fgpu_process {
    __u64 state;      /* 0 fresh, 1 claimed, 2 ready */
    __u64 generation; /* when the kernel made this entry: a reused tgid has another */
    __u64 changes;    /* done; equal to `begun` where none is under way */
    __u64 begun;      /* changes; two reads of one number had none between */
    __u64 turn;       /* moves so far: its last bit is the side that is charged */
    __u64 moved_ns;   /* when the last of them was */
    __u32 level_count;
    __u32 flags; /* FGPU_SEEN_SHIM and its kin */
    __u32 last_device;
    __u32 tag; /* in the answers to its questions; no other living process of the host has it */
    struct fgpu_level sides[FGPU_BOTH_LEVELS]; /* `levels` of this move and of the one before */
    __u64 levels[FGPU_LEVELS];                 /* cgroup ids, leaf first */
    struct fgpu_level counted; /* the level in whose part of the map this entry is, and its threads are in theirs */
    __s64 threads;             /* so many of them; below 0: it counts none any more */
    __u64 space;               /* its address space, by the kernel's address of it; 0: not known */
    struct fgpu_holding devices[FGPU_DEVICES];
};
#define FGPU_SEEN_SHIM 1
#define FGPU_SEEN_BYPASS 2
#define FGPU_SEEN_EXPORT 4       /* of memory that has no entry: what it frees may be open elsewhere */
#define FGPU_SEEN_CALL 8         /* by a probe: not only by NVML */
#define FGPU_SEEN_POOL_EXPORT 16 /* pool bytes that it gives back may be open elsewhere */
#define FGPU_SEEN_IMPORT 32      /* it has opened memory of other processes */
#define FGPU_TOLD_BYPASS 64      /* the event of its first call without an admission was sent */
enum fgpu_space { FGPU_SPACE_POINTER, FGPU_SPACE_HANDLE, FGPU_SPACE_MAPPING, FGPU_SPACE_CONTEXT, FGPU_SPACE_ARRAY };
struct fgpu_allocation_key {
    __u32 tgid;
    __u32 space;
    __u64 generation;
    __u64 handle;
};
struct fgpu_allocation {
    __u64 bytes;
    __u32 device;
    __u32 era;
    __u64 references;        /* of a VMM handle: handles and mappings together */
    __u64 owner;             /* of a mapping: its handle; of a pointer: 1 where it is managed memory */
    __u64 exported;          /* 1: another process may have it open */
    struct fgpu_level level; /* the leaf in which its process was when the entry was made; 0: none */
};
/* orphans: bytes of a process that has ended, or that it exported and released. They stay charged to these levels until
 * the agent finds that the device does not hold them any more. */
struct fgpu_orphan_key {
    __u32 tgid;
    __u32 device;
    __u64 generation; /* of the process, as its entry had it */
    __u64 turn;       /* its moves so far: other levels may be charged after each */
};
struct fgpu_orphan {
    __u64 bytes;
    __u64 since_ns; /* the first of them */
    __u64 ended_ns; /* when its process ended, or executed another program; 0: it lives */
    __u64 spare;
    struct fgpu_level levels[FGPU_LEVELS]; /* that are charged, leaf first */
};
struct fgpu_admission { /* that no driver call has settled yet; ticket 0: none */
    __u64 ticket;
    __u64 bytes;
    __u32 device;
    __u32 kind;
    __u64 verdict;
};
/* How far calls of a library are believed: see docs/tenants.md, trust classes. */
enum fgpu_class {
    FGPU_CLASS_HOST,    /* the host driver's own file: what it frees counts as freed */
    FGPU_CLASS_LISTED,  /* a file that the host's administrator trusts: likewise */
    FGPU_CLASS_UNKNOWN, /* what it frees stays charged until NVML shows that it is freed */
};
/* What a probe on the driver is attached to. The cookie of both its probes is `function | class << FGPU_CLASS_SHIFT`.
 */
#define FGPU_FUNCTION_MASK 0xff
#define FGPU_CLASS_SHIFT 8
enum fgpu_function {
    FGPU_FUNCTION_NONE,
    FGPU_FUNCTION_ALLOC,
    FGPU_FUNCTION_ALLOC_MANAGED,
    FGPU_FUNCTION_ALLOC_PITCH,
    FGPU_FUNCTION_ARRAY,
    FGPU_FUNCTION_ARRAY_3D,
    FGPU_FUNCTION_ARRAY_MIPMAPPED,
    FGPU_FUNCTION_CREATE,
    FGPU_FUNCTION_MAP,
    FGPU_FUNCTION_UNMAP,
    FGPU_FUNCTION_RETAIN_HANDLE,
    FGPU_FUNCTION_EXPORT,
    FGPU_FUNCTION_EXPORT_POINTER,
    FGPU_FUNCTION_RETAIN,
    FGPU_FUNCTION_PRIMARY_RELEASE,
    FGPU_FUNCTION_PRIMARY_RESET,
    FGPU_FUNCTION_CONTEXT_V2,
    FGPU_FUNCTION_CONTEXT_V3,
    FGPU_FUNCTION_CONTEXT_V4,
    FGPU_FUNCTION_FREE, /* from here to DESTROY: what takes an entry out of the allocations */
    FGPU_FUNCTION_RELEASE,
    FGPU_FUNCTION_ARRAY_DESTROY,
    FGPU_FUNCTION_DESTROY,
    FGPU_FUNCTION_EXPORT_RANGE, /* cuMemGetHandleForAddressRange */
    FGPU_FUNCTION_EXPORT_POOL,
    FGPU_FUNCTION_IMPORT, /* of memory, a pool or an allocation in one */
};
/* hits: how often each probe ran, by function at its entry; the shim's own two come last. */
#define FGPU_HITS 32
#define FGPU_HIT_ADMIT 30
#define FGPU_HIT_GIVE_BACK 31
struct fgpu_call { /* the driver call that a thread is in; function 0: none */
    __u64 function;
    __u64 arguments[3];
    __u64 bytes; /* charged, or taken out of the allocations, until the call's end decides */
    __u32 device;
    __u32 admitted; /* an admission went before */
    __u64 references;
    __u64 exported;
    __u64 uncovered; /* bytes, where no admission covered them */
};
struct fgpu_thread { /* threads: pid_tgid -> ; made once, deleted when the thread ends */
    struct fgpu_admission admission;
    struct fgpu_call call;
    __u64 open; /* the generation of the process that counts it; with its top bit, unless in the middle of a change */
};
#define FGPU_REASONS 8 /* for as many each, what is counted for the host: anomalies, then events by their fate */
/* Counters of a level. */
struct fgpu_counter_key {
    __u64 cgroup;
    __u32 device;
    __u16 kind;
    __u16 reason;
};

/* adjust(): arguments of the raw tracepoint program that the agent runs by BPF_PROG_TEST_RUN. Returns 0 or -errno. */
enum fgpu_adjust {
    FGPU_PUBLISH,  /* cgroup: limits -> its page */
    FGPU_OVERHEAD, /* tgid, generation, device, bytes, changes: sets what NVML alone knows; -EAGAIN if one began
                      on */
    FGPU_MOVE,     /* tgid, generation (0: make the entry), count, levels leaf first: charges follow */
    FGPU_REAP,     /* tgid, generation: the process is gone, and no event said so */
    FGPU_DISOWN, /* cgroup, device, bytes: the device does not hold so many orphaned bytes any more, which have no entry
                    in `orphans` */
    FGPU_RAISE,  /* tgid, generation, device, bytes: adds to what NVML alone knows, in any case */
    FGPU_WITHDRAW, /* cgroup: its page is about to be taken away */
    FGPU_SWEPT,    /* cgroup, n, place: so many allocations of the level's were deleted, which no free would delete */
    FGPU_RING,     /* wakes what sleeps on the bell: shares have changed */
    FGPU_LET_GO, /* tgid, device, generation, turn, bytes: the device does not hold so many of these bytes any more; 0:
                    delete it */
    FGPU_MARK,   /* tgid, generation, device: its `peak` begins anew */
    FGPU_ENTER,  /* tgid, 0, count, levels leaf first: makes the entry of a process that has none yet */
    FGPU_LOOKED, /* cgroup, device, time: sets `looked_ns` */
    FGPU_OWN,    /* cgroup, slot, owner, most[FGPU_OWNED]: the level's bounds are those of this owner; cgroup 0: only
                    the slot is written */
    FGPU_TRIM,   /* slot: gives back what its owner has claimed and does not need */
};

/* -- events: a ring buffer of what is rare; what does not get in is counted ---------------------------------------- */
enum fgpu_news {
    FGPU_NEWS_PROCESS,  /* a process of a managed cgroup is seen for the first time; of many in a second, one */
    FGPU_NEWS_REFUSED,  /* by the level `cgroup`; reason as in the counters */
    FGPU_NEWS_BYPASS,   /* its first call without an admission */
    FGPU_NEWS_KILLED,   /* a call without an admission that would exceed the limit, under onBypass: kill */
    FGPU_NEWS_ORPHANED, /* the level `cgroup` has orphaned bytes now */
    FGPU_NEWS_MOVED,    /* a process was moved to the cgroup at `path` */
    FGPU_NEWS_MADE,     /* the cgroup at `path` was made */
    FGPU_NEWS_EMPTIED,  /* no process is left in it, nor below */
    FGPU_NEWS_REMOVED,
    FGPU_NEWS_ENDED, /* on the bell: a process that had a context runs no more; the driver may still be busy with it */
    FGPU_NEWS_EXECUTED,  /* a program begins in the level `cgroup`; the first few of a second */
    FGPU_NEWS_FIRST_USE, /* of the device, by a process of the level `cgroup`, which is uncommitted there */
};
enum fgpu_fate { FGPU_FATE_SENT, FGPU_FATE_RATE, FGPU_FATE_FULL };
struct fgpu_event {
    __u64 at_ns;
    __u32 kind;
    __u32 tgid;
    __u64 cgroup;
    __u64 bytes;
    __u32 device;
    __u16 operation; /* enum fgpu_kind */
    __u16 reason;
};
struct fgpu_cgroup_event {
    struct fgpu_event event;
    char path[FGPU_PATH]; /* cut where it is longer */
};
/* event_budgets: FNV-1a hash of a workload's path from the hierarchy's root -> its budget of events of cgroups. The
 * agent enters workloads in which much happens. FGPU_BUDGET_OTHERS: for lost events of all other cgroups.
 * FGPU_BUDGET_ROOT: there if the agent is in a cgroup namespace; `second` is the hash of its root's path. */
#define FGPU_EVENT_BUDGETS 1024
#define FGPU_BUDGET_OTHERS 0
#define FGPU_BUDGET_ROOT 1
#define FGPU_FNV_BASIS 0xcbf29ce484222325ULL
#define FGPU_FNV_PRIME 0x100000001b3ULL
struct fgpu_event_budget {
    __u64 second; /* of the events that were counted last */
    __u64 count;  /* events of that second */
    __u64 lost;   /* events that were not sent to the agent, ever growing */
};

#endif
