/* writes: a program that always has kernels of 2 ms in flight, which write to its memory, until stdin ends. It prints
 * "ready MPS", where MPS is 1 if the program uses MPS, and answers each line of stdin with the number of its launches.
 * After the line "fault" its kernels write to address 8, which causes a fatal fault of the driver. At the first error
 * of the driver it prints the error and exits. It does not use fgpu; bench/killed_clients.py and bench/isolation.py
 * run it. */
#include <cuda.h>
#include <dlfcn.h>
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

static void *driver;

static void failed(const char *what, int result)
{
    printf("error %d in %s\n", result, what);
    fflush(stdout);
    _Exit(3);
}

/* Call a function of the driver, and end the program at an error. */
#define CALL(name, ...)                                                                                                \
    do {                                                                                                               \
        static __typeof__(&name) function_;                                                                            \
        if (!function_) function_ = (__typeof__(&name))dlsym(driver, EXPORTED(name));                                  \
        CUresult result_ = function_ ? function_(__VA_ARGS__) : CUDA_ERROR_NOT_FOUND;                                  \
        if (result_ != CUDA_SUCCESS) failed(#name, (int)result_);                                                      \
    } while (0)
#define TEXT(name) #name
#define EXPORTED(name) TEXT(name) /* cuda.h defines cuMemAlloc as cuMemAlloc_v2 */

int main(void)
{
    CUdevice device;
    CUcontext context;
    CUmodule module;
    CUfunction function;
    CUdeviceptr memory;
    CUevent events[IN_FLIGHT];
    int is_mps = 0;
    driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver) failed("dlopen", 0);
    CALL(cuInit, 0);
    CALL(cuDeviceGet, &device, 0);
    CALL(cuDeviceGetAttribute, &is_mps, CU_DEVICE_ATTRIBUTE_MPS_ENABLED, device);
    CALL(cuDevicePrimaryCtxRetain, &context, device);
    CALL(cuCtxSetCurrent, context);
    CALL(cuModuleLoadData, &module, ptx);
    CALL(cuModuleGetFunction, &function, module, "writes");
    CALL(cuMemAlloc, &memory, 64 << 20);
    for (int i = 0; i < IN_FLIGHT; i++) CALL(cuEventCreate, &events[i], CU_EVENT_BLOCKING_SYNC);
    printf("ready %d\n", is_mps);
    fflush(stdout);
    for (unsigned long launches = 0;; launches++) {
        void *arguments[] = {&memory};
        char line[64];
        struct pollfd input = {.fd = 0, .events = POLLIN};
        if (launches >= IN_FLIGHT) CALL(cuEventSynchronize, events[launches % IN_FLIGHT]);
        CALL(cuLaunchKernel, function, 32, 1, 1, 256, 1, 1, 0, NULL, arguments, NULL);
        CALL(cuEventRecord, events[launches % IN_FLIGHT], NULL);
        if (poll(&input, 1, 0) <= 0) continue;
        if (!fgets(line, sizeof line, stdin)) return 0;
        if (line[0] == 'f') memory = 8;
        printf("%lu\n", launches);
        fflush(stdout);
    }
}
