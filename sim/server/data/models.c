#include "server/data/models.h"

#include <cuda.h>
#include <nvml.h>
#include <stdio.h>
#include <string.h>

#define MIB (1ull << 20)
#define MAX_CHANGES 24

/* Every attribute of a real H200 under driver 580.159.04, by number. The models below have the differences of the other
 * boards. */
static const int32_t h200_attributes[SIM_ATTRIBUTES] = {
    0,        1024,      1024,     1024,  64,    2147483647, 65535, 65535,     49152,     65536,     32,     2147483647,
    65536,    1980000,   512,      1,     132,   0,          0,     1,         0,         131072,    131072, 65536,
    16384,    16384,     16384,    32768, 32768, 2048,       512,   1,         1,         0,         0,      0,
    3201000,  6016,      62914560, 2048,  3,     1,          32768, 2048,      1,         32768,     32768,  8192,
    8192,     32768,     0,        32,    32768, 32768,      2046,  32768,     131072,    65536,     16384,  16384,
    16384,    32768,     2048,     32768, 32768, 2048,       32768, 32768,     2046,      268435456, 131072, 65000,
    2097120,  32768,     32768,    9,     0,     32768,      1,     1,         1,         233472,    65536,  1,
    0,        0,         0,        2,     0,     1,          1,     1,         0,         0,         0,      1,
    1,        232448,    0,        1,     0,     0,          1,     1,         0,         0,         32,     1,
    39321600, 134217728, 1,        1024,  1,     1,          1,     1,         1,         1,         100,    9,
    1,        1,         1,        1,     1,     1,          4,     1,         1,         1,         0,      -1,
    0,        0,         0,        0,     0,     0,          0,     590680286, 415174878, 1,         1,      0,
    1,        1,         0,        0,
};

struct change {
    CUdevice_attribute attribute;
    int32_t value;
};

struct model {
    const char *key;
    struct sim_device device;
    struct change changes[MAX_CHANGES];
};

/* H200: measured. A100 and T4: memory, clocks and limits as published. Their context sizes are near those that users
 * report, and are not measured. */
