/* Properties of devices that do not change while the server runs. */
#include "nvml/state.h"

#include <stdio.h>
#include <string.h>

#define GET(name, type, expression)                                                                                    \
    NVML_API name(nvmlDevice_t device, type *out)                                                                      \
    {                                                                                                                  \
        const struct sim_device *d;                                                                                    \
        nvmlReturn_t result = nvml_enter(device, out, &d);                                                             \
        if (!result) *out = (expression);                                                                              \
        return result;                                                                                                 \
    }

#define GET_TEXT(name, text)                                                                                           \
    NVML_API name(nvmlDevice_t device, char *out, unsigned int length)                                                 \
    {                                                                                                                  \
        const struct sim_device *d;                                                                                    \
        nvmlReturn_t result = nvml_enter(device, out, &d);                                                             \
        return result ? result : nvml_text(out, length, text);                                                         \
    }

#define GET_PAIR(name, type, first, second)                                                                            \
    NVML_API name(nvmlDevice_t device, type *a, type *b)                                                               \
    {                                                                                                                  \
        const struct sim_device *d;                                                                                    \
        nvmlReturn_t result = nvml_enter(device, a, &d);                                                               \
        if (!result && !b) result = NVML_ERROR_INVALID_ARGUMENT;                                                       \
        if (!result) {                                                                                                 \
            *a = (first);                                                                                              \
            *b = (second);                                                                                             \
        }                                                                                                              \
        return result;                                                                                                 \
    }

/* Queries of what the simulated boards do not have. */
#define REFUSE(name, type)                                                                                             \
    NVML_API name(nvmlDevice_t device, type *out)                                                                      \
    {                                                                                                                  \
        const struct sim_device *d;                                                                                    \
        nvmlReturn_t result = nvml_enter(device, out, &d);                                                             \
        return result ? result : NVML_ERROR_NOT_SUPPORTED;                                                             \
    }

#define ATTRIBUTE(number) d->attributes[number]
#define MAJOR 75 /* CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR */
#define MINOR 76

