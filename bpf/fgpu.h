/*
 * fgpu.h: every struct that two programs share. BPF programs and the shim include this file, and fgpu_ebpf/abi.py reads
 * the file. tests/unit/test_layout.py compares the Python layouts with this file, offset by offset.
 *
 * Layouts grow at the end only; spare fields are zero. FGPU_LAYOUT changes if a layout must change in another way. The
 * folder of the pinned maps is named after FGPU_LAYOUT, so that two layouts never share a map. An agent also reads some
 * maps of another layout (other_layouts.py), so every layout has the following parts: the folder vLAYOUT/maps with
 * `pages` (cgroup -> usage page), `shelf` (place -> usage page), `limits` and `devices`; `version`, `cgroup`, `place`
 * and the first FGPU_DEVICES `devices` of the usage page, at the same offsets; the same values of FGPU_DEVICES and of
 * the limit flags; the same beginning and the same keys of `struct fgpu_limit` and `struct fgpu_device`. Sizes are
 * bytes. Times are CLOCK_MONOTONIC ns; times on the pages of a process are by the clock that the process reads.
 */
#ifndef FGPU_H
#define FGPU_H

#include <linux/types.h>

#define FGPU_LAYOUT 3
#define FGPU_PAGE_BYTES 4096
#define FGPU_DEVICES 16
#define FGPU_LEVELS 4
#define FGPU_BOTH_LEVELS 8 /* levels of both sides of a process */
#define FGPU_VERDICTS 128  /* a power of two: the verifier accepts an index with a mask, not with a remainder */
#define FGPU_ROWS 128
#define FGPU_SHARED 3
#define FGPU_OPENS 2
#define FGPU_PATH 192
#define FGPU_ENDS 65536       /* a power of two */
#define FGPU_NO_LIMIT (~0ULL) /* 0, the value in a new page, means that nothing is admitted */
#define FGPU_MOST_BYTES (1ULL << 48)
#define FGPU_LEASE_NS 2000000000ULL
#define FGPU_BUDGET_NS 4000000ULL /* of work in flight, if the control page has no budget */
#define FGPU_MAGIC 0x75706766u    /* "fgpu" */
#define FGPU_SOCKET_DIR "/run/fgpu/shim"
#define FGPU_SOCKET FGPU_SOCKET_DIR "/shim.sock"

/* A verdict word is `ticket << 2 | verdict`. One store writes it into slot `ticket & (FGPU_VERDICTS - 1)`. */
enum fgpu_verdict { FGPU_REFUSED, FGPU_ADMITTED, FGPU_AGAIN, FGPU_UNLIMITED };
enum fgpu_kind { FGPU_MEMORY, FGPU_POOL, FGPU_CONTEXT, FGPU_HELLO, FGPU_VMM, FGPU_KINDS, FGPU_EVENTS };
/* Flags in the same word as a kind. FULL, when bytes are released: the driver was out of memory. TAGGED, in a request:
 * the verdict is stored in `answers`, with the tag of the requesting process. PATIENT, in a request: a refusal that is
 * due to orphaned bytes alone is not counted. FREED: no request, and no verdict; the program has freed memory in a way
 * that no probe reports, see `freed_ns`. KNOCK, ANNOUNCE, CALLED and LACKS are in requests of the kind HELLO, which get
 * no verdict. KNOCK: the device is the number of a descriptor, see FGPU_NEWS_KNOCK. ANNOUNCE: the program will let the
 * driver open device nodes. CALLED: the program has registered, or has called a function that launches work, waits for
 * work or queries work, see `called_ns`; its shim delays such calls while the process is parked. LACKS: the bytes fit
 * in the limits, but the driver has no memory for them, and the thread waits, see `room_ns`. */
