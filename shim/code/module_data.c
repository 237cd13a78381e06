/*
 * module_data.c: the driver's memory for the data of code (variables in the state space .global). Owns the list of
 * modules and libraries that have data.
 *
 * A module's data exists from its load on; a library's data exists in each context that uses it, from its first use
 * there. No probe reports that. So the shim requests the bytes beforehand, committed at once like those of pools, and
 * releases them when the code is unloaded or its context is destroyed. If the list has no room, or the code cannot be
 * read, NVML shows the memory and the agent charges it.
 */
#define _GNU_SOURCE
#include "code/module_data.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "code/image.h"

#define ENTRIES 1024
/* Less data than this fits into memory that contexts have anyway, or is a granule that NVML shows. */
#define LEAST_BYTES (2ULL << 20)
#define MOST_FILE (1ULL << 30)
#define BUSY 1ULL   /* the driver never returns this handle */
#define LEAVES 2ULL /* a bit that is set in a handle while its code is being unloaded */

struct fgpu_loaded {
    _Atomic uint64_t handle;  /* 0: free */
    _Atomic uint64_t context; /* 0: of a library: the bytes that each context will need */
    _Atomic uint64_t bytes;
    _Atomic int index; /* the ledger's index; -1: nothing was requested */
    _Atomic bool uses_heap;
};
static _Atomic(void *) list;

static struct fgpu_loaded *known_list(void) { return atomic_load_explicit(&list, memory_order_acquire); }

static struct fgpu_loaded *own_list(void) { return fgpu_table(&list, ENTRIES * sizeof(struct fgpu_loaded)); }

static struct fgpu_loaded *claim(void)
{
    struct fgpu_loaded *own = own_list();
    for (unsigned i = 0; own && i < ENTRIES; i++) {
        uint64_t none = 0;
        if (atomic_compare_exchange_strong(&own[i].handle, &none, BUSY)) return &own[i];
    }
    return NULL;
}

static struct fgpu_loaded *find(uint64_t handle, uint64_t context)
{
    struct fgpu_loaded *known = known_list();
    for (unsigned i = 0; known && i < ENTRIES; i++)
        if (atomic_load(&known[i].handle) == handle && atomic_load(&known[i].context) == context) return &known[i];
    return NULL;
}

/* Delete an entry. Only one thread succeeds. */
static void drop(struct fgpu_loaded *entry, uint64_t handle)
{
    if (!atomic_compare_exchange_strong(&entry->handle, &handle, BUSY)) return;
    if (atomic_load(&entry->context)) fgpu_give_back(atomic_load(&entry->index), atomic_load(&entry->bytes));
    atomic_store(&entry->handle, 0);
}

static void rename_all(uint64_t from, uint64_t to)
{
    struct fgpu_loaded *known = from ? known_list() : NULL;
    for (unsigned i = 0; known && i < ENTRIES; i++) {
        uint64_t handle = from;
        atomic_compare_exchange_strong(&known[i].handle, &handle, to);
    }
}

/* Mark code that is about to be unloaded: another thread may get the same handle for other code before the driver's
 * call returns here. */
void fgpu_data_leaves(uint64_t handle) { rename_all(handle, handle | LEAVES); }

void fgpu_data_left(uint64_t handle, bool is_gone)
{
    struct fgpu_loaded *known = known_list();
    if (!is_gone) rename_all(handle | LEAVES, handle);
    for (unsigned i = 0; is_gone && known && i < ENTRIES; i++) drop(&known[i], handle | LEAVES);
}

void fgpu_data_of_context_ends(uint64_t context)
{
    struct fgpu_loaded *known = known_list();
    for (unsigned i = 0; known && i < ENTRIES; i++) {
        uint64_t handle = atomic_load(&known[i].handle);
        if (handle > BUSY && atomic_load(&known[i].context) == context) drop(&known[i], handle);
    }
}

/* -- if a limit is in force */

static uint64_t whole(uint64_t bytes, uint64_t granule)
{
    return granule ? (bytes + granule - 1) & ~(granule - 1) : bytes;
}

/* Write an entry before its handle is written: no other thread reads it before that. */
static void fill(struct fgpu_loaded *entry, uint64_t context, uint64_t bytes, uint64_t data)
{
    atomic_store_explicit(&entry->context, context, memory_order_relaxed);
    atomic_store_explicit(&entry->bytes, bytes, memory_order_relaxed);
    atomic_store_explicit(&entry->uses_heap, data & FGPU_USES_HEAP, memory_order_relaxed);
}

static bool matters(uint64_t data) { return data >= LEAST_BYTES; } /* the bit for the heap is a higher bit */

static CUresult ask(struct fgpu_load *load, uint64_t data)
{
    uint64_t bytes = data & ~FGPU_USES_HEAP;
    __typeof__(&cuCtxGetCurrent) get = REAL(cuCtxGetCurrent);
    CUcontext context;
    CUdevice ordinal;
    if (!matters(data) || !fgpu_current(&ordinal) || !get || get(&context) != CUDA_SUCCESS ||
        !fgpu_context_is_known(context))
        return CUDA_SUCCESS;
    if (load->handle && find(load->handle, (uint64_t)context)) return CUDA_SUCCESS;
    struct fgpu_loaded *entry = claim();
    if (!entry) return bytes < LEAST_BYTES ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    struct admission admission = {.index = -1};
    if (bytes >= LEAST_BYTES) admission = fgpu_admission(ordinal, whole(bytes, fgpu_granule(ordinal)), FGPU_POOL);
    if (admission.refusal) {
        atomic_store(&entry->handle, 0);
        return admission.refusal;
    }
    fill(entry, (uint64_t)context, admission.index < 0 ? 0 : admission.bytes, data);
    atomic_store_explicit(&entry->index, admission.index, memory_order_relaxed);
    load->entry = entry;
    load->context = (uint64_t)context;
    return CUDA_SUCCESS;
}

