/* The calls of the conformance program: each function is looked up by name in the driver that the loader finds, and
 * each result is one line `name value`, so that two drivers are compared by diff. */
#ifndef FGPU_CONFORMANCE_H
#define FGPU_CONFORMANCE_H

#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#define NVML_NO_UNVERSIONED_FUNC_DEFS
#include <nvml.h>

#include <stddef.h>
#include <stdint.h>

/* Variants for the per-thread default stream. The driver exports them, and the header has them only as macros. */
#define PER_THREAD(name) __typeof__(name) name##_ptsz
PER_THREAD(cuMemAllocAsync);
PER_THREAD(cuMemAllocFromPoolAsync);
PER_THREAD(cuMemFreeAsync);
PER_THREAD(cuStreamBeginCapture_v2);
PER_THREAD(cuStreamBeginCaptureToGraph);
PER_THREAD(cuStreamEndCapture);
PER_THREAD(cuStreamSynchronize);
PER_THREAD(cuStreamQuery);
PER_THREAD(cuEventRecord);
PER_THREAD(cuEventRecordWithFlags);
PER_THREAD(cuStreamGetDevice);
PER_THREAD(cuGraphInstantiateWithParams);
PER_THREAD(cuGraphUpload);
PER_THREAD(cuGraphLaunch);
PER_THREAD(cuLaunchKernel);
PER_THREAD(cuLaunchKernelEx);
PER_THREAD(cuLaunchCooperativeKernel);

void *need(const char *name); /* never NULL: a missing function returns 999 */
void say(const char *name, long long value);
void section(const char *name); /* prefix of the lines that follow */

#define CALL(function, ...) ((__typeof__(&function))need(#function))(__VA_ARGS__)
/* Makes a call, and prints its result under this name. */
#define TRY(name, function, ...) say(name, (long long)CALL(function, __VA_ARGS__))

#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)

void use_primary(void);    /* makes the first device's primary context current */
long long taken_mib(void); /* the memory of the device that was taken since mark() */
void mark(void);

void check_contexts(void);
void check_memory(void);
void check_vmm(void);
void check_pools(void);
void check_streams(void);
void check_capture(void);
void check_graphs(void);
void check_modules(void);
void check_arrays(void);
void check_managed(void);
void check_old(void);
void check_sharing(void);
int sharing_child(int sock); /* main function of the other process of check_sharing() */
void check_lookup(void);
void check_nvml(void);
void check_events(void);
void check_unready(void); /* before cuInit in any thread */
void check_forked(void);
void check_records(void);
void check_fragments(void);
void check_contextless(void);
void check_gone(void);
void check_launches(void);
void check_twins(void);
void check_instantiation(void);
void check_to_graph(void);
void check_current_pool(void);
void check_older(void);
void check_green(void);
void check_green_contexts(void);
void check_lists(void);
void check_accounts(void);
void check_relaxed(void);
void check_lost_graphs(void);
void check_asides(void);
void check_apart(void);
void check_destroyed_pools(void);
void check_outlives(void);
int actor_begins(int sock); /* main function of the other processes of check_outlives() and check_endings() */
void check_endings(void);
void check_grows(void);
void check_queues(void);
void check_resident(void);
void check_pool_handles(void);
void check_hooks(void);
void check_code(void);
void check_freed(void);
void check_afar(void);
void check_sparse(void);
void check_formats(void);
void check_checkpoint(void);

#endif
