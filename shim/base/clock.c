/*
 * clock.c: clocks of Linux, in ns. Owns nothing.
 */
#define _GNU_SOURCE
#include "base/clock.h"

uint64_t fgpu_clock(int which) { return fgpu_read_clock(which); }

uint64_t fgpu_now(void) { return fgpu_read_clock(CLOCK_MONOTONIC); }