CUresult fgpu_load_of_library_begins(struct fgpu_load *load, CUlibrary library)
{
    struct fgpu_loaded *entry = library ? find((uint64_t)library, 0) : NULL;
    int saved = errno;
    *load = (struct fgpu_load){.handle = (uint64_t)library};
    CUresult refusal = entry && fgpu_is_held() ? ask(load, atomic_load(&entry->bytes)) : CUDA_SUCCESS;
    errno = saved;
    return refusal;
}

CUresult fgpu_load_ends(const struct fgpu_load *load, CUresult result, uint64_t module)
{
    struct fgpu_loaded *entry = load->entry;
    if (!entry) return result;
    int saved = errno;
    if (result != CUDA_SUCCESS) fgpu_failed(atomic_load(&entry->index), atomic_load(&entry->bytes), result);
    atomic_store(&entry->handle, result != CUDA_SUCCESS ? 0 : load->handle ? load->handle : module);
    /* If two threads used a library at the same time, one of two admissions is a surplus. */
    if (result == CUDA_SUCCESS && load->handle && find(load->handle, load->context) != entry) drop(entry, load->handle);
    errno = saved;
    return result;
}

/* -- libraries: their data is read when they are loaded, and counts when they are used */

CUlibrary fgpu_library_of(CUkernel kernel)
{
    __typeof__(&cuKernelGetLibrary) get = REAL(cuKernelGetLibrary);
    CUlibrary library = NULL;
    if (!known_list() || !get) return NULL; /* no library has data, so there is nothing to request */
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    bool is_known = get(&library, kernel) == CUDA_SUCCESS;
    fgpu_unrelax(mode);
    errno = saved;
    return is_known ? library : NULL;
}

/* Without room in the list, a library with data is unloaded again. */
static CUresult keep(CUlibrary library, uint64_t data)
{
    if (!matters(data)) return CUDA_SUCCESS;
    struct fgpu_loaded *entry = claim();
    if (!entry) {
        if ((data & ~FGPU_USES_HEAP) < LEAST_BYTES) return CUDA_SUCCESS;
        REAL(cuLibraryUnload)(library);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    fill(entry, 0, data, data);
    atomic_store(&entry->handle, (uint64_t)library);
    return CUDA_SUCCESS;
}

/* Return whether the code calls malloc. Code that could not be read counts as code without malloc. */
bool fgpu_code_uses_heap(uint64_t handle, uint64_t context)
{
    const struct fgpu_loaded *entry = handle ? find(handle, context) : NULL;
    return entry && atomic_load(&entry->uses_heap);
}

/* -- files: read as a whole into the shim's own memory, because they may change */

static uint64_t data_of_descriptor(int file)
{
    struct stat status;
    if (syscall(SYS_fstat, file, &status) || !S_ISREG(status.st_mode) || status.st_size <= 0 ||
        (uint64_t)status.st_size > MOST_FILE)
        return 0;
    size_t size = (size_t)status.st_size, got = 0;
    char *text = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (text == MAP_FAILED) return 0;
    for (long n; got < size && (n = syscall(SYS_pread64, file, text + got, size - got, got)) > 0;) got += (size_t)n;
    uint64_t bytes = fgpu_image_data(text, got);
    munmap(text, size);
    return bytes;
}

static uint64_t data_of_file(const void *path)
{
    int file = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_NONBLOCK | O_CLOEXEC, 0);
    if (file < 0) return 0;
    uint64_t bytes = data_of_descriptor(file);
    syscall(SYS_close, file);
    return bytes;
}

/* -- code as it is passed to the driver, or the path of its file */

/* If `load` is NULL, the code is that of a library, which is loaded already. */
static CUresult begin(struct fgpu_load *load, CUlibrary library, const void *source, uint64_t (*data_of)(const void *))
{
    int saved = errno;
    CUresult refusal = CUDA_SUCCESS;
    if (load) load->handle = 0, load->entry = NULL;
    if (source && fgpu_is_held()) {
        uint64_t data = data_of(source);
        refusal = load ? ask(load, data) : keep(library, data);
    }
    errno = saved;
    return refusal;
}

CUresult fgpu_load_begins(struct fgpu_load *load, const void *code) { return begin(load, NULL, code, fgpu_code_data); }

CUresult fgpu_load_of_file_begins(struct fgpu_load *load, const char *path)
{
    return begin(load, NULL, path, data_of_file);
}

CUresult fgpu_library_made(CUlibrary library, const void *code) { return begin(NULL, library, code, fgpu_code_data); }

CUresult fgpu_library_of_file_made(CUlibrary library, const char *path)
{
    return begin(NULL, library, path, data_of_file);
}
