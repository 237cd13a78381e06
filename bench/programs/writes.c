/* writes: a program that always has kernels of 2 ms in flight, which write to its memory, until stdin ends. It prints
 * "ready MPS", where MPS is 1 if the program uses MPS, and answers each line of stdin with the number of its launches.
 * At the first error of the driver it prints the error and exits. It does not use fgpu; bench/killed_clients.py runs
 * it. */
#include <cuda.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>

#define IN_FLIGHT 8

static const char ptx[] =
    ".version 7.0\n.target sm_70\n.address_size 64\n"
    ".visible .entry writes(.param .u64 to)\n{\n.reg .u64 %a, %b, %c, %p;\n.reg .u32 %x, %y, %z;\n"
    ".reg .pred %q;\nld.param.u64 %p, [to];\nmov.u32 %x, %tid.x;\nmov.u32 %y, %ctaid.x;\n"
    "mov.u32 %z, %ntid.x;\nmad.lo.u32 %x, %y, %z, %x;\nmul.wide.u32 %a, %x, 8;\n"
    "add.u64 %p, %p, %a;\nmov.u64 %a, %globaltimer;\nagain:\nmov.u64 %b, %globaltimer;\n"
    "st.global.u64 [%p], %b;\nsub.u64 %c, %b, %a;\nsetp.lt.u64 %q, %c, 2000000;\n@%q bra again;\n"
    "ret;\n}\n";

static void check(CUresult result, const char *what)
{
    if (result == CUDA_SUCCESS) return;
    printf("error %d in %s\n", result, what);
    fflush(stdout);
    _Exit(3);
}

int main(void)
{
    CUdevice device;
    CUcontext context;
    CUmodule module;
    CUfunction function;
    CUdeviceptr memory;
    CUevent events[IN_FLIGHT];
    int is_mps = 0;
    check(cuInit(0), "cuInit");
    check(cuDeviceGet(&device, 0), "cuDeviceGet");
    cuDeviceGetAttribute(&is_mps, CU_DEVICE_ATTRIBUTE_MPS_ENABLED, device);
    check(cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
    check(cuCtxSetCurrent(context), "cuCtxSetCurrent");
    check(cuModuleLoadData(&module, ptx), "cuModuleLoadData");
    check(cuModuleGetFunction(&function, module, "writes"), "cuModuleGetFunction");
    check(cuMemAlloc(&memory, 64 << 20), "cuMemAlloc");
    for (int i = 0; i < IN_FLIGHT; i++) check(cuEventCreate(&events[i], CU_EVENT_BLOCKING_SYNC), "cuEventCreate");
    printf("ready %d\n", is_mps);
    fflush(stdout);
    for (unsigned long launches = 0;; launches++) {
        void *arguments[] = {&memory};
        char line[64];
        struct pollfd input = {.fd = 0, .events = POLLIN};
        if (launches >= IN_FLIGHT) check(cuEventSynchronize(events[launches % IN_FLIGHT]), "cuEventSynchronize");
        check(cuLaunchKernel(function, 32, 1, 1, 256, 1, 1, 0, NULL, arguments, NULL), "cuLaunchKernel");
        check(cuEventRecord(events[launches % IN_FLIGHT], NULL), "cuEventRecord");
        if (poll(&input, 1, 0) <= 0) continue;
        if (!fgets(line, sizeof line, stdin)) return 0;
        printf("%lu\n", launches);
        fflush(stdout);
    }
}
