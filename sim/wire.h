/* What libcuda.so.1 and libnvidia-ml.so.1 of the simulator say to fgpu-simd, and what it answers. One request, one
 * reply, each one SOCK_SEQPACKET message; a request of another size or magic costs the sender its connection. Server
 * and libraries are built and installed together, so there is a version to refuse a mixture but no compatibility. */
#ifndef FGPU_SIM_WIRE_H
#define FGPU_SIM_WIRE_H

#include <stdint.h>

#ifndef FGPU_SIM_DIR
#define FGPU_SIM_DIR "/run/fgpu-sim"
#endif
#define SIM_SOCKET_NAME "driver"
/* What every CUDA program has open besides, as it has the real driver's nodes: by this name tools on the host recognise
 * a process that has descriptors of the driver. */
#define SIM_NODE_NAME "nvidiactl"

#define SIM_MAGIC 0x66677332u /* "fgs2": the digit is the version */
#define SIM_MAX_DEVICES 16
#define SIM_MAX_CLIENTS 1024
#define SIM_MAX_CONTEXTS 512 /* per client and over all its devices */
#define SIM_MAX_SHARES 1024
#define SIM_MAX_EXPORTS 1024
#define SIM_KEPT_XIDS 64
#define SIM_ATTRIBUTES 148
#define SIM_DRIVER_VERSION "580.159.04"
#define SIM_NVML_VERSION "13.580.159.04"
#define SIM_CUDA_VERSION 13000

/* In an exported function that calls nothing, gcc leaves the frame pointer out whatever it is told; asking for the
 * frame's address makes it begin with `push %rbp` like the others. */
#define SIM_FRAME() __asm__ volatile("" ::"r"(__builtin_frame_address(0)))

enum sim_op {
    SIM_HELLO,     /* reply.count = devices */
    SIM_DEVICE,    /* struct sim_device */
    SIM_ATTACH,    /* cuInit */
    SIM_TAKE,      /* takes bytes of a kind; kind context: the server knows how many */
    SIM_GIVE,      /* gives them back */
    SIM_CLOSE,     /* ends a context with all that is in it */
    SIM_MEMORY,    /* struct sim_memory */
    SIM_PROCESSES, /* reply.count x struct sim_process, as the asker may see them */
    SIM_DUMP,      /* reply.count x struct sim_record, for tests */
    SIM_WORK,      /* bytes = microseconds a kernel will run, requested = not before; struct sim_time */
    SIM_SHARE,     /* memory it holds gets a key; sends the file with its contents; struct sim_share */
    SIM_OPEN,      /* context, requested = a key; struct sim_share, and the file */
    SIM_EXPORT,    /* context, requested = a key; a descriptor that stands for it */
    SIM_IMPORT,    /* sends such a descriptor, of memory of the kind; struct sim_share, and the file */
    SIM_DROP,      /* context, requested = a key; one less of shared, opened, imported */
    SIM_FAULT,     /* kind = enum sim_fault, bytes = its number, of one device where it says so; for root */
    SIM_LOOK,      /* requested = a moment of the context's clock; struct sim_time */
    SIM_QUEUE,     /* work as in SIM_WORK, in a lane, behind what is there; struct sim_lane */
    SIM_LOOK_LANE, /* struct sim_lane */
    SIM_XID,       /* requested = how many of the device's are known; struct sim_xid */
    SIM_RESIZE,    /* context, requested = the key of a pool that it made; bytes = what that has reserved now */
    SIM_SET_LOCAL, /* bytes = local memory of each thread that the context has room for from now on */
    SIM_RESIDENT,  /* bytes = managed memory of the process that is on the device from now on */
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
    SIM_LOCAL,   /* local memory of threads, as far as it exceeds what a context has for it */
    SIM_RUNTIME, /* what device code calls: its heap, and what printf writes to */
    SIM_LAUNCH,  /* what launching takes: streams, nodes of graphs */
    SIM_PAGES,   /* page tables of registered host memory: in no process's row */
    SIM_KINDS,
};

#define SIM_ASKED SIM_LOCAL /* programs ask for kinds before this one by a size; the others come by themselves */

enum sim_status { SIM_OK, SIM_NO_MEMORY, SIM_NO_DEVICE, SIM_NOT_ALLOWED, SIM_LOST, SIM_ECC };

/* The asker's /proc belongs to another pid namespace: the real driver then lists no process at all. */
#define SIM_FLAG_FOREIGN_PROC 1u
/* The asker is NVML: what a stall of NVML holds up, and nothing else. */
#define SIM_FLAG_NVML 2u
/* With SIM_EXPORT: for another device's driver, and not to be imported. */
#define SIM_FLAG_RANGE 4u

