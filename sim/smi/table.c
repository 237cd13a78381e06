/* The table that nvidia-smi prints without options. Widths are those of the real tool: scripts cut it at columns. */
#include "smi/smi.h"

#include <string.h>

#define EDGE "+-----------------------------------------------------------------------------------------+"
#define EDGES "+-----------------------------------------+------------------------+----------------------+"

static void print_heading(void)
{
    char text[64], driver[32] = "N/A", cuda[16] = "N/A";
    int version;
    smi_now(text, sizeof text, "%a %b %e %H:%M:%S %Y");
    nvml.nvmlSystemGetDriverVersion(driver, sizeof driver);
    if (!nvml.nvmlSystemGetCudaDriverVersion_v2(&version))
        snprintf(cuda, sizeof cuda, "%d.%d", version / 1000, version % 1000 / 10);
    printf("%s       \n%s\n", text, EDGE);
    printf("| NVIDIA-SMI %-22s Driver Version: %-14s CUDA Version: %-9s|\n", driver, driver, cuda);
    puts(EDGES);
    puts("| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |");
    puts("| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |");
    puts("|                                         |                        |               MIG M. |");
    puts("|=========================================+========================+======================|");
}

static const char *on_off(nvmlReturn_t result, nvmlEnableState_t state)
{
    return result ? "N/A" : state == NVML_FEATURE_ENABLED ? "On" : "Off";
}

static void print_first_line(unsigned index, nvmlDevice_t device)
{
    char name[96] = "", ecc[24] = "N/A";
    nvmlPciInfo_t pci = {.busId = "N/A"};
    nvmlEnableState_t persistence, display;
    unsigned long long errors;
    nvml.nvmlDeviceGetName(device, name, sizeof name);
    nvml.nvmlDeviceGetPciInfo_v3(device, &pci);
    nvmlReturn_t persistent = nvml.nvmlDeviceGetPersistenceMode(device, &persistence);
    nvmlReturn_t displaying = nvml.nvmlDeviceGetDisplayActive(device, &display);
    if (!nvml.nvmlDeviceGetTotalEccErrors(device, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, &errors))
        snprintf(ecc, sizeof ecc, "%llu", errors);
    printf("|%4u  %-29.29s%4s  |%19s %3s |%21s |\n", index, name, on_off(persistent, persistence), pci.busId,
           on_off(displaying, display), ecc);
}

static void print_second_line(nvmlDevice_t device)
{
    char fan[12] = "N/A", used[24] = "N/A", total[24] = "N/A", busy[12] = "N/A";
    unsigned speed, temperature = 0, power = 0, limit = 0;
    nvmlPstates_t state = NVML_PSTATE_0;
    nvmlMemory_v2_t memory;
    nvmlUtilization_t utilization;
    if (!nvml.nvmlDeviceGetFanSpeed(device, &speed)) snprintf(fan, sizeof fan, "%u%%", speed);
    nvml.nvmlDeviceGetTemperature(device, NVML_TEMPERATURE_GPU, &temperature);
    nvml.nvmlDeviceGetPerformanceState(device, &state);
    nvml.nvmlDeviceGetPowerUsage(device, &power);
    nvml.nvmlDeviceGetEnforcedPowerLimit(device, &limit);
    if (smi_memory(device, &memory)) {
        snprintf(used, sizeof used, "%uMiB", smi_mib(memory.used));
        snprintf(total, sizeof total, "%uMiB", smi_mib(memory.total));
    }
    if (!nvml.nvmlDeviceGetUtilizationRates(device, &utilization)) snprintf(busy, sizeof busy, "%u%%", utilization.gpu);
    printf("| %3s%5uC    P%u%15uW / %4uW |%11s / %9s |%8s      Default |\n", fan, temperature, (unsigned)state,
           power / 1000, limit / 1000, used, total, busy);
}

static void print_device(unsigned index, nvmlDevice_t device)
{
    unsigned current, pending;
    print_first_line(index, device);
    print_second_line(device);
    const char *mig = nvml.nvmlDeviceGetMigMode(device, &current, &pending) ? "N/A" : current ? "Enabled" : "Disabled";
    printf("|%41s|%24s|%21s |\n%s\n", "", "", mig, EDGES);
}

static void print_process(unsigned index, const nvmlProcessInfo_t *process)
{
    char name[256], memory[24] = "N/A";
    smi_process_name(process->pid, name, sizeof name);
    size_t length = strlen(name);
    if (process->usedGpuMemory != (unsigned long long)NVML_VALUE_NOT_AVAILABLE)
        snprintf(memory, sizeof memory, "%uMiB", smi_mib(process->usedGpuMemory));
    /* The end of a long path is more useful than its beginning. */
    printf("|%5u   N/A  N/A%16u      C   %s%-*.*s%10s |\n", index, process->pid, length > 36 ? "..." : "",
           length > 36 ? 33 : 36, length > 36 ? 33 : 36, length > 36 ? name + length - 33 : name, memory);
}

int smi_table(void)
{
    static struct processes processes;
    nvmlDevice_t devices[MAX_GPUS];
    unsigned n = smi_devices(devices), lines = 0;
    print_heading();
    for (unsigned i = 0; i < n; i++) print_device(smi_index(devices[i]), devices[i]);
    printf("\n%s\n", EDGE);
    puts("| Processes:                                                                              |");
    puts("|  GPU   GI   CI              PID   Type   Process name                        GPU Memory |");
    puts("|        ID   ID                                                               Usage      |");
    puts("|=========================================================================================|");
    for (unsigned i = 0; i < n; i++) {
        smi_processes(devices[i], &processes);
        for (unsigned p = 0; p < processes.n; p++) print_process(smi_index(devices[i]), &processes.lines[p]);
        lines += processes.n;
    }
    if (!lines) puts("|  No running processes found                                                             |");
    puts(EDGE);
    return 0;
}