#define FGPU_KIND_MASK 0xff
#define FGPU_FULL 0x100
#define FGPU_TAGGED 0x200
#define FGPU_PATIENT 0x400
#define FGPU_KNOCK 0x800
#define FGPU_FREED 0x1000
#define FGPU_ANNOUNCE 0x2000
#define FGPU_CALLED 0x4000
#define FGPU_LACKS 0x8000
/* A tagged verdict word is `tag << 34 | (ticket & FGPU_TICKET_BITS) << 2 | verdict`, in slot `ticket & (FGPU_VERDICTS -
 * 1)`. A BPF program chooses the tag, so no process can write the verdict that another process waits for. */
#define FGPU_TICKET_BITS 0xffffffffULL
#define FGPU_TAG_SHIFT 34
#define FGPU_TAG_BITS 0x3fffffffU
enum fgpu_reason {
    FGPU_REASON_LIMIT,
    FGPU_REASON_DEVICE_FULL,
    FGPU_REASON_OBSERVED,
    FGPU_REASON_ENTRIES /* too many allocations, threads or processes, whatever the requested size */
};
enum fgpu_anomaly {
    FGPU_ANOMALY_RELEASE, /* more bytes were released than were charged */
    FGPU_ANOMALY_FULL,    /* a map, or a level's part of a map, was full; bytes without an entry stay charged until the
                             process exits */
    FGPU_ANOMALY_DEVICE,  /* a request with a device index of FGPU_DEVICES or more */
    FGPU_ANOMALY_LOST,    /* a driver call found the entry of its process half created */
    FGPU_ANOMALY_BYPASS,  /* an allocation without an admission, or with a smaller admission */
    FGPU_ANOMALY_STALE,   /* a new handle whose key still has an older charge */
};

/* -- usage page: one per level, a BPF array of one element, frozen: only BPF programs write it -------------------- */
struct fgpu_usage {
    __u64 limit;
    __u64 used;
    __u64 peak;
    __u64 refused;
};
struct fgpu_tally { /* bytes, which only grow: bytes admitted to requests, and bytes allocated by driver calls that have
                       a probe */
    __u64 admitted;
    __u64 witnessed;
};
/* Maps that all tenants share. Each level may have a part of each map. Entries beyond this part are refused to the
 * level, and not to its neighbours. */
