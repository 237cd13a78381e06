/* The parts of nvidia-smi. */
#ifndef FGPU_SIM_SMI_H
#define FGPU_SIM_SMI_H

#include <stdbool.h>
#include <stdio.h>

#define NVML_NO_UNVERSIONED_FUNC_DEFS
#include <nvml.h>

#define MAX_GPUS 64
#define MAX_PROCESSES 1024

/* Everything is looked up by dlsym, as the real tool does: a preloaded library that answers dlsym must be seen here
 * too. */
#define NVML_FUNCTIONS(X)                                                                                              \
    X(nvmlInitWithFlags)                                                                                               \
    X(nvmlShutdown)                                                                                                    \
    X(nvmlSystemGetDriverVersion)                                                                                      \
    X(nvmlSystemGetCudaDriverVersion_v2)                                                                               \
    X(nvmlSystemGetProcessName)                                                                                        \
    X(nvmlDeviceGetCount_v2)                                                                                           \
    X(nvmlDeviceGetHandleByIndex_v2)                                                                                   \
    X(nvmlDeviceGetName)                                                                                               \
    X(nvmlDeviceGetUUID)                                                                                               \
    X(nvmlDeviceGetPciInfo_v3)                                                                                         \
    X(nvmlDeviceGetMemoryInfo_v2)                                                                                      \
    X(nvmlDeviceGetUtilizationRates)                                                                                   \
    X(nvmlDeviceGetTemperature)                                                                                        \
    X(nvmlDeviceGetFanSpeed)                                                                                           \
    X(nvmlDeviceGetPerformanceState)                                                                                   \
    X(nvmlDeviceGetPowerUsage)                                                                                         \
    X(nvmlDeviceGetEnforcedPowerLimit)                                                                                 \
    X(nvmlDeviceGetPersistenceMode)                                                                                    \
    X(nvmlDeviceGetDisplayActive)                                                                                      \
    X(nvmlDeviceGetComputeMode)                                                                                        \
    X(nvmlDeviceGetMigMode)                                                                                            \
    X(nvmlDeviceGetTotalEccErrors)                                                                                     \
    X(nvmlDeviceGetComputeRunningProcesses_v3)

#define DECLARE(name) __typeof__(name) *name;
struct nvml {
    NVML_FUNCTIONS(DECLARE)
};
#undef DECLARE
extern struct nvml nvml;

struct processes {
    nvmlProcessInfo_t lines[MAX_PROCESSES];
    unsigned n;
};

/* nvidia-smi.c */
unsigned smi_mib(unsigned long long bytes); /* rounded up, as the real tool shows them */
bool smi_memory(nvmlDevice_t device, nvmlMemory_v2_t *memory);
void smi_processes(nvmlDevice_t device, struct processes *processes);
void smi_process_name(unsigned pid, char *name, unsigned room);
unsigned smi_devices(nvmlDevice_t *devices);

/* smi_table.c */
int smi_table(void);

/* smi_query.c */
struct query {
    const char *fields;
    bool header, units;
};
int smi_query_gpus(const struct query *query);
int smi_query_processes(const struct query *query);

#endif
