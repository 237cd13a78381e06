/* The protocol between the simulator's libcuda.so.1 and libnvidia-ml.so.1 and fgpu-simd. One request has one reply,
 * and each is one SOCK_SEQPACKET message. A request of another size or with another magic ends the sender's
 * connection. Server and libraries are built and installed together. No version is compatible with another: the version
 * in the magic number only serves to refuse a mixture. */
#ifndef FGPU_SIM_WIRE_H
#define FGPU_SIM_WIRE_H

#include <stdint.h>

#ifndef FGPU_SIM_DIR
#define FGPU_SIM_DIR "/run/fgpu-sim"
#endif
#define SIM_SOCKET_NAME "driver"
/* Every CUDA program also has this file open, as it has the real driver's device nodes. By this name, tools on the host
 * detect that a process has descriptors of the driver. */
#define SIM_NODE_NAME "nvidiactl"

#define SIM_MAGIC 0x66677332u /* "fgs2": the digit is the version */
#define SIM_MAX_DEVICES 16
#define SIM_MAX_CLIENTS 1024
#define SIM_MAX_CONTEXTS 512 /* of a client, on all devices together */
#define SIM_MAX_SHARES 1024
#define SIM_MAX_EXPORTS 1024
#define SIM_MAX_LIMITS 1024 /* of cgroups, on all devices together */
#define SIM_KEPT_XIDS 64
#define SIM_ATTRIBUTES 148
#define SIM_DRIVER_VERSION "580.159.04"
#define SIM_NVML_VERSION "13.580.159.04"
#define SIM_CUDA_VERSION 13000

/* In an exported function that calls nothing, gcc omits the frame pointer in spite of its options. Using the frame's
 * address makes the function begin with `push %rbp` like the others. */
#define SIM_FRAME() __asm__ volatile("" ::"r"(__builtin_frame_address(0)))

enum sim_op {
    SIM_HELLO,      /* reply.count = devices */
    SIM_DEVICE,     /* struct sim_device */
    SIM_ATTACH,     /* cuInit; returns a file with a struct sim_gate, or none */
    SIM_TAKE,       /* takes bytes of a kind; kind context: the server has the number of bytes */
    SIM_GIVE,       /* releases bytes of a kind */
    SIM_CLOSE,      /* ends a context with everything in it */
    SIM_MEMORY,     /* struct sim_memory */
    SIM_PROCESSES,  /* reply.count x struct sim_process, those that the client may see */
    SIM_DUMP,       /* reply.count x struct sim_record, for tests */
    SIM_WORK,       /* bytes = microseconds that a kernel will run, requested = its earliest start; struct sim_time */
    SIM_SHARE,      /* gives a key to memory of the client; sends the file with its contents; struct sim_share */
    SIM_OPEN,       /* context, requested = a key; struct sim_share, and the file */
    SIM_EXPORT,     /* context, requested = a key; returns a descriptor of the memory */
    SIM_IMPORT,     /* sends such a descriptor, of memory of the kind; struct sim_share, and the file */
    SIM_DROP,       /* context, requested = a key; drops one reference of the client */
    SIM_FAULT,      /* kind = enum sim_fault, bytes = its number, device if it has one; only for root */
    SIM_LOOK,       /* requested = a time of the context's clock; struct sim_time */
    SIM_QUEUE,      /* work as in SIM_WORK, in a queue, after what is there; struct sim_queue */
    SIM_LOOK_QUEUE, /* struct sim_queue */
    SIM_XID,        /* requested = how many XIDs of the device the client has read; struct sim_xid */
    SIM_RESIZE,     /* context, requested = the key of a pool of the client; bytes = what the pool has reserved now */
    SIM_SET_LOCAL,  /* bytes = local memory of each thread that the context has room for from now on */
    SIM_RESIDENT,   /* bytes = managed memory of the process that is on the device from now on */
    SIM_CHECKPOINT, /* kind = enum sim_checkpoint, requested = a pid, bytes = milliseconds; reply.count = the result.
                       With parties: key has for each device the one to restore to, in SIM_PLACE_BITS each */
    SIM_SET_LIMITS, /* sends the folder of a cgroup; bytes = the hard limit, requested = the soft one; only for root */
    SIM_GET_LIMITS, /* sends the folder of a cgroup; struct sim_limits */
    SIM_UNLIST,     /* turns bytes of the kind SIM_VMM into bytes of the kind SIM_TILES */
    SIM_OPS,
};

