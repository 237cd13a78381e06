/* Handles by which another process opens a pool, with errors in each argument. */
#define _GNU_SOURCE
#include "conformance.h"

#include <string.h>
#include <unistd.h>

void check_pool_handles(void)
{
    section("pool_handles");
    CUmemoryPool pool = NULL, plain = NULL, again = NULL;
    CUmemPoolProps props;
    CUmemPoolPtrExportData data;
    CUdeviceptr at = 0, of = 0, got = 0;
    int file = -1, other = -1;
    use_primary();
    memset(&props, 0, sizeof props);
    memset(&data, 0, sizeof data);
    props.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
    props.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    CALL(cuMemPoolCreate, &plain, &props);
    props.handleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    TRY("create", cuMemPoolCreate, &pool, &props);
    CALL(cuMemAllocFromPoolAsync, &at, MIB, pool, NULL);
    CALL(cuMemAllocFromPoolAsync, &of, MIB, plain, NULL);
    CALL(cuStreamSynchronize, NULL);
    int type = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    TRY("export.plain", cuMemPoolExportToShareableHandle, &file, plain, type, 0);
    TRY("export.null", cuMemPoolExportToShareableHandle, NULL, pool, type, 0);
    TRY("export.flags", cuMemPoolExportToShareableHandle, &file, pool, type, 1);
    TRY("export.type", cuMemPoolExportToShareableHandle, &file, pool, CU_MEM_HANDLE_TYPE_WIN32, 0);
    TRY("export", cuMemPoolExportToShareableHandle, &file, pool, type, 0);
    TRY("export.again", cuMemPoolExportToShareableHandle, &other, pool, type, 0);
    say("export.same", file == other);
    TRY("pointer.null", cuMemPoolExportPointer, NULL, at);
    TRY("pointer.unknown", cuMemPoolExportPointer, &data, 0x1000);
    TRY("pointer.other", cuMemPoolExportPointer, &data, of);
    TRY("pointer", cuMemPoolExportPointer, &data, at);
    TRY("import.null", cuMemPoolImportFromShareableHandle, NULL, (void *)(intptr_t)file, type, 0);
    TRY("import.flags", cuMemPoolImportFromShareableHandle, &again, (void *)(intptr_t)file, type, 1);
    TRY("import.closed", cuMemPoolImportFromShareableHandle, &again, (void *)(intptr_t)-1, type, 0);
    TRY("import.own", cuMemPoolImportFromShareableHandle, &again, (void *)(intptr_t)file, type, 0);
    if (again) TRY("import.own.pointer", cuMemPoolImportPointer, &got, again, &data);
    say("import.own.same", got == at);
    TRY("import.pointer.pool", cuMemPoolImportPointer, &got, plain, &data);
    CALL(cuMemFreeAsync, at, NULL);
    CALL(cuMemFreeAsync, of, NULL);
    CALL(cuCtxSynchronize);
    if (again) TRY("import.own.destroy", cuMemPoolDestroy, again);
    TRY("destroy", cuMemPoolDestroy, pool);
    CALL(cuMemPoolDestroy, plain);
    close(file);
    close(other);
}