static const struct model models[] = {
    {
        .key = "h200",
        .device =
            {
                .name = "NVIDIA H200",
                .vbios = "96.00.A5.00.1A",
                .part_number = "692-2G520-0282-001",
                .pci_device_id = 0x233510DE,
                .pci_subsystem_id = 0x18BF10DE,
                .brand = NVML_BRAND_NVIDIA,
                .architecture = NVML_DEVICE_ARCH_HOPPER,
                .cores = 16896,
                .bus_width = 6016,
                .graphics_mhz = 1980,
                .memory_mhz = 3201,
                .video_mhz = 1545,
                .power_mw = 83000,
                .power_limit_mw = 700000,
                .power_min_mw = 200000,
                .temperature = 33,
                .pcie_generation = 5,
                .ecc = 1,
                .mig = 1,
                .memory_total = 143771 * MIB,
                .memory_reserved = 644939776, /* CUDA's total is then 150109880320 bytes, 143155 MiB */
                .context_bytes = 518 * MIB,
                .context_overhead = 5832704, /* 5.5625 MiB */
                .overhead = 3407872,         /* 3.25 MiB */
                .bar1_bytes = 262144 * MIB,
            },
    },
    {
        .key = "a100",
        .device =
            {
                .name = "NVIDIA A100-SXM4-80GB",
                .vbios = "92.00.45.00.05",
                .part_number = "692-2G506-0212-003",
                .pci_device_id = 0x20B210DE,
                .pci_subsystem_id = 0x147F10DE,
                .brand = NVML_BRAND_NVIDIA,
                .architecture = NVML_DEVICE_ARCH_AMPERE,
                .cores = 6912,
                .bus_width = 5120,
                .graphics_mhz = 1410,
                .memory_mhz = 1593,
                .video_mhz = 1275,
                .power_mw = 62000,
                .power_limit_mw = 400000,
                .power_min_mw = 100000,
                .temperature = 31,
                .pcie_generation = 4,
                .ecc = 1,
                .mig = 1,
                .memory_total = 81920 * MIB,
                .memory_reserved = 870 * MIB,
                .context_bytes = 416 * MIB,
                .bar1_bytes = 131072 * MIB,
            },
        .changes =
            {
                {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 108},
                {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 8},
                {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
                {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1410000},
                {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 1593000},
                {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 5120},
                {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 41943040},
                {CU_DEVICE_ATTRIBUTE_MAX_PERSISTING_L2_CACHE_SIZE, 31457280},
                {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 167936},
                {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 166912},
                {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 3},
                {CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH, 0},
                {CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED, 0},
                {CU_DEVICE_ATTRIBUTE_GPU_PCI_DEVICE_ID, 0x20B210DE},
                {CU_DEVICE_ATTRIBUTE_GPU_PCI_SUBSYSTEM_ID, 0x147F10DE},
            },
    },
    {
        .key = "t4",
        .device =
            {
                .name = "Tesla T4",
                .vbios = "90.04.38.00.03",
                .part_number = "900-2G183-0000-001",
                .pci_device_id = 0x1EB810DE,
                .pci_subsystem_id = 0x12A210DE,
                .brand = NVML_BRAND_NVIDIA,
                .architecture = NVML_DEVICE_ARCH_TURING,
                .cores = 2560,
                .bus_width = 256,
                .graphics_mhz = 1590,
                .memory_mhz = 5001,
                .video_mhz = 1470,
                .power_mw = 10000,
                .power_limit_mw = 70000,
                .power_min_mw = 60000,
                .temperature = 36,
                .pcie_generation = 3,
                .ecc = 1,
                .memory_total = 15360 * MIB,
                .memory_reserved = 258 * MIB,
                .context_bytes = 104 * MIB,
                .bar1_bytes = 256 * MIB,
            },
        .changes =
            {
                {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 40},
                {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 7},
                {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 5},
                {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1590000},
                {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 5001000},
                {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 256},
                {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 4194304},
                {CU_DEVICE_ATTRIBUTE_MAX_PERSISTING_L2_CACHE_SIZE, 0},
                {CU_DEVICE_ATTRIBUTE_MAX_ACCESS_POLICY_WINDOW_SIZE, 0},
                {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 65536},
                {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 65536},
                {CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK, 0},
                {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 1024},
                {CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR, 16},
                {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 3},
                {CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH, 0},
                {CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED, 0},
                {CU_DEVICE_ATTRIBUTE_GPU_PCI_DEVICE_ID, 0x1EB810DE},
                {CU_DEVICE_ATTRIBUTE_GPU_PCI_SUBSYSTEM_ID, 0x12A210DE},
            },
    },
};

/* A board has the same name on every machine and at every start, so that tests and policies can contain it. */
static void name_device(const char *model, struct sim_device *device)
{
    uint64_t hash = 14695981039346656037ull;
    for (const char *c = model; *c; c++) hash = (hash ^ (uint8_t)*c) * 1099511628211ull;
    uint8_t *b = device->uuid_bytes;
    for (int i = 0; i < 16; i++) {
        hash = (hash ^ (device->index + 1 + (uint32_t)i)) * 1099511628211ull;
        b[i] = (uint8_t)(hash >> 32);
    }
    snprintf(device->uuid, sizeof device->uuid,
             "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1], b[2], b[3], b[4],
             b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
    snprintf(device->serial, sizeof device->serial, "16539241%05u", 84814 + device->index);
}

/* Addresses are those of a virtual machine with passed-through devices, one slot after the other. */
int model_device(const char *key, uint32_t index, uint64_t memory, struct sim_device *device)
{
    const struct model *model = NULL;
    for (size_t i = 0; i < sizeof models / sizeof *models; i++)
        if (!strcmp(models[i].key, key)) model = &models[i];
    if (!model) return -1;
    *device = model->device;
    device->index = index;
    device->pci_slot = 6 + index;
    memcpy(device->attributes, h200_attributes, sizeof device->attributes);
    for (const struct change *c = model->changes; c < model->changes + MAX_CHANGES && c->attribute; c++)
        device->attributes[c->attribute] = c->value;
    device->attributes[CU_DEVICE_ATTRIBUTE_PCI_BUS_ID] = (int32_t)device->pci_bus;
    device->attributes[CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID] = (int32_t)device->pci_slot;
    if (memory) {
        /* A smaller device of the same make: the driver reserves the same part of it. */
        double share = (double)device->memory_reserved / (double)device->memory_total;
        device->memory_reserved = (uint64_t)(share * (double)memory) / (2 * MIB) * (2 * MIB);
        device->memory_total = memory;
    }
    name_device(key, device);
    return 0;
}