GET_TEXT(nvmlDeviceGetName, d->name)
GET_TEXT(nvmlDeviceGetUUID, d->uuid)
GET_TEXT(nvmlDeviceGetSerial, d->serial)
GET_TEXT(nvmlDeviceGetVbiosVersion, d->vbios)
GET_TEXT(nvmlDeviceGetBoardPartNumber, d->part_number)
GET(nvmlDeviceGetIndex, unsigned int, d->index)
GET(nvmlDeviceGetMinorNumber, unsigned int, d->index)
GET(nvmlDeviceGetBrand, nvmlBrandType_t, (nvmlBrandType_t)d->brand)
GET(nvmlDeviceGetArchitecture, nvmlDeviceArchitecture_t, d->architecture)
GET(nvmlDeviceGetNumGpuCores, unsigned int, d->cores)
GET(nvmlDeviceGetMemoryBusWidth, unsigned int, d->bus_width)
GET(nvmlDeviceGetBoardId, unsigned int, d->pci_bus << 8 | d->pci_slot)
GET(nvmlDeviceGetMultiGpuBoard, unsigned int, 0)
GET(nvmlDeviceGetPowerUsage, unsigned int, d->power_mw)
GET(nvmlDeviceGetEnforcedPowerLimit, unsigned int, d->power_limit_mw)
GET(nvmlDeviceGetPowerManagementLimit, unsigned int, d->power_limit_mw)
GET(nvmlDeviceGetPowerManagementDefaultLimit, unsigned int, d->power_limit_mw)
GET(nvmlDeviceGetPowerManagementMode, nvmlEnableState_t, NVML_FEATURE_ENABLED)
GET(nvmlDeviceGetPersistenceMode, nvmlEnableState_t, NVML_FEATURE_ENABLED)
GET(nvmlDeviceGetComputeMode, nvmlComputeMode_t, NVML_COMPUTEMODE_DEFAULT)
GET(nvmlDeviceGetDisplayMode, nvmlEnableState_t, NVML_FEATURE_ENABLED)
GET(nvmlDeviceGetDisplayActive, nvmlEnableState_t, NVML_FEATURE_DISABLED)
GET(nvmlDeviceGetAccountingMode, nvmlEnableState_t, NVML_FEATURE_ENABLED)
GET(nvmlDeviceGetAccountingBufferSize, unsigned int, 4000)
GET(nvmlDeviceGetPerformanceState, nvmlPstates_t, NVML_PSTATE_0)
GET(nvmlDeviceGetPowerState, nvmlPstates_t, NVML_PSTATE_0)
GET(nvmlDeviceGetCurrPcieLinkGeneration, unsigned int, d->pcie_generation)
GET(nvmlDeviceGetMaxPcieLinkGeneration, unsigned int, d->pcie_generation)
GET(nvmlDeviceGetCurrPcieLinkWidth, unsigned int, 16)
GET(nvmlDeviceGetMaxPcieLinkWidth, unsigned int, 16)
GET(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, 0)
GET(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, 0)
GET(nvmlDeviceGetNumFans, unsigned int, 0)
GET(nvmlDeviceGetMaxMigDeviceCount, unsigned int, 0)
GET_PAIR(nvmlDeviceGetCudaComputeCapability, int, ATTRIBUTE(MAJOR), ATTRIBUTE(MINOR))
GET_PAIR(nvmlDeviceGetPowerManagementLimitConstraints, unsigned int, d->power_min_mw, d->power_limit_mw)
GET_PAIR(nvmlDeviceGetEccMode, nvmlEnableState_t, (nvmlEnableState_t)d->ecc, (nvmlEnableState_t)d->ecc)
GET_PAIR(nvmlDeviceGetEncoderUtilization, unsigned int, 0, 100000)
GET_PAIR(nvmlDeviceGetDecoderUtilization, unsigned int, 0, 100000)
REFUSE(nvmlDeviceGetFanSpeed, unsigned int)
REFUSE(nvmlDeviceGetAttributes_v2, nvmlDeviceAttributes_t)
REFUSE(nvmlDeviceGetBridgeChipInfo, nvmlBridgeChipHierarchy_t)
REFUSE(nvmlDeviceGetVirtualizationMode, nvmlGpuVirtualizationMode_t)

NVML_API nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned int *current, unsigned int *pending)
{
    const struct sim_device *d;
    nvmlReturn_t result = nvml_enter(device, current, &d);
    if (result || !pending) return result ? result : NVML_ERROR_INVALID_ARGUMENT;
    if (!d->mig) return NVML_ERROR_NOT_SUPPORTED;
    *current = *pending = d->mig > 1 ? NVML_DEVICE_MIG_ENABLE : NVML_DEVICE_MIG_DISABLE;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceIsMigDeviceHandle(nvmlDevice_t device, unsigned int *isMigDevice)
{
    const struct sim_device *d;
    nvmlReturn_t result = nvml_enter(device, isMigDevice, &d);
    if (!result) *isMigDevice = 0;
    return result;
}

NVML_API nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned int index, nvmlDevice_t *migDevice)
{
    const struct sim_device *d;
    (void)index;
    nvmlReturn_t result = nvml_enter(device, migDevice, &d);
    return result ? result : NVML_ERROR_NOT_FOUND;
}

NVML_API nvmlDeviceGetDriverModel_v2(nvmlDevice_t device, nvmlDriverModel_t *current, nvmlDriverModel_t *pending)
{
    const struct sim_device *d;
    (void)pending;
    nvmlReturn_t result = nvml_enter(device, current, &d);
    return result ? result : NVML_ERROR_NOT_SUPPORTED; /* only Windows has it */
}

