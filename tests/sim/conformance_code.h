/* Code for the device, in assembly, and a new context in which it runs. */
#ifndef FGPU_CONFORMANCE_CODE_H
#define FGPU_CONFORMANCE_CODE_H

#include "conformance.h"

#define CODE_HEAD ".version 7.0\n.target sm_70\n.address_size 64\n"

extern CUfunction noop_kernel; /* of the last context of own_context() */

CUcontext own_context(void); /* creates a context and makes it current, runs a kernel in it, and calls mark() */
CUfunction load_code(const char *code, const char *name, CUmodule *module);
CUfunction load_sized_code(const char *format, unsigned bytes, const char *name, CUmodule *module);
CUresult launch_once(CUfunction function, void **arguments);
void say_number(const char *what, unsigned number, const char *of, long long value);

#endif
