/* Access between devices: which devices can access each other's memory, and which contexts have enabled this access.
 * All boards of a simulated machine can access each other's memory. */
#include "cuda/context/context.h"

#include <stdlib.h>

struct peer {
    const struct context *context;
    struct peer *next;
};

void peers_end(struct context *context)
{
    for (struct context *c = driver.contexts; c; c = c->next) {
        for (struct peer **at = &c->peers; *at;) {
            struct peer *peer = *at;
            if (c != context && peer->context != context) {
                at = &peer->next;
                continue;
            }
            *at = peer->next;
            free(peer);
        }
    }
}

API cuDeviceCanAccessPeer(int *canAccessPeer, CUdevice dev, CUdevice peerDev)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!canAccessPeer) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!sim_is_device(dev) || !sim_is_device(peerDev)) return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    *canAccessPeer = dev != peerDev;
    return sim_leave(CUDA_SUCCESS);
}

API cuDeviceGetP2PAttribute(int *value, CUdevice_P2PAttribute attrib, CUdevice srcDevice, CUdevice dstDevice)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!value || attrib < CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK ||
        attrib > CU_DEVICE_P2P_ATTRIBUTE_CUDA_ARRAY_ACCESS_SUPPORTED)
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!sim_is_device(srcDevice) || !sim_is_device(dstDevice) || srcDevice == dstDevice)
        return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    *value = attrib != CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK;
    return sim_leave(CUDA_SUCCESS);
}

/* Enters with the current context and another context that is alive. */
static CUresult enter_pair(CUcontext handle, struct context **context, const struct context **other)
{
    CUresult result = sim_enter(context);
    if (result) return result;
    *other = (struct context *)handle;
    if (!handle || !context_is_known(*other)) return sim_leave(CUDA_ERROR_INVALID_CONTEXT);
    return (*other)->alive ? CUDA_SUCCESS : sim_leave(CUDA_ERROR_CONTEXT_IS_DESTROYED);
}

static struct peer **find(struct context *context, const struct context *other)
{
    struct peer **at = &context->peers;
    while (*at && (*at)->context != other) at = &(*at)->next;
    return at;
}

API cuCtxEnablePeerAccess(CUcontext peerContext, unsigned int Flags)
{
    struct context *context;
    const struct context *other;
    CUresult result = enter_pair(peerContext, &context, &other);
    if (result) return result;
    if (Flags) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (other == context) return sim_leave(CUDA_ERROR_INVALID_CONTEXT);
    if (other->device == context->device) return sim_leave(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED);
    if (*find(context, other)) return sim_leave(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
    struct peer *peer = calloc(1, sizeof *peer);
    if (!peer) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    *peer = (struct peer){other, context->peers};
    context->peers = peer;
    return sim_leave(CUDA_SUCCESS);
}

API cuCtxDisablePeerAccess(CUcontext peerContext)
{
    struct context *context;
    const struct context *other;
    CUresult result = enter_pair(peerContext, &context, &other);
    if (result) return result;
    struct peer **at = find(context, other), *peer = *at;
    if (!peer) return sim_leave(CUDA_ERROR_PEER_ACCESS_NOT_ENABLED);
    *at = peer->next;
    free(peer);
    return sim_leave(CUDA_SUCCESS);
}
