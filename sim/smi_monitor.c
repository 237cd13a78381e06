/* `nvidia-smi pmon -c 1`: processes and how busy they keep the device. */
#include "smi.h"

static unsigned busy_of(const nvmlProcessUtilizationSample_t *samples, unsigned n, unsigned pid)
{
    for (unsigned i = 0; i < n; i++)
        if (samples[i].pid == pid) return samples[i].smUtil;
    return 0;
}

int smi_monitor(void)
{
    static struct processes list;
    static nvmlProcessUtilizationSample_t samples[MAX_PROCESSES];
    nvmlDevice_t devices[MAX_GPUS];
    unsigned n = smi_devices(devices);
    puts("# gpu         pid   type     sm    mem    enc    dec    jpg    ofa    command ");
    puts("# Idx           #    C/G      %      %      %      %      %      %    name ");
    for (unsigned i = 0; i < n; i++) {
        unsigned n_samples = MAX_PROCESSES;
        smi_processes(devices[i], &list);
        if (nvml.nvmlDeviceGetProcessUtilization(devices[i], samples, &n_samples, 0)) n_samples = 0;
        if (!list.n)
            printf("%5u %10s %5s %6s %6s %6s %6s %6s %6s    %-15s\n", smi_index(devices[i]), "-", "-", "-", "-", "-",
                   "-", "-", "-", "-");
        for (unsigned p = 0; p < list.n; p++) {
            char name[256], sm[16] = "-", mem[16] = "-";
            unsigned busy = busy_of(samples, n_samples, list.lines[p].pid);
            if (busy) {
                snprintf(sm, sizeof sm, "%u", busy);
                snprintf(mem, sizeof mem, "0");
            }
            smi_process_name(list.lines[p].pid, name, sizeof name);
            printf("%5u %10u %5s %6s %6s %6s %6s %6s %6s    %-15.15s\n", smi_index(devices[i]), list.lines[p].pid, "C",
                   sm, mem, "-", "-", "-", "-", smi_base_name(name));
        }
    }
    return 0;
}
