/* Loading NVML. */
#include "smi/smi.h"

#include <dlfcn.h>

struct nvml nvml;

int nvml_load(void)
{
    void *library = dlopen("libnvidia-ml.so.1", RTLD_NOW);
    if (!library) {
        puts(
            "NVIDIA-SMI couldn't find libnvidia-ml.so library in your system. Please make sure that the NVIDIA Display "
            "Driver is properly installed and present in your system.");
        return 12;
    }
#define RESOLVE(name) nvml.name = (__typeof__(nvml.name))dlsym(library, #name);
    NVML_FUNCTIONS(RESOLVE)
#undef RESOLVE
#define CHECK(name)                                                                                                    \
    if (!nvml.name) {                                                                                                  \
        puts("Failed to initialize NVML: Function Not Found (" #name ")");                                             \
        return 13;                                                                                                     \
    }
    NVML_FUNCTIONS(CHECK)
#undef CHECK
    nvmlReturn_t result = nvml.nvmlInitWithFlags(0);
    if (result == NVML_ERROR_UNKNOWN)
        puts("Failed to initialize NVML: Unknown Error");
    else if (result)
        puts("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
             "NVIDIA driver is installed and running.\n");
    return (int)result;
}