enum fgpu_shared { FGPU_ALLOCATIONS, FGPU_THREADS, FGPU_PROCESSES };
struct fgpu_usage_page {
    __u64 version;
    __u64 cgroup;
    __u64 flags; /* FGPU_OBSERVE, FGPU_KILL, FGPU_DENY, FGPU_WAITS, 1 << FGPU_UNCOMMITTED_SHIFT << device: uncommitted
                    there */
    __u64 place; /* in `shelf` */
    __u64 spare[4];
    struct fgpu_usage devices[FGPU_DEVICES];
    __u64 verdicts[FGPU_VERDICTS];
    struct fgpu_tally tallies[FGPU_DEVICES];
    __u64 orphaned[FGPU_DEVICES]; /* part of `used`: bytes that exited or exporting processes had, and that the
                                     device may still hold */
    __u64 event_second;           /* the second in which events of this level were last counted, so that no level can
                                     flood the ring buffer */
    __u64 event_count;
    __u64 process_second;       /* the second of the last event of a process */
    __u64 entries[FGPU_SHARED]; /* number of entries of its processes in the maps that all tenants share */
    __u64 exec_second;          /* the second in which programs that start in this level were last reported */
    __u64 exec_count;
    __u64 orphaned_ns[FGPU_DEVICES]; /* when bytes of this level were last orphaned; 0: never */
    __u64 answers[FGPU_VERDICTS];    /* tagged verdict words, see FGPU_TAGGED */
    __u64 orphans;                   /* entries of this level in the map `orphans` */
    __u64 urgent_second;             /* the second of events that must not be lost because of many refusals */
    __u64 urgent_count;
    __u64 looked_ns[FGPU_DEVICES]; /* when the agent last found that the device keeps all of `orphaned`; 0: never */
    __u64 owner;                   /* slot in `owners` of this level's bound owner; 0: no owner */
    __u64 undecided[FGPU_DEVICES]; /* requests of this level's programs that found an uncommitted level; only grows */
    __u64 crowded; /* requests of this level's programs that were refused for too many entries; only grows */
    __u64 outside[FGPU_DEVICES]; /* part of the limit that views leave out, for contexts: see FGPU_OUTSIDE_SHIFT */
    __u64 freed_ns; /* when a program of this level last freed memory in a way that no probe reports; 0: never */
    __u64 opens[FGPU_OPENS]; /* opens of device nodes by processes of this level without the shim: refused; allowed */
    __u64 open_second;       /* the second in which events of refused opens were last counted */
    __u64 open_count;
    __u64 parked[FGPU_DEVICES]; /* part of `used`: bytes of this level's own processes that are in host memory. The
                                   levels around this level are not charged for these bytes */
    __u64 held; /* entries of this level's processes in the map `parked`. The shims of these processes make no call that
                   waits for work or queries work, because the driver may have unmapped memory that the call would
                   read */
    __u64 called_ns; /* when a program of this level last reported a call, see FGPU_CALLED; 0: never. A program reports
                        one call in 0.1 s */
    __u64 room_ns[FGPU_DEVICES]; /* the agent's last decision about a request that lacks room, see FGPU_LACKS: the
                                    request waits until this time, and is then repeated. With FGPU_NO_ROOM: no room will
                                    be made, by a decision at this time */
    __u64 tail[20];
};
#define FGPU_OBSERVE 1
#define FGPU_KILL 2
#define FGPU_DENY 4       /* a process without the shim may not open a device node, see device_open() */
#define FGPU_WAITS 8      /* if a device is full, the agent may make room for requests of the level, see `room_ns` */
#define FGPU_NO_ROOM 1ULL /* the last bit of `room_ns` */
#define FGPU_ROOM_NS 5000000000ULL /* `room_ns` is at most this far in the future */
/* Uncommitted: the limit on a device does not count against the device yet. A request for memory of that device is
 * refused, but not counted as a refusal. After the event FGPU_NEWS_FIRST_USE the agent grants the limit or sets the
 * limit to 0, and the shim repeats the request. `undecided` of the program's own level counts such requests, because
 * the uncommitted level may be a group whose page the program does not have yet. */
#define FGPU_UNCOMMITTED_SHIFT 16 /* the first device's bit */
/* `memory.contexts` of a policy: the limit includes the size of that many contexts, and the tenant's views do not show
 * this part. The size is in MiB, and only in the flags of a limit. On the usage page, the size is `outside`. */
#define FGPU_OUTSIDE_SHIFT 32

/* -- control page: one per process, a sealed memfd, written by the gatekeeper alone ------------------------------ */
struct fgpu_device {
    __u8 uuid[16];
    __u32 index; /* the ledger's index, not CUDA's ordinal */
    __u32 spare[3];
};
struct fgpu_row { /* one process of the tenant on one device */
    __u32 pid;    /* in the pid namespace of the reader */
    __u32 device;
    __u64 bytes;
};
struct fgpu_control_page {
    __u32 version;
    __u32 flags;   /* FGPU_MANAGED, FGPU_MPS */
    __u8 boot[16]; /* identifies the gatekeeper that wrote this page */
    __u64 heartbeat_ns;
    __u64 epoch; /* if the epoch changes, the process must register again */
    __u32 device_count;
    __u32 tag; /* tag of this process's verdicts, see FGPU_TAGGED; 0: the process's requests have no tag */
    __u32 spare[4];
    struct fgpu_device devices[FGPU_DEVICES];
    __u32 gates[FGPU_DEVICES]; /* turn << FGPU_GATE_SHIFT | FGPU_GATED | FGPU_GATE_OPEN; a futex each */
    __u32 sequence;            /* odd while the gatekeeper changes the rows */
    __u32 row_count;
    __u64 spare2;
    struct fgpu_row rows[FGPU_ROWS];
    __u64 budget_ns[FGPU_DEVICES]; /* maximum of work in flight while gated: how long a drain may take; 0:
                                      FGPU_BUDGET_NS */
    __u64 passes[FGPU_DEVICES];    /* a closed gate lets launches through until this many launches have been made,
                                      because work of other processes waits for these launches */
};
/* A gate. Without GATED, no gatekeeper schedules this process on the device, and the shim counts nothing, whatever the
 * other bits of the gate are. A turn keeps its number from its opening to the end of its drain. The next turn has
 * another number, so every change of a gate changes the word. A closed gate counts as open if its page's heartbeat is
 * older than the lease. */
