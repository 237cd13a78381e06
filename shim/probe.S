/*
 * What must not be left to a compiler.
 *
 * The probe symbols: a uprobe on a 5-byte nop is emulated by the kernel; any other first instruction (an endbr64 too) is
 * single-stepped and costs 10 to 20 times as much.
 *
 * dlsym: for names that are not ours it jumps, so that the real one sees its caller's return address. With a call in between,
 * RTLD_NEXT of another preload would be looked up from here and find that preload again, without end.
 */
#ifndef __x86_64__
#error "x86-64 only"
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
        .byte   0x0f, 0x1f, 0x44, 0x00, 0x00
        ret
        .cfi_endproc
        .size   \name, .-\name
        .size   \name\()_here, .-\name\()_here
.endm

        .text
        probe   fgpu_admit
        probe   fgpu_release
        probe   fgpu_settle

        .globl  dlsym
        .type   dlsym, @function
        .balign 16
dlsym:
        .cfi_startproc
        pushq   %rdi
        .cfi_adjust_cfa_offset 8
        pushq   %rsi
        .cfi_adjust_cfa_offset 8
        subq    $8, %rsp
        .cfi_adjust_cfa_offset 8
        call    fgpu_lookup
        addq    $8, %rsp
        .cfi_adjust_cfa_offset -8
        popq    %rsi
        .cfi_adjust_cfa_offset -8
        popq    %rdi
        .cfi_adjust_cfa_offset -8
        cmpq    $1, %rax        /* FGPU_PASS */
        je      1f
        ret
1:      movq    fgpu_real_dlsym(%rip), %rax
        testq   %rax, %rax
        jz      2f
        jmp     *%rax
2:      ret
        .cfi_endproc
        .size   dlsym, .-dlsym

        .section .note.GNU-stack, "", @progbits
