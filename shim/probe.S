/*
 * What must not be left to a compiler.
 *
 * The probe symbols: a uprobe on a one-byte nop is emulated; most other first instructions (an endbr64 too) are single-
 * stepped and cost 10 to 20 times as much. Not the five-byte nop: Linux 6.18 rewrites a probed one into a call of a
 * page that it does not copy at fork, so the child's next admission would end it by SIGSEGV (seen on 6.18.44).
 *
 * dlsym: for names that are not ours it jumps, so that the real one sees its caller's return address. With a call in
 * between, RTLD_NEXT of another preload would be looked up from here and find that preload again, without end.
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
        probe   fgpu_settle

        .globl  dlsym
        .type   dlsym, @function
        .balign 16
dlsym:
        .cfi_startproc
#ifdef __x86_64__
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
#else
        stp     x29, x30, [sp, #-32]!
        .cfi_def_cfa_offset 32
        .cfi_offset x29, -32
        .cfi_offset x30, -24
        stp     x0, x1, [sp, #16]
        bl      fgpu_lookup
        mov     x16, x0
        ldp     x0, x1, [sp, #16]
        ldp     x29, x30, [sp], #32
        .cfi_def_cfa_offset 0
        .cfi_restore x29
        .cfi_restore x30
        cmp     x16, #1         /* FGPU_PASS */
        b.ne    2f
        adrp    x16, fgpu_real_dlsym
        ldr     x16, [x16, #:lo12:fgpu_real_dlsym]
        cbz     x16, 2f
        br      x16
2:      mov     x0, x16
        ret
#endif
        .cfi_endproc
        .size   dlsym, .-dlsym

        .section .note.GNU-stack, "", @progbits