#define FGPU_GATE_OPEN 1
#define FGPU_GATED 2
#define FGPU_GATE_SHIFT 2
#define FGPU_MANAGED 1
#define FGPU_MPS 2 /* the process uses the host's MPS, because tenants of its device run at the same time */

/* -- status page: one per process, a memfd sealed against resizing, written by the tenant: hints, never trusted -- */
struct fgpu_status {
    __u32 waiting; /* number of threads at the closed gate */
    __u32 drained; /* the last turn (gate >> FGPU_GATE_SHIFT) that was found closed with nothing in flight */
    __u64 launches;
};
struct fgpu_flight {     /* work launched on a gated device */
    __u64 in_flight;     /* launches that may be unfinished. They are counted before the gate is read, so 0 after the
                            gate has closed means drained */
    __u64 busy_until_ns; /* when the work in flight should be done, by earlier measurements. If this time has passed
                            without a wake-up by `bell`, no thread has checked the work */
    __u64 wanted_ns;     /* when a thread last tried to launch */
    __u64 idle_ns;       /* sum of the times >= 0.1 ms from an observed end (of a span) to a launch; only grows */
};
struct fgpu_span {  /* of the last turn */
    __u64 begun_ns; /* when a thread last passed a gate that had been closed */
    __u64 ended_ns; /* when a thread that waited for or queried the work in flight found all of this work done */
};
struct fgpu_status_page {
    __u32 version;
    __u32 bell; /* a futex. Its value changes, and its waiters are woken, when the first thread begins to wait, when a
                   turn has drained, and when work in flight outlasts its estimate while a thread waits */
    __u32 spare[14];
    struct fgpu_status devices[FGPU_DEVICES];
    struct fgpu_flight flights[FGPU_DEVICES];
    struct fgpu_span spans[FGPU_DEVICES];
};
/* The end of a drain is reported by a thread that reaches the closed gate, after it has waited for the work in flight,
 * or by a thread whose synchronise or query call returns. A program that makes neither call reports nothing, and a
 * stopped program reports nothing either. For such programs, busy_until_ns is the best estimate, and the scheduler
 * waits until the deadline of the drain. The shim has no thread of its own. */

/* -- hello: SOCK_SEQPACKET; descriptors in the reply: control, status, usage pages innermost first --------------- */
struct fgpu_hello {
    __u32 magic;
    __u16 version;
    __u16 size;
    __u8 boot[16]; /* `boot` of the control page in use, or zero */
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
    __u64 flags; /* flags as on the usage page, with only this device's uncommitted bit */
};
struct fgpu_share { /* shares: {level, device} -> the level's part of the device's time; a level without an entry is not
                       gated */
    __u64 limit_millionths;
    __u64 weight;
    __u64 rank; /* 0 comes first; bit 32: without MPS on a concurrent device */
    __u64 quantum_ns;
};
struct fgpu_turn { /* turns: {level, device} -> results of turns; the numbers up to `throttled` only grow */
    __u64 owned_ns;
    __u64 waits;
    __u64 wait_ns;
    __u64 overruns;            /* turns that passed to the next tenant with work in flight */
    __u64 switches;            /* turns that began */
    __u64 throttled;           /* how often the level's ceiling delayed its turn */
    __u64 owner;               /* 1: the level has the turn on the device now */
    __u64 had_millionths;      /* the level's part of the time since these numbers were last written */
    __u64 entitled_millionths; /* the part of that time that was due to the level, by weights and limits of the tenants
                                  that requested time */
    __u64 free;     /* 1: no other tenant shares the device, and the level has no ceiling, so the level is neither gated
                       nor measured; 2: the level runs at the same time as other tenants, without turns */
    __u64 since_ns; /* the start of the level's wait; 0: the level does not wait */
};
/* owners: slot -> the number of entries of the shared maps that a bound owner (a workload, with all levels inside it)
 * has and may have. The last slot has the sum of all claims, because an owner claims several entries at a time. Slot 0
 * is for levels without an owner. */
