/* opens.bpf.h: opens of device nodes. A program of the cgroup hierarchy's root decides about each open. */

/* struct bpf_cgroup_dev_ctx of linux/bpf.h */
struct device_context {
    u32 access_type; /* access << 16 | type */
    u32 major;
    u32 minor;
};
#define CHARACTER_DEVICE 2 /* BPF_DEVCG_DEV_CHAR */
#define READ_OR_WRITE 6    /* BPF_DEVCG_ACC_READ, BPF_DEVCG_ACC_WRITE; not MKNOD, which a container's runtime does */
#define OPENS_A_SECOND 4

/* Return whether a process may open nodes in any case, because the process has called the published shim's code or has
 * opened devices before. */
static int may_open(u32 tgid)
{
    struct fgpu_process *p = processes.lookup(&tgid);
    return has_announced(tgid) || (p && p->flags & (FGPU_SEEN_SHIM | FGPU_SEEN_DEVICE));
}

/* Return 1 if the current process may open a node, otherwise 0. Only nodes of the driver and processes of levels are
 * concerned. A level with FGPU_DENY refuses nodes to a process without the shim. All other levels count the opens of
 * such a process. */
int device_open(struct device_context *ctx)
{
    u32 major = ctx->major, access = ctx->access_type >> 16, tgid = bpf_get_current_pid_tgid() >> 32;
    u64 levels[FGPU_LEVELS] = {}, denies = 0;
    if (!node_majors.lookup(&major) || (ctx->access_type & 0xffff) != CHARACTER_DEVICE) return 1;
    if (!(access & READ_OR_WRITE)) return 1;
    if (may_open(tgid) || !find_levels(levels)) return 1;
    EACH_LEVEL
    {
        struct fgpu_usage_page *page = levels[i] ? page_of(levels[i]) : 0;
        if (page) denies |= page->flags & FGPU_DENY;
    }
    struct fgpu_usage_page *leaf = page_of(levels[0]);
    if (!leaf) return !denies;
    __sync_fetch_and_add(&leaf->opens[!denies], 1);
    if (!denies) return 1;
    if (spend(&leaf->open_second, &leaf->open_count, OPENS_A_SECOND))
        send(leaf, FGPU_NEWS_OPEN, 0, (u64)ctx->major << 32 | ctx->minor, 0, 0);
    return 0;
}
