/*
 * The functions that the shim uses from libc. Every glibc for this machine has them, from the first version on. The
 * shim is linked with this file and never with the library of the host that builds it. The host's library would record
 * its own symbol versions, with the file that has each version. Then no program would start in a container whose glibc
 * has a version in another file.
 *
 * Functions that some versions lack are weak, have no version, and are not here: dlopen, clock_gettime and others.
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
        has putenv
        has strcmp
        has strlen
        has strncmp
        has syscall
#ifdef __aarch64__ /* calls that the compiler inserts */
        has __getauxval
#endif

        .section .note.GNU-stack, "", %progbits
