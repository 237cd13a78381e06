/* Fails the k-th system call that the shim makes, and lets tests move its clock. All other calls pass. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>

static uintptr_t low, high;
static int left = -1, made;
static int64_t skew_ns;

void fault_arm(int k) { left = k; }
int fault_made(void) { return made; }
void fault_skip(int64_t ns) { skew_ns += ns; }

static int find(struct dl_phdr_info *info, size_t size, void *data)
{
    (void)size, (void)data;
    if (!info->dlpi_name || !strstr(info->dlpi_name, "libfgpu")) return 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];
        if (p->p_type == PT_LOAD && p->p_flags & PF_X) low = info->dlpi_addr + p->p_vaddr, high = low + p->p_memsz;
    }
    return 1;
}
static int fails(void *caller, int error)
{
    if (!low) dl_iterate_phdr(find, NULL);
    if ((uintptr_t)caller < low || (uintptr_t)caller >= high) return 0;
    made++;
    if (left < 0 || left-- != 1) return 0;
    left = -1;
    errno = error;
    return 1;
}
long syscall(long number, ...)
{
    static long (*next)(long, ...);
    long a[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
    va_end(list);
    if (!next) next = dlsym(RTLD_NEXT, "syscall");
    int error = number == SYS_socket    ? EMFILE
                : number == SYS_connect ? ECONNREFUSED
                : number == SYS_recvmsg ? ENOMEM
                                        : EINTR;
    if (number != SYS_close && fails(__builtin_return_address(0), error)) return -1;
    return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset)
{
    if (fails(__builtin_return_address(0), ENOMEM)) return MAP_FAILED;
    return (void *)(intptr_t)((long (*)(long, ...))dlsym(RTLD_NEXT, "syscall"))(SYS_mmap, at, n, prot, flags, fd,
                                                                                offset);
}
int madvise(void *at, size_t n, int advice)
{
    if (fails(__builtin_return_address(0), EINVAL)) return -1;
    return (int)((long (*)(long, ...))dlsym(RTLD_NEXT, "syscall"))(SYS_madvise, at, n, advice);
}
int clock_gettime(clockid_t id, struct timespec *now)
{
    int result = (int)((long (*)(long, ...))dlsym(RTLD_NEXT, "syscall"))(SYS_clock_gettime, id, now);
    uintptr_t caller = (uintptr_t)__builtin_return_address(0);
    if (!low) dl_iterate_phdr(find, NULL);
    if (caller >= low && caller < high) {
        int64_t ns = now->tv_nsec + skew_ns % 1000000000;
        now->tv_sec += skew_ns / 1000000000 + ns / 1000000000;
        now->tv_nsec = ns % 1000000000;
    }
    return result;
}
