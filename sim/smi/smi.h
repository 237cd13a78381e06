/* The parts of nvidia-smi. */
#ifndef FGPU_SIM_SMI_H
#define FGPU_SIM_SMI_H

#include <stdbool.h>
#include <stdio.h>

#define NVML_NO_UNVERSIONED_FUNC_DEFS
#include <nvml.h>

#define MAX_GPUS 64
#define MAX_PROCESSES 1024

/* Every function is looked up by dlsym, as in the real tool, so that a preloaded library that replaces dlsym has its
 * effect here too. */
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
    X(nvmlDeviceGetIndex)                                                                                              \
    X(nvmlDeviceGetSerial)                                                                                             \
    X(nvmlDeviceGetVbiosVersion)                                                                                       \
    X(nvmlDeviceGetMinorNumber)                                                                                        \
    X(nvmlDeviceGetBoardPartNumber)                                                                                    \
    X(nvmlDeviceGetBoardId)                                                                                            \
    X(nvmlDeviceGetBrand)                                                                                              \
    X(nvmlDeviceGetArchitecture)                                                                                       \
    X(nvmlDeviceGetBAR1MemoryInfo)                                                                                     \
    X(nvmlDeviceGetEccMode)                                                                                            \
    X(nvmlDeviceGetDisplayMode)                                                                                        \
    X(nvmlDeviceGetPowerManagementLimit)                                                                               \
    X(nvmlDeviceGetPowerManagementDefaultLimit)                                                                        \
    X(nvmlDeviceGetPowerManagementLimitConstraints)                                                                    \
    X(nvmlDeviceGetClockInfo)                                                                                          \
    X(nvmlDeviceGetMaxClockInfo)                                                                                       \
    X(nvmlDeviceGetEncoderUtilization)                                                                                 \
    X(nvmlDeviceGetDecoderUtilization)                                                                                 \
    X(nvmlDeviceGetCudaComputeCapability)                                                                              \
    X(nvmlDeviceGetCurrPcieLinkGeneration)                                                                             \
    X(nvmlDeviceGetMaxPcieLinkGeneration)                                                                              \
    X(nvmlDeviceGetCurrPcieLinkWidth)                                                                                  \
    X(nvmlDeviceGetMaxPcieLinkWidth)                                                                                   \
    X(nvmlDeviceGetProcessUtilization)                                                                                 \
    X(nvmlDeviceGetComputeRunningProcesses_v3)

#define DECLARE(name) __typeof__(name) *name;
struct nvml {
    NVML_FUNCTIONS(DECLARE)
};
#undef DECLARE
extern struct nvml nvml;

/* nvml_loader.c */
int nvml_load(void); /* returns 0, or the exit status */

struct processes {
    nvmlProcessInfo_t lines[MAX_PROCESSES];
    unsigned n;
};

/* devices.c */
unsigned smi_mib(unsigned long long bytes); /* rounds up, as the real tool does */
bool smi_memory(nvmlDevice_t device, nvmlMemory_v2_t *memory);
void smi_processes(nvmlDevice_t device, struct processes *processes);
void smi_process_name(unsigned pid, char *name, unsigned room);
void smi_select(const char *ids);            /* indices, UUIDs or bus ids, separated by commas; NULL: every device */
unsigned smi_devices(nvmlDevice_t *devices); /* the devices that -i selects */
unsigned smi_index(nvmlDevice_t device);
void smi_now(char *text, unsigned room, const char *format);
const char *smi_base_name(const char *path);

/* table.c */
int smi_table(void);

/* full.c */
enum {
    PART_MEMORY = 1,
    PART_UTILIZATION = 2,
    PART_ECC = 4,
    PART_TEMPERATURE = 8,
    PART_POWER = 16,
    PART_CLOCK = 32,
    PART_COMPUTE = 64,
    PART_PIDS = 128,
    PART_ALL = 256, /* the parts above, and the sections that belong to none of them */
};
unsigned smi_parts(const char *names); /* returns 0 if a name is unknown */
int smi_full(bool xml, unsigned parts);

/* monitor.c */
int smi_monitor(const char *select); /* characters of u, m */

/* fields.c */
struct row {
    unsigned index;
    nvmlDevice_t device;
    const nvmlProcessInfo_t *process;
};
struct field {
    const char *name, *alias, *heading, *unit;
    void (*put)(const struct row *row, char *out, size_t room);
};
extern const struct field smi_gpu_fields[], smi_process_fields[];

/* query.c */
struct query {
    const char *fields;
    bool header, units;
};
int smi_query_gpus(const struct query *query);
int smi_query_processes(const struct query *query);

#endif
