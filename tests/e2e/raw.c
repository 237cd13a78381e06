/* raw: takes memory of the simulated driver without any library of it, by what these send to it, as a program may that
 * speaks to a device file by itself. The same lines as bypass. */
#include "../../sim/link.c"

#include <stdio.h>
#include <unistd.h>

int main(void)
{
    static struct link link = LINK_INIT;
    uint32_t devices;
    unsigned long long bytes;
    if (link_open(&link, FGPU_SIM_DIR, &devices)) return 3;
    printf("ready %d\n", getpid());
    for (fflush(stdout); scanf(" alloc %llu", &bytes) == 1; fflush(stdout)) {
        static int attached;
        struct sim_request attach = {.op = SIM_ATTACH}, context = {.op = SIM_TAKE, .kind = SIM_CONTEXT, .context = 1};
        struct sim_request take = {.op = SIM_TAKE, .kind = SIM_BLOCK, .context = 1, .bytes = bytes, .requested = bytes};
        int status = attached ? SIM_OK : link_call(&link, attach, NULL, NULL, 0);
        if (!status && !attached) status = link_call(&link, context, NULL, NULL, 0);
        attached = 1;
        if (!status) status = link_call(&link, take, NULL, NULL, 0);
        printf(status ? "CUDA_ERROR_%d\n" : "ok\n", status);
    }
    return 0;
}
