"""Assembly for code that makes the driver use memory of a device, and the amount of this memory."""

from __future__ import annotations

CODE = r"""
HEAD = ".version 7.0\n.target sm_70\n.address_size 64\n"
def entry(name, body=""):
    return f".visible .entry {name}(.param .u64 p)\n{{\n {body}\n ret;\n}}\n"
def local(size, name="lmem"):
    return HEAD + entry(name, f".local .align 16 .b8 buf[{size}];")
def data(size):
    return HEAD + f".visible .global .align 16 .b8 big[{size}];\n" + entry("glob")
MALLOC = HEAD + ".extern .func (.param .b64 r) malloc (.param .b64 s);\n" + entry("mal")
PRINTF = HEAD + ".extern .func (.param .b32 r) vprintf (.param .b64 f, .param .b64 a);\n" + entry("pr")
def load(code, name):
    module, function = C.c_void_p(), C.c_void_p()
    result = L.cuModuleLoadData(C.byref(module), code.encode())
    if not result: need("cuModuleGetFunction", C.byref(function), module, name.encode())
    return result, module, function
def run(function):
    return L.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, None, None, None) or L.cuCtxSynchronize()
def attribute(function, number=3):
    value = C.c_int()
    need("cuFuncGetAttribute", C.byref(value), number, function)
    return value.value
def variable(module, name):
    at, size = C.c_uint64(), C.c_size_t()
    return L.cuModuleGetGlobal_v2(C.byref(at), C.byref(size), module, name.encode()), at, size.value
def limit(which, value=None):
    if value is not None: return L.cuCtxSetLimit(which, C.c_size_t(value))
    got = C.c_size_t()
    need("cuCtxGetLimit", C.byref(got), which)
    return got.value
STACK, FIFO, HEAP = range(3)
def another():
    context = C.c_void_p()
    need("cuCtxCreate_v2", C.byref(context), 0, 0)
    return context
start(); first = info()[0]
def taken():
    return (first - info()[0]) / (1 << 20)
"""
