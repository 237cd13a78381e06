/* cuGetProcAddress: converts a name and a CUDA version to an export. */
#include "cuda/core/driver.h"

#include <string.h>

/* Declares the exports as plain addresses: the per-thread variants have no prototypes in cuda.h, and need none here. */
#define LEGACY(name, version, symbol) extern char at_##symbol[] __asm__(#symbol);
#define BOTH(name, version, symbol) LEGACY(name, version, symbol)
#define EACH(name, version, symbol, twin) LEGACY(name, version, symbol) LEGACY(name, version, twin)
#include "cuda/data/symbols.h"
#undef LEGACY
#undef BOTH
#undef EACH

struct row {
    const char *name;
    int version;
    char *legacy, *per_thread;
};

#define LEGACY(name, version, symbol) {#name, version, at_##symbol, NULL},
#define BOTH(name, version, symbol) {#name, version, at_##symbol, at_##symbol},
#define EACH(name, version, symbol, twin) {#name, version, at_##symbol, at_##twin},
static const struct row rows[] = {
#include "cuda/data/symbols.h"
};

#define KNOWN_FLAGS (CU_GET_PROC_ADDRESS_LEGACY_STREAM | CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM)

static CUdriverProcAddressQueryResult look_up(const char *name, int version, bool per_thread, void **found)
{
    CUdriverProcAddressQueryResult status = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    *found = NULL;
    for (const struct row *row = rows; row < rows + sizeof rows / sizeof *rows; row++) {
        if (strcmp(row->name, name)) continue;
        char *symbol = per_thread ? row->per_thread : row->legacy;
        if (row->version <= version && symbol) *found = symbol;
        status = *found ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT;
    }
    return status;
}

static CUresult get(const char *symbol, void **pfn, int version, cuuint64_t flags,
                    CUdriverProcAddressQueryResult *status)
{
    if (!symbol || !pfn || version > SIM_CUDA_VERSION || flags & ~(cuuint64_t)KNOWN_FLAGS)
        return CUDA_ERROR_INVALID_VALUE;
    CUdriverProcAddressQueryResult how =
        look_up(symbol, version, flags & CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM, pfn);
    if (status) *status = how;
    return CUDA_SUCCESS;
}

API cuGetProcAddress(const char *symbol, void **pfn, int cudaVersion, cuuint64_t flags)
{
    CUresult result = get(symbol, pfn, cudaVersion, flags, NULL);
    return result || *pfn ? result : CUDA_ERROR_NOT_FOUND;
}

/* In this version a missing symbol is a result and no error, whether or not the program asks for the status. */
API cuGetProcAddress_v2(const char *symbol, void **pfn, int cudaVersion, cuuint64_t flags,
                        CUdriverProcAddressQueryResult *symbolStatus)
{
    return get(symbol, pfn, cudaVersion, flags, symbolStatus);
}

/* Only the real driver has the private tables of the CUDA runtime. */
API cuGetExportTable(const void **ppExportTable, const CUuuid *pExportTableId)
{
    SIM_FRAME();
    if (!ppExportTable || !pExportTableId) return CUDA_ERROR_INVALID_VALUE;
    *ppExportTable = NULL;
    return CUDA_ERROR_INVALID_VALUE; /* the real driver's answer for a table that it does not have */
}