#define FGPU_OWNERS 4096
#define FGPU_OWNED 4         /* the maps of enum fgpu_shared, and `orphans` */
#define FGPU_OWNED_ORPHANS 3 /* `orphans` */
struct fgpu_owner {
    __u64 cgroup; /* 0: the slot is free */
    __u64 entries[FGPU_OWNED];
    __u64 claimed[FGPU_OWNED];
    __u64 most[FGPU_OWNED];
    __u64 knock_second; /* the second in which its knocks were last counted */
    __u64 knock_count;
    __u64 spare;
};
struct fgpu_file { /* key of files: a file as /proc/PID/maps identifies it */
    __u64 dev;
    __u64 ino;
};
struct fgpu_level { /* of a process */
    __u64 cgroup;   /* 0: none */
    __u64 place;    /* index of its usage page in `shelf`, from the time when the process entered the level; the
                       upper half is its owner's slot */
};
struct fgpu_holding { /* of a process on one device; the fields that every allocation uses come first */
    __u64 bytes;      /* all bytes that are charged, including those below */
    __s64 charged[2]; /* the part of `bytes` that is charged at the levels of either side */
    __u32 era;        /* incremented when the last context is destroyed: older allocations no longer exist */
    __u32 openings;   /* calls that may open memory: on device 0 the calls that have begun, on device 1 the calls that
                         have ended */
    __u64 vmm;        /* VMM memory, which outlives contexts */
    __u64 managed;    /* managed memory, which NVML never shows */
    __u64 pool;
    __s64 overhead; /* contexts, modules, rounding: bytes known only from NVML; may be negative */
    __u64 contexts; /* 64 bits, like every number that several threads change and base decisions on */
    __u64 retained; /* references to the primary context; the driver counts a reference later than this number */
    __u64 primary;  /* 1: the primary context exists; a reset destroys it and leaves its references */
    __u64 exported; /* bytes of memory behind pointers that another process may have open */
    __u64 exported_vmm;
    __u64 owed;  /* released bytes that `charged` did not have during a move */
    __u64 ended; /* contexts that were destroyed while others remained; only NVML shows how much memory these contexts
                    had */
    __u64 peak;  /* the maximum of `bytes` since the agent last set the mark (FGPU_MARK) */
};
/* processes: tgid -> the entry of the process. The size is a multiple of 64 bytes, so that each field is always in the
 * same part of a cache line */
struct fgpu_process {
    __u64 state;      /* 0 fresh, 1 claimed, 2 ready */
    __u64 generation; /* when the kernel created this entry: a reused tgid has another generation */
    __u64 changes;    /* completed changes; equal to `begun` if no change is under way */
    __u64 begun;      /* changes that have begun; if two reads return the same number, no change began between the
                         reads */
    __u64 turn;       /* number of moves so far; the last bit is the side that is charged */
    __u64 moved_ns;   /* when the last move was */
    __u32 level_count;
    __u32 flags; /* FGPU_SEEN_SHIM and the flags defined below FGPU_SEEN_SHIM */
    __u32 last_device;
    __u32 tag; /* tag in the verdicts of the process's requests; no other process that is alive on the host has this
                  tag */
    struct fgpu_level sides[FGPU_BOTH_LEVELS]; /* `levels` of this move and of the previous move */
    __u64 levels[FGPU_LEVELS];                 /* cgroup ids, innermost first */
    struct fgpu_level counted; /* the level that counts this entry, and the entries of the process's threads, in the
                                  level's part of the maps */
    __s64 threads;             /* number of counted threads; below 0: the entry is deleted and counts no more threads */
    __u64 space;               /* the process's address space, as an address in the kernel; 0: unknown */
    struct fgpu_holding devices[FGPU_DEVICES];
};
#define FGPU_SEEN_SHIM 1
#define FGPU_SEEN_BYPASS 2
/* Memory that the process frees may still be in use: the process may have exported memory that has no entry, or it may
 * have a reference that an untrusted library reported as dropped. */