enum sim_kind {
    SIM_CONTEXT,
    SIM_BLOCK,
    SIM_VMM,
    SIM_MANAGED,
    SIM_POOL,
    SIM_MODULE,
    SIM_GRAPH,
    SIM_LOCAL,   /* local memory of threads beyond what a new context has */
    SIM_RUNTIME, /* for functions of device code: the heap of malloc, and the buffer of printf */
    SIM_LAUNCH,  /* for launches: streams, and nodes of graphs */
    SIM_PAGES,   /* page tables of registered host memory: in no process's row */
    SIM_TILES,   /* memory of released handles that is mapped into sparse arrays: in no process's row */
    SIM_KINDS,
};

/* Programs request memory of the kinds before this one by a size. The driver takes the others by itself. */
#define SIM_ASKED SIM_LOCAL

enum sim_status {
    SIM_OK,
    SIM_NO_MEMORY,
    SIM_NO_DEVICE,
    SIM_NOT_ALLOWED,
    SIM_LOST,
    SIM_ECC,
    SIM_NO_PROCESS,    /* no process with this pid has called cuInit */
    SIM_ILLEGAL_STATE, /* the process is in another state */
    SIM_NOT_READY,     /* the time is over */
    SIM_NOT_SUPPORTED,
    SIM_FAILED,    /* the target has ended, or a fault is set */
    SIM_INVALID,   /* the request contradicts itself */
    SIM_NOT_FOUND, /* the descriptor is not the folder of a cgroup */
};

/* The functions that one process calls for another, in the order of the rows of a fault's specification. */
enum sim_checkpoint {
    SIM_GET_STATE,
    SIM_GET_THREAD,
    SIM_LOCK,
    SIM_PARK,
    SIM_RESTORE,
    SIM_UNLOCK,
    SIM_CHECKPOINTS,
};

/* The client's /proc belongs to another pid namespace. The real driver then lists no process. */
#define SIM_FLAG_FOREIGN_PROC 1u
/* The client is NVML. Only such requests wait during a stall of NVML. */
#define SIM_FLAG_NVML 2u
/* See SIM_CHECKPOINT. */
#define SIM_PLACE_BITS 4
/* With SIM_EXPORT: for the driver of another device. CUDA cannot import it. */
#define SIM_FLAG_RANGE 4u

enum sim_fault {
    SIM_FAULT_RESET,        /* ends all faults */
    SIM_FAULT_NVML_STALL,   /* NVML gets no answer for this many milliseconds from now */
    SIM_FAULT_NVML_NA,      /* NVML has no value for a process's memory */
    SIM_FAULT_ALLOC_FAIL,   /* every n-th allocation fails */
    SIM_FAULT_MIG,          /* devices that support it are in MIG mode, for NVML of processes that start from now on */
    SIM_FAULT_SLOW_END,     /* memory outlives its process by this many more milliseconds, as if many ended at once */
    SIM_FAULT_DEVICE_RESET, /* processes lose the devices that they use; NVML finds them when initialised again */
    SIM_FAULT_DEVICE_LOST,  /* the same, and NVML finds no device until all faults end */
    SIM_FAULT_XID, /* one device reports this XID and continues to work; the end of all faults does not revoke it */
    SIM_FAULT_ECC, /* processes that use the devices get no more memory, and keep what they have */
    SIM_FAULT_NVML_GONE,  /* NVML finds no device until all faults end, and is then initialised again; CUDA works */
    SIM_FAULT_ONE_LOST,   /* one device is lost until all faults end; the others work */
    SIM_FAULT_NVML_CUT,   /* NVML says "Unknown Error" in each process until it is initialised again there */
    SIM_FAULT_CALL_FAILS, /* the n-th call of the function `device` of enum sim_checkpoint fails and changes nothing */
    SIM_FAULT_CALL_HANGS, /* calls of this function wait until all faults end */
    SIM_FAULT_CALL_LOSES, /* calls of this function fail, and leave the target in the state FAILED */
    SIM_FAULTS,
};

struct sim_request {
    uint32_t magic;
    uint32_t op;
    uint32_t device;
    uint32_t kind;
    uint64_t context;   /* the client's choice; 0 = the memory belongs to the process, not to a context */
    uint64_t bytes;     /* bytes that are taken from the device */
    uint64_t requested; /* bytes that the program requested */
    uint32_t flags;
    uint32_t parties; /* SIM_QUEUE: how many kernels, each on its own device, run only together; 0: it runs alone */
    uint64_t key;     /* which kernels these are */
    uint64_t queue;   /* a stream of the context whose work the server does, in order */
};

struct sim_reply {
    uint32_t magic;
    uint32_t op;
    uint32_t status;
    uint32_t count;
    /* the payload follows */
};

struct sim_memory {
    uint64_t total;    /* as NVML counts */
    uint64_t reserved; /* by the driver itself; total - reserved is what CUDA calls total */
    uint64_t used;     /* by processes, and by the driver while there are any */
    uint64_t busy_us;  /* the time that kernels ran in the last second, at most 1,000,000 */
};

