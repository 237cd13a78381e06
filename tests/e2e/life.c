/* life: a CUDA program that lives at random. `life SEED THREADS` answers every line "N" on stdin, after N operations of
 * each thread, with "ok OPERATIONS REFUSED". It takes and gives back memory in every way there is, asks for nonsense,
 * and never cares which call failed: whether the books are right is asked elsewhere. */
#define _GNU_SOURCE
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <dlfcn.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#define SLOTS 48
#define GRANULE (2ULL << 20)
#define MOST_THREADS 8

/* clang-format off */
#define DRIVER(X)                                                                                                      \
    X(cuInit) X(cuDevicePrimaryCtxRetain) X(cuCtxSetCurrent) X(cuCtxCreate_v2) X(cuCtxDestroy_v2) X(cuCtxPopCurrent_v2)  \
    X(cuMemAlloc_v2) X(cuMemAllocPitch_v2) X(cuMemAllocManaged) X(cuMemFree_v2) X(cuArrayCreate_v2)                      \
    X(cuArray3DCreate_v2) X(cuMipmappedArrayCreate) X(cuArrayDestroy) X(cuMipmappedArrayDestroy) X(cuMemCreate)          \
    X(cuMemRelease) X(cuMemRetainAllocationHandle) X(cuMemAddressReserve) X(cuMemAddressFree) X(cuMemMap) X(cuMemUnmap)
/* clang-format on */

static struct {
#define SLOT(name) __typeof__(&name) name;
    DRIVER(SLOT)
} cu;

enum kind { NOTHING, POINTER, ARRAY, MIPMAPPED, MAPPED, CONTEXT };
struct slot {
    enum kind kind;
    CUdeviceptr pointer;
    size_t bytes;
    CUarray array;
    CUmipmappedArray mipmapped;
    CUmemGenericAllocationHandle handle;
    int references; /* of the handle, held by us */
    CUcontext context;
};
struct life {
    uint64_t random;
    struct slot slots[SLOTS];
    pthread_t thread;
};

static CUcontext primary;
static struct life lives[MOST_THREADS];
static uint64_t goal;
static _Atomic uint64_t refused;

static uint64_t draw(struct life *life, uint64_t below)
{
    life->random ^= life->random << 13, life->random ^= life->random >> 7, life->random ^= life->random << 17;
    return (life->random >> 11) % below;
}

static bool took(CUresult result)
{
    if (result == CUDA_ERROR_OUT_OF_MEMORY) refused++;
    return result == CUDA_SUCCESS;
}

/* From a few bytes to sixteen megabytes, small ones more often. */
static size_t size(struct life *life) { return 1 + draw(life, 1ULL << (4 + draw(life, 21))); }

static void map(struct life *life, struct slot *slot)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0}};
    slot->bytes = (1 + draw(life, 4)) * GRANULE;
    if (!took(cu.cuMemCreate(&slot->handle, slot->bytes, &prop, 0))) return;
    slot->references = 1;
    slot->kind = MAPPED;
    if (cu.cuMemAddressReserve(&slot->pointer, slot->bytes, 0, 0, 0)) slot->pointer = 0;
    if (slot->pointer && cu.cuMemMap(slot->pointer, slot->bytes, 0, slot->handle, 0)) {
        cu.cuMemAddressFree(slot->pointer, slot->bytes);
        slot->pointer = 0;
    }
    CUmemGenericAllocationHandle again;
    if (slot->pointer && !draw(life, 3) && !cu.cuMemRetainAllocationHandle(&again, (void *)slot->pointer))
        slot->references++;
}

/* In either order: the memory goes with whichever is the last. */
static void unmap(struct life *life, struct slot *slot)
{
    bool first = draw(life, 2);
    for (int i = 0; first && i < slot->references; i++) cu.cuMemRelease(slot->handle);
    if (slot->pointer) {
        cu.cuMemUnmap(slot->pointer, slot->bytes);
        cu.cuMemAddressFree(slot->pointer, slot->bytes);
    }
    for (int i = 0; !first && i < slot->references; i++) cu.cuMemRelease(slot->handle);
}

