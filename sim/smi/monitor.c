/* `nvidia-smi pmon -c 1`: processes, their utilization of the device (-s u) and their memory (-s m). */
#include "smi/smi.h"

struct cells {
    char sm[16], mem[16], fb[16], ccpm[16];
};

static const struct group {
    char letter;
    const char *names, *units;
} groups[] = {{'u', "     sm    mem    enc    dec    jpg    ofa", "      %      %      %      %      %      %"},
              {'m', "     fb   ccpm", "     MB     MB"}};

static const struct group *group_of(char letter)
{
    for (unsigned i = 0; i < sizeof groups / sizeof *groups; i++)
        if (groups[i].letter == letter) return &groups[i];
    return NULL;
}

static void print_headings(const char *select)
{
    fputs("# gpu         pid   type", stdout);
    for (const char *c = select; *c; c++) fputs(group_of(*c)->names, stdout);
    fputs("    command \n# Idx           #    C/G", stdout);
    for (const char *c = select; *c; c++) fputs(group_of(*c)->units, stdout);
    puts("    name ");
}

static void print_line(const char *select, unsigned gpu, const char *pid, const char *type, const struct cells *cells,
                       const char *name)
{
    printf("%5u %10s %5s", gpu, pid, type);
    for (const char *c = select; *c; c++) {
        if (*c == 'u')
            printf(" %6s %6s %6s %6s %6s %6s", cells->sm, cells->mem, "-", "-", "-", "-");
        else
            printf(" %6s %6s", cells->fb, cells->ccpm);
    }
    printf("    %-15.15s\n", name);
}

static void fill_busy(struct cells *cells, const nvmlProcessUtilizationSample_t *samples, unsigned n, unsigned pid)
{
    for (unsigned i = 0; i < n; i++) {
        if (samples[i].pid != pid || !samples[i].smUtil) continue;
        snprintf(cells->sm, sizeof cells->sm, "%u", samples[i].smUtil);
        snprintf(cells->mem, sizeof cells->mem, "%u", samples[i].memUtil);
        return;
    }
}

static void print_device(const char *select, nvmlDevice_t device)
{
    static struct processes list;
    static nvmlProcessUtilizationSample_t samples[MAX_PROCESSES];
    static const struct cells none = {"-", "-", "-", "-"};
    unsigned gpu = smi_index(device), n = MAX_PROCESSES;
    smi_processes(device, &list);
    if (nvml.nvmlDeviceGetProcessUtilization(device, samples, &n, 0)) n = 0;
    if (!list.n) print_line(select, gpu, "-", "-", &none, "-");
    for (unsigned p = 0; p < list.n; p++) {
        struct cells cells = none;
        char name[256], pid[16];
        fill_busy(&cells, samples, n, list.lines[p].pid);
        snprintf(cells.fb, sizeof cells.fb, "%u", smi_mib(list.lines[p].usedGpuMemory));
        snprintf(cells.ccpm, sizeof cells.ccpm, "0");
        snprintf(pid, sizeof pid, "%u", list.lines[p].pid);
        smi_process_name(list.lines[p].pid, name, sizeof name);
        print_line(select, gpu, pid, "C", &cells, smi_base_name(name));
    }
}

int smi_monitor(const char *select)
{
    nvmlDevice_t devices[MAX_GPUS];
    unsigned n = smi_devices(devices);
    for (const char *c = select; *c; c++)
        if (!group_of(*c)) return 255;
    print_headings(select);
    for (unsigned i = 0; i < n; i++) print_device(select, devices[i]);
    return 0;
}
