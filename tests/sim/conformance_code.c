#define _GNU_SOURCE
#include "conformance_code.h"

#include <stdio.h>

static const char noop_code[] = CODE_HEAD ".visible .entry noop()\n{\n ret;\n}\n";

void say_number(const char *what, unsigned number, const char *of, long long value)
{
    char name[96];
    snprintf(name, sizeof name, "%s.%u%s%s", what, number, of[0] ? "." : "", of);
    say(name, value);
}

CUfunction load_code(const char *code, const char *name, CUmodule *module)
{
    CUfunction function = NULL;
    *module = NULL;
    if (!CALL(cuModuleLoadData, module, code)) CALL(cuModuleGetFunction, &function, *module, name);
    return function;
}

CUfunction load_sized_code(const char *format, unsigned bytes, const char *name, CUmodule *module)
{
    char code[2048];
    snprintf(code, sizeof code, format, bytes);
    return load_code(code, name, module);
}

CUresult launch_once(CUfunction function, void **arguments)
{
    if (!function) return 999;
    CUresult result = CALL(cuLaunchKernel, function, 1, 1, 1, 32, 1, 1, 0, NULL, arguments, NULL);
    return result ? result : CALL(cuCtxSynchronize);
}

CUfunction noop_kernel;

CUcontext own_context(void)
{
    CUcontext context = NULL;
    CUmodule module;
    CALL(cuCtxCreate_v2, &context, 0, 0);
    noop_kernel = load_code(noop_code, "noop", &module);
    launch_once(noop_kernel, NULL);
    mark();
    return context;
}
