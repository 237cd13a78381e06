/* storm.h: the interface between storm.c, a program that uses all functions at once, and storm_world.c, its gatekeeper,
 * kernel and operator. Both files are in one process, so that a sanitizer checks both sides of every page. */
#ifndef STORM_H
#define STORM_H

#define __CUDA_API_VERSION_INTERNAL
#define NVML_NO_UNVERSIONED_FUNC_DEFS
#include <cuda.h>
#include <nvml.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "fgpu.h"

#define DEVICES 2
#define LIMIT (1ULL << 30)
#define ALMOST_NONE (64ULL << 20)

extern _Atomic bool storm_over;

struct storm_counts { /* above 0: the event has happened */
    _Atomic unsigned long hellos, asked, refused, changes, tagged, patient;
};
extern struct storm_counts storm_counts;

void storm_nap(long us);
void storm_world_begin(void *shim);                     /* diverts the probe symbols of the shim before its first use */
void storm_world_knows(int device, const CUuuid *uuid); /* the device's index in the ledger is device + 3 */
void storm_world_turns(long again_us);                  /* begins to change the pages, in its own thread */
void storm_world_end(void);

#endif
