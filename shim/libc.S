/*
 * What the shim takes of libc, as every glibc has it since there is one for this machine. The shim is linked with this
 * and never with the library of the host that builds it: that would ask for its own versions, and for each of them in
 * the file that has it there, so that no program would start in a container whose glibc has it elsewhere.
 *
 * What some do not have is asked for weakly, without a version, and is not here: dlopen and its like, clock_gettime.
 */
.macro has name
        .globl  \name
        .type   \name, @function
\name:
.endm

        .text
        has __cmsg_nxthdr
        has __errno_location
        has madvise
        has memcmp
        has memcpy
        has memmove
        has memset
        has mmap
        has munmap
        has strcmp
        has strlen
        has strncmp
        has syscall
#ifdef __aarch64__ /* what its compiler calls */
        has __getauxval
#endif

        .section .note.GNU-stack, "", %progbits
