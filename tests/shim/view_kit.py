"""Python source that calls NVML, for programs under the shim."""

NVML = """
N = C.CDLL("libnvidia-ml.so.1")
class Memory(C.Structure): _fields_ = [(n, C.c_uint64) for n in ("total", "free", "used")]
class Memory2(C.Structure):
    _fields_ = [("version", C.c_uint)] + [(n, C.c_uint64) for n in ("total", "reserved", "free", "used")]
class Info1(C.Structure): _fields_ = [("pid", C.c_uint), ("used", C.c_uint64)]
class Info(C.Structure): _fields_ = Info1._fields_ + [("gi", C.c_uint), ("ci", C.c_uint)]
class Detail(C.Structure): _fields_ = Info._fields_ + [("cc", C.c_uint64)]
class Details(C.Structure):
    _fields_ = [("version", C.c_uint), ("mode", C.c_uint), ("count", C.c_uint), ("array", C.POINTER(Detail))]
class Sample(C.Structure):
    _fields_ = [("pid", C.c_uint), ("stamp", C.c_uint64)] + [(n, C.c_uint) for n in ("sm", "mem", "enc", "dec")]
class Info2(C.Structure):
    _fields_ = [("stamp", C.c_uint64), ("pid", C.c_uint)] + [(n, C.c_uint) for n in ("sm", "mem", "e", "d", "j", "o")]
class Infos(C.Structure):
    _fields_ = [("version", C.c_uint), ("count", C.c_uint), ("since", C.c_uint64), ("array", C.POINTER(Info2))]
class Encoder(C.Structure): _fields_ = [(n, C.c_uint) for n in ("id", "pid", "vgpu", "c", "h", "v", "fps", "latency")]
class Capture(C.Structure):
    _fields_ = [("id", C.c_uint), ("pid", C.c_uint)] + [(f"f{i}", C.c_uint) for i in range(10)]
class Stats(C.Structure):
    _fields_ = [("gpu", C.c_uint), ("memory", C.c_uint), ("most", C.c_uint64), ("rest", C.c_uint64 * 6)]
class Stats2(C.Structure): _fields_ = [("pid", C.c_uint), ("is", C.c_uint), ("_", C.c_uint64), ("most", C.c_uint64),
    ("rest", C.c_uint64 * 6)]
def device(i):
    d = C.c_void_p(); N.nvmlDeviceGetHandleByIndex_v2(i, C.byref(d)); return d
def memory(i):
    m = Memory(); return [N.nvmlDeviceGetMemoryInfo(device(i), C.byref(m)), m.total, m.free, m.used]
def memory2(i, version=Memory2):
    m = Memory2(C.sizeof(Memory2) | 2 << 24)
    return [N.nvmlDeviceGetMemoryInfo_v2(device(i), C.byref(m)), m.total, m.reserved, m.free, m.used]
def processes(name, kind, room, d=0):
    n, a = C.c_uint(room), (kind * 8)()
    r = getattr(N, name)(device(d) if d is not None else C.c_void_p(99), C.byref(n), a if room else None)
    return [r, n.value, [[getattr(x, f[0]) for f in kind._fields_] for x in a[: n.value if r == 0 else 0]]]
N.nvmlInit_v2()
"""
