/* image.h: between module_data.c and image.c, which reads code. */
#ifndef FGPU_IMAGE_H
#define FGPU_IMAGE_H

#include <stdint.h>

#include "shim.h"

/* Bytes that the variables of code take; 0: none that could be read. With FGPU_USES_HEAP where it calls malloc. */
#define FGPU_USES_HEAP (1ULL << 62)
HIDDEN uint64_t fgpu_code_data(const void *code); /* as it is given to the driver */
HIDDEN uint64_t fgpu_image_data(const void *image, uint64_t most);

#endif
