/*
 * The probe symbols. A compiler must not choose their first instruction.
 *
 * A uprobe on a one-byte nop is emulated; most other first instructions (an endbr64 too) are single-stepped and cost 10
 * to 20 times as much. The five-byte nop is not used: Linux 6.18 replaces a probed five-byte nop by a call into a page
 * that the kernel does not copy at fork, so SIGSEGV kills the child at its next admission (observed on 6.18.44).
 */
#if !defined(__x86_64__) && !defined(__aarch64__)
#error "x86-64 and arm64 only"
#endif

.macro probe name
        .globl  \name
        .hidden \name\()_here
        .globl  \name\()_here
        .type   \name, @function
        .type   \name\()_here, @function
        .balign 16
\name:
\name\()_here:
        .cfi_startproc
        nop
        ret
        .cfi_endproc
        .size   \name, .-\name
        .size   \name\()_here, .-\name\()_here
.endm

        .text
        probe   fgpu_admit
        probe   fgpu_release

        .section .note.GNU-stack, "", @progbits
