/* ends.bpf.h: exits of threads and processes, and starts of programs. */

/* Handle the exit of a thread. The thread may leave an admission that was not settled, and a call that never
 * returned. */
static void end_thread(u64 id)
{
    struct fgpu_thread *t = threads.lookup(&id);
    u32 tgid = id >> 32;
    if (!t) return;
    struct fgpu_process *p = owner_of(&tgid);
    if (p && belongs(p, t)) {
        busy(p, t);
        leave_unsettled(p, &t->admission);
        if (t->call.function) give_up(p, tgid, &t->call);
        end(p);
        uncount_thread(p);
    }
    threads.delete(&id);
}

static int has_context(struct fgpu_process *p)
{
    u64 n = 0;
    for (u32 d = 0; d < FGPU_DEVICES; d++) n |= on(p, d)->contexts;
    return n != 0;
}

/* Handle the exit of a process. Returns whether it had a context: a process without a context has no turn. */
static int end_process(u32 tgid)
{
    struct fgpu_process *p = processes.lookup(&tgid);
    borrowers.delete(&tgid);
    end_announcement(tgid);
    if (!p) return 0;
    int had_context = has_context(p);
    __sync_fetch_and_add(&p->state, 1); /* before all reads, so that the entry is not ready while its bytes are read */
    orphan_all(p, tgid);
    if (UNLIKELY(p->flags & FGPU_PARKED)) drop_parked(p, tgid);
    delete_process(tgid, p);
    return had_context;
}

/* Return whether this is the last thread of its process. Do not compare pid and tgid: the leader may exit first. */
static int is_last(struct bpf_raw_tracepoint_args *ctx)
{
#ifdef SIGNAL_AT
    /* Before Linux 6.16: `live` is the number of threads that have not reached this point of their exit. Two threads
     * may both read 0. */
    void *signal = 0;
    s32 live = 1;
    bpf_probe_read_kernel(&signal, sizeof(signal), (void *)ctx->args[0] + SIGNAL_AT);
    bpf_probe_read_kernel(&live, sizeof(live), signal + LIVE_AT);
    return !live;
#else
    return !!ctx->args[1]; /* group_dead */
#endif
}

int process_exit(struct bpf_raw_tracepoint_args *ctx)
{
    u64 id = bpf_get_current_pid_tgid();
    end_thread(id);
    if (!is_last(ctx)) return 0;
    note_end(id >> 32);
    if (end_process(id >> 32)) tell_of_end(id >> 32);
    return 0;
}

int process_exec(struct bpf_raw_tracepoint_args *ctx)
{
    u64 id = bpf_get_current_pid_tgid();
    end_thread((id >> 32 << 32) | (u32)ctx->args[1]); /* the thread's own pid, from before it became the leader */
    end_process(id >> 32);
    return 0;
}

int program_began(struct bpf_raw_tracepoint_args *ctx)
{
    u64 levels[FGPU_LEVELS] = {};
    (void)ctx;
    if (find_levels(levels)) tell_of_program(page_of(levels[0]));
    return 0;
}
