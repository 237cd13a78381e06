/* builtin_types.h: replaces the header of this name of the CUDA runtime, which CUPTI's headers include without a need
 * for its types. The original needs headers of the CUDA compiler (crt/), which torch does not install. */
