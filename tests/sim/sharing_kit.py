"""Functions for programs that share memory.

Handles are passed as text, and descriptors by a named socket or by a duplicate that the receiver takes.
"""

from __future__ import annotations

from subprocess import Popen

SHARING = """
import socket
class Handle(C.Structure):
    _fields_ = [("bytes", C.c_char * 64)]
class Prop(C.Structure):
    _fields_ = [("type", C.c_int), ("handles", C.c_int), ("where", C.c_int), ("id", C.c_int), ("spare", C.c_uint64 * 2)]
class PoolProps(C.Structure):
    _fields_ = [("type", C.c_int), ("handles", C.c_int), ("where", C.c_int), ("id", C.c_int), ("spare", C.c_uint64 * 9)]
class Access(C.Structure):
    _fields_ = [("where", C.c_int), ("id", C.c_int), ("flags", C.c_int)]
def ask():
    return sys.stdin.readline().strip()
def export(pointer):
    handle = Handle()
    need("cuIpcGetMemHandle", C.byref(handle), pointer)
    return C.string_at(C.byref(handle), 64).hex()
def opened(text, flags=1):
    handle, pointer = Handle.from_buffer_copy(bytes.fromhex(text)), C.c_uint64()
    return L.cuIpcOpenMemHandle_v2(C.byref(pointer), handle, flags), pointer
def put(pointer, text):
    need("cuMemcpyHtoD_v2", pointer, text, C.c_size_t(len(text)))
def get(pointer, n):
    out = C.create_string_buffer(n)
    need("cuMemcpyDtoH_v2", out, pointer, C.c_size_t(n))
    return out.raw.decode()
def create(size, handles=1):
    handle = C.c_uint64()
    need("cuMemCreate", C.byref(handle), C.c_size_t(size), C.byref(Prop(1, handles, 1, 0)), C.c_uint64(0))
    return handle
def mapped(handle, size):
    pointer = C.c_uint64()
    need("cuMemAddressReserve", C.byref(pointer), C.c_size_t(size), C.c_size_t(0), C.c_uint64(0), C.c_uint64(0))
    need("cuMemMap", pointer, C.c_size_t(size), C.c_size_t(0), handle, C.c_uint64(0))
    need("cuMemSetAccess", pointer, C.c_size_t(size), C.byref(Access(1, 0, 3)), C.c_size_t(1))
    return pointer
def descriptor(handle):
    fd = C.c_int(-1)
    need("cuMemExportToShareableHandle", C.byref(fd), handle, 1, C.c_uint64(0))
    return fd.value
def imported(fd):
    handle = C.c_uint64()
    return L.cuMemImportFromShareableHandle(C.byref(handle), C.c_void_p(fd), 1), handle
def range_descriptor(pointer, size):
    fd = C.c_int(-1)
    return L.cuMemGetHandleForAddressRange(C.byref(fd), pointer, C.c_size_t(size), 1, C.c_uint64(0)), fd.value
def pool(handles=1):
    made = C.c_void_p()
    need("cuMemPoolCreate", C.byref(made), C.byref(PoolProps(1, handles, 1, 0)))
    return made
def pooled(pool, size):
    pointer = C.c_uint64()
    need("cuMemAllocFromPoolAsync", C.byref(pointer), C.c_size_t(size), pool, None)
    return pointer
def freed(pointer):
    need("cuMemFreeAsync", pointer, None); need("cuCtxSynchronize")
def pool_descriptor(pool):
    fd = C.c_int(-1)
    need("cuMemPoolExportToShareableHandle", C.byref(fd), pool, 1, C.c_uint64(0))
    return fd.value
def pool_imported(fd):
    made = C.c_void_p()
    return L.cuMemPoolImportFromShareableHandle(C.byref(made), C.c_void_p(fd), 1, C.c_uint64(0)), made
def pool_export(pointer):
    handle = Handle()
    need("cuMemPoolExportPointer", C.byref(handle), pointer)
    return C.string_at(C.byref(handle), 64).hex()
def pool_pointer(pool, text):
    handle, pointer = Handle.from_buffer_copy(bytes.fromhex(text)), C.c_uint64()
    return L.cuMemPoolImportPointer(C.byref(pointer), pool, C.byref(handle)), pointer
def take_fd(pid, fd):
    pidfd = os.pidfd_open(pid)
    got = C.CDLL(None).syscall(438, pidfd, fd, 0)
    os.close(pidfd)
    return got
def send_fd(fd, name):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("\\0" + name); listener.listen(1); say("up"); sock, _ = listener.accept()
        socket.send_fds(sock, [b"x"], [fd]); sock.recv(1)
def receive_fd(name):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); sock.connect("\\0" + name)
    fd = socket.recv_fds(sock, 1, 1)[1][0]; sock.send(b"x"); return fd
"""


def hear(client: Popen[str]) -> str:
    assert client.stdout is not None
    return client.stdout.readline().strip()
