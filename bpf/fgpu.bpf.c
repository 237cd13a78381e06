/*
 * fgpu.bpf.c: witness and bookkeeper. Admits, charges and releases, per cgroup and device; decides no policy.
 *
 * Order everywhere: a charge goes to the levels first and to the process second, a release the other way round, so that
 * a level never holds less than its processes do. One word, `bytes`, is what the end of a process takes back.
 *
 * Clang sees one file: driver/compiler.py puts the parts in place, since BCC rewrites map calls in the main file alone.
 * A part uses functions of the parts above it only (tools/bpf_order.py). SPARSE
 * (BPF_F_NO_PREALLOC if the kernel permits it) is on the command line.
 */
#include "fgpu.h"
// clang-format off
#include "maps.bpf.h"
#include "entries.bpf.h"
#include "events.bpf.h"
#include "levels.bpf.h"
#include "orphans.bpf.h"
#include "processes.bpf.h"
#include "admission.bpf.h"
#include "witness.bpf.h"
#include "settle.bpf.h"
#include "calls.bpf.h"
#include "ends.bpf.h"
#include "adjust.bpf.h"
// clang-format on
