/* life_races.h: the part of life.c in which threads create, destroy and pass on contexts at the same time. Only life.c
 * includes this file. */

#define RACERS 2
#define LAPS 3

static _Atomic(CUcontext) passed; /* from the thread that created it to the thread that destroys it */

static void *race(void *argument)
{
    struct life *life = argument;
    CUcontext context;
    CUdeviceptr left;
    for (int i = 0; i < LAPS; i++) {
        if (!cu.cuDevicePrimaryCtxRetain(&context, life->device)) cu.cuDevicePrimaryCtxRelease_v2(life->device);
        if (!took(cu.cuCtxCreate_v2(&context, 0, life->device))) continue;
        if (leaves_unseen()) cu.cuMemAlloc_v2(&left, GRANULE); /* freed with its context */
        cu.cuCtxPopCurrent_v2(&context);
        context = atomic_exchange(&passed, context);
        if (context) cu.cuCtxDestroy_v2(context);
    }
    return NULL;
}

static void race_contexts(struct life *life)
{
    pthread_t racers[RACERS];
    for (int i = 0; i < RACERS; i++) pthread_create(&racers[i], NULL, race, life);
    for (int i = 0; i < RACERS; i++) pthread_join(racers[i], NULL);
    CUcontext context = atomic_exchange(&passed, NULL);
    if (context) cu.cuCtxDestroy_v2(context);
}

/* Frees pointers before their context ends, if the program has managed memory. If another context remains, neither a
 * call nor a comparison with the driver shows the end of pointers that ended with their context. Then managed memory
 * stays charged until the process has no context, and so does managed memory that gets the address of such a pointer.
 */
static void free_pointers(void)
{
    for (unsigned t = 0; t < threads; t++) {
        for (int i = 0; i < SLOTS; i++) {
            struct slot *slot = &lives[t].slots[i];
            bool is_pointer = slot->kind == MANAGED || (slot->kind == POINTER && !leaves_unseen());
            if (is_pointer) cu.cuMemFree_v2(slot->pointer);
        }
    }
    for (unsigned t = 0; t < MOST_THREADS; t++)
        if (handed[t]) cu.cuMemFree_v2(handed[t]);
}

/* Returns whether this kind of memory is freed with the primary context. */
static bool is_gone(enum kind kind)
{
    return kind == POINTER || kind == MANAGED || kind == ARRAY || kind == MIPMAPPED || kind == MODULE;
}

static void forget(void)
{
    for (unsigned t = 0; t < threads; t++)
        for (int i = 0; i < SLOTS; i++)
            if (is_gone(lives[t].slots[i].kind)) lives[t].slots[i] = (struct slot){0};
    for (unsigned t = 0; t < MOST_THREADS; t++) handed[t] = 0;
}

static void *retain(void *device)
{
    CUcontext context = NULL;
    took(cu.cuDevicePrimaryCtxRetain(&context, (int)(intptr_t)device));
    return context;
}

/* Several threads retain the primary context at the same time. It does not exist before. One reference is kept. */
static void retain_together(int device)
{
    pthread_t racers[RACERS];
    void *got;
    for (int i = 0; i < RACERS; i++) pthread_create(&racers[i], NULL, retain, (void *)(intptr_t)device);
    for (int i = 0; i < RACERS; i++) {
        pthread_join(racers[i], &got);
        if (got && primary[device]) cu.cuDevicePrimaryCtxRelease_v2(device);
        if (got) primary[device] = got;
    }
}

/* Ends the primary contexts with all of their memory, between two rounds. live_all() retains others, if they fit. */
static void begin_anew(struct life *life)
{
    free_pointers();
    for (unsigned t = 0; t < threads; t++) {
        int device = lives[t].device;
        if (!primary[device]) continue;
        if (draw(life, 2)) cu.cuDevicePrimaryCtxReset_v2(device); /* a reset keeps the reference */
        cu.cuDevicePrimaryCtxRelease_v2(device);
        primary[device] = NULL;
    }
    forget();
}

static unsigned held_contexts(void)
{
    unsigned n = 0;
    for (int device = 0; device < MOST_THREADS; device++) n += primary[device] != NULL;
    return n;
}
