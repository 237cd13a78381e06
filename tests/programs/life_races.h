/* life_races.h: the part of a random life in which threads make, end and hand over contexts at once; included by life.c
 * alone. */

#define RACERS 2
#define LAPS 3

static _Atomic(CUcontext) passed; /* on its way from the thread that made it to the one that ends it */

static void *race(void *argument)
{
    struct life *life = argument;
    CUcontext context;
    CUdeviceptr left;
    for (int i = 0; i < LAPS; i++) {
        if (!cu.cuDevicePrimaryCtxRetain(&context, life->device)) cu.cuDevicePrimaryCtxRelease_v2(life->device);
        if (!took(cu.cuCtxCreate_v2(&context, 0, life->device))) continue;
        if (leaves_unseen()) cu.cuMemAlloc_v2(&left, GRANULE); /* goes with its context */
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

/* In a life that has managed memory, pointers go before their context does. Where another context stays, no call and no
 * look at the driver tells of their end: managed memory is charged until there is no context, and so is managed memory
 * that the driver gives the address of such a pointer. */
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

/* What went with the primary contexts. */
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

/* Several threads at once ask for the primary context, which is not there; one reference is enough. */
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

/* Between two rounds: the primary contexts end, with all that is in them, and others begin, if there is room. */
static void begin_anew(struct life *life)
{
    free_pointers();
    for (unsigned t = 0; t < threads; t++) {
        int device = lives[t].device;
        if (!primary[device]) continue;
        if (draw(life, 2)) cu.cuDevicePrimaryCtxReset_v2(device); /* and leaves the reference */
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