#define FGPU_SEEN_EXPORT 4
#define FGPU_SEEN_CALL 8         /* the process has called a driver function that has a probe */
#define FGPU_SEEN_POOL_EXPORT 16 /* pool bytes that the process releases may be open in another process */
#define FGPU_SEEN_IMPORT 32      /* the process has opened memory of other processes */
#define FGPU_TOLD_BYPASS 64      /* the event of the process's first call without an admission has been sent */
#define FGPU_SEEN_DEVICE 128     /* NVML has shown memory of the process, so the process has opened device nodes */
#define FGPU_PARKED 256          /* the process has an entry in `parked` */
#define FGPU_SEEN_CALLED 512     /* the shim reports calls, and delays calls while the process is parked */
/* The first device's bit. The process has a context on the device whose creation no probe has recorded. `contexts`
 * counts one such context. */
#define FGPU_UNSEEN_SHIFT 16
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
    __u64 owner;             /* of a mapping: its handle; of a pointer: 1 for managed memory */
    __u64 exported;          /* 1: another process may have the memory open */
    struct fgpu_level level; /* the level of its process when the entry was created; 0: none */
};
/* orphans: bytes of an exited process, or bytes that a process exported and released. The bytes stay charged to these
 * levels until the agent finds that the device no longer holds the bytes. */
struct fgpu_orphan_key {
    __u32 tgid;
    __u32 device;
    __u64 generation; /* of the process, from its entry */
    __u64 turn;       /* number of the process's moves so far; after each move, other levels may be charged */
};
struct fgpu_orphan {
    __u64 bytes;
    __u64 since_ns; /* when the first of the bytes were orphaned */
    __u64 ended_ns; /* when the process exited, or executed another program; 0: the process is alive */
    __u64 spare;
    struct fgpu_level levels[FGPU_LEVELS]; /* the charged levels, innermost first */
};
/* parked: processes that the agent parks or has parked. Each of these processes has to be woken, whatever its state in
 * the driver is. The entry exists from before the first call of the driver until the process runs again or has
 * exited. */
struct fgpu_parked_key {
    __u32 tgid;
    __u32 spare;
    __u64 generation; /* of the process, from its entry */
};
struct fgpu_parked {
    __u64 since_ns;            /* when the entry was created */
    struct fgpu_level level;   /* the process's own level, which stays charged; 0: the process no longer has a level */
    __u64 bytes[FGPU_DEVICES]; /* bytes that the device does not hold; not in `charged` of the process */
    __u64 spare;
};
struct fgpu_admission { /* an admission that no driver call has settled yet; ticket 0: no admission */
    __u64 ticket;
    __u64 bytes;
    __u32 device;
    __u32 kind; /* the kind and, from bit 8 on, the era in which the bytes were charged */
    __u64 verdict;
};
/* The trust in the calls of a library (docs/tenants.md, trust classes). */
enum fgpu_class {
    FGPU_CLASS_HOST,    /* the host driver's own file: memory that it frees counts as freed */
    FGPU_CLASS_LISTED,  /* a file that the host's administrator trusts: memory that it frees counts as freed */
    FGPU_CLASS_UNKNOWN, /* memory that it frees stays charged until NVML shows that it is freed */
};
/* The functions with probes. The cookie of a function's two probes is `function | class << FGPU_CLASS_SHIFT`. */
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
    FGPU_FUNCTION_FREE, /* from here to DESTROY: functions that remove an entry from `allocations` */
    FGPU_FUNCTION_RELEASE,
    FGPU_FUNCTION_ARRAY_DESTROY,
    FGPU_FUNCTION_DESTROY,
    FGPU_FUNCTION_EXPORT_RANGE, /* cuMemGetHandleForAddressRange */
    FGPU_FUNCTION_EXPORT_POOL,
    FGPU_FUNCTION_IMPORT, /* of memory, of a pool, or of an allocation in a pool */
    FGPU_FUNCTION_GREEN,  /* cuGreenCtxCreate: a reference to the primary context */
    FGPU_FUNCTION_GREEN_DESTROY,
};
/* hits: how often the probe at the entry of each driver function ran, by enum fgpu_function; the last two numbers are
 * the hits of the shim's own probes. */