enum sim_fault {
    SIM_FAULT_RESET,        /* none of them any more */
    SIM_FAULT_NVML_STALL,   /* NVML is not answered for this many milliseconds from now */
    SIM_FAULT_NVML_NA,      /* NVML does not know what a process uses */
    SIM_FAULT_ALLOC_FAIL,   /* every n-th allocation finds no memory */
    SIM_FAULT_MIG,          /* devices that can are in MIG mode, for NVML of processes that start from now on */
    SIM_FAULT_SLOW_END,     /* memory outlives its process by this many milliseconds, as where many end at once */
    SIM_FAULT_DEVICE_RESET, /* who uses the devices has lost them; NVML finds them again when it is initialised anew */
    SIM_FAULT_DEVICE_LOST,  /* the same, and nobody finds them until the end of all faults */
    SIM_FAULT_XID,       /* one device reports this XID, and goes on as before; the end of all faults takes none back */
    SIM_FAULT_ECC,       /* who uses the devices is given nothing more, and keeps what it has until it ends */
    SIM_FAULT_NVML_GONE, /* NVML finds no device until all faults end, and must then begin anew; CUDA goes on */
    SIM_FAULT_ONE_LOST,  /* one device is lost until the end of all faults; the others go on */
    SIM_FAULTS,
};

struct sim_request {
    uint32_t magic;
    uint32_t op;
    uint32_t device;
    uint32_t kind;
    uint64_t context;   /* chosen by the client; 0 = belongs to the process and the device, not to a context */
    uint64_t bytes;     /* physical: what the device loses */
    uint64_t requested; /* what the program asked for, in bytes */
    uint32_t flags;
    uint32_t parties; /* SIM_QUEUE: how many kernels, each on a device of its own, run only together; 0: by itself */
    uint64_t key;     /* which these are */
    uint64_t lane;    /* a stream of the context whose work the server does, one thing after the other */
};

struct sim_reply {
    uint32_t magic;
    uint32_t op;
    uint32_t status;
    uint32_t count;
    /* payload follows */
};

struct sim_memory {
    uint64_t total;    /* as NVML counts */
    uint64_t reserved; /* the driver's own; total - reserved is what CUDA calls total */
    uint64_t used;     /* by processes, and by the driver while there are any */
    uint64_t busy_us;  /* kernel time in the last second, at most 1,000,000 */
};

/* A context's clock stands still while it has work and another context has the device. */
struct sim_time {
    uint64_t at_ns;       /* now; all real times are CLOCK_MONOTONIC */
    uint64_t lost_ns;     /* what the context's clock is behind */
    uint64_t done_ns;     /* by that clock: when the work will be done, or the moment that was asked about */
    uint64_t expected_ns; /* when that should be, really */
    uint32_t is_shared;   /* others have work too: it may be sooner, or later */
    uint32_t spare;
};

/* A lane: where nobody can say beforehand when work will be done. */
struct sim_lane {
    uint64_t at_ns, lost_ns; /* as in struct sim_time */
    uint64_t index;          /* of what was queued, from 1 on; 0: there was no room, UINT64_MAX: it cannot be */
    uint64_t done;           /* up to this index */
};

/* Who knows the key may open the memory: it is as hard to guess as it is long. */
struct sim_share {
    uint64_t key[2];
    uint64_t bytes;
    uint32_t device, kind;
};

/* The first of a device's XIDs that is not known, and is kept still. */
struct sim_xid {
    uint64_t count;  /* of all that there were */
    uint64_t number; /* its own, from 1 on */
    uint64_t xid;    /* 0: there is none */
};

struct sim_process {
    uint32_t pid; /* in the asker's pid namespace */
    uint32_t busy_us;
    uint64_t bytes;
};

/* With SIM_DUMP: pid 0 = a device's own line, else one process on one device. */
struct sim_record {
    uint32_t pid;
    uint32_t device;
    uint32_t contexts;
    uint32_t has_ended; /* the process, whose connection another one has */
    uint64_t resident;  /* managed memory that is on the device */
    uint64_t bytes[SIM_KINDS];
    union {
        uint64_t requested[SIM_ASKED];
        struct {
            uint64_t total;
            uint64_t reserved;
            uint64_t used;
            uint64_t driver;   /* the part of used that is in no process's row */
            uint64_t exported; /* the part of that which several processes may hold */
            uint64_t managed;  /* and the part that has been given out for managed memory */
        };
    };
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
    uint32_t ecc, mig, fan; /* 1 = the board has it; mig 2 = and is in that mode */
    uint64_t memory_total;
    uint64_t memory_reserved;
    uint64_t context_bytes;
    uint64_t context_overhead; /* what a context takes besides, in no process's name */
    uint64_t overhead;         /* likewise, while any process is initialised */
    uint64_t bar1_bytes;
    int32_t attributes[SIM_ATTRIBUTES]; /* by CUdevice_attribute */
};

#endif
