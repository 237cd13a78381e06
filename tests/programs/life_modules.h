/* life_modules.h: the part of life.c in which the driver allocates memory by itself: for data of modules, local memory
 * of kernels, and stacks. Only life.c includes this file. */

#define STACK_STEP 512

static const char image[] = ".version 7.0\n.target sm_70\n.address_size 64\n"
                            ".visible .global .align 16 .b8 data[%zu];\n"
                            ".visible .entry kernel(.param .u32 n)\n{\n"
                            " .local .align 16 .b8 own[%zu];\n .reg .b64 %%rd<4>;\n .reg .b32 %%r<4>;\n"
                            " ld.param.u32 %%r1, [n];\n mov.u64 %%rd1, own;\n cvt.u64.u32 %%rd2, %%r1;\n"
                            " and.b64 %%rd2, %%rd2, 60;\n add.u64 %%rd1, %%rd1, %%rd2;\n"
                            " st.local.u32 [%%rd1], %%r1;\n ld.local.u32 %%r2, [%%rd1];\n mov.u64 %%rd3, data;\n"
                            " st.global.u32 [%%rd3], %%r2;\n ret;\n}\n";

/* Loads a module with up to 16 MiB of data. Its kernel has up to 3 KiB of local memory a thread, and is launched in
 * half of the calls. */
static void load(struct life *life, struct slot *slot)
{
    char text[sizeof image + 64];
    unsigned number = 12;
    void *arguments[] = {&number};
    CUfunction kernel;
    snprintf(text, sizeof text, image, (size_t)((1 + draw(life, 8)) * GRANULE),
             (size_t)((1 + draw(life, 6)) * STACK_STEP));
    if (!took(cu.cuModuleLoadData(&slot->module, text))) return;
    slot->kind = MODULE;
    if (draw(life, 2) || cu.cuModuleGetFunction(&kernel, slot->module, "kernel")) return;
    took(cu.cuLaunchKernel(kernel, 1, 1, 1, 32, 1, 1, 0, NULL, arguments, NULL));
}

/* Sets the stack size of the whole context, so that its local memory grows or shrinks. */
static void set_stack(struct life *life)
{
    took(cu.cuCtxSetLimit(CU_LIMIT_STACK_SIZE, (1 + draw(life, 6)) * STACK_STEP));
}