#define FGPU_HITS 32
#define FGPU_HIT_ADMIT 30
#define FGPU_HIT_GIVE_BACK 31
struct fgpu_call { /* the driver call in which a thread is; function 0: no call */
    __u64 function;
    __u64 arguments[3];
    __u64 bytes; /* charged, or removed from `allocations`, until the result of the call is known */
    __u32 device;
    __u32 admitted; /* bit 0: an admission preceded the call; from bit 8 on: the era, as in an admission */
    __u64 references;
    __u64 exported;  /* as in fgpu_allocation; from bit 32 on: the process's openings that had ended at the entry; 1 for
                        a call that may open memory */
    __u64 uncovered; /* bytes without an admission */
};
struct fgpu_thread { /* threads: pid_tgid -> the entry of the thread; created once, deleted when the thread exits */
    struct fgpu_admission admission;
    struct fgpu_call call;
    __u64 open; /* the generation of the process that counts the thread; the top bit is set while the thread changes
                   nothing */
};
#define FGPU_REASONS 8 /* maximum of counters in each of the host's two groups: anomalies, and events by their fate */
/* Counters of a level. */
struct fgpu_counter_key {
    __u64 cgroup;
    __u32 device;
    __u16 kind;
    __u16 reason;
};

/* adjust(): arguments of the raw tracepoint program that the agent runs by BPF_PROG_TEST_RUN. Returns 0 or -errno. */
enum fgpu_adjust {
    FGPU_PUBLISH,  /* cgroup, flags: copies the limits to the cgroup's page, with these flags, even if the cgroup has no
                      limits */
    FGPU_OVERHEAD, /* tgid, generation, device, bytes, changes: sets the overhead; -EAGAIN if a change began
                      meanwhile */
    FGPU_MOVE,     /* tgid, generation (0: create the entry), count, levels innermost first: moves the charges to these
                      levels */
    FGPU_REAP,     /* tgid, generation: the process has exited, and no event has reported it */
    FGPU_DISOWN,   /* cgroup, device, bytes: the device no longer holds these orphaned bytes, which have no entry in
                      `orphans` */
    FGPU_RAISE,    /* tgid, generation, device, bytes: adds to the overhead, even if a change has begun meanwhile */
    FGPU_WITHDRAW, /* cgroup: its page is about to be removed */
    FGPU_SWEPT,    /* cgroup, n, place: the agent deleted n allocations of the level that no free will delete */
    FGPU_RING,     /* wakes the reader of the ring buffer `bell`, because shares have changed */
    FGPU_LET_GO,   /* tgid, device, generation, turn, bytes: the device no longer holds these orphaned bytes; 0: delete
                      the entry */
    FGPU_MARK,     /* tgid, generation, device: sets the `peak` of the process to its present `bytes` */
    FGPU_ENTER,    /* tgid, 0, count, levels innermost first: creates the missing entry of a process */
    FGPU_LOOKED,   /* cgroup, device, time: sets `looked_ns` */
    FGPU_OWN,      /* cgroup, slot, owner, most[FGPU_OWNED]: the level's bound owner; cgroup 0: only the slot is
                      written */
    FGPU_TRIM,     /* slot: releases the claims that the slot's owner does not need */
    FGPU_EXEMPT,   /* tgid, generation: sets FGPU_SEEN_DEVICE */
    FGPU_BEGIN_PARK,   /* tgid, generation: creates the entry of `parked` */
    FGPU_PARK,         /* tgid, generation, device: the device holds no memory of the process */
    FGPU_WAKE,         /* tgid, generation, device, force: the device is about to hold the process's parked bytes again;
                          -ENOSPC: the bytes do not fit in a level around the process's own level */
    FGPU_END_PARK,     /* tgid, generation: deletes the entry of `parked`; -EBUSY: the entry has bytes */
    FGPU_ROOM,         /* cgroup, device, time: sets `room_ns`; 0: FGPU_NO_ROOM, decided now */
    FGPU_FINISH_MOVE,  /* tgid, generation: moves charges that the last move has missed, and deletes the entry of a
                          process without levels */
    FGPU_CONTEXT_SEEN, /* tgid, generation, device, changes: NVML shows a context of a process without a recorded
                          context; -EAGAIN if a change began meanwhile */
    FGPU_CONTEXT_GONE, /* tgid, generation, device, changes: NVML does not show the context that was counted without a
                          record of its creation; -EAGAIN if a change began meanwhile */
};

