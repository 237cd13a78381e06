/*
 * fgpu.bpf.c: the BPF programs. They admit, charge and release, for each cgroup and device, and decide no policy.
 *
 * All programs use one order: a charge is added to the levels before the process, and a release is subtracted from the
 * process before the levels. Therefore a level never has less than its processes. When a process exits, one word,
 * `bytes`, is the number to release.
 *
 * Clang compiles one file: driver/compiler.py inserts the parts, because BCC rewrites map calls in the main file alone.
 * A part uses only functions of the parts above it (tools/bpf_order.py). SPARSE (BPF_F_NO_PREALLOC if the kernel
 * permits it) is defined on the command line.
 */
#include "fgpu.h"
#include "texels.h"
// clang-format off
#include "maps.bpf.h"
#include "entries.bpf.h"
#include "events.bpf.h"
#include "levels.bpf.h"
#include "orphans.bpf.h"
#include "processes.bpf.h"
#include "parking.bpf.h"
#include "admission.bpf.h"
#include "witness.bpf.h"
#include "contexts.bpf.h"
#include "settle.bpf.h"
#include "calls.bpf.h"
#include "ends.bpf.h"
#include "opens.bpf.h"
#include "adjust.bpf.h"
// clang-format on
