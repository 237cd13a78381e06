/* raw: allocates memory of the simulated driver without its libraries. It sends the requests that they send, as a
 * program may that uses a device file by itself. It reads and prints the same lines as bypass.c. `admit BYTES` requests
 * admission through the shim, if the process has the shim, and allocates nothing. */
#define _GNU_SOURCE
#include "../../sim/wire/link.c"

#include <dlfcn.h>
#include <stdio.h>
#include <unistd.h>

static struct link link_to_driver = LINK_INIT;

static int take(uint64_t bytes)
{
    static int attached;
    struct sim_request attach = {.op = SIM_ATTACH}, context = {.op = SIM_TAKE, .kind = SIM_CONTEXT, .context = 1};
    struct sim_request take = {.op = SIM_TAKE, .kind = SIM_BLOCK, .context = 1, .bytes = bytes, .requested = bytes};
    int status = attached ? SIM_OK : link_call(&link_to_driver, attach, NULL, NULL, 0);
    if (!status && !attached) status = link_call(&link_to_driver, context, NULL, NULL, 0);
    attached = 1;
    return status ? status : link_call(&link_to_driver, take, NULL, NULL, 0);
}

static int admit(uint64_t bytes)
{
    static uint64_t ticket = 1 << 20;
    void (*ask)(unsigned, uint64_t, unsigned, uint64_t) = dlsym(RTLD_DEFAULT, "fgpu_admit");
    if (ask) ask(0, bytes, 0, ++ticket);
    return ask ? 0 : -1;
}

int main(void)
{
    uint32_t devices;
    unsigned long long bytes;
    char what[8];
    if (link_open(&link_to_driver, FGPU_SIM_DIR, &devices)) return 3;
    printf("ready %d\n", getpid());
    for (fflush(stdout); scanf(" %7s %llu", what, &bytes) == 2; fflush(stdout)) {
        int status = strcmp(what, "admit") ? take(bytes) : admit(bytes);
        printf(status ? "CUDA_ERROR_%d\n" : "ok\n", status);
    }
    return 0;
}