/* -- events: a ring buffer for rare events; events that do not fit are counted ------------------------------------- */
enum fgpu_news {
    FGPU_NEWS_PROCESS,  /* a probe created the entry of a process of `cgroup`; at most one event of a level in a
                           second */
    FGPU_NEWS_REFUSED,  /* the level `cgroup` refused a request; reason as in the counters */
    FGPU_NEWS_BYPASS,   /* the first call of a process without an admission */
    FGPU_NEWS_KILLED,   /* a call without an admission that would exceed the limit, under onBypass: kill */
    FGPU_NEWS_ORPHANED, /* the level `cgroup` has orphaned bytes now */
    FGPU_NEWS_MOVED,    /* a process was moved to the cgroup at `path` */
    FGPU_NEWS_MADE,     /* the cgroup at `path` was created */
    FGPU_NEWS_EMPTIED,  /* no process is left in the cgroup at `path` or in a cgroup below this cgroup */
    FGPU_NEWS_REMOVED,
    FGPU_NEWS_ENDED,     /* in the ring buffer `bell`: a process that had a context has exited; the driver may still
                            handle the exit */
    FGPU_NEWS_EXECUTED,  /* a program starts in the level `cgroup`; only the first few programs of a second are
                            reported */
    FGPU_NEWS_FIRST_USE, /* first use of the device by a process of the level `cgroup`, which is uncommitted on the
                            device */
    FGPU_NEWS_KNOCK,     /* in the ring buffer `bell`: a process may not connect to the gatekeeper's socket. `device` is
                            the number of the process's descriptor of one end of a socket pair, from which the
                            gatekeeper reads the hello; `bytes` is the slot of the process's bound owner */
    FGPU_NEWS_OPEN,      /* a process without the shim may not open a device node; `bytes` is its number: major << 32 |
                            minor */
    FGPU_NEWS_LACKS,     /* a thread of the level `cgroup` waits for room on a full device, see FGPU_LACKS */
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
    char path[FGPU_PATH]; /* a longer path is truncated */
};
/* event_budgets: FNV-1a hash of a workload's path from the hierarchy's root -> its budget of cgroup events. The agent
 * adds the workloads that cause many events. FGPU_BUDGET_OTHERS counts lost events of all other cgroups.
 * FGPU_BUDGET_ROOT exists if the agent is in a cgroup namespace; its `second` is the hash of the path of the
 * namespace's root. */
#define FGPU_EVENT_BUDGETS 1024
#define FGPU_BUDGET_OTHERS 0
#define FGPU_BUDGET_ROOT 1
#define FGPU_FNV_BASIS 0xcbf29ce484222325ULL
#define FGPU_FNV_PRIME 0x100000001b3ULL
struct fgpu_event_budget {
    __u64 second; /* the second in which the events of `count` occurred */
    __u64 count;  /* events of that second */
    __u64 lost;   /* events that were not sent to the agent; only grows */
};

#endif
