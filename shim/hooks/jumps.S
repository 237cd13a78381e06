/*
 * dlsym and dlopen. Each calls a function of lookup.c, and jumps to the real function of libc if that function returns
 * FGPU_PASS. The real function derives the caller's namespace and RUNPATH, and the meaning of RTLD_NEXT, from its
 * return address. If the real function were called instead, it would resolve RTLD_NEXT of another preload from here,
 * and find that preload again, in an endless loop.
 */
#if !defined(__x86_64__) && !defined(__aarch64__)
#error "x86-64 and arm64 only"
#endif

        .macro  JUMP name, asked, real
        .globl  \name
        .type   \name, @function
        .balign 16
\name:
        .cfi_startproc
#ifdef __x86_64__
        pushq   %rdi
        .cfi_adjust_cfa_offset 8
        pushq   %rsi
        .cfi_adjust_cfa_offset 8
        subq    $8, %rsp
        .cfi_adjust_cfa_offset 8
        call    \asked
        addq    $8, %rsp
        .cfi_adjust_cfa_offset -8
        popq    %rsi
        .cfi_adjust_cfa_offset -8
        popq    %rdi
        .cfi_adjust_cfa_offset -8
        cmpq    $1, %rax        /* FGPU_PASS */
        je      1f
        ret
1:      movq    \real(%rip), %rax
        testq   %rax, %rax
        jz      2f
        jmp     *%rax
2:      ret
#else
        stp     x29, x30, [sp, #-32]!
        .cfi_def_cfa_offset 32
        .cfi_offset x29, -32
        .cfi_offset x30, -24
        stp     x0, x1, [sp, #16]
        bl      \asked
        mov     x16, x0
        ldp     x0, x1, [sp, #16]
        ldp     x29, x30, [sp], #32
        .cfi_def_cfa_offset 0
        .cfi_restore x29
        .cfi_restore x30
        cmp     x16, #1         /* FGPU_PASS */
        b.ne    2f
        adrp    x16, \real
        ldr     x16, [x16, #:lo12:\real]
        cbz     x16, 2f
        br      x16
2:      mov     x0, x16
        ret
#endif
        .cfi_endproc
        .size   \name, .-\name
        .endm

        .text
        JUMP    dlsym, fgpu_lookup, fgpu_real_dlsym
        JUMP    dlopen, fgpu_before_dlopen, fgpu_real_dlopen

        .section .note.GNU-stack, "", @progbits
