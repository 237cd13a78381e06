/* builtin_types.h: CUPTI's headers include this header of the CUDA runtime, and need none of its types. The runtime's
 * own needs headers of the CUDA compiler (crt/), which torch does not install. */
