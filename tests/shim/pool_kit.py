"""Python source that allocates from memory pools, for programs under the shim."""

POOL, RELEASED, MEMORY = 1, 101, 0
MIB, GIB, OOM = 1 << 20, 1 << 30, 2
POOLS = """
L.fake_reserved.restype = L.fake_graph_reserved.restype = C.c_uint64
V = C.c_void_p
def new(n, stream=0, name="cuMemAllocAsync"):
    p = C.c_uint64(); r = getattr(L, name)(C.byref(p), C.c_size_t(n), V(stream)); return r or p.value
def drop(p, stream=0, name="cuMemFreeAsync"): return getattr(L, name)(C.c_uint64(p), V(stream))
def new_from(pool, n, stream=0, name="cuMemAllocFromPoolAsync"):
    p = C.c_uint64(); r = getattr(L, name)(C.byref(p), C.c_size_t(n), V(pool), V(stream)); return r or p.value
class Props(C.Structure):
    _fields_ = [("type", C.c_int), ("handles", C.c_int), ("where", C.c_int), ("id", C.c_int), ("rest", C.c_uint64 * 9)]
def create(where=1, device=0):
    h, props = V(), Props(1, 0, where, device); L.cuMemPoolCreate(C.byref(h), C.byref(props)); return h.value
def trim(pool, keep=0): return L.cuMemPoolTrimTo(V(pool), C.c_size_t(keep))
c = V(); L.cuDevicePrimaryCtxRetain(C.byref(c), 0)
def results(rs): return [r if r < 1000 else 0 for r in rs]
"""
