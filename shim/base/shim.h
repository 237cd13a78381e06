/*
 * shim.h: declarations for all files of the shim. Owns no state.
 *
 * The library is loaded into every program of a container. So: the hot paths allocate nothing; the shim never
 * terminates or signals the host program, and blocks it only at a closed gate or for a bounded time; no descriptor
 * outlives a call; a hook restores errno before it calls the driver.
 */
#ifndef FGPU_SHIM_H
#define FGPU_SHIM_H

/* Declare each version of each function under its own name: the short names would silently mean the newest version. */
#define __CUDA_API_VERSION_INTERNAL
#define NVML_NO_UNVERSIONED_FUNC_DEFS
#include <cuda.h>
#include <nvml.h>

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "fgpu.h"

#define EXPORT __attribute__((visibility("default")))
#define HIDDEN __attribute__((visibility("hidden")))
#define LIKELY(x) __builtin_expect(!!(x), 1)
#define COLD __attribute__((cold)) /* small, not fast: runs rarely */
#define FGPU_SECOND_NS 1000000000ULL

/* -- clock.c */
HIDDEN uint64_t fgpu_clock(int which); /* a clock of Linux, in ns */
HIDDEN uint64_t fgpu_now(void);        /* CLOCK_MONOTONIC */
HIDDEN void fgpu_nap(long ns);         /* sleep, at most until a signal; keeps errno */

/* -- ticket.c */
HIDDEN uint64_t fgpu_ticket(void);

/* -- tables.c: returns the table, and maps it if there is none yet; NULL: the kernel has no memory for it */
HIDDEN void *fgpu_table(_Atomic(void *) *table, size_t bytes);

/* -- turn.c: at most one thread at a time has a turn, as a rule; a turn expires by itself. 0: not obtained in time */
HIDDEN uint64_t fgpu_take_turn(_Atomic uint64_t *busy_until_ns);
HIDDEN void fgpu_end_turn(_Atomic uint64_t *busy_until_ns, uint64_t turn);

/* -- probe.S: the same addresses as the exported symbols, under names that no other library can interpose */
HIDDEN void fgpu_admit_here(unsigned device, uint64_t bytes, unsigned kind, uint64_t ticket);
HIDDEN void fgpu_release_here(unsigned device, uint64_t bytes, unsigned kind, uint64_t ticket);

#endif
