/* --query-gpu and --query-compute-apps: csv as the real tool prints it. */
#include "smi/smi.h"

#include <string.h>

#define MAX_FIELDS 64

static const struct field *find(const struct field *known, const char *name, size_t length)
{
    for (; known->name; known++)
        if ((strlen(known->name) == length && !strncmp(known->name, name, length)) ||
            (known->alias && strlen(known->alias) == length && !strncmp(known->alias, name, length)))
            return known;
    return NULL;
}

/* Returns the number of fields, or 0 after the real tool's message. */
static unsigned parse(const struct field *known, const char *names, const struct field **out)
{
    unsigned n = 0;
    for (const char *at = names;; at++) {
        size_t length = strcspn(at, ",");
        const struct field *field = n < MAX_FIELDS ? find(known, at, length) : NULL;
        if (!field) {
            printf("Field \"%.*s\" is not a valid field to query.\n\n", (int)length, at);
            return 0;
        }
        out[n++] = field;
        at += length;
        if (!*at) return n;
    }
}

static void print_headings(const struct field *const *fields, unsigned n, const struct query *query)
{
    for (unsigned i = 0; query->header && i < n; i++) {
        printf("%s%s", i ? ", " : "", fields[i]->heading ? fields[i]->heading : fields[i]->name);
        if (fields[i]->unit) printf(" [%s]", fields[i]->unit);
        if (i == n - 1) putchar('\n');
    }
}

static void print_row(const struct field *const *fields, unsigned n, const struct query *query, const struct row *row)
{
    for (unsigned i = 0; i < n; i++) {
        char text[256] = "[N/A]";
        fields[i]->put(row, text, sizeof text);
        printf("%s%s", i ? ", " : "", text);
        if (fields[i]->unit && query->units && text[0] != '[') printf(" %s", fields[i]->unit);
    }
    putchar('\n');
}

int smi_query_gpus(const struct query *query)
{
    const struct field *fields[MAX_FIELDS];
    nvmlDevice_t devices[MAX_GPUS];
    unsigned n = parse(smi_gpu_fields, query->fields, fields), n_devices = smi_devices(devices);
    if (!n) return 2;
    print_headings(fields, n, query);
    for (unsigned i = 0; i < n_devices; i++)
        print_row(fields, n, query, &(struct row){.index = smi_index(devices[i]), .device = devices[i]});
    return 0;
}

int smi_query_processes(const struct query *query)
{
    static struct processes processes;
    const struct field *fields[MAX_FIELDS];
    nvmlDevice_t devices[MAX_GPUS];
    unsigned n = parse(smi_process_fields, query->fields, fields), n_devices = smi_devices(devices);
    if (!n) return 2;
    print_headings(fields, n, query);
    for (unsigned i = 0; i < n_devices; i++) {
        smi_processes(devices[i], &processes);
        for (unsigned p = 0; p < processes.n; p++)
            print_row(fields, n, query, &(struct row){smi_index(devices[i]), devices[i], &processes.lines[p]});
    }
    return 0;
}
