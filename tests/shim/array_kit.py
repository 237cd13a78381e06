"""Python source that creates arrays, for programs under the shim."""

ARRAYS = """
class D2(C.Structure): _fields_ = [("w", C.c_size_t), ("h", C.c_size_t), ("format", C.c_int), ("channels", C.c_uint)]
class D3(C.Structure):
    _fields_ = [(n, C.c_size_t) for n in "whd"] + [("format", C.c_int), ("channels", C.c_uint), ("flags", C.c_uint)]
class O2(C.Structure): _fields_ = [("w", C.c_uint), ("h", C.c_uint), ("format", C.c_int), ("channels", C.c_uint)]
class O3(C.Structure):
    _fields_ = [(n, C.c_uint) for n in "whd"] + [("format", C.c_int), ("channels", C.c_uint), ("flags", C.c_uint)]
def two(*shape): a = C.c_void_p(); return L.cuArrayCreate_v2(C.byref(a), C.byref(D2(*shape)))
def three(*shape): a = C.c_void_p(); return L.cuArray3DCreate_v2(C.byref(a), C.byref(D3(*shape)))
def mip(levels, *shape): a = C.c_void_p(); return L.cuMipmappedArrayCreate(C.byref(a), C.byref(D3(*shape)), levels)
"""