static nvmlReturn_t pci_info(nvmlDevice_t device, nvmlPciInfo_t *pci)
{
    const struct sim_device *d;
    nvmlReturn_t result = nvml_enter(device, pci, &d);
    if (result) return result;
    memset(pci, 0, sizeof *pci);
    pci->domain = d->pci_domain;
    pci->bus = d->pci_bus;
    pci->device = d->pci_slot;
    pci->pciDeviceId = d->pci_device_id;
    pci->pciSubSystemId = d->pci_subsystem_id;
    snprintf(pci->busId, sizeof pci->busId, "%08X:%02X:%02X.0", d->pci_domain, d->pci_bus, d->pci_slot);
    snprintf(pci->busIdLegacy, sizeof pci->busIdLegacy, "%04X:%02X:%02X.0", d->pci_domain & 0xffff, d->pci_bus & 0xff,
             d->pci_slot & 0xff);
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetPciInfo(nvmlDevice_t device, nvmlPciInfo_t *pci) { return pci_info(device, pci); }

NVML_API nvmlDeviceGetPciInfo_v2(nvmlDevice_t device, nvmlPciInfo_t *pci) { return pci_info(device, pci); }

NVML_API nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *pci) { return pci_info(device, pci); }

NVML_API nvmlDeviceGetTemperature(nvmlDevice_t device, nvmlTemperatureSensors_t sensor, unsigned int *temp)
{
    const struct sim_device *d;
    nvmlReturn_t result = nvml_enter(device, temp, &d);
    if (result || sensor != NVML_TEMPERATURE_GPU) return result ? result : NVML_ERROR_INVALID_ARGUMENT;
    *temp = d->temperature;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetTemperatureV(nvmlDevice_t device, nvmlTemperature_t *temperature)
{
    const struct sim_device *d;
    nvmlReturn_t result = nvml_enter(device, temperature, &d);
    if (result) return result;
    if (temperature->version != nvmlTemperature_v1) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (temperature->sensorType != NVML_TEMPERATURE_GPU) return NVML_ERROR_INVALID_ARGUMENT;
    temperature->temperature = (int)d->temperature;
    return NVML_SUCCESS;
}

static nvmlReturn_t clock_mhz(nvmlDevice_t device, nvmlClockType_t type, unsigned int *clock)
{
    const struct sim_device *d;
    nvmlReturn_t result = nvml_enter(device, clock, &d);
    if (result || (unsigned)type >= NVML_CLOCK_COUNT) return result ? result : NVML_ERROR_NOT_SUPPORTED;
    *clock = type == NVML_CLOCK_MEM ? d->memory_mhz : type == NVML_CLOCK_VIDEO ? d->video_mhz : d->graphics_mhz;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetClockInfo(nvmlDevice_t device, nvmlClockType_t type, unsigned int *clock)
{
    return clock_mhz(device, type, clock);
}

NVML_API nvmlDeviceGetMaxClockInfo(nvmlDevice_t device, nvmlClockType_t type, unsigned int *clock)
{
    return clock_mhz(device, type, clock);
}

NVML_API nvmlDeviceGetApplicationsClock(nvmlDevice_t device, nvmlClockType_t clockType, unsigned int *clockMHz)
{
    return clock_mhz(device, clockType, clockMHz);
}

NVML_API nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, nvmlMemoryErrorType_t errorType,
                                     nvmlEccCounterType_t counterType, unsigned long long *eccCounts)
{
    const struct sim_device *d;
    nvmlReturn_t result = nvml_enter(device, eccCounts, &d);
    if (result) return result;
    if ((unsigned)errorType >= NVML_MEMORY_ERROR_TYPE_COUNT || (unsigned)counterType >= NVML_ECC_COUNTER_TYPE_COUNT)
        return NVML_ERROR_INVALID_ARGUMENT;
    *eccCounts = 0;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetPcieThroughput(nvmlDevice_t device, nvmlPcieUtilCounter_t counter, unsigned int *value)
{
    const struct sim_device *d;
    nvmlReturn_t result = nvml_enter(device, value, &d);
    if (result || (unsigned)counter >= NVML_PCIE_UTIL_COUNT) return result ? result : NVML_ERROR_INVALID_ARGUMENT;
    *value = 0;
    return NVML_SUCCESS;
}