static void take_array(struct life *life, struct slot *slot)
{
    CUDA_ARRAY3D_DESCRIPTOR shape = {.Width = 1 + draw(life, 300),
                                     .Height = 1 + draw(life, 300),
                                     .Format = CU_AD_FORMAT_FLOAT,
                                     .NumChannels = 1 + 3 * (unsigned)draw(life, 2)};
    CUDA_ARRAY_DESCRIPTOR flat = {shape.Width, shape.Height, shape.Format, shape.NumChannels};
    switch (draw(life, 3)) {
    case 0:
        if (took(cu.cuArrayCreate_v2(&slot->array, &flat))) slot->kind = ARRAY;
        return;
    case 1:
        shape.Depth = 1 + draw(life, 20);
        if (took(cu.cuArray3DCreate_v2(&slot->array, &shape))) slot->kind = ARRAY;
        return;
    default:
        if (took(cu.cuMipmappedArrayCreate(&slot->mipmapped, &shape, 1 + (unsigned)draw(life, 5))))
            slot->kind = MIPMAPPED;
    }
}

static void take(struct life *life, struct slot *slot)
{
    size_t pitch;
    switch (draw(life, 12)) {
    case 0:
        if (took(cu.cuMemAllocPitch_v2(&slot->pointer, &pitch, 1 + draw(life, 5000), 1 + draw(life, 500), 4)))
            slot->kind = POINTER;
        return;
    case 1:
        /* Whole granules: no driver tells what it rounds managed memory to. */
        if (took(cu.cuMemAllocManaged(&slot->pointer, (1 + draw(life, 4)) * GRANULE, CU_MEM_ATTACH_GLOBAL)))
            slot->kind = POINTER;
        return;
    case 2:
    case 3:
        map(life, slot);
        return;
    case 4:
    case 5:
        take_array(life, slot);
        return;
    case 6: /* nonsense */
        took(cu.cuMemAlloc_v2(&slot->pointer, draw(life, 2) ? 0 : 1ULL << (34 + draw(life, 30))));
        cu.cuMemFree_v2(draw(life, 1ULL << 40));
        cu.cuMemRelease(draw(life, 1000) + 1000000);
        return;
    case 7:
        if (draw(life, 200) || cu.cuCtxCreate_v2(&slot->context, 0, 0)) return;
        cu.cuCtxPopCurrent_v2(&slot->context);
        slot->kind = CONTEXT;
        return;
    default:
        if (took(cu.cuMemAlloc_v2(&slot->pointer, size(life)))) slot->kind = POINTER;
    }
}

static void give(struct life *life, struct slot *slot)
{
    switch (slot->kind) {
    case POINTER:
        cu.cuMemFree_v2(slot->pointer);
        break;
    case ARRAY:
        cu.cuArrayDestroy(slot->array);
        break;
    case MIPMAPPED:
        cu.cuMipmappedArrayDestroy(slot->mipmapped);
        break;
    case MAPPED:
        unmap(life, slot);
        break;
    case CONTEXT:
        cu.cuCtxDestroy_v2(slot->context);
        break;
    default:
        break;
    }
    *slot = (struct slot){0};
}

static void *live(void *argument)
{
    struct life *life = argument;
    cu.cuCtxSetCurrent(primary);
    for (uint64_t i = 0; i < goal; i++) {
        struct slot *slot = &life->slots[draw(life, SLOTS)];
        slot->kind == NOTHING ? take(life, slot) : give(life, slot);
    }
    return NULL;
}

int main(int count, char **arguments)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (count != 3 || !driver) return 2;
#define FIND(name) cu.name = (__typeof__(&name))dlsym(driver, #name);
    DRIVER(FIND)
    unsigned threads = (unsigned)atoi(arguments[2]) % (MOST_THREADS + 1);
    CUresult result = cu.cuInit(0);
    if (!result) result = cu.cuDevicePrimaryCtxRetain(&primary, 0);
    printf(result ? "no context: %d\n" : "ready %d\n", result);
    fflush(stdout);
    for (unsigned t = 0; t < threads; t++) lives[t].random = strtoull(arguments[1], NULL, 10) * 8 + t + 1;
    while (scanf("%" SCNu64, &goal) == 1) {
        for (unsigned t = 0; t < threads; t++) pthread_create(&lives[t].thread, NULL, live, &lives[t]);
        for (unsigned t = 0; t < threads; t++) pthread_join(lives[t].thread, NULL);
        printf("ok %" PRIu64 " %" PRIu64 "\n", goal * threads, (uint64_t)refused);
        fflush(stdout);
    }
    return 0;
}
