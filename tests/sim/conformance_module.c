/* Code: how much memory it takes, and when; libraries and the linker. Also arrays, managed memory and the oldest calls.
 */
#include "conformance.h"

#include <stdio.h>
#include <string.h>

static const char image[] = ".version 6.0\n.target sm_50\n.address_size 64\n"
                            ".visible .entry spin_0us() { ret; }\n.visible .entry other() { ret; }\n";

static CUresult launch(CUfunction function) { return CALL(cuLaunchKernel, function, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0); }

static void check_loading(void)
{
    CUmodule modules[40] = {NULL};
    CUfunction function = NULL, again = NULL;
    CUmoduleLoadingMode mode = 77;
    CUfunctionLoadingState state = 77;
    CUdeviceptr at = 0;
    size_t size = 0;
    TRY("mode", cuModuleGetLoadingMode, &mode);
    say("mode.value", mode);
    mark();
    TRY("load", cuModuleLoadData, &modules[0], image);
    say("load.mib", taken_mib());
    TRY("function", cuModuleGetFunction, &function, modules[0], "spin_0us");
    TRY("function.again", cuModuleGetFunction, &again, modules[0], "spin_0us");
    say("function.same", function == again);
    TRY("function.missing", cuModuleGetFunction, &again, modules[0], "nosuch");
    TRY("function.empty", cuModuleGetFunction, &again, modules[0], "");
    TRY("loaded", cuFuncIsLoaded, &state, function);
    say("loaded.before", state);
    say("function.mib", taken_mib());
    say("launch", launch(function));
    CALL(cuCtxSynchronize);
    CALL(cuFuncIsLoaded, &state, function);
    say("loaded.after", state);
    say("launch.mib", taken_mib());
    for (int i = 1; i < 40; i++) {
        CALL(cuModuleLoadData, &modules[i], image);
        CALL(cuModuleGetFunction, &again, modules[i], "spin_0us");
        launch(again);
    }
    CALL(cuCtxSynchronize);
    say("many.mib", taken_mib());
    for (int i = 1; i < 40; i++) CALL(cuModuleUnload, modules[i]);
    say("unloaded.mib", taken_mib());
    TRY("global.missing", cuModuleGetGlobal_v2, &at, &size, modules[0], "nosuch");
    TRY("unload", cuModuleUnload, modules[0]);
    say("unload.mib", taken_mib());
    TRY("garbage", cuModuleLoadData, &modules[0], "garbage");
    TRY("file", cuModuleLoad, &modules[0], "/nonexistent/module.cubin");
}

static void check_libraries(void)
{
    CUlibrary library = NULL;
    CUkernel kernel = NULL;
    CUfunction function = NULL;
    CUmodule module = NULL, of = NULL;
    mark();
    TRY("library", cuLibraryLoadData, &library, image, NULL, NULL, 0, NULL, NULL, 0);
    TRY("library.null", cuLibraryLoadData, &library, NULL, NULL, NULL, 0, NULL, NULL, 0);
    TRY("library.kernel", cuLibraryGetKernel, &kernel, library, "spin_0us");
    TRY("library.kernel.missing", cuLibraryGetKernel, &kernel, library, "nosuch");
    TRY("library.function", cuKernelGetFunction, &function, kernel);
    TRY("library.module", cuLibraryGetModule, &module, library);
    TRY("library.function.module", cuFuncGetModule, &of, function);
    say("library.module.same", of == module);
    say("library.mib", taken_mib());
    say("library.launch", launch(function));
    say("library.launch.kernel", launch((CUfunction)kernel));
    TRY("library.wait", cuCtxSynchronize);
    say("library.launched.mib", taken_mib());
    TRY("library.unload", cuLibraryUnload, library);
    say("library.unloaded.mib", taken_mib());
}

static void check_linker(void)
{
    CUlinkState state = NULL;
    CUmodule module = NULL;
    void *cubin = NULL;
    size_t size = 0;
    TRY("link", cuLinkCreate_v2, 0, NULL, NULL, &state);
    TRY("link.data", cuLinkAddData_v2, state, CU_JIT_INPUT_PTX, (void *)image, sizeof image, "x", 0, NULL, NULL);
    TRY("link.complete", cuLinkComplete, state, &cubin, &size);
    say("link.size", size > 0);
    if (cubin) TRY("link.load", cuModuleLoadData, &module, cubin);
    TRY("link.destroy", cuLinkDestroy, state);
    if (module) CALL(cuModuleUnload, module);
}

void check_modules(void)
{
    section("module");
    use_primary();
    check_loading();
    check_libraries();
    check_linker();
}

