/* Queries of devices. All results come from the server's description at cuInit. After a restore to another device, its
 * UUID is reported, and the PCI address of the first device, as by driver 580. */
#include "cuda/core/driver.h"
#include "cuda/core/gate.h"

#include <stdio.h>
#include <string.h>

API cuDeviceGetCount(int *count)
{
    CUresult result = sim_enter_query();
    if (result) return result;
    if (!count) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *count = (int)driver.n_devices;
    return sim_leave(CUDA_SUCCESS);
}

API cuDeviceGet(CUdevice *device, int ordinal)
{
    CUresult result = sim_enter_query();
    if (result) return result;
    if (!device) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!sim_is_device(ordinal)) return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    *device = ordinal;
    return sim_leave(CUDA_SUCCESS);
}

/* Makes the checks that nearly all queries share: cuInit was called, there is a place for the result, and the device
 * exists. */
static CUresult enter_device(const void *out, CUdevice device)
{
    CUresult result = sim_enter_query();
    if (result) return result;
    if (!out) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    return sim_is_device(device) ? CUDA_SUCCESS : sim_leave(CUDA_ERROR_INVALID_DEVICE);
}

API cuDeviceGetName(char *name, int len, CUdevice dev)
{
    if (gate_is_parked()) return CUDA_ERROR_OPERATING_SYSTEM;
    CUresult result = enter_device(name, dev);
    if (result) return result;
    if (len <= 0) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    snprintf(name, (size_t)len, "%s", driver.devices[dev].name);
    return sim_leave(CUDA_SUCCESS);
}

static CUresult get_uuid(CUuuid *uuid, CUdevice dev)
{
    CUresult result = enter_device(uuid, dev);
    if (result) return result;
    memcpy(uuid->bytes, driver.devices[gate_device((uint32_t)dev)].uuid_bytes, sizeof uuid->bytes);
    return sim_leave(CUDA_SUCCESS);
}

API cuDeviceGetUuid(CUuuid *uuid, CUdevice dev) { return get_uuid(uuid, dev); }

API cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice dev) { return get_uuid(uuid, dev); }

API cuDeviceGetLuid(char *luid, unsigned int *mask, CUdevice dev)
{
    CUresult result = enter_device(luid, dev);
    if (result) return result;
    return sim_leave(mask ? CUDA_ERROR_NOT_SUPPORTED : CUDA_ERROR_INVALID_VALUE); /* only Windows has it */
}

/* The first version has room for less than 4 GiB. */
API cuDeviceTotalMem(unsigned int *bytes, CUdevice dev)
{
    CUresult result = enter_device(bytes, dev);
    if (result) return result;
    uint64_t total = driver.devices[dev].memory_total - driver.devices[dev].memory_reserved;
    *bytes = total > UINT32_MAX ? UINT32_MAX : (uint32_t)total;
    return sim_leave(CUDA_SUCCESS);
}

API cuDeviceTotalMem_v2(size_t *bytes, CUdevice dev)
{
    CUresult result = enter_device(bytes, dev);
    if (result) return result;
    *bytes = driver.devices[dev].memory_total - driver.devices[dev].memory_reserved;
    return sim_leave(CUDA_SUCCESS);
}

API cuDeviceGetAttribute(int *pi, CUdevice_attribute attrib, CUdevice dev)
{
    CUresult result = enter_device(pi, dev);
    if (result) return result;
    if ((int)attrib <= 0 || (int)attrib >= SIM_ATTRIBUTES) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *pi = driver.devices[dev].attributes[attrib];
    return sim_leave(CUDA_SUCCESS);
}

API cuDeviceComputeCapability(int *major, int *minor, CUdevice dev)
{
    CUresult result = enter_device(major, dev);
    if (result) return result;
    if (!minor) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *major = driver.devices[dev].attributes[CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR];
    *minor = driver.devices[dev].attributes[CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR];
    return sim_leave(CUDA_SUCCESS);
}

API cuDeviceGetPCIBusId(char *pciBusId, int len, CUdevice dev)
{
    CUresult result = enter_device(pciBusId, dev);
    if (result) return result;
    const struct sim_device *d = &driver.devices[dev];
    char text[32];
    int n = snprintf(text, sizeof text, "%04x:%02x:%02x.0", d->pci_domain, d->pci_bus, d->pci_slot);
    if (len <= n) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    memcpy(pciBusId, text, (size_t)n + 1);
    return sim_leave(CUDA_SUCCESS);
}

API cuDeviceGetByPCIBusId(CUdevice *dev, const char *pciBusId)
{
    CUresult result = sim_enter_query();
    if (result) return result;
    if (!dev || !pciBusId) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    unsigned domain = 0, bus, slot, function = 0;
    if (sscanf(pciBusId, "%8x:%2x:%2x.%1x", &domain, &bus, &slot, &function) < 3) {
        domain = 0;
        if (sscanf(pciBusId, "%2x:%2x.%1x", &bus, &slot, &function) < 2) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    }
    for (uint32_t i = 0; i < driver.n_devices; i++) {
        const struct sim_device *d = &driver.devices[i];
        if (d->pci_domain == domain && d->pci_bus == bus && d->pci_slot == slot && !function) {
            *dev = (CUdevice)i;
            return sim_leave(CUDA_SUCCESS);
        }
    }
    return sim_leave(CUDA_ERROR_INVALID_DEVICE);
}

API cuDeviceGetProperties(CUdevprop *prop, CUdevice dev)
{
    CUresult result = enter_device(prop, dev);
    if (result) return result;
    const int32_t *a = driver.devices[dev].attributes;
    *prop = (CUdevprop){.maxThreadsPerBlock = a[CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK],
                        .sharedMemPerBlock = a[CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK],
                        .totalConstantMemory = a[CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY],
                        .SIMDWidth = a[CU_DEVICE_ATTRIBUTE_WARP_SIZE],
                        .memPitch = a[CU_DEVICE_ATTRIBUTE_MAX_PITCH],
                        .regsPerBlock = a[CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK],
                        .clockRate = a[CU_DEVICE_ATTRIBUTE_CLOCK_RATE],
                        .textureAlign = a[CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT]};
    for (int i = 0; i < 3; i++) {
        prop->maxThreadsDim[i] = a[CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X + i];
        prop->maxGridSize[i] = a[CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X + i];
    }
    return sim_leave(CUDA_SUCCESS);
}
