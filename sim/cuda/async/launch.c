/* Launches. */
#include "cuda/async/async.h"
#include "cuda/graph/graph.h"

#define CLUSTER_MAX 8u /* blocks that every device with clusters can run */

CUresult kernel_begin(struct context *context, struct stream *stream, const struct kernel_run *run)
{
    CUresult result = growth_launch(context, &run->needs);
    return result ? result : stream_work(context, stream, run->ns, &run->party);
}

static CUresult kernel_launch(CUfunction handle, struct shape shape, CUstream stream_handle, bool per_thread,
                              bool cooperates)
{
    struct context *context;
    struct stream *stream;
    struct kernel kernel = {.function = handle, .shape = shape};
    CUresult result = stream_enter_work(stream_handle, per_thread, &context, &stream);
    if (result) return result;
    result = kernel_check(context, handle, &shape, cooperates, &kernel.run);
    if (result) return sim_leave(result);
    if (stream->capture) {
        struct node *node;
        result = capture_node(stream, CU_GRAPH_NODE_TYPE_KERNEL, &node);
        if (!result) node->kernel = kernel;
        return sim_leave(result);
    }
    return sim_leave(kernel_begin(context, stream, &kernel.run));
}

#define SHAPE(s)                                                                                                       \
    ((struct shape){{(s)->gridDimX, (s)->gridDimY, (s)->gridDimZ},                                                     \
                    {(s)->blockDimX, (s)->blockDimY, (s)->blockDimZ},                                                  \
                    (s)->sharedMemBytes})

TWICE(_ptsz, cuLaunchKernel,
      (CUfunction f, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx, unsigned int by,
       unsigned int bz, unsigned int shared, CUstream hStream, void **params, void **extra),
      ((void)params, (void)extra,
       kernel_launch(f, (struct shape){{gx, gy, gz}, {bx, by, bz}, shared}, hStream, per_thread, false)))

TWICE(_ptsz, cuLaunchCooperativeKernel,
      (CUfunction f, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx, unsigned int by,
       unsigned int bz, unsigned int shared, CUstream hStream, void **params),
      ((void)params, kernel_launch(f, (struct shape){{gx, gy, gz}, {bx, by, bz}, shared}, hStream, per_thread, true)))

static bool says_cooperative(const CUlaunchConfig *config)
{
    for (unsigned i = 0; config->attrs && i < config->numAttrs; i++)
        if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE && config->attrs[i].value.cooperative) return true;
    return false;
}

/* A cluster has at most CLUSTER_MAX blocks, and a grid consists of whole clusters. */
static bool fits_clusters(const CUlaunchConfig *config)
{
    for (unsigned i = 0; config->attrs && i < config->numAttrs; i++) {
        const CUlaunchAttributeValue *value = &config->attrs[i].value;
        if (config->attrs[i].id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) continue;
        unsigned x = value->clusterDim.x, y = value->clusterDim.y, z = value->clusterDim.z;
        if (!x || !y || !z || (uint64_t)x * y * z > CLUSTER_MAX) return false;
        if (config->gridDimX % x || config->gridDimY % y || config->gridDimZ % z) return false;
    }
    return true;
}

static CUresult launch_as_told(const CUlaunchConfig *config, CUfunction f, bool per_thread)
{
    if (!config) return CUDA_ERROR_INVALID_VALUE;
    if (!fits_clusters(config)) return CUDA_ERROR_INVALID_CLUSTER_SIZE;
    return kernel_launch(f, SHAPE(config), config->hStream, per_thread, says_cooperative(config));
}

TWICE(_ptsz, cuLaunchKernelEx, (const CUlaunchConfig *config, CUfunction f, void **params, void **extra),
      ((void)params, (void)extra, launch_as_told(config, f, per_thread)))
