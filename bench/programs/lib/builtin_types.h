/* builtin_types.h: replaces the CUDA runtime's header of the same name. CUPTI's headers include that header and use
 * none of its types. The original needs headers of the CUDA compiler (crt/), which torch does not install. */
