/*
 * fgpu.h: every struct that two sides share. BPF programs, the shim and fgpu_ebpf/pages.py read this one file;
 * tests/unit/test_layout.py holds the Python layouts against it, offset by offset.
 *
 * Layouts grow at the end only; spare room is zero. FGPU_LAYOUT changes when that promise cannot be kept, and names
 * the folder of the pinned maps, so that two layouts never meet. Sizes are bytes, times are CLOCK_MONOTONIC ns.
 */
#ifndef FGPU_H
#define FGPU_H

#include <linux/types.h>

#define FGPU_LAYOUT 1
#define FGPU_PAGE_BYTES 4096
#define FGPU_DEVICES 16
#define FGPU_LEVELS 4
#define FGPU_VERDICTS 128 /* a power of two: the verifier takes a mask, not a remainder */
#define FGPU_ROWS 128
#define FGPU_NO_LIMIT (~0ULL) /* 0, what a fresh page holds, means deny */
#define FGPU_MOST_BYTES (1ULL << 48)
#define FGPU_LEASE_NS 2000000000ULL
#define FGPU_MAGIC 0x75706766u /* "fgpu" */
#define FGPU_SOCKET_DIR "/run/fgpu/shim"
#define FGPU_SOCKET FGPU_SOCKET_DIR "/shim.sock"

/* A verdict word is `ticket << 2 | verdict`, stored at once in slot `ticket & (FGPU_VERDICTS - 1)`. */
enum fgpu_verdict { FGPU_REFUSED, FGPU_ADMITTED, FGPU_AGAIN, FGPU_UNLIMITED };
enum fgpu_kind { FGPU_MEMORY, FGPU_POOL, FGPU_CONTEXT, FGPU_HELLO, FGPU_VMM, FGPU_KINDS };
enum fgpu_reason { FGPU_REASON_LIMIT, FGPU_REASON_DEVICE_FULL, FGPU_REASON_OBSERVED };
enum fgpu_anomaly {
    FGPU_ANOMALY_RELEASE, /* more given back than held */
    FGPU_ANOMALY_FULL,    /* a map had no room: charged until the process ends */
    FGPU_ANOMALY_DEVICE,  /* a device index that is not the tenant's */
    FGPU_ANOMALY_LOST,    /* a witness that met a process entry half made */
    FGPU_ANOMALY_BYPASS,  /* an allocation that no admission went before */
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
struct fgpu_usage_page {
    __u64 version;
    __u64 cgroup;
    __u64 flags; /* FGPU_OBSERVE, FGPU_KILL */
    __u64 spare[5];
    struct fgpu_usage devices[FGPU_DEVICES];
    __u64 verdicts[FGPU_VERDICTS];
    struct fgpu_tally tallies[FGPU_DEVICES];
    __u64 tail[280];
};
#define FGPU_OBSERVE 1
#define FGPU_KILL 2

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
    __u8 boot[16]; /* which gatekeeper wrote this */
    __u64 heartbeat_ns;
    __u64 epoch; /* has changed: say hello again */
    __u32 device_count;
    __u32 spare[5];
    struct fgpu_device devices[FGPU_DEVICES];
    __u32 gates[FGPU_DEVICES]; /* 1 open, 0 closed; a futex each */
    __u32 sequence;            /* odd while the rows change */
    __u32 row_count;
    __u64 spare2;
    struct fgpu_row rows[FGPU_ROWS];
};
#define FGPU_MANAGED 1
#define FGPU_SETTLE 2 /* no return probes on this kernel: call fgpu_settle after the driver */

/* -- status page: one per process, a memfd sealed against resizing, written by the tenant: hints, never trusted -- */
struct fgpu_status {
    __u32 waiting;
    __u32 drained;
    __u64 launches;
};
struct fgpu_status_page {
    __u32 version;
    __u32 spare[15];
    struct fgpu_status devices[FGPU_DEVICES];
};

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
    __u64 flags;
};
struct fgpu_file { /* key of files, as /proc/PID/maps names a file */
    __u64 dev;
    __u64 ino;
};
struct fgpu_process {          /* processes: tgid -> */
    __u64 state;               /* 0 fresh, 1 claimed, 2 ready */
    __u64 generation;          /* when the kernel made this entry: a reused tgid has another */
    __u64 levels[FGPU_LEVELS]; /* cgroup ids, leaf first */
    __u32 level_count;
    __u32 flags; /* FGPU_SEEN_SHIM, FGPU_SEEN_BYPASS */
    __u32 last_device;
    __u32 spare;
    __u64 changes;             /* done; equal to `begun` where none is under way */
    __u64 bytes[FGPU_DEVICES]; /* all that is charged, what follows included */
    __u64 pool[FGPU_DEVICES];
    __u64 vmm[FGPU_DEVICES];      /* outlives contexts */
    __s64 overhead[FGPU_DEVICES]; /* contexts, modules, rounding: what NVML alone knows; may be negative */
    __u32 contexts[FGPU_DEVICES];
    __u32 retained[FGPU_DEVICES]; /* references to the primary context */
    __u32 era[FGPU_DEVICES];      /* one more when the last context ends: older allocations are gone */
    __u64 managed[FGPU_DEVICES];  /* NVML never shows it */
    __u32 primary[FGPU_DEVICES];  /* 1: the primary context is there; a reset ends it and leaves its references */
    __u64 begun;                  /* changes; two reads of one number had none between */
};
#define FGPU_SEEN_SHIM 1
#define FGPU_SEEN_BYPASS 2
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
    __u64 references; /* of a VMM handle: handles and mappings together */
    __u64 owner;      /* of a mapping: its handle; of a pointer: 1 where it is managed memory */
};
struct fgpu_admission { /* that no driver call has settled yet; ticket 0: none */
    __u64 ticket;
    __u64 bytes;
    __u32 device;
    __u32 kind;
    __u64 verdict;
};
/* What a probe on the driver is attached to: the cookie of both its probes. */
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
    FGPU_FUNCTION_RETAIN,
    FGPU_FUNCTION_PRIMARY_RELEASE,
    FGPU_FUNCTION_PRIMARY_RESET,
    FGPU_FUNCTION_CONTEXT_V2,
    FGPU_FUNCTION_CONTEXT_V3,
    FGPU_FUNCTION_CONTEXT_V4,
    FGPU_FUNCTION_FREE, /* from here on: what takes an entry out of the allocations */
    FGPU_FUNCTION_RELEASE,
    FGPU_FUNCTION_ARRAY_DESTROY,
    FGPU_FUNCTION_DESTROY,
};
struct fgpu_call { /* the driver call that a thread is in; function 0: none */
    __u64 function;
    __u64 arguments[3];
    __u64 bytes; /* charged, or taken out of the allocations, until the call's end decides */
    __u32 device;
    __u32 admitted; /* an admission went before */
    __u64 references;
};
struct fgpu_thread { /* threads: pid_tgid -> ; made once, deleted when the thread ends */
    struct fgpu_admission admission;
    struct fgpu_call call;
};
struct fgpu_counter_key { /* counters; anomalies have cgroup 0, kind FGPU_KINDS and the anomaly as reason */
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
    FGPU_REAP,     /* tgid, generation: the process is gone and nothing said so */
};

#endif