/* A context's clock stops while the context has work and another context has the device. */
struct sim_time {
    uint64_t at_ns;       /* now; all real times are those of CLOCK_MONOTONIC */
    uint64_t lost_ns;     /* how far the context's clock is behind */
    uint64_t done_ns;     /* by that clock: when the work will be done, or the time in the request */
    uint64_t expected_ns; /* the real time at which that is expected */
    uint32_t is_shared;   /* other contexts have work too, so the real time may differ */
    uint32_t spare;
};

/* A queue is a stream whose work the server does, because its end cannot be known in advance. */
struct sim_queue {
    uint64_t at_ns, lost_ns; /* as in struct sim_time */
    uint64_t index;          /* of the queued work, from 1 on; 0: the queue was full; UINT64_MAX: impossible work */
    uint64_t done;           /* the index of the last work that is done */
    uint64_t done_ns;        /* by the context's clock: when the work with the requested index was done; 0: unknown */
};

/* A process that has the key may open the memory. The key is too long to be guessed. */
struct sim_share {
    uint64_t key[2];
    uint64_t bytes;
    uint32_t device, kind;
};

/* The first XID of a device that the client has not read and the server still has. */
struct sim_xid {
    uint64_t count;  /* how many there were in all */
    uint64_t number; /* its own number, from 1 on */
    uint64_t xid;    /* 0: there is none */
};

/* What the processes of a cgroup, and of the cgroups inside it, may have on a device. */
struct sim_limits {
    uint64_t soft, hard; /* 0 and UINT64_MAX: there is no limit */
    uint64_t used;
};

struct sim_process {
    uint32_t pid; /* in the client's pid namespace */
    uint32_t busy_us;
    uint64_t bytes;
};

/* For SIM_DUMP. pid 0: a row for a device; otherwise a row for a process on a device. */
struct sim_record {
    uint32_t pid;
    uint32_t device;
    uint32_t contexts;
    uint32_t has_ended;      /* the process has ended, and another process has its connection */
    uint64_t freed_after_ns; /* how long after the last close of its connection its memory is freed; 0: it is open */
    uint64_t resident;       /* managed memory that is on the device */
    uint64_t bytes[SIM_KINDS];
    union {
        uint64_t requested[SIM_ASKED];
        struct {
            uint64_t total;
            uint64_t reserved;
            uint64_t used;
            uint64_t driver;   /* the part of used that is in no process's row */
            uint64_t exported; /* the part of driver that several processes may hold */
            uint64_t managed;  /* the part of driver that was given out for managed memory */
        };
    };
};

/* Memory that the server shares with a process. The process's calls stop here while another process has locked it. */
struct sim_gate {
    uint32_t is_closed; /* a futex: calls wait while it is 1 */
    uint32_t n_inside;  /* the number of threads that are inside a call */
    uint32_t thread;    /* the id of the restore thread in its own pid namespace; 0: there is none */
    uint32_t order;     /* a futex: the number of the last order to the restore thread */
    uint32_t what;      /* the order, an enum sim_checkpoint */
    uint32_t done;      /* the number of the last order that the thread has executed */
    uint32_t has_failed;
    uint32_t is_parked; /* the device memory is in the host, and waits and queries have nothing that they could read */
    uint64_t bytes;     /* how much host memory the process has to take for the copy of its device memory */
    uint32_t devices[SIM_MAX_DEVICES]; /* the device that is used as each one: others after a restore elsewhere */
};

struct sim_device {
    char name[64];
    char uuid[48]; /* GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx */
    uint8_t uuid_bytes[16];
    char serial[24];
    char vbios[24];
    char part_number[24];
    uint32_t index;
    uint32_t pci_domain, pci_bus, pci_slot;
    uint32_t pci_device_id, pci_subsystem_id;
    uint32_t brand, architecture; /* nvmlBrandType_t, nvmlDeviceArchitecture_t */
    uint32_t cores, bus_width;
    uint32_t graphics_mhz, memory_mhz, video_mhz;
    uint32_t power_mw, power_limit_mw, power_min_mw;
    uint32_t temperature;
    uint32_t pcie_generation;
    uint32_t ecc, mig, fan; /* 1 = the board has it; mig 2 = the board is in MIG mode */
    uint64_t memory_total;
    uint64_t memory_reserved;
    uint64_t context_bytes;
    uint64_t context_overhead; /* what a context takes in addition, in no process's row */
    uint64_t overhead;         /* the same, while any process is initialised */
    uint64_t bar1_bytes;
    int32_t attributes[SIM_ATTRIBUTES]; /* by CUdevice_attribute */
};

#endif