void check_arrays(void)
{
    section("array");
    use_primary();
    CUarray flat = NULL, deep = NULL, level = NULL, same = NULL;
    CUmipmappedArray mip = NULL;
    CUDA_ARRAY_DESCRIPTOR shape = {64, 32, CU_AD_FORMAT_FLOAT, 2}, told = {0};
    CUDA_ARRAY3D_DESCRIPTOR solid = {8, 8, 8, CU_AD_FORMAT_FLOAT, 1, 0}, told3 = {0};
    mark();
    TRY("create", cuArrayCreate_v2, &flat, &shape);
    TRY("describe", cuArrayGetDescriptor_v2, &told, flat);
    say("describe.width", (long long)told.Width);
    TRY("describe.null", cuArrayGetDescriptor_v2, NULL, flat);
    TRY("describe.none", cuArrayGetDescriptor_v2, &told, NULL);
    TRY("create.deep", cuArray3DCreate_v2, &deep, &solid);
    TRY("describe.deep", cuArray3DGetDescriptor_v2, &told3, deep);
    say("describe.deep.depth", (long long)told3.Depth);
    TRY("describe.deep.flat", cuArrayGetDescriptor_v2, &told, deep);
    shape.NumChannels = 3;
    TRY("channels", cuArrayCreate_v2, &level, &shape);
    shape.NumChannels = 1;
    shape.Format = (CUarray_format)0x99;
    TRY("format", cuArrayCreate_v2, &level, &shape);
    shape.Format = CU_AD_FORMAT_FLOAT;
    shape.Width = 0;
    TRY("width0", cuArrayCreate_v2, &level, &shape);
    TRY("null", cuArrayCreate_v2, NULL, &shape);
    solid = (CUDA_ARRAY3D_DESCRIPTOR){64, 16, 0, CU_AD_FORMAT_FLOAT, 1, 0};
    TRY("mip", cuMipmappedArrayCreate, &mip, &solid, 6);
    TRY("mip.level", cuMipmappedArrayGetLevel, &level, mip, 5);
    TRY("mip.level.again", cuMipmappedArrayGetLevel, &same, mip, 5);
    say("mip.level.same", level == same);
    TRY("mip.level.describe", cuArrayGetDescriptor_v2, &told, level);
    say("mip.level.width", (long long)told.Width);
    say("mip.level.height", (long long)told.Height);
    TRY("mip.level.past", cuMipmappedArrayGetLevel, &level, mip, 7);
    TRY("mip.destroy", cuMipmappedArrayDestroy, mip);
    TRY("destroy", cuArrayDestroy, flat);
    TRY("destroy.deep", cuArrayDestroy, deep);
    say("left.mib", taken_mib());
}

void check_managed(void)
{
    section("managed");
    use_primary();
    CUdeviceptr at = 0, plain = 0;
    CUmemLocation device = {.type = CU_MEM_LOCATION_TYPE_DEVICE}, none = {.type = CU_MEM_LOCATION_TYPE_INVALID};
    CALL(cuMemAllocManaged, &at, 8 * MIB, CU_MEM_ATTACH_GLOBAL);
    CALL(cuMemAlloc_v2, &plain, MIB);
    mark();
    TRY("prefetch", cuMemPrefetchAsync_v2, at, 8 * MIB, device, 0, NULL);
    TRY("wait", cuCtxSynchronize);
    say("prefetch.mib", taken_mib());
    TRY("prefetch.flags", cuMemPrefetchAsync_v2, at, MIB, device, 1, NULL);
    TRY("prefetch.none", cuMemPrefetchAsync_v2, at, MIB, none, 0, NULL);
    TRY("prefetch.past", cuMemPrefetchAsync_v2, at, 8 * MIB + 1, device, 0, NULL);
    TRY("prefetch.plain", cuMemPrefetchAsync_v2, plain, MIB, device, 0, NULL);
    device.id = 99;
    TRY("prefetch.device", cuMemPrefetchAsync_v2, at, MIB, device, 0, NULL);
    TRY("advise", cuMemAdvise, at, MIB, CU_MEM_ADVISE_SET_READ_MOSTLY, 0);
    TRY("advise.plain", cuMemAdvise, plain, MIB, CU_MEM_ADVISE_SET_READ_MOSTLY, 0);
    TRY("advise.what", cuMemAdvise, at, MIB, (CUmem_advise)77, 0);
    TRY("advise.device", cuMemAdvise, at, MIB, CU_MEM_ADVISE_SET_PREFERRED_LOCATION, 99);
    CALL(cuMemFree_v2, at);
    CALL(cuMemFree_v2, plain);
}

void check_old(void)
{
    section("old");
    use_primary();
    CUdeviceptr_v1 at = 0;
    unsigned available = 0, total = 0;
    CUcontext context = NULL;
    TRY("alloc", cuMemAlloc, &at, 1000);
    TRY("free", cuMemFree, 7);
    TRY("info", cuMemGetInfo, &available, &total);
    TRY("total", cuDeviceTotalMem, &total, 0);
    say("total.value", total);
    TRY("context", cuCtxCreate, &context, 0, 0);
    if (!context) return;
    unsigned version = 0;
    CALL(cuCtxGetApiVersion, context, &version);
    say("context.version", version);
    TRY("context.alloc", cuMemAlloc, &at, 1000);
    TRY("context.info", cuMemGetInfo, &available, &total);
    CALL(cuCtxDestroy_v2, context);
}
