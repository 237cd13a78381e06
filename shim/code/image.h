/* image.h: the interface of image.c, which reads code, for module_data.c. */
#ifndef FGPU_IMAGE_H
#define FGPU_IMAGE_H

#include "base/shim.h"

/* Return the bytes that the variables of code take; 0: none could be read. FGPU_USES_HEAP is set if the code calls
 * malloc. */
#define FGPU_USES_HEAP (1ULL << 62)
HIDDEN uint64_t fgpu_code_data(const void *code); /* in any form that the driver accepts */
HIDDEN uint64_t fgpu_image_data(const void *image, uint64_t most);

#endif
